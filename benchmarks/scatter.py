"""Do whole runs on eight devices scatter more than on one? Seeds that benchmarks/devices.py did not use.

    python benchmarks/scatter.py [--folder=runs/scatter] [--first=8] [--seeds=12] [--save]

Trains resnet8 on CIFAR-10 as `devices.py` does, each seed on one device and on eight virtual CPU devices.
Prints a JSON: clean accuracies, the p value of equal spread (Brown and Forsythe 1974: Levene's test about the
medians) and of equal means (Welch), and the last training loss of each warm-up, which says how far rounding
alone has carried the two warm-ups of a seed apart. Runs resume, and parts of the seeds can be run beside
each other in the same folder first.
"""

import argparse
import json
import pathlib

import devices
import numpy as np
import process
import scipy.stats

COUNTS = (1, 8)


def warmup_loss(workdir: pathlib.Path) -> float:
    """The training loss of the last epoch of the warm-up."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row.get("stage") == "1_warmup"][-1]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=pathlib.Path, default=process.ROOT / "runs" / "scatter")
    parser.add_argument("--first", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/scatter.json")
    args = parser.parse_args()
    seeds = range(args.first, args.first + args.seeds)
    runs = {
        (count, seed): args.folder.resolve() / f"cifar10-{count}-{seed}" for seed in seeds for count in COUNTS
    }
    for (count, seed), workdir in runs.items():
        devices.run(workdir, count, *devices.SETS["cifar10"], *devices.CLEAN, f"--config.seed={seed}")

    accuracy, loss = (
        {count: [read(runs[count, seed]) for seed in seeds] for count in COUNTS}
        for read in (devices.clean, warmup_loss)
    )
    one, eight = accuracy.values()
    result = json.loads((runs[1, args.first] / "results" / "clean.json").read_text())
    content = {
        "seeds": list(seeds), "one_device": one, "eight_devices": eight,
        "standard_deviations": [float(np.std(values, ddof=1)) for values in (one, eight)],
        "p_of_equal_spread": float(scipy.stats.levene(one, eight, center="median").pvalue),
        "p_of_equal_means": float(scipy.stats.ttest_ind(one, eight, equal_var=False).pvalue),
        "warmup_loss_one_device": loss[1], "warmup_loss_eight_devices": loss[8],
        "arguments": list(devices.SETS["cifar10"]), "config_sha": result["config_sha"],
    }  # fmt: skip
    process.finish("scatter", content, args.save)


if __name__ == "__main__":
    main()
