"""Everything that has to be known of an accelerator, by one command of at most eight minutes.

    python benchmarks/accelerator.py [--limit=480] [--out=FOLDER] [--small] [--save]

Needs no network and no data set: the images are random. One part after the other, what matters most first;
a part that fails is kept with its error and the next one runs, a part for which there is no time left is
called "not run". FOLDER/accelerator.json is written again after each part, so nothing is lost if the machine
goes. `--small` is the same in small, to try the script on a CPU.

    versions    devices, versions, and the canary: does this compiler compute right numbers?
    steps       one training step of every method: parameters and metrics against the CPU's
    attacks     every attack of the registry: outcomes and images against the CPU's
    epochs      images per second of ClusTR+QTRADES and TRADES on ResNet-18 in float32, TF32 and bfloat16,
                and the share of what the data sheet promises
    slots       PGD^20 x 10 and sound-3 on 512 images with 64 to 2,048 slots
    kmeans      50,000 embeddings of 512 dimensions, and the memory in use at the end
    profile     a trace of ten steps, for TensorBoard or Perfetto
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import process
import steps as benchmark_steps
from jax.tree_util import Partial

import clustr_jax
from clustr_jax import clusters, data
from clustr_jax.attacks import scheduler
from clustr_jax.attacks.models import View
from clustr_jax.attacks.registry import ATTACKS, Budget
from clustr_jax.attacks.targets import CHOOSERS
from clustr_jax.clusters import Clusters
from clustr_jax.runtime import canary, mesh, provenance
from clustr_jax.settings import ModelSettings
from clustr_jax.stages import configuration
from clustr_jax.storage import loading
from clustr_jax.training import cost, train_state
from clustr_jax.training.objectives import METHODS
from configs import cifar10

EPS = 8 / 255
# Dense, without sparsity, in TFLOP/s: NVIDIA H200 SXM, H100 SXM and A100 data sheets; others have no share.
# Full float32 does not use the tensor cores.
PEAKS = {
    "H200": {"float32": 67.0, "tf32": 494.5, "bfloat16": 989.5},
    "H100": {"float32": 67.0, "tf32": 494.5, "bfloat16": 989.5},
    "A100": {"float32": 19.5, "tf32": 156.0, "bfloat16": 312.0},
}
# (precision of products and convolutions, dtype of the layers in training mode)
FORMS = {
    "float32": ("highest", "float32"),
    "tf32": ("tensorfloat32", "float32"),
    "bfloat16": ("default", "bfloat16"),
}


def images(n):
    """The same random images [n, 32, 32, 3] and labels each time."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    return pixels, (np.arange(n) % 10).astype(np.int32)


def versions(_):
    started = time.perf_counter()
    answer = canary.check()
    return {
        "devices": [str(d) for d in jax.devices()],
        "kind": jax.devices()[0].device_kind,
        "canary": {"worst": answer.worst, "pattern": answer.pattern, "size": answer.size},
        "canary_seconds": time.perf_counter() - started,
    }


def on_cpu():
    """A context in which everything is computed by the CPU of the same process."""
    return jax.default_device(jax.devices("cpu")[0])


def network(method, model, width, dtype="float32"):
    """(config, net, training set): random images and a network of CIFAR-10's shape."""
    config = cifar10.get_config(method)
    config.model.name, config.model.width, config.model.dtype = model, width, dtype
    config = configuration.resolve(config)
    x, y = images(benchmark_steps.SIZE)
    split = data.Split(x, y, 10, 255.0, (0.0, 1.0), "")
    net = loading.build_net(ModelSettings.of(config.model), split)
    return config, net, (x, y)


def one_step(method, where):
    """Parameters and metrics after three steps of a method on a small network."""
    with where, mesh.over(mesh_devices(where)), jax.default_matmul_precision("highest"):
        config, net, (x, y) = network(method, "resnet8", 8)
        train_set = mesh.place(
            train_state.TrainSet(jnp.asarray(x), jnp.asarray(y), 255.0, config.data.augment)
        )
        trainer, _, state = benchmark_steps.stepping(net, method, config, train_set, jax.random.key(0))
        order = benchmark_steps.train.epoch_order(jax.random.key(0), benchmark_steps.SIZE, 0)
        state = benchmark_steps.train.run_steps(trainer, state, train_set, order, jax.random.key(0), 3)
        return jax.device_get((state.variables["params"], state.totals))


