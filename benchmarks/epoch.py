"""An epoch of ClusTR+QTRADES, everything included, against the same epoch in PyTorch.

    python benchmarks/epoch.py [--model=resnet8] [--width=32] [--n=9600] [--runs=3] [--save]
    python benchmarks/epoch.py --model=fast --width=64 --n=4800 --save

Needs benchmarks/requirements-bench.txt and a prepared TFDS CIFAR-10. Sampling, augmentation, attack, both
losses, optimiser, embedding the set and k-means per class. PyTorch's side (torch_clustr.py) is channels
last, with the best of 0, 1 and 2 DataLoader workers, measured first. Both sides stay in processes of their
own and take turns (the first call of a turn does not count); the medians' ratio counts. Also: the parts
by themselves (a batch drawn and augmented; one parameter gradient of the network).
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time

import numpy as np
import process

STAGES = {"resnet8": (1, 1, 1), "resnet18": (2, 2, 2, 2), "fast": ()}


def images(n):
    from clustr_jax import data

    split = data.load_split("cifar10", "train")
    return split.images[:n], split.labels[:n]


def configured(args):
    from clustr_jax.stages import configuration
    from configs import cifar10

    config = cifar10.get_config("clustr_qtrades")
    config.fidelity.epoch_statistics = "keep"
    config.fidelity.scores = "log"  # as torch_clustr.py has it
    config.model.name, config.model.width, config.data.train_size = args.model, args.width, args.n
    return configuration.resolve(config)


def ours(args):
    """{what: function} of our side: an epoch, one drawn batch, one parameter gradient."""
    import jax
    import jax.numpy as jnp

    from clustr_jax import data
    from clustr_jax.runtime import mesh
    from clustr_jax.settings import ModelSettings, Recipe, TrainingSettings
    from clustr_jax.storage import loading
    from clustr_jax.training import refit, train, train_state, trainers
    from clustr_jax.training.objectives import METHODS

    config = configured(args)
    x, y = images(args.n)
    net = loading.build_net(ModelSettings.of(config.model), data.Split(x, y, 10, 255.0, (0.0, 1.0), ""))
    train_set = mesh.place(train_state.TrainSet(jnp.asarray(x), jnp.asarray(y), 255.0, config.data.augment))
    trainer = trainers.Trainer(
        net, METHODS["clustr_qtrades"], TrainingSettings.of(config), Recipe.of(config.train), args.n
    )
    key = jax.random.key(0)
    state = mesh.place(train.create(trainer, net.init(key)))
    state = refit.refit(trainer, state, train_set, key)
    state = train.with_totals(trainer, state, train_set, key)
    order = train.epoch_order(key, args.n, 0)

    def epoch():
        # a step's number decides the randomness, not its cost: every epoch may be the first
        after = train.run_steps(trainer, state, train_set, order, key, trainer.steps_per_epoch)
        jax.block_until_ready(refit.refit(trainer, after, train_set, key))

    draw = jax.jit(lambda state, train_set, key: train.draw_batch(trainer, state, train_set, order, key))
    pixels = train_set.batch(jnp.arange(trainer.batch_size))[0]

    def loss(params, x):
        return jnp.mean(trainer.step_net.train({**state.variables, "params": params}, x)[0].embeddings ** 2)

    gradient = jax.jit(
        mesh.spread(lambda p, x: mesh.average(jax.grad(loss)(p, x)), (mesh.SAME, mesh.ROWS), mesh.SAME)
    )
    return {
        "epoch": epoch,
        "batch": lambda: jax.block_until_ready(draw(state, train_set, key)),
        "gradient": lambda: jax.block_until_ready(gradient(state.params, pixels)),
    }


def theirs(args):
    """The same of PyTorch's side."""
    import torch
    from torch_clustr import Clustr

    config = configured(args)
    x, y = images(args.n)
    train, magnet = config.train, config.magnet
    settings = {
        "k": magnet.k, "rows": min(12, 10 * magnet.k), "samples": magnet.samples, "alpha": magnet.alpha,
        "n_init": magnet.n_init, "max_iter": magnet.max_iter, "lam": train.lam, "eps": train.attack.eps,
        "step_size": train.attack.step_size,
    }  # fmt: skip
    clustr = Clustr(
        x, y, stages=STAGES[args.model], width=args.width or 64, mean=config.model.mean, std=config.model.std,
        workers=args.workers, settings=settings,
    )  # fmt: skip
    stream = iter(())

    def batch():
        nonlocal stream
        found = next(stream, None)
        if found is None:
            stream = iter(clustr.loader)
            found = next(stream)
        return found

    pixels = clustr._pixels(clustr.pixels[: settings["rows"] * settings["samples"]])

    def gradient():
        clustr.net.train()
        clustr.net.zero_grad(set_to_none=True)
        torch.mean(clustr.embed(pixels) ** 2).backward()

    return {"epoch": clustr.epoch, "batch": batch, "gradient": gradient}


