"""Train step of each method against the bare passes that it cannot do without.

    python benchmarks/steps.py [--methods=nominal,trades,...] [--model=resnet8] [--width=16] [--runs=5]

For each method: its passes (forward, input gradient, parameter gradient, each timed alone at the same
batch size), the sum of their times, the measured step, and the ratio. `rest` is the step of a network that
costs nothing (its embeddings are pixels), as a share of the sum: sampling, gathering, augmentation, losses,
clusters, the attack's own arithmetic. Random pixels, CIFAR-10 shapes; refits excluded. Passes and steps
are timed in turns, medians are compared.
"""

import argparse
import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import process

from clustr_jax import data, models
from clustr_jax.runtime import mesh
from clustr_jax.settings import ModelSettings, Recipe, TrainingSettings
from clustr_jax.stages import configuration
from clustr_jax.storage import loading
from clustr_jax.training import cost, refit, train, train_state, trainers
from clustr_jax.training.objectives import METHODS
from configs import cifar10

SIZE = 2400


def bare(net, variables, x, y):
    """The passes on their own, each as one compiled function."""

    def loss(params, x, y, mode):
        full = {**variables, "params": params}
        outputs = net.train(full, x)[0] if mode == "train" else net.eval(full, x)
        return -jnp.mean(jax.nn.log_softmax(outputs.logits)[jnp.arange(len(y)), y])

    def gradients(which, mode):
        def part(params, x, y):
            found = jax.grad(loss, which)(params, x, y, mode)
            return (mesh.average(found[0]), *found[1:]) if which != (1,) else found

        specs = tuple(mesh.ROWS if i else mesh.SAME for i in which)
        return jax.jit(mesh.spread(part, (mesh.SAME, mesh.ROWS, mesh.ROWS), specs))

    functions = {"parameter_gradient": gradients((0,), "train"), "both_gradients": gradients((0, 1), "train")}
    for mode in ("train", "eval"):
        forward = functools.partial(loss, mode=mode)
        functions[f"forward_{mode}"] = jax.jit(
            mesh.spread(
                lambda *args, forward=forward: mesh.average(forward(*args)),
                (mesh.SAME, mesh.ROWS, mesh.ROWS),
                mesh.SAME,
            )
        )
        functions[f"input_gradient_{mode}"] = gradients((1,), mode)
    return {name: lambda f=f: f(variables["params"], x, y) for name, f in functions.items()}


@dataclasses.dataclass(frozen=True)
class FreeNet:
    """A network whose embeddings are the first pixels, moved by a parameter."""

    input_shape: tuple[int, ...]
    num_classes: int
    size: int

    def init(self, key):
        head = {"kernel": jnp.zeros((self.size, self.num_classes))}  # some objectives look at it
        return {"params": {"z": jnp.zeros(self.size), models.HEAD: head}, "batch_stats": {}}

    def eval(self, variables, x):
        z = x.reshape(x.shape[0], -1)[:, : self.size] + variables["params"]["z"]
        return models.Outputs(z[:, : self.num_classes], z)

    def train(self, variables, x):
        return self.eval(variables, x), {}


def stepping(net, method, config, train_set, key):
    """(trainer, function that makes three steps in one call, as training runs them, and its state)."""
    trainer = trainers.Trainer(
        net, METHODS[method], TrainingSettings.of(config), Recipe.of(config.train), SIZE
    )
    state = refit.begin(trainer, mesh.place(train.create(trainer, net.init(key))), train_set, key)
    state = train.with_totals(trainer, state, train_set, key)
    order = train.epoch_order(key, SIZE, 0)
    return trainer, (lambda: train.run_steps(trainer, state, train_set, order, key, 3).step), state


def seconds(f, repeat=3):
    jax.block_until_ready(f())
    started = time.perf_counter()
    for _ in range(repeat):
        result = f()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / repeat


def measure(method, args):
    config = cifar10.get_config(method)
    config.model.name, config.model.width = args.model, args.width
    config = configuration.resolve(config)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (SIZE, 32, 32, 3), dtype=np.uint8)
    labels = (np.arange(SIZE) % 10).astype(np.int32)
    net = loading.build_net(
        ModelSettings.of(config.model), data.Split(images, labels, 10, 255.0, (0.0, 1.0), "")
    )
    train_set = train_state.TrainSet(jnp.asarray(images), jnp.asarray(labels), 255.0, config.data.augment)
    train_set = mesh.place(train_set)
    key = jax.random.key(0)
    trainer, step, state = stepping(net, method, config, train_set, key)
    embedding = jax.eval_shape(net.eval, state.variables, jax.ShapeDtypeStruct((1, 32, 32, 3), "float32"))
    free = FreeNet((32, 32, 3), 10, embedding.embeddings.shape[-1])
    _, rest, _ = stepping(free, method, config, train_set, key)
    batch = trainer.batch_size
    x = jnp.asarray(images[:batch], jnp.float32) / 255
    needed = {
        name: n
        for name, n in cost.passes(method, TrainingSettings.of(config), Recipe.of(config.train)).items()
        if n
    }
    x, y = mesh.place((x, jnp.asarray(labels[:batch])))
    functions = bare(trainer.step_net, state.variables, x, y)
    taken = {name: [] for name in (*needed, "step", "rest")}
    for _ in range(args.runs):
        for name in needed:
            taken[name].append(seconds(functions[name]))
        for name, function in (("step", step), ("rest", rest)):
            taken[name].append(seconds(function, 1) / 3)
    median = {name: statistics.median(values) for name, values in taken.items()}
    total = sum(needed[name] * median[name] for name in needed)
    return {
        "method": method, "batch": batch, "passes": needed, "pass_seconds": {n: median[n] for n in needed},
        "sum_seconds": total, "step_seconds": median["step"], "ratio": median["step"] / total,
        "rest_seconds": median["rest"], "rest": median["rest"] / total,
        "images_per_second": batch / median["step"],
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", help="write results/benchmarks/SAVE.json")
    args = parser.parse_args()
    process.restart(GLIBC_TUNABLES="glibc.malloc.hugetlb=1")  # as run.py does
    print(
        f"{'method':17} {'batch':>5} {'passes s':>9} {'step s':>8} {'ratio':>6} {'rest':>7} {'images/s':>9}",
        flush=True,
    )
    rows = []
    for method in args.methods.split(","):
        with process.on_cores():
            row = measure(method, args)
        rows.append(row)
        print(
            f"{method:17} {row['batch']:5} {row['sum_seconds']:9.3f} {row['step_seconds']:8.3f} "
            f"{row['ratio']:6.2f} {row['rest']:7.2%} {row['images_per_second']:9.0f}",
            flush=True,
        )
    content = {"model": args.model, "width": args.width, "runs": args.runs, "rows": rows}
    process.finish(args.save or "steps", content, bool(args.save))


if __name__ == "__main__":
    main()
