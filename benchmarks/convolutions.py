"""The kernel gradient of each convolution of the networks, on this CPU: where is Winograd's form to be used?

    python benchmarks/convolutions.py [--networks=fast,resnet18] [--images=48] [--runs=5] [--save]

For each shape: the usual form, Winograd's where it can be used, and XLA's own derivative, each in a compiled
loop as in training, on a device per core. They take turns, and the median over the turns of usual / Winograd
counts: at least LEAST where `clustr_jax.models.winograd.pays` is true, less than MISSED elsewhere.
"""

import argparse
import functools
import statistics
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import process
from jax import lax

from clustr_jax import models
from clustr_jax.models import convolution, winograd
from clustr_jax.runtime import mesh

# A form with other rounding has to be worth it, on other machines as well.
LEAST = 1.1
# A rule by channels alone leaves out some shapes that gain less than this.
MISSED = 1.5
# Of one turn, at least.
SECONDS = 0.1
# name and width; their shapes are those of images [32, 32, 3]
NETWORKS = {
    "fast": ("fast", 64), "fast_plain": ("fast_plain", 64), "resnet8-16": ("resnet8", 16),
    "resnet8-32": ("resnet8", 32), "resnet8-64": ("resnet8", 64), "resnet18": ("resnet18", 64),
}  # fmt: skip


class Shape(NamedTuple):
    """Kernel's side, stride, padding, image's side, channels in and out."""

    kernel: int
    stride: int
    padding: int
    side: int
    channels: int
    features: int


def shapes(name: str, width: int) -> list[Shape]:
    """The convolutions of a network, each once, as JAX traces them."""
    net = models.build(name, num_classes=10, input_shape=(32, 32, 3), mean=(0.0,), std=(1.0,), width=width)
    variables = jax.eval_shape(net.init, jax.random.key(0))
    traced = jax.make_jaxpr(net.eval)(variables, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    return list(dict.fromkeys(_convolutions(traced.jaxpr)))


def _convolutions(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            x, kernel = (v.aval.shape for v in equation.invars)
            stride, padding = equation.params["window_strides"][0], equation.params["padding"][0][0]
            yield Shape(kernel[0], stride, padding, x[1], *kernel[2:])
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _convolutions(inner)


def candidates(shape: Shape) -> dict:
    """{form: function of (x, dy)}"""
    k, stride, padding, _, channels, features = shape
    convolve = functools.partial(convolution._convolve, stride=stride, padding=padding, precision=None)

    def derived(x, dy):
        return jax.vjp(lambda kernel: convolve(x, kernel), jnp.zeros((k, k, channels, features)))[1](dy)[0]

    found = {
        "usual": lambda x, dy: convolution._kernel_gradient(x, dy, k, stride, padding, None),
        "xla": derived,
    }
    if (k, stride) == (winograd.SIZE, 1):
        found["winograd"] = lambda x, dy: convolution._winograd_gradient(x, dy, padding)
    return found


def looped(f, x, dy):
    """`f` so many times in one compiled loop on each device, its result written out each time."""

    def run(x, dy, count):
        def body(_, carry):
            x, dy, y = carry
            # the inputs of each turn hang on the last one: nothing can be taken out of the loop
            first = y.reshape(-1)[0] * 1e-30
            x, dy = (a.at[(0,) * a.ndim].set(first) for a in (x, dy))
            return x, dy, f(x, dy)

        one = jax.eval_shape(f, x, dy)
        return lax.fori_loop(0, count, body, (x, dy, jnp.zeros(one.shape)))[2][:1]

    run = jax.jit(mesh.spread(run, (mesh.ROWS, mesh.ROWS, mesh.SAME), mesh.ROWS))
    jax.block_until_ready(run(x, dy, 0))

    def seconds(count):
        started = time.perf_counter()
        jax.block_until_ready(run(x, dy, count))
        return (time.perf_counter() - started) / count

    return seconds


def measure(shape: Shape, args) -> dict[str, list[float]]:
    """{form: [seconds of each turn]}"""
    rng, n = np.random.default_rng(0), args.images * mesh.devices()
    out = (shape.side + 2 * shape.padding - shape.kernel) // shape.stride + 1
    sizes = (n, shape.side, shape.side, shape.channels), (n, out, out, shape.features)
    arrays = mesh.place(tuple(jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes))
    runs = {form: looped(f, *arrays) for form, f in candidates(shape).items()}
    once = {form: run(1) for form, run in runs.items()}
    # ten times slower is known well enough after one call
    found = {form: [seconds] for form, seconds in once.items() if seconds > 10 * min(once.values())}
    left = {form: max(1, round(SECONDS / once[form])) for form in runs if form not in found}
    found |= {form: [] for form in left}
    for _ in range(args.runs):
        for form, count in left.items():
            found[form].append(runs[form](count))
    return found


def ratio(seconds: dict[str, list[float]]) -> float:
    """Median over the turns of the usual form's time / Winograd's."""
    turns = zip(seconds["usual"], seconds["winograd"], strict=True)
    return statistics.median(usual / other for usual, other in turns)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--images", type=int, default=48, help="of one device")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/convolutions.json")
    args = parser.parse_args()
    process.restart(GLIBC_TUNABLES="glibc.malloc.hugetlb=1")  # as run.py does
    rows = []
    with process.on_cores():
        names = args.networks.split(",")
        for shape in dict.fromkeys(shape for name in names for shape in shapes(*NETWORKS[name])):
            seconds = measure(shape, args)
            rows.append({"shape": shape._asdict(), "seconds": seconds})
            told = f"usual / winograd {ratio(seconds):.2f}" if "winograd" in seconds else ""
            print(tuple(shape), told, file=sys.stderr, flush=True)
    process.finish("convolutions", {"images": args.images, "runs": args.runs, "rows": rows}, args.save)


if __name__ == "__main__":
    main()
