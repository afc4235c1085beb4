"""What a head of clusters may give beside robust accuracy, of final rows of experiments/beyond.py.

    python experiments/surplus.py [--scale=half] [--seed=0] [--only=ROW,...] [--n=1000] [--table]

For each final row whose work directory is there (runs/beyond/SCALE/ROW-SEED):
calibration: expected calibration error (Guo et al. 2017, 15 bins of equal width) and negative log
    likelihood, of all CIFAR-10 test images as they are, and with the one temperature that is best on images
    held out from training or, where none are, on the training set's first 2,000.
rejection: area under the ROC curve of telling CIFAR-10 test images from those of SVHN and of CIFAR-100
    (Hendrycks and Gimpel 2017), by the largest probability, the log-sum-exp of the logits, and, of clusters,
    the distance to the nearest centroid.
twice the radius: PMA at twice the radius of training on --n stratified test images.
transfer: the images that PGD-50 on the margin ends at against every other row that is there, shown to this
    one (run it last); and how many withstand all of them.

Writes results/beyond/SCALE/surplus/ROW-SEED.json. What is there is not made again.
"""

import argparse
import pathlib
import sys

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import beyond  # noqa: E402
from result_tables import markdown  # noqa: E402

from clustr_jax import attacks, data, losses  # noqa: E402
from clustr_jax.evaluation import intervals  # noqa: E402
from clustr_jax.runtime import provenance  # noqa: E402
from clustr_jax.runtime.errors import UserError  # noqa: E402
from clustr_jax.runtime.programs import program  # noqa: E402
from clustr_jax.settings import DataSettings  # noqa: E402
from clustr_jax.stages import EVALUATE, stage_key  # noqa: E402
from clustr_jax.storage import loading  # noqa: E402
from clustr_jax.storage.files import read_json, write_json  # noqa: E402

BINS = 15
STRANGERS = ("svhn_cropped", "cifar100")
TEMPERATURES = np.geomspace(0.05, 20.0, 200)
FITTED = 2000


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of [N, Y], in float64."""
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=1, keepdims=True))


def nll(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log likelihood in nats; logits [N, Y], labels [N]."""
    return float(-np.mean(log_softmax(logits)[np.arange(len(labels)), labels]))


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error of logits [N, Y]: |accuracy - confidence| by bins, weighted by their images.

    Bins are of equal width: b holds confidences in (b / bins, (b + 1) / bins] (Guo et al. 2017, Eq. 3).
    """
    probs = np.exp(log_softmax(logits))
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(index, right - confidence, minlength=bins)
    return float(np.sum(np.abs(gaps)) / len(labels))


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """What to divide logits by: the one of TEMPERATURES with the least negative log likelihood."""
    return float(min(TEMPERATURES, key=lambda t: nll(logits / t, labels)))


def auroc(own: np.ndarray, strange: np.ndarray) -> float:
    """P(score of an own image > score of a strange one), ties count half: Mann and Whitney's U by ranks."""
    values = np.concatenate([own, strange])
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[: len(own)].sum() - len(own) * (len(own) + 1) / 2) / (len(own) * len(strange)))


def scores(clf, x: np.ndarray) -> dict[str, np.ndarray]:
    """How much an image looks like the training set's, by each measure [N]: the higher the more."""
    view = clf.view(x)
    logits = np.asarray(view.logits, np.float64)
    top = logits.max(axis=1)
    found = {
        "largest probability": np.exp(log_softmax(logits)).max(axis=1),
        "log-sum-exp": top + np.log(np.sum(np.exp(logits - top[:, None]), axis=1)),
    }
    if clf.clusters is not None:
        found["nearest centroid"] = np.asarray(view.exponents, np.float64).max(axis=(1, 2))
    return found


def calibration(clf, config: dict) -> dict:
    """Of all test images, as they are and at the temperature that other images choose."""
    train, held = data.splits(DataSettings.of(config["data"]))[:2]
    split = data.load_split("cifar10", "test")
    source, on = (held, "held out") if len(held) else (train, "training")
    some = data.stratified(source.labels, min(FITTED, len(source)), source.num_classes)
    temperature = best_temperature(np.asarray(clf.logits(source.pixels(some))), source.labels[some])
    logits = np.asarray(clf.logits(split.pixels()))
    found: dict = {"temperature": temperature, "fitted_on": f"{len(some)} {on}", "n": len(split)}
    for name, t in (("plain", 1.0), ("tempered", temperature)):
        found[name] = {
            "ece": calibration_error(logits / t, split.labels),
            "nll": nll(logits / t, split.labels),
        }
    return found


def rejection(clf) -> dict:
    """AUROC by stranger and measure, of all test images against at most as many strangers."""
    own, found = scores(clf, data.load_split("cifar10", "test").pixels()), {}
    for name in STRANGERS:
        split = data.load_split(name, "test")
        count = min(len(split), len(next(iter(own.values()))))
        strange = scores(clf, split.pixels(data.stratified(split.labels, count, split.num_classes)))
        found[name] = {"n": count} | {what: auroc(own[what], strange[what]) for what in own}
    return found


