"""What is around a run: switches of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax import attacks, certify, clusters, data, lipschitz, losses
from clustr_jax.kmeans import kmeans
from clustr_jax.models.convolution import conv2d
from clustr_jax.runtime import surroundings
from runs import DIGITS, assert_one_line

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
)


# Switches of JAX


OTHER = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 7,
    "jax_high_dynamic_range_gumbel": True,
    "jax_default_matmul_precision": "highest",
}


@pytest.fixture
def switch():
    """switch(name, value) sets it as JAX_NAME does, until the test is over."""
    before = {}

    def set_to(name, value):
        before.setdefault(name, getattr(jax.config, name))
        jax.config.update(name, value)

    yield set_to
    for name, value in before.items():
        jax.config.update(name, value)


def numbers():
    """Something of all that the switches change."""
    key = jax.random.key(3)
    many = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (3,)))(jnp.arange(4))
    drawn = jax.random.categorical(jax.random.fold_in(key, 9), jnp.zeros(7), shape=(5,))
    # a training step's convolution has another form where a precision is asked for
    x, kernel = (
        np.linspace(-1, 1, 8192).reshape(2, 8, 8, 64),
        np.linspace(-1, 2, 36_864).reshape(3, 3, 64, 64),
    )
    slope = jax.jit(jax.grad(lambda k: jnp.sum(jnp.square(conv2d(jnp.float32(x), k, tuned=True)))))
    drawn = (drawn, slope(jnp.float32(kernel)))
    return [np.asarray(v) for v in (many, *drawn, jnp.arange(3) * 0.5, np.ones(2) * jnp.ones(2))]


@pytest.mark.parametrize("name", OTHER)
def test_a_runs_numbers_do_not_depend_on_a_switch(name, switch):
    assert set(OTHER) == set(surroundings.PINNED)
    with surroundings.pinned(pytest.fail):
        expected = numbers()
    switch(name, OTHER[name])
    said = []
    with surroundings.pinned(said.append):
        found = numbers()
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert getattr(jax.config, name) == OTHER[name]  # as it was for whoever called
    (line,) = said
    assert f"{name.upper()}={OTHER[name]}" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_disable_jit", True),
        ("jax_check_tracer_leaks", True),
        ("jax_debug_infs", True),
        ("jax_transfer_guard", "disallow"),
        ("jax_transfer_guard_host_to_device", "disallow_explicit"),
    ],
)
def test_a_switch_under_which_nothing_works_is_one_line(name, value, switch, attempt, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "splits", lambda *_, **__: pytest.fail("it began"))
    switch(name, value)
    code, stderr = attempt(f"{DIGITS}:clustr", f"--workdir={tmp_path / 'run'}")
    assert code == 2 and name.upper() in stderr and "unset it" in stderr
    assert_one_line(stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("JAX_ENABLE_X64", "maybe"), ("JAX_NUMPY_DTYPE_PROMOTION", "some")]
)
def test_a_switch_that_jax_does_not_understand(name, value, run):
    _, stderr = run("--help", code=2, **{name: value})
    assert_one_line(stderr)
    assert name.lower() in stderr.lower() and value in stderr


# The same functions from Python, under the switches of whoever calls them.

X = np.random.default_rng(0).random((6, 2, 2, 1)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
Z = np.random.default_rng(2).standard_normal((20, 3)).astype(np.float32)
Y, LABELS = (X.reshape(6, 4) @ W).argmax(axis=1), np.arange(20) % 2


def logits(x):
    return x.reshape(x.shape[0], -1) @ jnp.asarray(W, x.dtype)


def threefry():
    return jax.random.key(0, impl="threefry2x32")


def fitted():
    return clusters.fit(threefry(), Z, LABELS, num_classes=2, k=1)


FUNCTIONS = {
    "pgd": lambda: attacks.pgd(threefry(), logits, X, Y, eps=0.1, step_size=0.05, steps=3, start="zero"),
    "qtrades": lambda: (
        attacks.qtrades(
            threefry(), logits, X, np.full((6, 3), 1 / 3, np.float32), eps=0.1, step_size=0.1
        ).shape
    ),
    "fgsm": lambda: attacks.fgsm(threefry(), logits, X, Y, eps=0.1),
    "apgd": lambda: logits(attacks.apgd(threefry(), logits, X, Y, eps=0.5, steps=5)).argmax(axis=1) == Y,
    "fab": lambda: attacks.fab(threefry(), logits, X, Y, eps=0.1, steps=3),
    "square": lambda: attacks.square(threefry(), logits, X, Y, eps=0.1, queries=9).shape,
    "autoattack": lambda: attacks.autoattack(threefry(), logits, X, Y, eps=0.3).robust,
    "kmeans": lambda: kmeans(threefry(), Z, 1).centroids,
    "fit": lambda: fitted().centroids,
    "log_scores": lambda: fitted().log_scores(Z),
    "probs": lambda: fitted().probs(Z),
    "magnet_loss": lambda: losses.magnet_loss(Z.reshape(4, 5, 3), np.array([0, 1, 0, 1]), alpha=1.0)[0],
    "cross_entropy": lambda: losses.cross_entropy(Z, np.arange(20) % 3),
    "radius": lambda: certify.radius(fitted(), Z, LABELS, lipschitz=1.0, rule="any_d"),
    "jacobian_norm": lambda: lipschitz.jacobian_norm(logits, X),
}
SWITCHES = {
    "x64": lambda: jax.enable_x64(True),
    "strict": lambda: jax.numpy_dtype_promotion("strict"),
    "rank": lambda: jax.numpy_rank_promotion("raise"),
    "nans": lambda: jax.debug_nans(True),
}


SLOW = ("autoattack", "square", "fab")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FUNCTIONS]
)
@pytest.mark.one_in(3)
def test_functions_give_the_same_under_switches_of_the_caller(name):
    expected = np.asarray(FUNCTIONS[name]())
    for what, within in SWITCHES.items():
        with within():
            found = np.asarray(FUNCTIONS[name]())
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=what)
