"""What the attacks refuse or warn about, and that it is named."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from affine_model import CLASSES, SHAPE, SLOTS, STEPS, N, problem, wrong
from clustr_jax import attacks
from clustr_jax.attacks import scheduler
from clustr_jax.attacks.geometry import ascend
from clustr_jax.attacks.input_checks import check_logits
from clustr_jax.clusters import Clusters
from clustr_jax.runtime.errors import UserError


def bad_inputs():
    _, _, model, x, y = problem()
    return {
        "outside": (dict(x=x + 0.1), "x must lie in bounds"),
        "negative": (dict(x=x - 0.1), "x must lie in bounds"),
        "nan": (dict(x=np.where(np.arange(N)[:, None, None, None] == 3, np.nan, x)), "x has values"),
        "high": (dict(y=np.full(N, CLASSES)), r"y must lie in 0\.\.4"),
        "low": (dict(y=np.full(N, -1)), r"y must lie in 0\.\.4"),
        "float": (dict(y=y.astype(np.float32)), "y must hold integer labels"),
        "few": (dict(y=y[:-1]), r"x must be \[B, \.\.\.\] and y \[B\]"),
        "flat": (dict(x=x.reshape(-1)), r"x must be \[B, \.\.\.\] and y \[B\]"),
        "column": (dict(y=y[:, None]), r"y must be labels \[B\]|and y \[B\]"),
        "few_ids": (dict(ids=np.arange(N - 1)), "ids must be one whole number for each"),
        "many_ids": (dict(ids=np.arange(N + 1)), "ids must be one whole number for each"),
        "wide_ids": (dict(ids=np.arange(N) + 2**32), "ids must fit in 32 bits, got 4294967296 to"),
        "deep_ids": (dict(ids=np.arange(N) - 2**31 - 1), "ids must fit in 32 bits, got -2147483649 to"),
        "float_ids": (dict(ids=np.arange(N) / 2), "ids must be one whole number for each"),
        "norm": (dict(norm="l1"), "norm must be one of"),
        "eps": (dict(eps=-0.1), "eps must be >= 0"),
        "nan_eps": (dict(eps=float("nan")), "eps must be >= 0"),
        "probabilities": (dict(logits_fn=lambda x: jax.nn.softmax(model(x))), "logits_fn returned prob"),
        "infinite": (dict(logits_fn=lambda x: model(x).at[0, 0].set(jnp.inf)), "logits_fn returned values"),
        "shape": (dict(logits_fn=lambda x: model(x)[:, 0]), r"logits_fn must return \[B, Y\]"),
    }


@pytest.mark.wrong_arrays
@pytest.mark.parametrize("case", list(bad_inputs()))
@pytest.mark.parametrize("name", ["apgd", "autoattack", "pgd"])
def test_bad_input_is_named(name, case):
    """One UserError, whose text says which argument; nothing has been attacked by then."""
    _, _, model, x, y = problem()
    change, text = bad_inputs()[case]
    given_ = dict(logits_fn=model, x=x, y=y, eps=0.1) | change
    if name == "pgd":
        if case in ("few", "shape"):
            given_["bounds"] = (0.0, 1.0)
        given_ |= dict(step_size=0.1, steps=1)
    else:
        given_["slots"] = SLOTS
    with pytest.raises(UserError, match=text):
        getattr(attacks, name)(jax.random.key(0), **given_)


@pytest.mark.wrong_arrays
@pytest.mark.parametrize("case", ["outside", "nan", "probabilities", "infinite", "shape", "few"])
def test_bad_input_beside_probabilities_is_named(case):
    """QTRADES has no labels, and looks at the rest all the same."""
    _, _, model, x, y = problem()
    change, text = bad_inputs()[case]
    probs = np.full((len(change.get("y", y)), CLASSES), 1 / CLASSES, np.float32)
    given_ = dict(logits_fn=model, x=x) | {k: v for k, v in change.items() if k != "y"}
    with pytest.raises(UserError, match=text):
        attacks.qtrades(jax.random.key(0), **given_, probs=probs, eps=0.1, step_size=0.1)


@pytest.mark.wrong_arrays
def test_a_column_of_labels_is_refused_inside_jit_as_well():
    """[B, 1] would pass for probabilities, whose gradient is 0 for label 0: a blind attack."""
    _, _, model, x, y = problem()
    with pytest.raises(UserError, match="y must be labels"):
        jax.jit(lambda y: attacks.pgd(jax.random.key(0), model, x, y, eps=0.1, step_size=0.1, steps=1))(
            y[:, None]
        )


def test_keys_of_another_kind():
    """Those of a hardware generator: their seed is taken, and the same key gives the same images."""
    _, _, model, x, y = problem()
    run = functools.partial(attacks.apgd, logits_fn=model, x=x, y=y, eps=0.03, steps=STEPS, slots=SLOTS)
    keys = [jax.random.key(seed, impl="rbg") for seed in (0, 0, 1)]
    with jax.debug_key_reuse(False):
        first, again, other = (run(key) for key in keys)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert wrong(model, first, y).sum() == wrong(model, run(jax.random.key(0)), y).sum()


@pytest.mark.parametrize("size", [1.0, 1e-10, 1e-15, 1e-25, 1e-35])
def test_l2_steps_have_their_length_however_small_the_gradient(size, rng):
    gradient = (size * rng.normal(size=(5, 3, 4))).astype(np.float32)
    gradient[4] = 0.0
    moved = np.asarray(ascend(jnp.zeros((5, 3, 4)), jnp.asarray(gradient), 0.1, "l2"), np.float64)
    direction = np.float64(gradient[:4]) / np.linalg.norm(
        np.float64(gradient[:4]), axis=(1, 2), keepdims=True
    )
    np.testing.assert_allclose(moved[:4], 0.1 * direction, atol=1e-6)
    assert not moved[4].any()


def test_a_confident_softmax_hides_nothing_from_l2():
    """A margin of 64 nats, so cross entropy's gradient is of the order 1e-26: the way out is 0.4 long."""
    x, y = np.full((2, 2, 2, 1), 0.5, np.float32), np.zeros(2, np.int32)
    x[:, 0, 0] = 0.9
    model = Partial(lambda x: 80 * jnp.stack([x[:, 0, 0, 0] - 0.5, 0.5 - x[:, 0, 0, 0]], axis=1))
    assert np.ptp(model(x), axis=1).min() > 60
    x_adv = attacks.apgd(jax.random.key(0), model, x, y, eps=0.5, steps=20, norm="l2", slots=2)
    assert wrong(model, x_adv, y).all()


