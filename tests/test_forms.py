"""Forms of a convolution for training: each against float64 with a stated bound, and who uses them.

Bounds, relative to the largest entry: twice the largest error that was measured, 9.1e-6 and 6e-7, both of
sums of 3 x 3 x 128 products of standard normal numbers. Winograd's matrices have entries of up to 8.
"""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from clustr_jax import models
from clustr_jax.models import blocks, convolution, forms
from clustr_jax.models.convolution import conv2d

ROOT = pathlib.Path(__file__).parents[1]
BOUNDS = {"winograd": 1.8e-5, "patches": 1.2e-6}
# batch, height, width, channels in, channels out, kernel, stride, padding
SHAPES = [
    (2, 8, 8, 3, 4, 3, 1, 1),
    (9, 7, 5, 4, 3, 3, 1, 1),
    (16, 4, 4, 128, 128, 3, 1, 1),
    (3, 3, 3, 2, 5, 3, 1, 1),
    (2, 6, 9, 3, 2, 3, 1, 0),
    (2, 5, 6, 3, 2, 3, 1, 2),
    (1, 1, 1, 2, 2, 3, 1, 1),
    (12, 6, 6, 3, 4, 3, 2, 1),
    (2, 5, 7, 3, 4, 3, 2, 1),
    (2, 6, 5, 3, 4, 1, 2, 0),
    (10, 7, 7, 3, 4, 2, 1, 0),
    (2, 9, 6, 2, 3, 5, 2, 2),
]
CASES = [
    (form, shape)
    for shape in SHAPES
    for form in forms.usable(forms.Shape(shape[5], shape[6], shape[7], shape[1], *shape[3:5]))
]


def problem(shape, rng):
    n, height, width, channels, features, k, stride, padding = shape
    x = rng.normal(size=(n, height, width, channels)).astype(np.float32)
    kernel = rng.normal(size=(k, k, channels, features)).astype(np.float32)
    out = [(side + 2 * padding - k) // stride + 1 for side in (height, width)]
    dy = rng.normal(size=(n, *out, features)).astype(np.float32)
    return x, kernel, dy


def exact(shape, x, kernel, dy):
    """(y, dx, dkernel) by loops in float64; the gradients as the transposed sums."""
    *_, k, stride, padding = shape
    x, kernel, dy = (np.asarray(a, np.float64) for a in (x, kernel, dy))
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    dx, dkernel = np.zeros_like(padded), np.zeros_like(kernel)
    for i in range(dy.shape[1]):
        for j in range(dy.shape[2]):
            window = (slice(None), slice(i * stride, i * stride + k), slice(j * stride, j * stride + k))
            dx[window] += np.einsum("no,abco->nabc", dy[:, i, j], kernel)
            dkernel += np.einsum("nabc,no->abco", padded[window], dy[:, i, j])
    inner = tuple(slice(padding, padding + side) for side in x.shape[1:3])
    return reference.conv2d(x, kernel, stride, padding), dx[:, *inner], dkernel


def computed(form, shape):
    *_, k, stride, padding = shape

    def run(x, kernel, dy):
        return (
            forms.forward(form, x, kernel, stride, padding),
            forms.input_gradient(form, dy, kernel, x.shape[1:3], stride, padding),
            forms.kernel_gradient(form, x, dy, k, stride, padding),
        )

    return jax.jit(run)


def error(found, expected):
    assert found.shape == expected.shape
    return float(np.max(np.abs(np.asarray(found, np.float64) - expected)) / np.max(np.abs(expected)))


@pytest.mark.parametrize("form, shape", CASES, ids=str)
def test_every_form_is_the_convolution_up_to_its_rounding(form, shape, rng):
    arrays = problem(shape, rng)
    for name, found, expected in zip(
        forms.PASSES, computed(form, shape)(*arrays), exact(shape, *arrays), strict=True
    ):
        assert error(found, expected) <= BOUNDS[form], name


@pytest.fixture
def everywhere(monkeypatch):
    """Every shape has a form: Winograd's where it can."""

    def choose(x, kernel, stride, padding):
        usable = forms.usable(forms.Shape(kernel.shape[0], stride, padding, x.shape[1], *kernel.shape[2:]))
        return forms.Forms(*[usable[0]] * len(forms.PASSES))

    monkeypatch.setattr(forms, "chosen", choose)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_jax(everywhere, shape, rng):
    """Through conv2d, jit and vmap: the value and both gradients of a curved function of the outputs."""
    *_, stride, padding = shape
    x, kernel, _ = problem(shape, rng)

    def of(convolve):
        def total(x, kernel):
            return jnp.mean(jnp.sin(convolve(x, kernel)))

        return jax.jit(jax.grad(total, (0, 1)))(x, kernel)

    usual = of(lambda x, kernel: convolution._convolve(x, kernel, stride, padding, None))
    once = of(lambda x, kernel: conv2d(x, kernel, stride, padding, tuned=True))
    each = of(
        lambda x, kernel: jax.vmap(lambda row: conv2d(row[None], kernel, stride, padding, tuned=True)[0])(x)
    )
    for found in (once, each):
        for a, b in zip(found, usual, strict=True):
            # sines of sums: an error of the sum, of some tens, counts as it is
            assert error(a, np.asarray(b, np.float64)) <= 20 * BOUNDS["winograd"]


def network(name, **more):
    return models.build(
        name, num_classes=4, input_shape=(16, 16, 3), mean=(0.5,), std=(0.2,), width=4, **more
    )


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "fast", "fast_plain", "cnn", "lip_sll"])
def test_evaluation_is_bit_for_bit_what_it_was(everywhere, name, rng):
    """Of the plain network neither mode sees the table; of the tuned one both do, where it can."""
    net = network(name)
    variables = net.init(jax.random.key(0))
    x = jnp.asarray(rng.uniform(size=(4, 16, 16, 3)), jnp.float32)
    programs = {}
    for tuned, one in ((False, net), (True, net.tuned)):
        for mode in ("eval", "train"):
            programs[tuned, mode] = str(jax.make_jaxpr(getattr(one, mode))(variables, x))
    with_forms = name in ("resnet8", "resnet18", "fast", "fast_plain")
    for (tuned, mode), text in programs.items():
        assert ("optimization_barrier" in text) == (tuned and with_forms), (tuned, mode)
    if with_forms:
        close = {"rtol": 1e-3, "atol": 1e-4}
        np.testing.assert_allclose(
            net.tuned.eval(variables, x).logits, net.eval(variables, x).logits, **close
        )
    assert jax.tree.map(jnp.shape, net.tuned.init(jax.random.key(0))) == jax.tree.map(jnp.shape, variables)