def mesh_devices(where):
    return jax.devices("cpu")[:1] if where is not NOWHERE else jax.devices()[:1]


class _Nowhere:
    """The default device."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


NOWHERE = _Nowhere()


def apart(a, b):
    """Largest difference of two trees, relative to the largest value of each leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(p - q)) / max(np.max(np.abs(p)), 1e-6)) for p, q in pairs if np.size(p))


def steps(args):
    found = {}
    for method in list(METHODS)[: 2 if args.small else None]:
        theirs, ours = one_step(method, on_cpu()), one_step(method, NOWHERE)
        found[method] = {"parameters": apart(theirs[0], ours[0]), "metrics": apart(theirs[1], ours[1])}
    return found


def view(found, weight, x):
    """A cluster head on features that are linear in the image."""
    z = x.reshape(x.shape[0], -1) @ weight
    scores = found.log_scores(z)
    return View(scores, scores, found.exponents(z))


def logits(found, weight, x):
    return view(found, weight, x).logits


def outcome(entry, n, budget):
    rng = np.random.default_rng(1)
    found = Clusters(jnp.asarray(rng.normal(size=(10, 2, 8)), jnp.float32), jnp.float32(0.3))
    weight = jnp.asarray(rng.normal(size=(16 * 16 * 3, 8)) / 9, jnp.float32)
    x = rng.uniform(0, 1, (n, 16, 16, 3)).astype(np.float32)
    y = np.asarray(logits(found, weight, x)).argmax(axis=1).astype(np.int32)
    model = Partial(view if entry.clusters else logits, found, weight)
    targets = None
    if entry.targets is not None:
        outputs = scheduler.forward(model, x, n)
        targets = CHOOSERS[entry.targets](model, x, y, outputs, "linf", count=3, slots=n)
    return scheduler.run(
        entry.make(budget, None), jax.random.key(0), model, x, y, targets=targets, restarts=1, slots=n
    )


def attacked(args):
    n = 16 if args.small else 128
    eps = 1 / 255  # so that some images withstand
    budget = Budget(eps=eps, steps=10 if args.small else 50, queries=50, step_size=eps / 4)
    found = {}
    for name, entry in ATTACKS.items():
        with jax.default_matmul_precision("highest"):
            with on_cpu():
                theirs = outcome(entry, n, budget)
            ours = outcome(entry, n, budget)
        both = theirs.broken & ours.broken
        found[name] = {
            "n": n,
            "broken": [int(theirs.broken.sum()), int(ours.broken.sum())],
            "other_outcomes": int((theirs.broken != ours.broken).sum()),
            "apart": float(np.abs(theirs.x_adv - ours.x_adv)[both].max()) if both.any() else 0.0,
        }
    return found


def epochs(args):
    kind = jax.devices()[0].device_kind
    peaks = next((p for name, p in PEAKS.items() if name in kind), {})
    model, width = ("resnet8", 8) if args.small else ("resnet18", 0)
    found = {}
    for method in ("clustr_qtrades", "trades"):
        for form, (precision, dtype) in FORMS.items():
            if args.small and form == "tf32":
                continue
            with mesh.over(jax.devices()), jax.default_matmul_precision(precision):
                found[f"{method} {form}"] = throughput(method, model, width, dtype, peaks.get(form), args)
    return found


def throughput(method, model, width, dtype, peak, args):
    config, net, (x, y) = network(method, model, width, dtype)
    train_set = mesh.place(train_state.TrainSet(jnp.asarray(x), jnp.asarray(y), 255.0, config.data.augment))
    trainer, step, state = benchmark_steps.stepping(net, method, config, train_set, jax.random.key(0))
    settings = trainer.settings
    passes = cost.passes(method, settings, trainer.recipe)
    seconds = statistics.median(benchmark_steps.seconds(step, 1 if args.small else 5) / 3 for _ in range(3))
    forward = jax.jit(lambda v, x: net.eval(v, x).logits).lower(
        state.variables, jnp.zeros((trainer.batch_size, *net.input_shape))
    )
    analysis = forward.compile().cost_analysis() or {}
    # a gradient for the input costs about two forward passes, one for both three
    flops = float(analysis.get("flops", 0.0)) * sum(
        n * (1 if "forward" in name else 3 if "both" in name else 2) for name, n in passes.items()
    )
    return {
        "batch": trainer.batch_size,
        "step_seconds": seconds,
        "images_per_second": trainer.batch_size / seconds,
        "epoch_of_50000_seconds": 50_000 * seconds / trainer.batch_size,
        "tflops": flops / seconds / 1e12,
        "share_of_data_sheet": flops / seconds / 1e12 / peak if peak else None,
    }


