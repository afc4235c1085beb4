"""One device against eight: final accuracies beside those of other seeds, and attacks on one checkpoint.

    python benchmarks/devices.py [--folder=runs/devices] [--seeds=8] [--eight=8] [--only=digits] [--save]

Trains digits and resnet8 on CIFAR-10 (5,000 images) by ClusTR+QTRADES with several seeds on one device, and
with the first of them on eight virtual CPU devices; then attacks the first network once more on eight
devices, and trains stage 2 on eight once more from the warm-up that was made on one: rounding alone
separates these two. Every run is one of run.py and resumes. Prints a table and a JSON: whether each
accuracy on eight devices lies where one more seed would (95 % prediction interval), and between the lowest
and the highest of the seeds (which one more seed on one device does with probability 1 - 2 / (seeds + 1));
and the share of attack outcomes that are equal.

    python benchmarks/devices.py --warmups=20,20 [--folder=runs/warmups] [--only=digits] [--save]

Warm-ups alone (warmups.py) of so many seeds of each set, on one device and on eight: whether their accuracies scatter
alike, whether a seed on eight devices ends twice in the same weights, and how far one seed's weights on one
device and on eight are apart, in float32 and in float64.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import process
import scipy.stats

QUICK = ("--config.eval.protocols=('quick',)", "--config.eval.diagnostics=False")
CLEAN = ("--config.eval.protocols=()", "--stages=1_warmup,2_train,evaluate")
SETS = {
    "digits": ("--config=configs/digits.py:clustr_qtrades", *QUICK),
    "cifar10": (
        "--config=configs/cifar10.py:clustr_qtrades,cpu",
        *QUICK,
        "--config.data.train_size=5000",
        "--config.warmup.epochs=6",
        "--config.train.epochs=2",
        "--config.eval.n=500",
    ),
}


def run(workdir: pathlib.Path, devices: int, *arguments: str) -> None:
    """run.py with that many virtual devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    subprocess.run(
        [sys.executable, "run.py", "--platform=cpu", f"--workdir={workdir}", *arguments],
        cwd=process.ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        check=True,
        stdout=sys.stderr,
    )


def clean(workdir: pathlib.Path) -> float:
    return json.loads((workdir / "results" / "clean.json").read_text())["clean"]


