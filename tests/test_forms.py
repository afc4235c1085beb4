"""What training steps compute in a faster form: each against float64 with a stated bound, and who uses it.

Bounds, relative to the largest entry: twice the largest error that was measured. Winograd's was 9.1e-6, of
sums of 3 x 3 x 128 products of standard normal numbers: its matrices have entries of up to 8.
"""

import dataclasses
import importlib.util
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax import models
from clustr_jax.models import convolution, fast, winograd
from clustr_jax.models.convolution import conv2d

ROOT = pathlib.Path(__file__).parents[1]
BOUND = 1.8e-5
# batch, height, width, channels in, channels out, padding
SHAPES = [
    (2, 8, 8, 3, 4, 1),
    (9, 7, 5, 4, 3, 1),
    (16, 4, 4, 128, 128, 1),
    (3, 3, 3, 2, 5, 1),
    (2, 6, 9, 3, 2, 0),
    (2, 5, 6, 3, 2, 2),
    (1, 1, 1, 2, 2, 1),
]


def problem(shape, rng):
    n, height, width, channels, features, padding = shape
    x = rng.normal(size=(n, height, width, channels)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, channels, features)).astype(np.float32)
    out = [side + 2 * padding - 2 for side in (height, width)]
    return x, kernel, rng.normal(size=(n, *out, features)).astype(np.float32)


def exact(x, dy, padding):
    """d loss / d kernel by loops in float64."""
    x, dy = (np.asarray(a, np.float64) for a in (x, dy))
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    found = np.zeros((3, 3, x.shape[-1], dy.shape[-1]))
    for i in range(dy.shape[1]):
        for j in range(dy.shape[2]):
            found += np.einsum("nabc,no->abco", x[:, i : i + 3, j : j + 3], dy[:, i, j])
    return found


def error(found, expected):
    assert found.shape == expected.shape
    return float(np.max(np.abs(np.asarray(found, np.float64) - expected)) / np.max(np.abs(expected)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_winograds_gradient_is_that_of_the_kernel_up_to_its_rounding(shape, rng):
    x, _, dy = problem(shape, rng)
    found = jax.jit(lambda x, dy: convolution._winograd_gradient(x, dy, shape[-1]))(x, dy)
    assert error(found, exact(x, dy, shape[-1])) <= BOUND


@pytest.fixture
def everywhere(monkeypatch):
    """Winograd wherever it can: 3 x 3 and stride 1, however few channels."""
    monkeypatch.setattr(winograd, "_LEAST", 1)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_gradients_are_those_of_jax(everywhere, shape, rng):
    """Through conv2d, jit and vmap: both gradients of a curved function of the outputs."""
    x, kernel, _ = problem(shape, rng)
    padding = shape[-1]

    def of(convolve):
        return jax.jit(jax.grad(lambda x, kernel: jnp.mean(jnp.sin(convolve(x, kernel))), (0, 1)))(x, kernel)

    usual = of(lambda x, kernel: convolution._convolve(x, kernel, 1, padding, None))
    once = of(lambda x, kernel: conv2d(x, kernel, 1, padding, tuned=True))
    each = of(lambda x, kernel: jax.vmap(lambda row: conv2d(row[None], kernel, 1, padding, tuned=True)[0])(x))
    for found in (once, each):
        np.testing.assert_array_less(error(found[0], np.asarray(usual[0], np.float64)), 1e-5)
        assert error(found[1], np.asarray(usual[1], np.float64)) <= BOUND


def test_gelu_and_its_slope_are_those_of_the_normal_distribution():
    """The absolute error, over max(1, |x|), against math.erf in float64."""
    x = np.concatenate([np.linspace(-40, 40, 4001), [-1e30, 0.0, 1e30]]).astype(np.float32)
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(fast.quick_gelu)))(x)
    for found, expected in zip(
        (value, slope), zip(*map(reference_gelu, x.tolist()), strict=True), strict=True
    ):
        assert np.all(np.abs(np.asarray(found, np.float64) - expected) <= 3e-7 * np.maximum(1, np.abs(x)))


def reference_gelu(x):
    """(x Phi(x), Phi(x) + x phi(x))"""
    phi = 0.5 * math.erfc(-x / math.sqrt(2))
    return x * phi, phi + x * math.exp(-0.5 * min(x * x, 1400)) / math.sqrt(2 * math.pi)


