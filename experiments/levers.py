"""ClusTR+QTRADES at the paper's operating point: one lever at a time, from one warm start.

    python experiments/levers.py [--only=NAME,...] [--seed=0] [--list]
    python experiments/levers.py --table | --start | --curve=NAME | --export=NAME

The warm start is `cifar10:nominal,fast` of seed 0, kept in results/operating-point. Every row is a second
stage with one setting changed: 12 epochs of 510 updates of 96 images, or as its name says 510 updates, or
the two epochs of a short row. Then clean on all test images, and 500 of them by the quick forms of the
paper's and of the sound protocol. Writes results/levers/NAME-SEED.json; the seed is the second stage's.
What is there is not made again, and a row that was interrupted goes on.

--start measures the warm start. --curve writes and prints what a row measured after each epoch so far, on
held-out images, into NAME-SEED.curve.json. --export writes the network of a finished row, or of a warm start,
and 100 test images to results/operating-point, which `make demo` attacks.
"""

import argparse
import functools
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import child  # noqa: E402
import lever_tables  # noqa: E402

from clustr_jax import data  # noqa: E402
from clustr_jax.evaluation import intervals  # noqa: E402
from clustr_jax.runtime import provenance  # noqa: E402
from clustr_jax.settings import DataSettings  # noqa: E402
from clustr_jax.storage import loading, results, safetensors_file  # noqa: E402
from clustr_jax.storage.files import read_json, write_json  # noqa: E402
from clustr_jax.storage.workdir import Workdir  # noqa: E402

# Relative to ROOT, which every command runs in: paths are part of a config, and of its hash.
RUNS, RESULTS = pathlib.Path("runs", "levers"), pathlib.Path("results", "levers")
# What `--export=warm` wrote: rows need no warm-up of their own, and all start from the same weights.
START = pathlib.Path("results", "operating-point", "nominal.safetensors")
ATTACKED = 500
EXPORTED = 100
QUANTILES = (0.05, 0.5, 0.95)
# Of each epoch.
CURVE = (
    "step", "val_accuracy", "adversarial_accuracy", "magnet", "hinge_active", "variance", "consistency",
    "single_step_accuracy", "multi_step_accuracy", "paper_accuracy", "quick_accuracy", "alarms",
)  # fmt: skip
EVALUATION = {"eval.n": ATTACKED, "eval.quick": True, "eval.diagnostics": False, "eval.attack.restarts": 1}

# The forms of the consistency term are `fidelity` switches; the default is `exp`, with clean statistics.
_TEXT, _EXP, _AUTHORS = (
    {"fidelity.scores": "log"},
    {"fidelity.scores": "exp"},
    {"fidelity.preset": "paper_code"},
)
# One cluster for each class, in batches of the same size.
_ONE_CLUSTER = {"magnet.k": 1, "magnet.clusters": 10, "magnet.samples": 10}
_ONE = _EXP | _ONE_CLUSTER
# What is the default now, and what was the default when the first rows were made: theirs but where they say.
_CLEAN, _KEPT = {"fidelity.epoch_statistics": "clean"}, {"fidelity.epoch_statistics": "keep"}
_PLAIN = {"data.augment": "none"}
_KL = _TEXT | {"train.consistency": "kl"}
ROWS: dict[str, dict] = {
    "text": _TEXT,
    "exp": _EXP,
    "authors": _AUTHORS,
    "lr-3e-4": _EXP | {"train.lr": 3e-4},
    "k-1": _ONE | {"train.epochs": 13},
    "clean-statistics": _EXP | _CLEAN,
    "no-augmentation": _EXP | _PLAIN,
    "text-510": _TEXT | {"train.epochs": 1},
    "exp-510": _EXP | {"train.epochs": 1},
}
# Warm starts: of the kept length, which `--start` and `--export` take, and of other lengths.
WARM = {"warm": {}, "warm-8": {"train.epochs": 8}, "warm-32": {"train.epochs": 32}}
# One setting changed at a time, for two epochs, in which the text's form destroys the network: the form of
# the term, how much of it, the rate, the margin, the clusters, the batch, the variance, the start.
_SHORT = {
    "text": _TEXT,
    "exp": _EXP,
    "authors": _AUTHORS,
    "kl": _KL,
    "stop-target": _TEXT | {"train.stop_target": True},
    "text-lam-1": _TEXT | {"train.lam": 1.0},
    "kl-lam-1": _KL | {"train.lam": 1.0},
    "lam-0": _EXP | {"train.lam": 0.0},
    "lam-1": _EXP | {"train.lam": 1.0},
    "lr-3e-4": _EXP | {"train.lr": 3e-4},
    "lr-1e-3": _EXP | {"train.lr": 1e-3},
    "alpha-6": _EXP | {"magnet.alpha": 6.25},
    "alpha-25": _EXP | {"magnet.alpha": 25.0},
    "k-1": _ONE,
    "k-4": _EXP | {"magnet.k": 4},
    "12x20": _EXP | {"magnet.samples": 20},  # as many images, in fewer updates
    "authors-k-1": _AUTHORS | _ONE_CLUSTER,
    "augmented-variance": _EXP | {"fidelity.variance_images": "augmented"},
    "clean-statistics": _EXP | _CLEAN,
    "lam-0-clean-statistics": _EXP | _CLEAN | {"train.lam": 0.0},
    "no-augmentation": _EXP | _PLAIN,
    "after-magnet": _EXP,
    "warm-8": _EXP,
    "warm-32": _EXP,
}
ROWS |= {f"{name}-short": {"train.epochs": 2} | settings for name, settings in _SHORT.items()}
# Magnet alone first: the stage of that row is what this one starts from.
_FIRST = {"after-magnet-short": "lam-0-short"}


