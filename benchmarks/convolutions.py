"""Forms of each convolution of the networks, on this CPU: which one is training to use?

    python benchmarks/convolutions.py [--networks=fast,resnet18] [--images=48] [--runs=5] [--save]

For each shape and each pass (forward, gradient of the input, gradient of the kernel): the usual form, those
of clustr_jax/models/forms.py, and XLA's own derivative, each in a compiled loop as in training, on a device
per core. They take turns, and the median over the turns of usual / other counts. A form is chosen where that
is at least LEAST. `--save` writes results/benchmarks/convolutions.json and, from it, the table of training.
"""

import argparse
import functools
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import process
from jax import lax

from clustr_jax import models
from clustr_jax.models import convolution, forms
from clustr_jax.runtime import mesh

# A form with other rounding has to be worth it, on other machines as well.
LEAST = 1.1
# Of one turn, at least.
SECONDS = 0.1
# name and width; their shapes are those of images [32, 32, 3]
NETWORKS = {
    "fast": ("fast", 64), "fast_plain": ("fast_plain", 64), "resnet8-16": ("resnet8", 16),
    "resnet8-32": ("resnet8", 32), "resnet8-64": ("resnet8", 64), "resnet18": ("resnet18", 64),
}  # fmt: skip


def shapes(name: str, width: int) -> list[forms.Shape]:
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
            yield forms.Shape(kernel[0], stride, padding, x[1], *kernel[2:])
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _convolutions(inner)


def candidates(shape: forms.Shape) -> dict[str, dict]:
    """{pass: {form: function of (x, kernel, dy)}}; "usual" is what conv2d does without `tuned`."""
    k, stride, padding, side = shape[:4]
    usual = functools.partial(convolution._convolve, stride=stride, padding=padding, precision=None)
    found = {
        "forward": {"usual": lambda x, kernel, dy: usual(x, kernel)},
        "input_gradient": {
            "usual": lambda x, kernel, dy: convolution._input_gradient(
                dy, kernel, (side, side), stride, padding, None
            ),
            "xla": lambda x, kernel, dy: jax.vjp(lambda x: usual(x, kernel), x)[1](dy)[0],
        },
        "kernel_gradient": {
            "usual": lambda x, kernel, dy: convolution._kernel_gradient(x, dy, k, stride, padding, None),
            "xla": lambda x, kernel, dy: jax.vjp(lambda kernel: usual(x, kernel), kernel)[1](dy)[0],
        },
    }
    for form in forms.usable(shape):
        found["forward"][form] = lambda x, kernel, dy, form=form: forms.forward(
            form, x, kernel, stride, padding
        )
        found["input_gradient"][form] = lambda x, kernel, dy, form=form: forms.input_gradient(
            form, dy, kernel, (side, side), stride, padding
        )
        found["kernel_gradient"][form] = lambda x, kernel, dy, form=form: forms.kernel_gradient(
            form, x, dy, k, stride, padding
        )
    return found


def looped(f, x, kernel, dy):
    """`f` so many times in one compiled loop on each device, its result written out each time."""

    def run(x, kernel, dy, count):
        def body(_, carry):
            x, kernel, dy, _ = carry
            y = f(x, kernel, dy)
            # the inputs of each turn hang on the last one: nothing can be taken out of the loop
            first = y.reshape(-1)[0] * 1e-30
            x, kernel, dy = (a.at[(0,) * a.ndim].set(first) for a in (x, kernel, dy))
            return x, kernel, dy, y

        one = jax.eval_shape(f, x, kernel, dy)
        return lax.fori_loop(0, count, body, (x, kernel, dy, jnp.zeros(one.shape)))[3][:1]

    specs = (mesh.ROWS, mesh.SAME, mesh.ROWS, mesh.SAME)
    run = jax.jit(mesh.spread(run, specs, mesh.ROWS))
    jax.block_until_ready(run(x, kernel, dy, 0))

    def seconds(count):
        started = time.perf_counter()
        jax.block_until_ready(run(x, kernel, dy, count))
        return (time.perf_counter() - started) / count

    return seconds


def measure(shape: forms.Shape, args) -> dict:
    """{pass: {form: [seconds of each turn]}}."""
    rng, n = np.random.default_rng(0), args.images * mesh.devices()
    k, stride, padding, side, channels, features = shape
    out = (side + 2 * padding - k) // stride + 1

    def normal(*size):
        return jnp.asarray(rng.normal(size=size), jnp.float32)

    arrays = normal(n, side, side, channels), normal(k, k, channels, features), normal(n, out, out, features)
    arrays = mesh.place(arrays)
    found = {}
    for name, by_form in candidates(shape).items():
        runs = {form: looped(f, *arrays) for form, f in by_form.items()}
        once = {form: run(1) for form, run in runs.items()}
        # ten times slower is known well enough after one call
        found[name] = {form: [seconds] for form, seconds in once.items() if seconds > 10 * min(once.values())}
        left = {form: max(1, round(SECONDS / once[form])) for form in runs if form not in found[name]}
        found[name] |= {form: [] for form in left}
        for _ in range(args.runs):
            for form, count in left.items():
                found[name][form].append(runs[form](count))
    return found


def ratios(by_form: dict[str, list[float]]) -> dict[str, float]:
    """{form: median over the turns of the usual form's time / its own}."""
    usual = by_form["usual"]
    return {
        form: statistics.median(a / b for a, b in zip(usual, taken, strict=False))
        for form, taken in by_form.items()
        if form != "usual"
    }


def choice(by_form: dict[str, list[float]]) -> str:
    """The fastest of our forms, or "" where the usual one will do."""
    found = {form: ratio for form, ratio in ratios(by_form).items() if form != "xla" and ratio >= LEAST}
    return max(found, key=found.__getitem__, default="")


def table(rows: list[dict]) -> dict:
    """The content of forms.FILE: the shapes for which some form is chosen."""
    found = [{**row["shape"], **{p: choice(row["seconds"][p]) for p in forms.PASSES}} for row in rows]
    return {"least": LEAST, "shapes": [row for row in found if any(row[p] for p in forms.PASSES)]}


def written(content: dict) -> str:
    """As text, a line for each shape."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in content["shapes"])
    return f'{{"least": {content["least"]}, "shapes": [\n{lines}\n]}}\n'


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--images", type=int, default=48, help="of one device")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write the result, and the table of training")
    args = parser.parse_args()
    process.restart(GLIBC_TUNABLES="glibc.malloc.hugetlb=1")  # as run.py does
    rows = []
    with process.on_cores():
        names = args.networks.split(",")
        wanted = dict.fromkeys(shape for name in names for shape in shapes(*NETWORKS[name]))
        for shape in wanted:
            started = time.perf_counter()
            found = measure(shape, args)
            rows.append({"shape": shape._asdict(), "seconds": found})
            told = {p: {form: round(ratio, 2) for form, ratio in ratios(found[p]).items()} for p in found}
            print(f"{tuple(shape)} {told} {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    process.finish("convolutions", {"images": args.images, "runs": args.runs, "rows": rows}, args.save)
    if args.save:
        forms.FILE.write_text(written(table(rows)))


if __name__ == "__main__":
    main()
