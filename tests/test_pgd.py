"""PGD: exact on linear models, the promises that hold for any model, and the compile budget.

One float32 rounding of a pixel in [0, 1] is at most 6e-8 (ULP below).
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.tree_util import Partial

import reference
from clustr_jax import attacks, losses
from clustr_jax.runtime.errors import UserError

ULP = 6e-8
SHAPE = (4, 4, 1)


@flax.struct.dataclass
class Linear:
    """A pytree with a method: logits = x . weight + bias."""

    weight: jax.Array
    bias: jax.Array

    def logits(self, x):
        return x.reshape(x.shape[0], -1) @ self.weight + self.bias[None]


def unfoolable(rng):
    """Two classes, weights of either sign; class 0 always wins by about 10 and the margin grows along w."""
    w = rng.normal(size=16, scale=0.1).astype(np.float32)
    model = Linear(jnp.stack([-w / 2, w / 2], axis=1), jnp.array([10.0, 0.0]))
    return model, w.reshape(1, *SHAPE)


def mlp(params, x):
    """A small non-linear model for the properties."""
    hidden = jnp.tanh(x.reshape(x.shape[0], -1) @ params[0])
    return hidden @ params[1]


def random_mlp(seed=0):
    rng = np.random.default_rng(seed)
    params = rng.normal(size=(16, 12)), rng.normal(size=(12, 3))
    return Partial(mlp, [jnp.asarray(p, jnp.float32) for p in params])


def images(rng, n, low=0.0, high=1.0):
    return rng.uniform(low, high, size=(n, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize("start, select", [("zero", "success"), ("uniform", "loss"), ("normal", "success")])
def test_linf_on_a_linear_model_is_the_corner(start, select, key, rng):
    """x_adv = clip(x + eps sign(w), 0, 1), difference exactly 0, from every start."""
    model, w = unfoolable(rng)
    x, y, eps = images(rng, 6), np.zeros(6, np.int32), 0.1
    x[0], x[1] = 0.0, 1.0
    x_adv = attacks.pgd(
        key, model.logits, x, y, eps=eps, step_size=0.4 * eps, steps=6, restarts=2,
        loss_fn=losses.margin, start=start, select=select,
    )  # fmt: skip
    assert x_adv.shape == x.shape and x_adv.dtype == jnp.float32
    np.testing.assert_array_equal(x_adv, np.clip(x + np.float32(eps) * np.sign(w), 0, 1))


def test_l2_on_a_linear_model_is_the_point_of_the_sphere(key, rng):
    """x_adv = x + eps w / |w| to 1e-6 (a dozen roundings), for points without a box."""
    model, w = unfoolable(rng)
    x, y, eps = images(rng, 6, -1.0, 2.0), np.zeros(6, np.int32), 0.2
    x_adv = attacks.pgd(
        key, model.logits, x, y, eps=eps, step_size=0.4 * eps, steps=4,
        loss_fn=losses.margin, norm="l2", start="zero", bounds=None,
    )  # fmt: skip
    np.testing.assert_allclose(x_adv, x + eps * w / np.linalg.norm(w), atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_match_the_reference(norm, key, rng):
    """Few steps from x itself with an active box; probability targets, so the last iterate returns."""
    model, w = unfoolable(rng)
    x, probs = images(rng, 6), np.tile(np.float32([1, 0]), (6, 1))
    settings = dict(eps=0.8, step_size=0.3, steps=4, norm=norm)

    def linear_loss(logits, p):
        return -jnp.sum(p * logits, axis=1)

    x_adv = attacks.pgd(key, model.logits, x, probs, loss_fn=linear_loss, start="zero", **settings)
    expected = reference.pgd_linear(x, w[0], **settings)
    np.testing.assert_allclose(x_adv, expected, atol=1e-6)  # 4 steps of a few roundings


@pytest.mark.parametrize("norm, start, select", [
    ("linf", "uniform", "success"), ("linf", "uniform", "loss"), ("linf", "normal", "success"),
    ("l2", "uniform", "success"), ("l2", "normal", "loss"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::clustr_jax.attacks.UnattackedWarning")
@given(eps=st.one_of(st.just(0.0), st.floats(1e-4, 1.0)), ratio=st.floats(0.1, 3.0), seed=st.integers(0, 99))
def test_inside_the_ball_and_the_box(norm, start, select, eps, ratio, seed):
    """For any eps, step and model, pixels at the border included; eps = 0 is the identity."""
    rng = np.random.default_rng(seed)
    x, y = images(rng, 16), rng.integers(0, 3, size=16)
    x[0] = np.round(x[0])
    x_adv = np.asarray(
        attacks.pgd(
            jax.random.key(seed), random_mlp(seed), x, y, eps=eps, step_size=ratio * eps, steps=3,
            restarts=2, norm=norm, start=start, select=select,
        )
    )  # fmt: skip
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    delta = (np.float64(x_adv) - x).reshape(16, -1)
    if norm == "linf":
        assert np.abs(delta).max() <= eps + ULP
    else:
        assert np.linalg.norm(delta, axis=1).max() <= eps * (1 + 1e-6) + 4 * ULP  # sqrt(16) pixels
    if eps == 0:
        np.testing.assert_array_equal(x_adv, x)


def fooled(model, x_adv, y):
    return np.asarray(model(jnp.asarray(x_adv)).argmax(axis=1) != y)


def test_more_restarts_never_lose_a_success():
    """Restart r draws the same numbers whatever the number of restarts: successes accumulate."""
    rng = np.random.default_rng(0)
    model, x = random_mlp(), images(rng, 64)
    y = np.asarray(model(jnp.asarray(x)).argmax(axis=1))
    run = functools.partial(attacks.pgd, eps=0.12, step_size=0.05, steps=1)
    one, four = (fooled(model, run(jax.random.key(1), model, x, y, restarts=r), y) for r in (1, 4))
    assert (one <= four).all()
    assert four.sum() > one.sum()  # the test would be empty without a difference


def test_same_key_same_result_and_the_key_matters(rng):
    """Bit for bit, called alone or inside jit up to one rounding; another key gives other noise."""
    model, x, y = random_mlp(), images(rng, 16), np.zeros(16, np.int64)
    run = functools.partial(attacks.pgd, eps=0.05, step_size=0.02, steps=3, restarts=2)
    first, again = (run(jax.random.key(4), model, x, y) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    nested = jax.jit(lambda key, x: run(key, model, x, y))(jax.random.key(4), x)
    np.testing.assert_allclose(nested, first, atol=2 * ULP)
    assert not np.array_equal(run(jax.random.key(5), model, x, y), first)


def test_outcome_does_not_depend_on_order_or_batch_mates(rng):
    """With `ids` an example is attacked alike anywhere in a batch of this size; by default ids = 0..B-1."""
    model, x, y = random_mlp(), images(rng, 16), rng.integers(0, 3, size=16)
    run = functools.partial(attacks.pgd, eps=0.05, step_size=0.02, steps=3, restarts=2)
    ids, order = np.arange(16, dtype=np.int32), rng.permutation(16)
    first = np.asarray(run(jax.random.key(4), model, x, y, ids=ids))
    np.testing.assert_array_equal(run(jax.random.key(4), model, x, y), first)
    moved = run(jax.random.key(4), model, x[order], y[order], ids=ids[order])
    np.testing.assert_allclose(moved, first[order], atol=2 * ULP)
    mates = np.where(np.arange(16)[:, None, None, None] < 4, x, images(rng, 16))
    with_others = run(jax.random.key(4), model, mates, y, ids=np.where(ids < 4, ids, ids + 100))
    np.testing.assert_allclose(with_others[:4], first[:4], atol=2 * ULP)
    assert not np.allclose(run(jax.random.key(4), model, x, y, ids=ids + 1), first, atol=1e-3)


@pytest.mark.filterwarnings("ignore::clustr_jax.attacks.UnattackedWarning")
def test_a_zero_gradient_moves_nothing(key):
    """0 / |0| = 0 in l2: no nan, no step."""
    x, y = np.full((3, *SHAPE), 0.5, np.float32), np.zeros(3, np.int32)
    flat = Partial(lambda x: jnp.zeros((x.shape[0], 2)) + jnp.array([[3.0, 0.0]]))
    x_adv = attacks.pgd(key, flat, x, y, eps=0.3, step_size=0.1, steps=2, start="zero", norm="l2")
    np.testing.assert_array_equal(x_adv, x)


@pytest.mark.filterwarnings("ignore:logits_fn returned bounded scores")  # so they are, on purpose
@pytest.mark.filterwarnings("ignore::clustr_jax.attacks.UnattackedWarning")
def test_a_sweep_and_new_parameters_compile_once(rng, compilations):
    """Four eps, four step sizes and four models of one shape through a method, a Partial, a function."""
    x, y = images(rng, 4), np.zeros(4, np.int32)

    def with_params(params, x):
        return mlp(params, x)

    counts = {"linear": [], "partial": [], "plain": []}
    for i, eps in enumerate((2 / 255, 8 / 255, 16 / 255, 0.1)):
        params = [jnp.full((16, 2), 0.1 * i), jnp.ones((2, 3))]

        def plain(x, params=params):
            return mlp([2 * params[0], params[1]], x)

        models = Linear(params[0], jnp.ones(2)).logits, Partial(with_params, params), plain
        for model, name in zip(models, counts, strict=True):
            with compilations() as found:
                attacks.pgd(jax.random.key(i), model, x, y, eps=eps, step_size=eps / 4, steps=2, restarts=2)
            counts[name].append(len(found))
    for name, found in counts.items():
        assert found[0] > 0 and found[1:] == [0] * 3, (name, found)


def test_a_method_of_a_pytree_is_unwrapped(rng):
    """Same answer as the Partial of the unbound method, with the arrays of *this* object."""
    x = images(rng, 4)
    run = functools.partial(attacks.pgd, x=x, eps=0.1, step_size=0.05, steps=2)
    for seed in range(2):
        weight = jnp.asarray(np.random.default_rng(seed).normal(size=(16, 2)), jnp.float32)
        model = Linear(weight, jnp.zeros(2))
        y = model.logits(x).argmax(axis=1)
        bound = run(jax.random.key(0), model.logits, y=y)
        np.testing.assert_array_equal(bound, run(jax.random.key(0), Partial(Linear.logits, model), y=y))
        gain = losses.cross_entropy(model.logits(bound), y) - losses.cross_entropy(model.logits(x), y)
        assert (gain > 0).all()


@pytest.mark.parametrize("y", [0, 1])
def test_a_gradient_that_is_no_number_is_no_success(y, key):
    """sqrt at 0: NaN after the first step, for either label; told, and not counted."""

    def logits(x):
        other = jnp.full_like(x, -3.05 if y else -2.95)
        return jnp.concatenate([jnp.sqrt(jnp.maximum(x - 0.5, 0.0)) - 3.0, other], axis=1)

    x, labels = jnp.full((3, 1), 0.2), jnp.full(3, 1 - y)
    with pytest.raises(UserError, match="NaN for 3 of 3 images"):
        attacks.pgd(key, logits, x, labels, eps=0.05, step_size=0.02, steps=5)