def copied(source: pathlib.Path, target: pathlib.Path, *without: str) -> pathlib.Path:
    """A copy of a work directory, or the one that is there already, without some of its folders."""
    if not target.exists():
        partial = target.with_name(target.name + ".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns(*without))
        partial.rename(target)
    return target


def compare(name: str, folder: pathlib.Path, seeds: int, eights: int, continued: int) -> dict:
    """Train, attack and compare one data set's runs."""
    arguments = SETS[name]
    for devices, count in ((1, seeds), (8, eights)):
        for seed in range(count):
            run(folder / f"{name}-{devices}-{seed}", devices, *arguments, *CLEAN, f"--config.seed={seed}")
    run(folder / f"{name}-1-0", 1, *arguments, "--stages=evaluate")
    same = copied(folder / f"{name}-1-0", folder / f"{name}-1-0-on-8", "results")
    run(same, 8, *arguments, "--stages=evaluate")
    for seed in range(continued):
        place = copied(folder / f"{name}-1-{seed}", folder / f"{name}-1-{seed}-then-8", "results", "2_train")
        run(place, 8, *arguments, *CLEAN, f"--config.seed={seed}")

    one = [clean(folder / f"{name}-1-{seed}") for seed in range(seeds)]
    eight = [clean(folder / f"{name}-8-{seed}") for seed in range(eights)]
    # where one more run of the same distribution lies with probability 95 %
    mean, spread = np.mean(one), np.std(one, ddof=1)
    half = scipy.stats.t.ppf(0.975, seeds - 1) * spread * np.sqrt(1 + 1 / seeds)
    outcomes = [dict(np.load(w / "results" / "quick.npz")) for w in (folder / f"{name}-1-0", same)]
    attacks = [key for key in outcomes[0] if outcomes[0][key].dtype == bool]
    equal = {key: float(np.mean(outcomes[0][key] == outcomes[1][key])) for key in attacks}
    result = json.loads((same / "results" / "quick.json").read_text())
    return {
        "set": name, "n": result["n"], "robust": result["robust"], "one_device": one, "eight_devices": eight,
        "stage_2_on_eight_devices": [clean(folder / f"{name}-1-{seed}-then-8") for seed in range(continued)],
        "range": [min(one), max(one)],
        "inside_range": [bool(min(one) <= value <= max(one)) for value in eight],
        "prediction_interval": [float(mean - half), float(mean + half)],
        "inside_prediction_interval": [bool(abs(value - mean) <= half) for value in eight],
        "p_of_equal_means": float(scipy.stats.ttest_ind(one, eight, equal_var=False).pvalue),
        "equal_outcomes": equal,
        "arguments": list(arguments), "config_sha": result["config_sha"], "versions": result["versions"],
    }  # fmt: skip


def warmups(name: str, folder: pathlib.Path, seeds: int) -> dict:
    """Accuracies of warm-ups on one device and on eight, and tests of whether they scatter alike.

    The same seeds are on both, so that the accuracies go together. Pitman's and Morgan's test allows for it:
    variances are equal where sums and differences of the pairs are uncorrelated. The F test and
    Levene's (Brown's and Forsythe's, by medians) are of independent samples.
    """
    found = {
        devices: called(
            devices, f"--set={name}", f"--seeds={seeds}", f"--folder={folder / f'{name}-{devices}'}"
        )
        for devices in (1, 8)
    }
    one, eight = (np.asarray([row["accuracy"] for row in found[devices]["rows"]]) for devices in (1, 8))
    ratio = float(np.var(eight, ddof=1) / np.var(one, ddof=1))
    tail = scipy.stats.f.sf(ratio, seeds - 1, seeds - 1)
    return {
        "set": name, "seeds": seeds, "one_device": one.tolist(), "eight_devices": eight.tolist(),
        "spread": [float(np.std(one, ddof=1)), float(np.std(eight, ddof=1))],
        "variance_ratio": ratio,
        "p_of_equal_variances": {
            "F": float(2 * min(tail, 1 - tail)),
            "Levene": float(scipy.stats.levene(one, eight, center="median").pvalue),
            "Pitman-Morgan": float(scipy.stats.pearsonr(one + eight, one - eight).pvalue),
        },
        "correlation": float(np.corrcoef(one, eight)[0, 1]),
        "p_of_equal_means": float(scipy.stats.ttest_rel(one, eight).pvalue),
        "same_weights_again": {
            devices: rows["again"]["weights"] == rows["rows"][0]["weights"] for devices, rows in found.items()
        },
        "drift": [kept_drift(name, bits, folder / f"{name}-drift-{bits}.json") for bits in (32, 64)],
    }  # fmt: skip


def kept_drift(name: str, bits: int, path: pathlib.Path) -> dict:
    """That of warmups.py, read where it is there already."""
    if not path.exists():
        path.write_text(json.dumps(called(8, f"--set={name}", f"--drift={bits}")))
    return json.loads(path.read_text())


def called(devices: int, *arguments: str) -> dict:
    """What warmups.py prints last, with that many virtual devices; without threads within one, as run.py."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false"
    done = subprocess.run(
        [sys.executable, "benchmarks/warmups.py", *arguments],
        cwd=process.ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=pathlib.Path)
    parser.add_argument("--warmups", help="warm-ups alone: how many seeds of each set, as 20,20")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--eight", type=int, default=8)
    parser.add_argument("--continued", type=int, default=3)
    parser.add_argument("--only", choices=SETS)
    parser.add_argument("--save", action="store_true", help="write devices.json or warmups.json")
    args = parser.parse_args()
    names = [args.only] if args.only else SETS
    folder = (args.folder or process.ROOT / "runs" / ("warmups" if args.warmups else "devices")).resolve()
    if args.warmups:
        folder.mkdir(parents=True, exist_ok=True)
        counts = [int(count) for count in args.warmups.split(",")]
        content = [warmups(name, folder, count) for name, count in zip(names, counts, strict=True)]
        process.finish("warmups", {"rows": content}, args.save)
        return
    rows = [compare(name, folder, args.seeds, args.eight, args.continued) for name in names]
    print("| set | on 8 devices, by seed | on 1 | one more seed | p | stage 2 on 8 | equal attack outcomes |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["prediction_interval"]
        equal = min(row["equal_outcomes"].values())
        one, eight, stage_2 = (
            ", ".join(f"{100 * value:.2f}" for value in row[key])
            for key in ("one_device", "eight_devices", "stage_2_on_eight_devices")
        )
        print(
            f"| {row['set']} | {eight} | {one} | {100 * low:.1f} to {100 * high:.1f} "
            f"| {row['p_of_equal_means']:.2f} | {stage_2} | {100 * equal:.2f} % of {row['n']} |"
        )
    process.finish("devices", {"rows": rows}, args.save)


if __name__ == "__main__":
    main()
