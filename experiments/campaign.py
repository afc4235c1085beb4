"""The runs behind docs/results.md: every method at a scale that two CPU cores train, one after the other.

    python experiments/campaign.py --dataset=cifar10 --seed=0 [--methods=nominal,trades] [--list]

One call per data set and seed (two calls side by side fill two cores). Every run is one of run.py, so a
call that was broken off goes on where it was; results are copied to results/<dataset>/<method>-<seed>/.

The budget: 12 gradient passes per training image, parameter gradients and input gradients alike (a step of
TRADES with three inner steps is five). TRADES uses 4/5 of the images so that three epochs are exactly that.
The Magnet methods start from the nominal network of the same seed and come on top of it;
`clustr_trades` spends two of the three TRADES epochs and one of its own.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
RUNS, RESULTS = ROOT / "runs" / "campaign", ROOT / "results"
# What is kept of a run; per-example outcomes stay in the work directory.
KEPT = ("clean", "paper", "sound", "diagnostics", "certified")

# Training images; TRADES, with its five passes, takes 4/5 of them.
SIZES = {"cifar10": (50000, 40000)}
FROM_NOMINAL = ("--config.init_from={runs}/nominal-{seed}", "--config.warmup.epochs=0")
METHODS = {
    "nominal": ("--config.train.epochs=12",),
    "trades": ("--config.train.epochs=3", "--config.train.eps_ramp=1.2"),
    "clustr_qtrades": (*FROM_NOMINAL, "--config.train.epochs=2"),
    "qtrades": ("--config.train.epochs=4", "--config.train.eps_ramp=1.6"),
    "clustr_trades": (
        "--config.warmup.epochs=2", "--config.warmup.eps_ramp=0.8", "--config.train.epochs=1",
    ),
    "clustr": (*FROM_NOMINAL, "--config.train.epochs=3"),
    "fast_at": ("--config.train.epochs=6", "--config.train.eps_ramp=2.4"),
    "pgd_at": ("--config.train.epochs=3", "--config.train.eps_ramp=1.8"),
    "free_at": ("--config.train.epochs=3", "--config.train.eps_ramp=1.2"),
    "magnet": ("--config.train.epochs=12",),
    "at_pretrain": (
        "--config.warmup.epochs=2", "--config.warmup.eps_ramp=0.8", "--config.train.epochs=1",
        "--config.pretrain.name={source}",
    ),
}  # fmt: skip
SOURCE = {"cifar10": "cifar100"}  # of at_pretrain


def arguments(dataset: str, method: str, seed: int) -> list[str]:
    """The command line of one run."""
    runs = RUNS / dataset
    size = SIZES[dataset][method in ("trades", "clustr_trades")]
    values = {"runs": runs, "seed": seed, "source": SOURCE[dataset]}
    return [
        f"--config=configs/{dataset}.py:{method},cpu", f"--workdir={runs}/{method}-{seed}",
        f"--config.seed={seed}", f"--config.data.train_size={size}", "--config.eval.quick=True",
        *(argument.format(**values) for argument in METHODS[method]),
    ]  # fmt: skip


def keep(dataset: str, method: str, seed: int) -> None:
    """Copy the result files of a finished run."""
    target = RESULTS / dataset / f"{method}-{seed}"
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        path = RUNS / dataset / f"{method}-{seed}" / "results" / f"{name}.json"
        if path.exists():
            shutil.copy(path, target)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=SIZES, default="cifar10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args()
    for method in args.methods.split(","):
        command = ["run.py", *arguments(args.dataset, method, args.seed)]
        print("python", *command, flush=True)
        if args.list:
            continue
        code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
        if code == 75:
            sys.exit(75)  # stopped: the same call goes on
        if code == 0:
            keep(args.dataset, method, args.seed)
        else:
            print(f"{method} failed with exit code {code}", flush=True)


if __name__ == "__main__":
    main()