def test_a_transferred_image_without_finite_logits_is_no_success():
    model = Partial(lambda x: jnp.stack([jnp.sqrt(x[:, 0] - 0.5), x[:, 0]], axis=1))
    x, y = np.float32([[0.6], [0.4], [0.7]]), np.int32([0, 1, 1])
    with pytest.raises(UserError, match="non-finite logits"):
        scheduler.misjudged(model, x, y)
    np.testing.assert_array_equal(scheduler.misjudged(model, x[[0, 2]], y[[0, 2]]), [True, False])


@pytest.mark.parametrize("name", ["apgd", "fab", "square", "autoattack"])
def test_slots_must_be_positive(name):
    _, _, model, x, y = problem()
    with pytest.raises(UserError, match="slots must be at least 1, got 0"):
        getattr(attacks, name)(jax.random.key(0), model, x, y, eps=0.1, slots=0)


@pytest.mark.wrong_arrays
def test_other_bad_settings():
    _, _, model, x, y = problem()
    key = jax.random.key(0)
    with pytest.raises(UserError, match="steps must be at least 1, got 0"):
        attacks.apgd(key, model, x, y, eps=0.1, steps=0)
    with pytest.raises(UserError, match="restarts must be at least 1, got 0"):
        attacks.fab(key, model, x, y, eps=0.1, restarts=0)
    with pytest.raises(UserError, match=r"attacks: unknown 'apgd'; known: apgd-ce"):
        attacks.autoattack(key, model, x, y, eps=0.1, attacks=("apgd",))
    with pytest.raises(UserError, match=r"square takes images \[B, H, W, C\]"):
        attacks.square(key, model, x.reshape(N, -1), y, eps=0.1, slots=SLOTS)
    with pytest.raises(UserError, match="kind must be uniform or gaussian"):
        attacks.noise(key, model, x, y, eps=0.1, kind="salt")


def exp_scores(mu, x):
    return Clusters(mu, jnp.float32(1.0)).scores(x.reshape(x.shape[0], -1))


def test_exp_scores_are_recognised():
    """Bounded scores that are no probabilities: a warning, from `pgd` and from the scheduled attacks."""
    x = np.random.default_rng(0).uniform(size=(SLOTS, *SHAPE)).astype(np.float32)
    model = Partial(exp_scores, jnp.asarray(x.reshape(SLOTS, 1, -1)[:4]))
    y = np.zeros(SLOTS, np.int32)
    y[:4] = np.arange(4)
    with pytest.warns(UserWarning, match="logits_fn returned bounded scores"):
        attacks.pgd(jax.random.key(0), model, x, y, eps=0.01, step_size=0.01, steps=1)
    with pytest.warns(UserWarning, match="logits_fn returned bounded scores"):
        false = (np.asarray(model(x)).argmax(axis=1) + 1) % 4  # nothing to attack
        attacks.autoattack(jax.random.key(0), model, x, false, eps=0.01, slots=SLOTS)
    with warnings.catch_warnings():  # what they should be
        warnings.simplefilter("error")
        check_logits(np.log(model(x)), y)


@pytest.mark.parametrize("case", ["outside", "high", "probabilities"])
def test_inside_jit_values_are_not_looked_at(case):
    """In a training step `pgd` costs nothing extra and refuses nothing that it cannot see."""
    _, _, model, x, y = problem()
    change, _ = bad_inputs()[case]
    given_ = dict(logits_fn=model, x=x, y=y) | change
    f = given_["logits_fn"]

    @jax.jit
    def run(key, x, y):
        return attacks.pgd(key, f, x, y, eps=0.1, step_size=0.1, steps=1)

    assert run(jax.random.key(0), given_["x"], given_["y"]).shape == x.shape