def serve(args):
    """A child: does what a line names, so many times, and answers with the seconds of one."""
    with process.on_cores() if args.side == "ours" else contextlib.nullcontext():
        functions = (ours if args.side == "ours" else theirs)(args)
        for line in sys.stdin:
            what, repeat = line.split()
            started = time.perf_counter()
            for _ in range(int(repeat)):
                functions[what]()
            print(json.dumps((time.perf_counter() - started) / int(repeat)), flush=True)


class Side:
    """One side of the comparison, in a process that lives on between the turns."""

    def __init__(self, args, side, workers=0):
        command = [sys.executable, __file__, f"--side={side}", f"--workers={workers}", f"--n={args.n}"]
        command += [f"--model={args.model}", f"--width={args.width}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, what, repeat=1):
        self.process.stdin.write(f"{what} {repeat}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def best_workers(args):
    """(DataLoader workers of the fastest epoch, seconds by number of workers)."""
    seconds = {}
    for workers in (0, 1, 2):
        side = Side(args, "theirs", workers)
        side("epoch")  # the first starts the workers
        seconds[workers] = side("epoch")
        side.close()
        print(f"DataLoader with {workers} workers: {seconds[workers]:.2f} s", file=sys.stderr, flush=True)
    return min(seconds, key=seconds.get), seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=STAGES, default="resnet8")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--n", type=int, default=9600)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/epoch-MODEL-WIDTH.json")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    process.restart(GLIBC_TUNABLES="glibc.malloc.hugetlb=1")  # as run.py does; PyTorch gets it as well
    if args.side:
        return serve(args)
    workers, by_workers = best_workers(args)
    sides = {"ours": Side(args, "ours"), "theirs": Side(args, "theirs", workers)}
    taken = {what: {side: [] for side in sides} for what in ("epoch", "batch", "gradient")}
    for run in range(-1, args.runs):  # the first turn compiles and starts workers
        for what, repeat in (("epoch", 1), ("batch", 10), ("gradient", 3)):
            for name, side in sides.items():
                side(what)  # the system takes memory from a process that waits: the first gets it back
                seconds = side(what, repeat)
                if run >= 0:
                    taken[what][name].append(seconds)
    for side in sides.values():
        side.close()
    print(f"| {args.model}, width {args.width}, {args.n} images | ours, s | PyTorch, s | PyTorch / ours |")
    print("|---|---|---|---|")
    rows = {}
    for what, by_side in taken.items():
        median = {name: statistics.median(values) for name, values in by_side.items()}
        rows[what] = {**median, "ratio": median["theirs"] / median["ours"], "runs": by_side}
        print(f"| {what} | {median['ours']:.4f} | {median['theirs']:.4f} | {rows[what]['ratio']:.2f} |")
    content = {
        "model": args.model, "width": args.width, "n": args.n, "runs": args.runs, "workers": workers,
        "seconds_by_workers": by_workers, "rows": rows,
    }  # fmt: skip
    process.finish(f"epoch-{args.model}-{args.width or 64}", content, args.save)


if __name__ == "__main__":
    np.random.seed(0)
    main()