def slots(args):
    model, width, n = ("resnet8", 8, 16) if args.small else ("resnet18", 0, 512)
    _, net, _ = network("trades", model, width)
    variables = net.init(jax.random.key(0))
    x, _ = images(n)
    x = x.astype(np.float32) / 255
    net_logits = Partial(lambda v, x: net.eval(v, x).logits, variables)
    y = np.asarray(jax.jit(net_logits)(x)).argmax(axis=1).astype(np.int32)
    found = {}
    for count in (8, 16) if args.small else (64, 256, 512, 1024, 2048):
        attack = ATTACKS["ce"].make(Budget(eps=EPS, steps=20, step_size=2 / 255), None)
        found[f"pgd20x10, {count} slots"] = twice(
            lambda attack=attack, count=count: scheduler.run(
                attack, jax.random.key(0), net_logits, x, y, restarts=10, slots=count
            )
        )
    for count in (8,) if args.small else (256, 1024):
        found[f"sound-3, {count} slots"] = twice(
            lambda count=count: clustr_jax.judge(net_logits, x, y, eps=EPS, slots=count), times=1
        )
    return found


def twice(run, times=2):
    """Seconds of each call, the first with its compilations, and the memory in use at most so far."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "memory": memory()}


def memory():
    """Bytes in use at most so far, where the device tells."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def kmeans(args):
    n = 2000 if args.small else 50_000
    z = np.random.default_rng(2).normal(size=(n, 512)).astype(np.float32)
    y = (np.arange(n) % 10).astype(np.int32)
    seconds = []
    for run in range(3):
        started = time.perf_counter()
        jax.block_until_ready(
            clusters.fit(jax.random.key(run), z, y, num_classes=10, k=2, n_init=10, max_iter=40)
        )
        seconds.append(time.perf_counter() - started)
    return {"n": n, "seconds": seconds, "memory": memory()}


def profile(args):
    folder = pathlib.Path(args.out) / "profile"
    model, width = ("resnet8", 8) if args.small else ("resnet18", 0)
    with mesh.over(jax.devices()):
        config, net, (x, y) = network("clustr_qtrades", model, width)
        train_set = mesh.place(
            train_state.TrainSet(jnp.asarray(x), jnp.asarray(y), 255.0, config.data.augment)
        )
        _, step, _ = benchmark_steps.stepping(net, "clustr_qtrades", config, train_set, jax.random.key(0))
        jax.block_until_ready(step())
        with jax.profiler.trace(str(folder)):
            jax.block_until_ready(step())
    return {"folder": str(folder)}


# The part, and the seconds without which it is not begun.
PARTS = {
    versions: 0, steps: 60, attacked: 60, epochs: 60, slots: 60, kmeans: 10, profile: 15,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=480, help="seconds")
    parser.add_argument("--out", default=".", help="where accelerator.json and the profile go")
    parser.add_argument("--small", action="store_true", help="try the script itself, on a CPU")
    parser.add_argument(
        "--save", action="store_true", help="write results/benchmarks/accelerator.json as well"
    )
    parser.add_argument("--only", default="", help="parts, comma-separated")
    args = parser.parse_args()
    started = time.perf_counter()
    known = {part.__name__: part for part in PARTS}
    chosen = [known[name] for name in args.only.split(",")] if args.only else list(PARTS)
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    content = {"platform": jax.default_backend(), "small": args.small, "parts": {}}
    for part in chosen:
        begun = time.perf_counter()
        left = args.limit - (begun - started)
        if left < PARTS[part]:
            found = {"not run": f"{left:.0f} of {args.limit:.0f} s left"}
        else:
            try:
                found = part(args)
            except Exception as error:  # the machine is lent for minutes: the next part is worth more
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        content["parts"][part.__name__] = {"seconds": time.perf_counter() - begun, **found}
        print(part.__name__, json.dumps(content["parts"][part.__name__], indent=1), flush=True)
        whole = {"benchmark": "accelerator", "versions": provenance.versions(), **content}
        (pathlib.Path(args.out) / "accelerator.json").write_text(json.dumps(whole, indent=2) + "\n")
    if args.save:
        process.finish("accelerator", content, True)
    return int(any("error" in found for found in content["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
