"""What clustering between epochs costs: the refit against one forward pass of the set, k-means of an epoch.

    python benchmarks/refit.py [--model=fast] [--width=64] [--size=49000] [--runs=3] [--save]

ClusTR+QTRADES as `configs/cifar10.py:clustr_qtrades,fast` has it, on random images of CIFAR-10's size,
with two clusters a class. `forward` is the network's pass in eval mode over ready pixels: as many whole
batches of the refit as the set has. `embedding` draws, decodes and embeds the set. `kmeans`
clusters the embeddings. `refit` is all of it, as training does it. They take turns, and medians are
compared. The epoch is so many measured steps and one refit.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import process
import steps

from clustr_jax import clusters, data
from clustr_jax.runtime import mesh
from clustr_jax.settings import ModelSettings
from clustr_jax.stages import configuration
from clustr_jax.storage import loading
from clustr_jax.training import refit, train_state, trainers
from configs import cifar10


def forward(net, variables, count):
    """(compiled pass over `count` ready images but for an incomplete batch of a device, images of a batch)"""
    batch = refit._EVAL_BATCH

    def part(variables, x):
        rows = jnp.arange(count // mesh.devices() // batch)

        # another image each time, or the compiler would make one pass of all
        def one(i):
            return jnp.sum(net.eval(variables, x + i * 1e-6).embeddings)

        return mesh.average(jnp.sum(jax.lax.map(one, rows)))

    return jax.jit(mesh.spread(part, (mesh.SAME, mesh.ROWS), mesh.SAME)), batch


def measure(args) -> dict:
    config = cifar10.get_config("clustr_qtrades,fast")
    config.model.name, config.model.width = args.model, args.width
    config = configuration.resolve(config)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (args.size, 32, 32, 3), dtype=np.uint8)
    labels = (np.arange(args.size) % 10).astype(np.int32)
    split = data.Split(images[:1], labels[:1], 10, 255.0, (0.0, 1.0), "")
    net = loading.build_net(ModelSettings.of(config.model), split)
    train_set = mesh.place(
        train_state.TrainSet(jnp.asarray(images), jnp.asarray(labels), 255.0, config.data.augment)
    )
    key = jax.random.key(0)
    trainer, step, state = steps.stepping(net, "clustr_qtrades", config, train_set, key)
    bare, batch = forward(net, state.variables, args.size)
    x = mesh.place(jnp.asarray(images[: batch * mesh.devices()], jnp.float32) / 255)
    z = refit.embed_all(net, state.variables, train_set)
    magnet = config.magnet
    k = trainers.per_class(trainer.settings.magnet, 10)

    def kmeans():
        return clusters.fit_assign(
            key, z, train_set.labels, num_classes=10, k=k, n_init=magnet.n_init, max_iter=magnet.max_iter
        )

    functions = {
        "forward": lambda: bare(state.variables, x),
        "embedding": lambda: refit.embed_all(net, state.variables, train_set),
        "kmeans": kmeans,
        "refit": lambda: refit.refit(trainer, state, train_set, key).clusters,
        "three_steps": step,
    }
    taken = {name: [] for name in functions}
    for run in range(args.runs + 1):  # the first one compiles
        for name, function in functions.items():
            started = time.perf_counter()
            jax.block_until_ready(function())
            if run:
                taken[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in taken.items()}
    updates = args.size // trainer.batch_size
    epoch = updates * median["three_steps"] / 3 + median["refit"]
    return {
        "model": args.model, "width": args.width, "size": args.size, "batch": trainer.batch_size,
        "updates": updates, "seconds": median, "all_seconds": taken, "epoch_seconds": epoch,
        "embedding_of_forward": median["embedding"] / median["forward"],
        "refit_of_forward": median["refit"] / median["forward"],
        "kmeans_of_epoch": median["kmeans"] / epoch, "refit_of_epoch": median["refit"] / epoch,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="fast")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--size", type=int, default=49_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/refit.json")
    args = parser.parse_args()
    process.restart(GLIBC_TUNABLES="glibc.malloc.hugetlb=1")  # as run.py does
    with process.on_cores():
        found = measure(args)
    process.finish("refit", found, args.save)


if __name__ == "__main__":
    main()