# The key of what withstands the images of all other rows.
ALL = "all others"


def transferred(clf, own: str, others: dict, x, y, ids, eps: float, seed: int) -> dict:
    """Accuracy on where PGD-50 ends against each of the networks, `own` included, and on all but `own`'s.

    An attack goes on after it has fooled its own network: the first image that does lies just across that
    network's border, and fools no other.
    """
    found, left = {}, np.ones(len(y), bool)
    for name, other in others.items():
        x_adv = attacks.pgd(
            stage_key(seed, EVALUATE), other.logits, x, y, eps=eps, step_size=eps / 10, steps=50,
            loss_fn=losses.margin, select="last", ids=ids,
        )  # fmt: skip
        right = np.asarray(clf.predict(x_adv)) == y
        found[name] = float(np.mean(right))
        if name != own:
            left &= right
    return found | ({ALL: float(np.mean(left))} if len(others) > 1 else {})


def measured(scale: str, row: str, seed: int, rows: list[str], n: int) -> dict:
    """All of it for one row; `rows` are those whose images it is shown."""
    root = ROOT / beyond.workdir(scale, row, seed)
    config, clf = read_json(root / "config.json"), loading.load(root)
    eps, split = config["train"]["attack"]["eps"], data.load_split("cifar10", "test")
    index = data.stratified(split.labels, n, split.num_classes)
    x, y = split.pixels(index), split.labels[index]
    twice = attacks.autoattack(
        stage_key(seed, EVALUATE), clf.logits, x, y, eps=2 * eps, attacks=("pma",),
        ids=index.astype(np.int32), slots=beyond.SLOTS,
    )  # fmt: skip
    others = {name: loading.load(ROOT / beyond.workdir(scale, name, seed)) for name in rows}
    return {
        "row": row, "seed": seed, "scale": scale, "n": len(index), "eps": eps,
        "calibration": calibration(clf, config), "rejection": rejection(clf),
        "twice_the_radius": float(np.mean(twice.robust)),
        "twice_the_radius_interval": intervals.wilson(int(twice.robust.sum()), len(index)),
        "transfer": transferred(clf, row, others, x, y, index.astype(np.int32), eps, seed),
        "config_sha": provenance.sha(config), "versions": provenance.versions(),
    }  # fmt: skip


def table(folder: pathlib.Path) -> str:
    """A row of Markdown for each file."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        found = read_json(path)
        low, high = (100 * v for v in found["twice_the_radius_interval"])
        far = [
            " / ".join(f"{v:.3f}" for k, v in found["rejection"][name].items() if k != "n")
            for name in STRANGERS
        ]
        plain, tempered = (found["calibration"][key] for key in ("plain", "tempered"))
        rows.append(
            [
                found["row"], str(found["seed"]),
                f"{100 * plain['ece']:.1f}, {100 * tempered['ece']:.1f}",
                f"{plain['nll']:.2f}, {tempered['nll']:.2f}",
                *far,
                f"{100 * found['twice_the_radius']:.1f} [{low:.1f}, {high:.1f}]",
                f"{100 * found['transfer'][ALL]:.1f}" if ALL in found["transfer"] else "",
            ]
        )  # fmt: skip
    by = "by probability / log-sum-exp / nearest centroid"
    header = [
        "row", "seed", "calibration error, %: plain, tempered", "NLL: plain, tempered", f"AUROC, SVHN, {by}",
        "AUROC, CIFAR-100", "PMA at twice the radius, %", "after transfer from all others, %",
    ]  # fmt: skip
    return markdown(header, rows)


@program
def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", default="half")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="rows, comma-separated; default: all that are trained")
    parser.add_argument("--n", type=int, default=1000, help="test images that are attacked")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    args = parser.parse_args(argv)
    folder = ROOT / beyond.RESULTS / args.scale / "surplus"
    if args.table:
        print(table(folder))
        return 0
    found = (ROOT / beyond.RUNS / args.scale).glob(f"*-{args.seed}/2_train/done.json")
    rows = sorted(path.parts[-3].rpartition("-")[0] for path in found)
    asked = args.only.split(",") if args.only else rows
    if unknown := set(asked) - set(rows):
        known = ", ".join(rows) or "none; train with experiments/beyond.py --final"
        raise UserError(f"--only: {sorted(unknown)[0]!r} is not trained; trained: {known}")
    folder.mkdir(parents=True, exist_ok=True)
    for row in asked:
        target = folder / f"{row}-{args.seed}.json"
        if not target.exists():
            jax.clear_caches()
            write_json(target, measured(args.scale, row, args.seed, rows, args.n))
            print(table(folder), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