def test_only_float32_square_images_of_measured_shapes_have_a_form(monkeypatch):
    shape = forms.Shape(3, 1, 1, 8, 5, 6)
    monkeypatch.setattr(forms, "table", lambda: {shape: forms.Forms("winograd", "winograd", "winograd")})

    def used(size, dtype=jnp.float32, stride=1, padding=1):
        x, kernel = jnp.zeros(size, dtype), jnp.zeros((3, 3, 5, 6), dtype)
        return forms.chosen(x, kernel, stride, padding) != forms.Forms()

    assert used((2, 8, 8, 5))
    assert not used((2, 8, 9, 5)) and not used((2, 9, 9, 5)) and not used((2, 8, 8, 5), stride=2)
    assert not used((2, 8, 8, 5), jnp.bfloat16) and not used((2, 8, 8, 5), padding=0)
    x, kernel = jnp.zeros((2, 8, 8, 5)), jnp.zeros((3, 3, 5, 6))

    def text(**how):
        return str(jax.make_jaxpr(lambda x, kernel: conv2d(x, kernel, **how))(x, kernel))

    assert "optimization_barrier" in text(tuned=True) and "optimization_barrier" not in text()
    with jax.default_matmul_precision("highest"):
        assert "optimization_barrier" not in text(tuned=True)


def test_accelerators_keep_their_own_convolution(everywhere):
    def gradients(x, kernel):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(conv2d(*a, tuned=True))), (0, 1))(x, kernel)

    args = jnp.zeros((8, 8, 8, 4)), jnp.zeros((3, 3, 4, 4))
    for platform, barrier in (("cuda", False), ("tpu", False), ("cpu", True)):
        text = jax.export.export(jax.jit(gradients), platforms=(platform,))(*args).mlir_module()
        assert ("optimization_barrier" in text) == barrier


def test_training_steps_and_their_adversaries_use_the_tuned_network():
    from clustr_jax.training import trainers

    net = network("resnet8")
    trainer = trainers.Trainer(net, None, None, None, 0)
    assert trainer.step_net == net.tuned != net and hash(trainer.step_net) == hash(net.tuned)
    assert dataclasses.replace(net.tuned, module=net.tuned.module.clone(tuned=False)) == net
    assert net.tuned.tuned == net.tuned and models.name_of(net.tuned) == "resnet8"


def test_the_table_is_what_the_benchmark_found(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("convolutions", ROOT / "benchmarks" / "convolutions.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    rows = json.loads((ROOT / "results" / "benchmarks" / "convolutions.json").read_text())["rows"]
    assert forms.FILE.read_text() == benchmark.written(benchmark.table(rows))
    for shape, chosen in forms.table().items():
        assert {*chosen} <= {"", *forms.usable(shape)}


def test_a_block_divides_the_batch():
    for batch in range(1, 130):
        assert batch % blocks.size(batch) == 0
    assert [blocks.size(batch) for batch in (1, 8, 48, 60, 64, 120, 512)] == [1, 8, 8, 10, 8, 8, 8]
