"""What the batch statistics that a network is deployed with are worth, with its weights as they are.

    python experiments/norm_statistics.py [--only=ROW,...] [--n=1000] [--table]

A step of ClusTR+QTRADES ends with the adversary's images, so the running statistics are mostly theirs. Rows:

    kept            the network of 6,120 updates as it is: `exp` of experiments/levers.py
    clean           its weights and clusters; statistics of clean training images
    clean+refit     and k-means again, on the embeddings that these statistics give
    start           the nominal network that it started from, with k-means: `clustr+kmeans`
    start+moved     its weights; statistics of images that the adversary of Eq. 5 moved, and k-means again

No row trains anything, and two are those of experiments/systems.py. The others are measured on all CIFAR-10
test images as they are, and on --n of them by the paper's protocol, PGD^20 with ten restarts at 8/255.
Writes results/levers/norm_statistics.json.
"""

import argparse
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import child  # noqa: E402
import lever_tables  # noqa: E402
import levers  # noqa: E402
from result_tables import markdown  # noqa: E402

import clustr_jax  # noqa: E402
from clustr_jax import attacks, clusters, data  # noqa: E402
from clustr_jax.evaluation import intervals, protocols  # noqa: E402
from clustr_jax.runtime import provenance  # noqa: E402
from clustr_jax.runtime.programs import program  # noqa: E402
from clustr_jax.stages import EVALUATE, stage_key  # noqa: E402
from clustr_jax.storage.files import read_json, write_json  # noqa: E402
from configs import cifar10  # noqa: E402

TARGET = levers.RESULTS / "norm_statistics.json"
EPS, STEP_SIZE, STEPS, RESTARTS, SLOTS = 8 / 255, 2 / 255, 20, 10, 100
TRAINED = levers.RUNS / "exp-0"  # as `levers.py --only=exp` leaves it behind
# Of a training step; momentum leaves nothing of what was before these.
BATCH, BATCHES = 96, 20
ROWS = ("clean", "clean+refit", "start+moved")
# As they are: the rows of experiments/systems.py, on the same images.
MEASURED = {"kept": "clustr_qtrades+moved_statistics-0", "start": "clustr+kmeans-0"}


def with_statistics(clf, split, seed: int, adversary: bool):
    """The classifier after passes in train mode over training images; with `adversary` each batch twice.

    The second pass is over what one step of 10/255 makes of it, away from the clusters' own prediction in
    exp scores, as `clustr_qtrades` trains.
    """
    order = np.random.default_rng(seed).permutation(len(split))[: BATCH * BATCHES].reshape(BATCHES, BATCH)
    step = jax.jit(lambda v, x: {**v, "batch_stats": clf.net.train(v, x)[1]})
    variables = clf.variables
    for i, ids in enumerate(order):
        x = split.pixels(np.sort(ids))
        variables = step(variables, jnp.asarray(x))
        if adversary:
            probs = jax.nn.softmax(clf.scores(x))
            key = jax.random.fold_in(jax.random.key(seed), i)
            with warnings.catch_warnings():  # that exp scores are bounded is the point
                warnings.filterwarnings("ignore", "logits_fn returned bounded scores", UserWarning)
                moved = attacks.qtrades(key, clf.scores, x, probs, eps=EPS, step_size=1.25 * EPS)
            variables = step(variables, moved)
    return clf.replace(variables=variables)


def refitted(clf, split, seed: int):
    """The classifier with two clusters per class of its own embeddings of all training images."""
    z = jnp.concatenate([clf.embed(split.pixels(part)) for part in _parts(len(split))])
    magnet = cifar10.get_config("clustr_qtrades,fast").magnet
    found = clusters.fit(
        jax.random.key(seed), z, split.labels, num_classes=split.num_classes, k=magnet.k,
        n_init=magnet.n_init, max_iter=magnet.max_iter,
    )  # fmt: skip
    return clf.replace(clusters=found)


def _parts(size: int):
    return np.array_split(np.arange(size), -(-size // 1000))


def network(name: str, seed: int):
    """The classifier of a row."""
    split = data.load_split("cifar10", "train")
    clf = clustr_jax.load(levers.START if name.startswith("start") else TRAINED)
    if name.startswith("start"):
        clf = refitted(clf, split, seed)
    clf = with_statistics(clf, split, seed, adversary=name == "start+moved")
    return clf if name == "clean" else refitted(clf, split, seed)


def measured(name: str, size: int, seed: int = 0) -> dict:
    """Clean accuracy and what the paper's protocol leaves."""
    clf, split = network(name, seed), data.load_split("cifar10", "test")
    found = [np.asarray(clf.predict(split.pixels(part))) for part in _parts(len(split))]
    right = np.concatenate(found) == split.labels
    some = data.stratified(split.labels, size, split.num_classes)
    examples = data.Examples(split.pixels(some), split.labels[some], some.astype(np.int32))
    found = protocols.paper_pgd(
        stage_key(seed, EVALUATE),
        clf,
        examples,
        eps=EPS,
        step_size=STEP_SIZE,
        steps=STEPS,
        restarts=RESTARTS,
        slots=SLOTS,
        report=lambda unbroken: print(f"\r{name}: {unbroken:.1%} left", end="", flush=True),
    )
    robust = int(found["robust"].sum())
    print()
    return {
        "clean": float(right.mean()), "clean_n": len(right), "paper": robust / size, "n": size,
        "paper_interval": intervals.wilson(robust, size), "seed": seed, "eps": EPS, "restarts": RESTARTS,
        "versions": provenance.versions(), "commit": provenance.commit(),
    }  # fmt: skip


def table() -> str:
    """What the rows are worth that are there."""
    there = read_json(ROOT / TARGET)
    found = {name: (there[name]["clean"], there[name]["paper"], there[name]["n"]) for name in there}
    for name, row in MEASURED.items():
        as_it_is = read_json(ROOT / levers.RESULTS.parent / "systems" / f"{row}.json")
        found[name] = as_it_is["clean"], as_it_is["paper"]["pgd20"], as_it_is["n"]
    rows = []
    for name in ("kept", "clean", "clean+refit", "start", "start+moved"):
        if name in found:
            clean, left, n = found[name]
            rows.append([f"`{name}`", f"{100 * clean:.1f}", lever_tables.share(left, n)])
    return markdown(["statistics and clusters", "clean", "paper's protocol, PGD^20"], rows)


@program
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows, comma-separated; default: all")
    parser.add_argument("--n", type=int, default=1000, help="test images that are attacked")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    args = parser.parse_args(argv)
    if not args.table:
        target = ROOT / TARGET
        for name in child.chosen(args.only, ROWS):
            there = read_json(target) if target.exists() else {}
            if name not in there:
                write_json(target, there | {name: measured(name, args.n)})
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
