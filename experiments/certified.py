"""Certified l2 accuracy on CIFAR-10: layers and recipes at equal training time, then one long row.

    python experiments/certified.py [--only=NAME,...] [--seed=0] [--list] | --table
    python experiments/certified.py --only=NAME --judged=1000    # of a finished row

Every row trains a 1-Lipschitz network by cross entropy with the certified margin (`nominal_certified`, all
images but the held-out ones), takes its linear head as one centroid per class, which is the same classifier,
and certifies all test images. "NAME+HEAD" is the network of NAME with another head. Writes
results/certified/NAME-SEED.json. What is there is not made again, and a row that was interrupted goes on.

--judged has some test images of a finished row judged in l2 at 36/255 by `clustr_jax.judge`, and writes into
NAME-SEED.judged.json whether any certified image was broken.
"""

import argparse
import functools
import os
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import child  # noqa: E402
from result_tables import markdown  # noqa: E402

import clustr_jax  # noqa: E402
from clustr_jax import data  # noqa: E402
from clustr_jax.evaluation import intervals  # noqa: E402
from clustr_jax.runtime import provenance  # noqa: E402
from clustr_jax.runtime.errors import UserError  # noqa: E402
from clustr_jax.storage import loading, results  # noqa: E402
from clustr_jax.storage.files import read_json, write_json  # noqa: E402
from clustr_jax.storage.workdir import Workdir  # noqa: E402

# Relative to ROOT, which every command runs in: paths are part of a config, and of its hash.
RUNS, RESULTS = pathlib.Path("runs", "certified"), pathlib.Path("results", "certified")

# Prach & Lampert 2022: temperature 1/4 and margin 2 sqrt(2) x 36/255, which is the worst case at twice that
# radius for a head of orthonormal rows; one cycle, batches of 256.
_RECIPE = {
    "data.augment": "translate_alternate", "train.radius": 72 / 255, "train.temperature": 0.25,
    "warmup.optimizer": "adam", "warmup.schedule": "onecycle", "warmup.batch_size": 256,
    "warmup.weight_decay": 0.0,
}  # fmt: skip
_LINEAR = {"magnet.fit": "linear_head", "magnet.k": 1, "train.epochs": 0}
# Of the l2 attack that the certificates are held against: little where rows are compared.
_BRIEF = {"eval.n": 100, "certify.steps": 20, "certify.restarts": 1}
_WHOLE = {"eval.n": 1000, "certify.steps": 50, "certify.restarts": 2}


def _row(model: str, width: int, epochs: int, lr: float, **changes) -> dict:
    own = {"model.name": model, "model.width": width, "warmup.epochs": epochs, "warmup.lr": lr}
    return _RECIPE | _LINEAR | _BRIEF | own | changes


def _orthogonal(**changes) -> dict:
    return _row("lip_orthogonal", 64, 5, 1e-3, **changes)


ROWS: dict[str, dict] = {
    # layers, at about the same time
    "orthogonal": _orthogonal(),
    "cpl": _row("lip_cpl", 32, 5, 5e-3),
    "sll": _row("lip_sll", 32, 5, 5e-3),
    "aol": _row("lip_aol", 32, 5, 5e-3),
    # the recipe
    "orthogonal-sgd": _orthogonal(**{"warmup.optimizer": "sgd", "warmup.lr": 0.02}),
    "orthogonal-radius-36": _orthogonal(**{"train.radius": 36 / 255}),
    "orthogonal-own-length": _orthogonal(**{"train.temperature": 0.0}),
    "orthogonal-crops": _orthogonal(**{"data.augment": "crop_flip"}),
    # the whole time, of two cores that have nothing else to do
    "long-cpl": _row("lip_cpl", 32, 40, 5e-3) | _WHOLE,
    "long-sll": _row("lip_sll", 32, 40, 5e-3) | _WHOLE,
    "long": _orthogonal(**{"warmup.epochs": 40} | _WHOLE),
    "wide": _orthogonal(**{"model.width": 128, "warmup.lr": 7e-4, "warmup.epochs": 24} | _WHOLE),
}
HEADS = {
    "centroids": {"magnet.fit": "kmeans"},
    "centroids-2": {"magnet.fit": "kmeans", "magnet.k": 2},
}


# A head that is fitted afterwards: only where it is asked for.
FITTED = tuple(f"{row}+{head}" for row in ROWS for head in HEADS)


def settings(name: str, seed: int) -> dict:
    """What a row sets."""
    row, _, head = name.partition("+")
    found = ROWS[row] | {"seed": seed}
    if head:
        found |= HEADS[head] | {"warmup.epochs": 0, "init_from": RUNS / f"{row}-{seed}" / "1_warmup"}
    return found


def command(name: str, seed: int) -> list[str]:
    """Trains and certifies a row."""
    return [
        "run.py",
        "--config=configs/cifar10.py:clustr_certified,cpu",
        f"--workdir={RUNS / f'{name}-{seed}'}",
        *(f"--config.{key}={value}" for key, value in settings(name, seed).items()),
        "--stages=1_warmup,2_train,certify",
    ]