def network(name, **more):
    return models.build(
        name, num_classes=4, input_shape=(16, 16, 3), mean=(0.5,), std=(0.2,), width=4, **more
    )


def gradients(net, mode, variables, x):
    """The program of the gradients with respect to parameters and images."""

    def total(params, x):
        found = getattr(net, mode)({**variables, "params": params}, x)
        return jnp.sum((found[0] if mode == "train" else found).logits)

    return str(jax.make_jaxpr(jax.grad(total, (0, 1)))(variables["params"], x))


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "fast", "fast_plain", "cnn", "lip_sll"])
@pytest.mark.one_in(5)
def test_only_the_tuned_network_has_other_forms(everywhere, name, rng):
    """The plain one neither evaluates nor trains by them: an attack's figures stay bit for bit."""
    net = network(name)
    variables = net.init(jax.random.key(0))
    x = jnp.asarray(rng.uniform(size=(4, 16, 16, 3)), jnp.float32)
    with_forms = name in ("resnet8", "resnet18", "fast", "fast_plain")
    for mode in ("eval", "train"):
        for tuned, one in ((False, net), (True, net.tuned)):
            text = gradients(one, mode, variables, x)
            assert ("optimization_barrier" in text) == (tuned and with_forms), (tuned, mode)
    assert "erfc" in str(jax.make_jaxpr(net.eval)(variables, x)) or not name.startswith("fast")
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(net.tuned.eval(variables, x).logits, net.eval(variables, x).logits, **close)
    assert jax.tree.map(jnp.shape, net.tuned.init(jax.random.key(0))) == jax.tree.map(jnp.shape, variables)


def test_float32_without_a_precision_and_as_many_channels_as_pay():
    def used(channels=64, features=64, k=3, dtype=jnp.float32, stride=1, padding=1, tuned=True):
        x, kernel = jnp.zeros((2, 8, 8, channels), dtype), jnp.zeros((k, k, channels, features), dtype)

        def total(kernel):
            return jnp.sum(conv2d(x, kernel, stride, padding, tuned=tuned))

        return "optimization_barrier" in str(jax.make_jaxpr(jax.grad(total))(kernel))

    assert used() and used(32, 256)
    assert not used(tuned=False) and not used(k=1, padding=0) and not used(stride=2) and not used(padding=3)
    assert not used(dtype=jnp.bfloat16) and not used(24) and not used(features=512)
    with jax.default_matmul_precision("highest"):
        assert not used()


def test_accelerators_keep_their_own_convolution(everywhere):
    def both(x, kernel):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(conv2d(*a, tuned=True))), (0, 1))(x, kernel)

    args = jnp.zeros((8, 8, 8, 4)), jnp.zeros((3, 3, 4, 4))
    for platform, barrier in (("cuda", False), ("tpu", False), ("cpu", True)):
        text = jax.export.export(jax.jit(both), platforms=(platform,))(*args).mlir_module()
        assert ("optimization_barrier" in text) == barrier


def test_training_steps_and_their_adversaries_use_the_tuned_network():
    from clustr_jax.training import trainers

    net = network("resnet8")
    trainer = trainers.Trainer(net, None, None, None, 0)
    assert trainer.step_net == net.tuned != net and hash(trainer.step_net) == hash(net.tuned)
    assert dataclasses.replace(net.tuned, module=net.tuned.module.clone(tuned=False)) == net
    assert net.tuned.tuned == net.tuned and models.name_of(net.tuned) == "resnet8"


def test_it_is_used_where_it_was_measured_to_pay(monkeypatch):
    """By the benchmark's measurement: it is faster where it is used, and hardly elsewhere."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("convolutions", ROOT / "benchmarks" / "convolutions.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    rows = json.loads((ROOT / "results" / "benchmarks" / "convolutions.json").read_text())["rows"]
    for row in rows:
        shape = benchmark.Shape(**row["shape"])
        paid = winograd.pays(
            (shape.kernel, shape.kernel, shape.channels, shape.features), shape.stride, shape.padding
        )
        ratio = benchmark.ratio(row["seconds"]) if "winograd" in row["seconds"] else 0.0
        assert ratio >= benchmark.LEAST if paid else ratio < benchmark.MISSED, shape