def warm(name: str) -> str:
    """The warm start of a row."""
    return next((w for w in WARM if w != "warm" and name.startswith(f"{w}-")), "warm")


def start(name: str, seed: int) -> pathlib.Path:
    """The weights that a row starts from: the kept warm start but for rows that ask for another."""
    if name in _FIRST:
        return RUNS / f"{_FIRST[name]}-{seed}" / "2_train"
    own = warm(name)
    return START if own == "warm" else RUNS / f"{own}-{seed}" / "2_train"


def words(settings: dict) -> list[str]:
    """As the command line has them."""
    return [f"--config.{key}={value}" for key, value in settings.items()]


def warm_command(name: str, seed: int) -> list[str]:
    """Trains a warm start."""
    settings = WARM[name] | {"seed": seed}
    workdir = RUNS / f"{name}-{seed}"
    return [
        "run.py",
        "--config=configs/cifar10.py:nominal,fast",
        f"--workdir={workdir}",
        *words(settings),
        "--stages=2_train",
    ]


def command(name: str, seed: int) -> list[str]:
    """Trains and evaluates a row."""
    settings = ({} if "fidelity.preset" in ROWS[name] else _KEPT) | ROWS[name] | EVALUATION
    settings |= {"seed": seed, "warmup.epochs": 0, "init_from": start(name, seed)}
    return [
        "run.py",
        "--config=configs/cifar10.py:clustr_qtrades,fast",
        f"--workdir={RUNS / f'{name}-{seed}'}",
        *words(settings),
        "--stages=1_warmup,2_train,evaluate",
    ]


def tightness(clf, x, y) -> dict[str, list[float]]:
    """Quantiles of d^2 / 2 sigma^2 to the nearest cluster of the own class, and of any other class."""
    exponents = -np.asarray(clf.view(x).exponents)  # [B, Y, K]
    nearest = exponents.min(axis=2)
    own = nearest[np.arange(len(y)), y]
    nearest[np.arange(len(y)), y] = np.inf
    return {
        "own": [float(v) for v in np.quantile(own, QUANTILES)],
        "other": [float(v) for v in np.quantile(nearest.min(axis=1), QUANTILES)],
    }


def measured(name: str, seed: int) -> dict:
    """What a finished row is worth: results, the last epoch's means, and the curve over updates."""
    root = ROOT / RUNS / f"{name}-{seed}"
    config = read_json(root / "config.json")
    found = {key: results.load(root / "results", key) or {} for key in ("clean", "paper", "sound")}
    metrics = [m for m in Workdir(root).records() if m["stage"] == "2_train"]
    x, y = data.load(DataSettings.of(config["data"]).name, "test")
    return {
        "settings": ROWS[name], "seed": seed, "updates": metrics[-1]["step"],
        "clean": found["clean"]["clean"],
        **{key: found[key]["robust"] for key in ("paper", "sound")},
        **{f"{key}_interval": intervals.wilson(round(found[key]["robust"] * ATTACKED), ATTACKED)
           for key in ("paper", "sound")},
        "n": ATTACKED, "protocols": [found[key]["protocol"] for key in ("paper", "sound")],
        "tightness": tightness(loading.load(root), x[:1000], y[:1000]),
        "curve": [{key: m[key] for key in CURVE if key in m} for m in metrics],
        "config_sha": provenance.sha(config), "versions": provenance.versions(),
        "commit": read_json(root / "2_train" / "done.json")["commit"],
    }  # fmt: skip


