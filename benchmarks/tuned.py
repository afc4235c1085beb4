"""A training step by the forms of training against the same step without, and where its time goes.

    python benchmarks/tuned.py [--networks=fast-64,resnet8-32] [--runs=5] [--save]

Both programs live in one process and take turns; medians of the turns' ratios count, of seconds and of the
processor's time, which another process on the machine changes little. Temporaries and compilation are the
compiler's. The profile is of one step of each: milliseconds of a device by kind of work, and the largest
operations by name, with the bytes that they write. Random pixels, CIFAR-10 shapes.
"""

import argparse
import collections
import functools
import glob
import gzip
import json
import math
import re
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import process

from clustr_jax import data
from clustr_jax.runtime import mesh
from clustr_jax.settings import ModelSettings, Recipe, TrainingSettings
from clustr_jax.stages import configuration
from clustr_jax.storage import loading
from clustr_jax.training import refit, train, train_state, trainers
from clustr_jax.training.objectives import METHODS
from configs import cifar10

NETWORKS = ("fast-64", "resnet8-32", "resnet8-64", "resnet18-64")
SIZE, LARGEST = 2400, 12
# a part of the name of an operation of the step, and what it is; the first that fits
KINDS = (
    ("psum", "waiting for the other device"), ("all-reduce", "waiting for the other device"),
    ("fun/while/body", "kernel gradients"), ("branch_0_fun", "input gradients"),
    ("conv_general_dilated", "forward convolutions"), ("norm", "batch norm"), ("Norm", "batch norm"),
    ("erf", "GELU"),
)  # fmt: skip


def stepping(name: str, method: str):
    """(trainer, its arguments) of a step of this network."""
    config = cifar10.get_config(method)
    config.model.name, width = name.split("-")
    config.model.width = int(width)
    config = configuration.resolve(config)
    images = np.random.default_rng(0).integers(0, 256, (SIZE, 32, 32, 3), dtype=np.uint8)
    labels = (np.arange(SIZE) % 10).astype(np.int32)
    split = data.Split(images, labels, 10, 255.0, (0.0, 1.0), "")
    net = loading.build_net(ModelSettings.of(config.model), split)
    train_set = train_state.TrainSet(jnp.asarray(images), jnp.asarray(labels), 255.0, config.data.augment)
    train_set, key = mesh.place(train_set), jax.random.key(0)
    trainer = trainers.Trainer(
        net, METHODS[method], TrainingSettings.of(config), Recipe.of(config.train), SIZE
    )
    state = refit.begin(trainer, mesh.place(train.create(trainer, net.init(key))), train_set, key)
    state = train.with_totals(trainer, state, train_set, key)
    return trainer, (state, train_set, train.epoch_order(key, SIZE, 0), key, 1)


class Plain(trainers.Trainer):
    """A trainer whose steps have the forms of evaluation."""

    step_net = property(lambda self: self.net)  # pyright: ignore[reportAssignmentType]


def compiled(trainer, arguments):
    """(program of one step, processor's seconds of its compilation)"""
    jax.clear_caches()  # the second is to trace as much as the first
    started = time.process_time()
    program = train.run_steps.lower(trainer, *arguments).compile()
    return program, time.process_time() - started


def turn(program, arguments) -> dict[str, float]:
    """Seconds and the processor's seconds of one step."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(program(*arguments))
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def operations(program, arguments) -> dict[str, float]:
    """{operation: milliseconds of a device} of one step."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(program(*arguments))
        (file,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
        events = json.loads(gzip.decompress(open(file, "rb").read()))["traceEvents"]
    found = collections.Counter()
    for event in events:
        operation = event.get("args", {}).get("hlo_op")
        if operation and not operation.startswith(("while", "call", "conditional")):  # their bodies count
            found[operation] += event["dur"] / 1000 / mesh.devices()
    return dict(found)


def profile(program, arguments) -> dict:
    """Milliseconds of a device by kind, and the largest operations."""
    lines = {}
    for line in program.as_text().splitlines():
        match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = f32\[([\d,]*)\]", line)
        if match:
            where = re.search(r'op_name="([^"]*)"', line)
            lines[match[1]] = match[2], where[1] if where else ""
    kinds, rows = collections.Counter(), []
    for operation, milliseconds in operations(program, arguments).items():
        shape, where = lines.get(operation, ("", ""))
        where = re.sub(r".*traced_step\)/", "", where)
        kind = next((kind for part, kind in KINDS if part in f"{operation} {where}"), "all other passes")
        kinds[kind] += milliseconds
        written = 4 * math.prod(int(n) for n in shape.split(",") if n)
        rows.append({"what": kind, "where": where, "ms": milliseconds, "bytes": written})
    rows.sort(key=lambda row: -row["ms"])
    return {"ms_by_kind": dict(kinds.most_common()), "largest": rows[:LARGEST]}


def measure(name: str, args) -> dict:
    trainer, arguments = stepping(name, args.method)
    fields = {field: getattr(trainer, field) for field in trainer.__dataclass_fields__}
    programs, row = {}, {"network": name, "batch": trainer.batch_size}
    for form, one in (("plain", Plain(**fields)), ("tuned", trainer)):
        programs[form], seconds = compiled(one, arguments)
        memory = programs[form].memory_analysis().temp_size_in_bytes
        row[form] = {"compile_cpu_seconds": seconds, "temporary_bytes": memory}
    turns = {form: [] for form in programs}
    for run in range(-1, args.runs):
        for form, program in programs.items():
            taken = turn(program, arguments)
            if run >= 0:
                turns[form].append(taken)
    for what in ("seconds", "cpu_seconds"):
        pairs = zip(turns["plain"], turns["tuned"], strict=True)
        row[f"{what}_ratio"] = statistics.median(plain[what] / tuned[what] for plain, tuned in pairs)
    for form, program in programs.items():
        row[form] |= {"turns": turns[form], **profile(program, arguments)}
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--method", default="clustr_qtrades")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/tuned.json")
    args = parser.parse_args()
    process.restart(GLIBC_TUNABLES="glibc.malloc.hugetlb=1")  # as run.py does
    say, rows = functools.partial(print, file=sys.stderr, flush=True), []
    for name in args.networks.split(","):
        with process.on_cores():
            row = measure(name, args)
        rows.append(row)
        ratios = {f: row["tuned"][f] / row["plain"][f] for f in ("temporary_bytes", "compile_cpu_seconds")}
        say(name, {f: round(row[f], 2) for f in ("seconds_ratio", "cpu_seconds_ratio")}, ratios)
        for kind, milliseconds in row["tuned"]["ms_by_kind"].items():
            say(f"  {milliseconds:8.1f} ms {kind}, was {row['plain']['ms_by_kind'].get(kind, 0):.1f}")
        for one in row["tuned"]["largest"]:
            say(f"  {one['ms']:8.1f} ms, writes {one['bytes'] / 1e6:.1f} MB: {one['where']}")
    content = {"method": args.method, "runs": args.runs, "rows": rows}
    process.finish("tuned", content, args.save)


if __name__ == "__main__":
    main()
