"""From `python run.py` to the first training step, with an empty compilation cache and with a full one.

    python benchmarks/startup.py [--config=configs/digits.py:clustr_qtrades] [--runs=3] [--save]

Each run is a process of its own in a fresh work directory. The first epoch's record in metrics.jsonl tells
when training steps had been made (an upper bound of the first one's end); JAX's log tells what was compiled
and what came from the cache. The first run fills the cache, the others find it full.
"""

import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

import process

# A line each of JAX's log, where JAX_LOG_COMPILES is set: the time includes reading the cache.
_COMPILED = re.compile(r"Finished XLA compilation of (\S+) in ([\d.]+) sec")


def start(config, folder, cache):
    """Seconds until the first record, until the stage ended, and the programs new to the cache."""
    known = {path.name for path in cache.rglob("*-cache")}
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "JAX_LOG_COMPILES": "1"}
    command = [
        sys.executable,
        "run.py",
        f"--config={config}",
        f"--workdir={folder}",
        "--stages=1_warmup,2_train",
    ]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        running = subprocess.Popen(command, cwd=process.ROOT, env=environment, stdout=log, stderr=log)
        metrics, first = folder / "metrics.jsonl", None
        while running.poll() is None:
            if first is None and metrics.exists() and metrics.stat().st_size:
                first = time.perf_counter() - started
            time.sleep(0.02)
        whole = time.perf_counter() - started
        log.seek(0)
        text = log.read()
    assert running.returncode == 0 and first is not None, text[-2000:]
    programs = [(name, float(seconds)) for name, seconds in _COMPILED.findall(text)]
    new = len({path.name for path in cache.rglob("*-cache")} - known)
    return {
        "first_record_seconds": first,
        "trained_seconds": whole,
        "programs": len(programs),
        "programs_seconds": sum(seconds for _, seconds in programs),
        "new_in_cache": new,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/digits.py:clustr_qtrades")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/startup.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        rows = [start(args.config, folder / f"run{i}", folder / "cache") for i in range(args.runs + 1)]
    print("| | first record, s | trained, s | programs | their compilation, s | new in the cache |")
    print("|---|---|---|---|---|---|")
    warm = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}
    for name, row in (("empty cache", rows[0]), (f"full cache, median of {args.runs}", warm)):
        print(
            f"| {name} | {row['first_record_seconds']:.1f} | {row['trained_seconds']:.1f} "
            f"| {row['programs']:.0f} | {row['programs_seconds']:.1f} | {row['new_in_cache']:.0f} |"
        )
    content = {"config": args.config, "empty": rows[0], "full": rows[1:], "full_median": warm}
    process.finish("startup", content, args.save)


if __name__ == "__main__":
    main()