def curve(name: str, seed: int) -> str:
    """Write what a row has measured so far, finished or not, and return it as Markdown."""
    root = ROOT / RUNS / f"{name}-{seed}"
    config = read_json(root / "config.json")
    metrics = [m for m in Workdir(root).records() if m["stage"] == "2_train"]
    found = {
        "settings": ROWS[name], "seed": seed, "updates": metrics[-1]["step"],
        "updates_planned": metrics[-1]["step"] // metrics[-1]["epoch"] * config["train"]["epochs"],
        "probed": config["train"]["probe"], "config_sha": provenance.sha(config),
        "versions": provenance.versions(),
        "curve": [{key: m[key] for key in CURVE if key in m} for m in metrics],
    }  # fmt: skip
    target = ROOT / RESULTS / f"{name}-{seed}.curve.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, found)
    return lever_tables.curve(name, seed)


def measure_start(seed: int) -> None:
    """Clean accuracy of the warm start on all test images."""
    root = ROOT / RUNS / f"warm-{seed}"
    metrics = [m for m in Workdir(root).records() if m["stage"] == "2_train"]
    x, y = data.load("cifar10", "test")
    found = {
        "seed": seed, "n": len(y), "clean": float(np.mean(loading.load(root).predict(x) == y)),
        "training_accuracy": metrics[-1]["accuracy"], "epochs": metrics[-1]["epoch"],
        "epoch_seconds": [m["epoch_seconds"] for m in metrics], "versions": provenance.versions(),
        "commit": read_json(root / "2_train" / "done.json")["commit"],
    }  # fmt: skip
    write_json(ROOT / RESULTS / f"warm-{seed}.start.json", found)
    print(f"clean {found['clean']:.2%} of {found['n']} test images")


def export(name: str, seed: int) -> None:
    """The network of a finished row or a warm start as one file, and a stratified 100 of the test images."""
    folder = ROOT / RESULTS.parent / "operating-point"
    folder.mkdir(parents=True, exist_ok=True)
    root = ROOT / RUNS / f"{name}-{seed}"
    done = read_json(root / "2_train" / "done.json")
    method = "nominal" if name in WARM else "clustr_qtrades"
    about = f"CIFAR-10, {method},fast, row {name}, seed {seed}, {done['step']} updates, {done['commit']}"
    safetensors_file.save(loading.load(root), folder / f"{method}.safetensors", trained=about)
    split = data.load_split("cifar10", "test")
    ids = data.stratified(split.labels, EXPORTED, 10).astype(np.int32)
    np.savez_compressed(
        folder / "images.npz", images=split.images[ids], labels=split.labels[ids].astype(np.int32), ids=ids
    )
    print(f"{folder}: {about}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows, comma-separated; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    parser.add_argument("--start", action="store_true", help="measure the warm start of --seed")
    parser.add_argument("--curve", metavar="NAME", help="of a row, finished or not; with --seed")
    parser.add_argument("--export", metavar="NAME", help="of a finished row or a warm start; with --seed")
    args = parser.parse_args()
    if args.start:
        measure_start(args.seed)
        return 0
    if args.curve:
        print(curve(args.curve, args.seed))
        return 0
    if args.export:
        export(args.export, args.seed)
        return 0
    if args.table:
        print(lever_tables.levers())
        return 0
    names = child.chosen(args.only, ROWS)
    for name in names:
        target = ROOT / RESULTS / f"{name}-{args.seed}.json"
        commands = [command(name, args.seed)]
        own = warm(name)
        if own != "warm" and Workdir(ROOT / RUNS / f"{own}-{args.seed}").finished("2_train") is None:
            commands.insert(0, warm_command(own, args.seed))
        if name in _FIRST:
            commands.insert(-1, command(_FIRST[name], args.seed))
        if args.list:
            print(child.listed(commands))
            continue
        if target.exists():
            continue
        if code := child.make(target, commands, functools.partial(measured, name, args.seed)):
            return code
        print(lever_tables.levers(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