def measured(name: str, seed: int) -> dict:
    """What a finished row is worth, and what its training cost."""
    root = ROOT / RUNS / f"{name}-{seed}"
    found = results.load(root / "results", "certified")
    assert found is not None  # the command has just ended well
    records = Workdir(root).records()
    radius = f"{found['eps']:.6f}"
    return {
        "settings": {k: v for k, v in settings(name, seed).items() if k not in ("init_from", "seed")},
        "seed": seed, "n": found["n"], "clean": found["clean"], "certified": found["robust"],
        "certified_interval": intervals.wilson(round(found["robust"] * found["n"]), found["n"]),
        "sweep": found["sweep"], "radius": radius, "rule": found["rule"], "lipschitz": found["lipschitz"],
        "empirical": found["empirical"],
        "training_seconds": sum(r["epoch_seconds"] for r in records),
        "images_per_second": float(np.mean([r["images_per_second"] for r in records])) if records else 0.0,
        "curve": [
            {key: r[key] for key in ("step", "loss", "accuracy", "certified", "val_accuracy") if key in r}
            for r in records
        ],
        "config_sha": provenance.sha(read_json(root / "config.json")), "versions": provenance.versions(),
        "commit": read_json(root / "2_train" / "done.json")["commit"],
    }  # fmt: skip


def judged(name: str, seed: int, size: int) -> dict:
    """The package's own judgement in l2 of a stratified part of the test images, beside certificates."""
    root = ROOT / RUNS / f"{name}-{seed}"
    found = results.load(root / "results", "certified")
    if found is None:
        raise UserError(f"{root} holds no certificates; make the row first: --only={name} without --judged")
    clf, split = loading.load(root), data.load_split("cifar10", "test")
    some = data.stratified(split.labels, min(size, len(split)), split.num_classes)
    with np.load(root / "results" / "certified.npz") as outcomes:
        certified = (outcomes["clean"] & (outcomes[f"radius_{found['rule']}"] >= found["eps"]))[some]
    j = clustr_jax.judge(
        clf, split.pixels(some), split.labels[some], eps=found["eps"], norm="l2",
        ids=some.astype(np.int32), seed=seed, folder=root / "judgement",
    )  # fmt: skip
    return {
        "row": name, "seed": seed, "n": len(some), "eps": found["eps"], "protocol": j.content["protocol"],
        "clean": j.clean, "robust": j.robust, "robust_interval": j.interval,
        "certified": float(certified.mean()),
        "certified_and_broken": int(np.sum(certified & (j.broken_by != ""))),
        "failed": j.content["failed"], "verdict": j.verdict, "versions": provenance.versions(),
    }  # fmt: skip


def table() -> str:
    """What each finished row certifies."""
    rows = []
    for path in sorted((ROOT / RESULTS).glob("*-[0-9].json")):
        row = read_json(path)
        low, high = row["certified_interval"]
        rows.append(
            [
                path.stem.rpartition("-")[0],
                str(row["seed"]),
                # what starts from another row and is not trained has no times of its own
                f"{row['training_seconds'] / 60:.0f}" if row["training_seconds"] else "",
                f"{row['images_per_second']:.0f}" if row["images_per_second"] else "",
                f"{100 * row['clean']:.1f}",
                f"{100 * row['certified']:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
                *(f"{100 * value:.1f}" for key, value in row["sweep"].items() if key != row["radius"]),
                f"{row['lipschitz']['lower']:.3f} to {row['lipschitz']['upper']:.4f}",
            ]
        )
    header = [
        "row", "seed", "minutes", "images / s", "clean", "certified at 36/255", "72/255", "108/255", "1",
        "Lipschitz constant",
    ]  # fmt: skip
    return markdown(header, rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows, comma-separated; default: all but other heads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judged", type=int, default=0, help="test images that are judged in l2")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    args = parser.parse_args()
    if args.table:
        print(table())
        return 0
    # with threads that wait for each other a small inverse takes a hundred times as long on a busy machine
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    names = child.chosen(args.only, (*ROWS, *FITTED)) if args.only else [*ROWS]
    if args.judged:
        for name in names:
            found = judged(name, args.seed, args.judged)
            write_json(ROOT / RESULTS / f"{name}-{args.seed}.judged.json", found)
            print(f"{name}: {found['verdict']}; certified and broken: {found['certified_and_broken']}")
        return 0
    for name in names:
        target = ROOT / RESULTS / f"{name}-{args.seed}.json"
        commands = [command(name, args.seed)]
        row = name.partition("+")[0]
        if row != name and Workdir(ROOT / RUNS / f"{row}-{args.seed}").finished("1_warmup") is None:
            commands.insert(0, command(row, args.seed))
        if args.list:
            print(child.listed(commands))
            continue
        if target.exists():
            continue
        if code := child.make(target, commands, functools.partial(measured, name, args.seed)):
            return code
        print(table(), flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
