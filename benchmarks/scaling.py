"""How the work of one training step is shared by devices: read from the compiled program, nothing is run.

    python benchmarks/scaling.py [--method=clustr_qtrades] [--model=resnet18] [--devices=1,2,4,8]
        [--side=32]

For each number of virtual CPU devices: FLOPs and bytes of one device in one step, as XLA's cost analysis of
the compiled program has them, and the bytes that it receives from the others, with the training images on
every device and sharded. CIFAR-10 shapes, or images of --side pixels.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import process
from jax.sharding import NamedSharding

from clustr_jax import data
from clustr_jax.runtime import mesh
from clustr_jax.settings import ModelSettings, Recipe, TrainingSettings
from clustr_jax.stages import configuration
from clustr_jax.storage import loading
from clustr_jax.training import placement, train, train_state, trainers
from clustr_jax.training.objectives import METHODS
from configs import cifar10

SIZE = 2400  # images, none of which is made


def abstract(lies, side):
    """The training images as they lie on the devices of the current mesh, without any."""
    where = None
    if lies.devices > 1:
        where = NamedSharding(jax.sharding.get_mesh(), mesh.ROWS if lies.sharded else mesh.SAME)
    return jax.ShapeDtypeStruct((SIZE, side, side, 3), jnp.uint8, sharding=where)


def measure(method, model, count, side=32):
    config = cifar10.get_config(method)
    config.model.name = model
    config = configuration.resolve(config)
    labels = jnp.arange(SIZE) % 10
    images = np.zeros((10, side, side, 3), np.uint8)
    net = loading.build_net(
        ModelSettings.of(config.model), data.Split(images, np.arange(10), 10, 255.0, (0.0, 1.0), "")
    )
    trainer = trainers.Trainer(
        net, METHODS[method], TrainingSettings.of(config), Recipe.of(config.train), SIZE
    )
    key = jax.random.key(0)
    with mesh.over(jax.devices()[:count]):
        lies = [placement.Placement(sharded, SIZE * side**2 * 3, count) for sharded in (False, count > 1)]
        augment = config.data.augment
        sets = [
            train_state.TrainSet(abstract(one, side), mesh.place(labels), 255.0, augment, sharded=one.sharded)
            for one in lies
        ]
        variables = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(net.init, key))
        state = mesh.place(train.blank(trainer, variables, sets[0], key))
        order = train.epoch_order(key, SIZE, 0)
        programs = [train.run_steps.lower(trainer, state, each, order, key, 1).compile() for each in sets]
        received = [mesh.received(program) for program in programs]
    cost = programs[0].cost_analysis()
    return {
        "devices": count,
        "images": trainer.batch_size // count,
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "received": received[0],
        "received_sharded": received[1],
        "batch_bytes": trainer.batch_size * side * side * 3,
        "images_each": [one.each for one in lies],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
    }


def forward(method, model) -> float:
    """FLOPs of the network's forward pass, per image."""
    config = cifar10.get_config(method)
    config.model.name = model
    images, labels = np.zeros((10, 32, 32, 3), np.uint8), np.arange(10, dtype=np.int32)
    net = loading.build_net(
        ModelSettings.of(config.model), data.Split(images, labels, 10, 255.0, (0.0, 1.0), "")
    )
    variables = jax.eval_shape(net.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((10, 32, 32, 3), jnp.float32)
    cost = jax.jit(lambda v, x: net.eval(v, x).logits).lower(variables, x).compile().cost_analysis()
    return cost["flops"] / 10


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="clustr_qtrades")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--devices", default="1,2,4,8")
    parser.add_argument("--side", type=int, default=32)
    args = parser.parse_args()
    counts = [int(count) for count in args.devices.split(",")]
    process.restart(XLA_FLAGS=f"--xla_force_host_platform_device_count={max(counts)}", JAX_PLATFORMS="cpu")
    once = forward(args.method, args.model)
    print(f"{args.model}, forward pass: {once / 1e9:.3f} GFLOP per image; {args.method}, one step:")
    print(f"{'devices':>7} {'images':>7} {'GFLOP':>9} {'GB':>8} {'received MB':>12} {'sharded':>9}")
    rows = []
    for count in counts:
        row = measure(args.method, args.model, count, args.side)
        rows.append(row)
        print(
            f"{count:7} {row['images']:7} {row['flops'] / 1e9:9.1f} {row['bytes'] / 1e9:8.2f} "
            f"{row['received'] / 1e6:12.2f} {row['received_sharded'] / 1e6:9.2f}",
            flush=True,
        )
    print(
        json.dumps(
            {"method": args.method, "model": args.model, "forward_flops": once, "rows": rows}, indent=2
        )
    )


if __name__ == "__main__":
    main()
