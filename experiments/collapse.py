"""Does the guard speak up? The paper's hyperparameters on a small network of some 85 % on CIFAR-10.

    python experiments/collapse.py [--only=text,exp] [--seed=0] [--list | --table]

resnet8 of width 32, all images, 8 epochs of SGD (one cycle, 0.2); then one epoch of ClusTR+QTRADES as
the paper has it: alpha 12.5, lambda 8, K 2, batches of 12 clusters of 20 images, Adam at 1e-4, one step
of 10/255. `text` has log scores in the consistency term, `exp` the exp scores of the authors' code.
Writes results/levers/NAME-SEED.collapse.json: what was handed over, what is left, and the alarms.
"""

import argparse
import functools
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import child  # noqa: E402
import levers  # noqa: E402
from result_tables import markdown  # noqa: E402

from clustr_jax.runtime import provenance  # noqa: E402
from clustr_jax.storage.files import read_json  # noqa: E402
from clustr_jax.storage.workdir import Workdir  # noqa: E402

RUNS = pathlib.Path("runs", "collapse")
SETTINGS = {
    "model.width": 32, "warmup.optimizer": "sgd", "warmup.lr": 0.2, "warmup.epochs": 8,
    "warmup.weight_decay": 5e-4, "train.epochs": 1, "train.lr": 1e-4, "train.schedule": "multistep",
    "train.probe": 0, "fidelity.epoch_statistics": "keep",
}  # fmt: skip
ROWS = ("text", "exp")


def words(name: str, seed: int, start: str, stages: str) -> list[str]:
    """run.py's, in the work directory of `name`; `start`: the warm-up's, whose own is empty."""
    settings = SETTINGS | {"seed": seed}
    if start:
        settings |= {"warmup.epochs": 0, "init_from": RUNS / f"{start}-{seed}" / "1_warmup"}
        settings |= {"fidelity.scores": "log" if name == "text" else "exp"}
    return [
        "run.py",
        "--config=configs/cifar10.py:clustr_qtrades,cpu",
        f"--workdir={RUNS / f'{name}-{seed}'}",
        *levers.words(settings),
        f"--stages={stages}",
    ]


def commands(name: str, seed: int) -> list[list[str]]:
    """The warm-up, which all rows share, and the row."""
    return [words("warm", seed, "", "1_warmup"), words(name, seed, "warm", "1_warmup,2_train")]


def measured(name: str, seed: int) -> dict:
    """What the one epoch did to the network, and what was said of it."""
    root = ROOT / RUNS
    handed = [m for m in Workdir(root / f"warm-{seed}").records() if m["stage"] == "1_warmup"][-1]
    after = [m for m in Workdir(root / f"{name}-{seed}").records() if m["stage"] == "2_train"][-1]
    keys = (
        "step",
        "val_accuracy",
        "largest_class",
        "feature_spread",
        "magnet",
        "consistency",
        "hinge_active",
    )
    return {
        "row": name, "seed": seed, "handed": handed["val_accuracy"],
        "training_accuracy": handed["accuracy"], "after": {k: after[k] for k in keys if k in after},
        "alarms": after.get("alarms", []),
        "config_sha": provenance.sha(read_json(root / f"{name}-{seed}" / "config.json")),
        "versions": provenance.versions(),
    }  # fmt: skip


def table() -> str:
    """A row for each file."""
    rows = []
    for path in sorted((ROOT / levers.RESULTS).glob("*.collapse.json")):
        found = read_json(path)
        rows.append(
            [
                found["row"], str(found["seed"]), str(found["after"]["step"]), f"{100 * found['handed']:.1f}",
                f"{100 * found['after']['val_accuracy']:.1f}",
                f"{100 * found['after']['hinge_active']:.1f} %",
                ", ".join(found["alarms"]) or "none",
            ]
        )  # fmt: skip
    header = ["form", "seed", "updates", "held out before", "after", "open hinges", "alarms"]
    return markdown(header, rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(ROWS), help="rows, comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    args = parser.parse_args()
    if args.table:
        print(table())
        return 0
    names = child.chosen(args.only, ROWS)
    for name in names:
        target = ROOT / levers.RESULTS / f"{name}-{args.seed}.collapse.json"
        if args.list:
            print(child.listed(commands(name, args.seed)))
        elif not target.exists():
            if code := child.make(
                target, commands(name, args.seed), functools.partial(measured, name, args.seed)
            ):
                return code
            print(table(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
