"""PGD: which iterate of which restart is returned; QTRADES: its start and its step.

One float32 rounding of a pixel in [0, 1] is at most 6e-8 (ULP below).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.tree_util import Partial

import reference
from clustr_jax import attacks

ULP = 6e-8

WINDOW = (0.55, 0.62)


def window_model(x):
    """A model of one pixel: class 1 wins only inside WINDOW; logit 2 carries the pixel to the loss."""
    pixel = x[:, 0]
    inside = (pixel > WINDOW[0]) & (pixel < WINDOW[1])
    return jnp.stack([jnp.zeros_like(pixel), jnp.where(inside, 1.0, -1.0), pixel - 10], axis=1)


def climb(logits, y):
    """Grows with the pixel, fooled or not."""
    return logits[:, 2]


def peak(logits, y):
    """Largest at pixel 0.53: a step of 0.1 from 0.5 overshoots."""
    return -((logits[:, 2] + 10 - 0.53) ** 2)


@pytest.mark.parametrize("select", ["success", "loss"])
def test_the_first_fooled_iterate_is_kept(select, key):
    """Iterates 0.5, 0.6 (fooled), 0.7, 0.8: both rules stop at 0.6; a fooled start is returned as it is."""
    x, y = np.float32([[0.5], [0.6]]), np.zeros(2, np.int32)
    x_adv = attacks.pgd(
        key, window_model, x, y, eps=0.3, step_size=0.1, steps=3, start="zero", loss_fn=climb, select=select
    )
    np.testing.assert_allclose(x_adv, [[0.6], [0.6]], atol=2 * ULP)
    np.testing.assert_array_equal(x_adv[1], x[1])


def test_a_fooled_iterate_beats_a_larger_loss(key):
    """The loss falls from 0.5 (not fooled) to 0.6 (fooled): success comes first."""
    x, y = np.float32([[0.5]]), np.zeros(1, np.int32)
    x_adv = attacks.pgd(key, window_model, x, y, eps=0.3, step_size=0.1, steps=1, start="zero", loss_fn=peak)
    np.testing.assert_allclose(x_adv, [[0.6]], atol=2 * ULP)


@pytest.mark.parametrize("target, select, expected", [
    ("label", "success", 0.5), ("label", "loss", 0.6), ("probs", "success", 0.6), ("probs", "loss", 0.6),
])  # fmt: skip
def test_without_success_the_rules_differ(target, select, expected, key):
    """The loss falls from 0.5 to 0.6: "success" keeps the best iterate, the others return the last.

    Class 2 is the label, and class 0 stands for it in the model, so nothing here is ever fooled.
    """
    y = np.zeros(1, np.int32) if target == "label" else np.float32([[1, 0, 0]])
    model = Partial(lambda x: window_model(x) * jnp.array([[1.0, 0.0, 1.0]]))
    x_adv = attacks.pgd(
        key, model, np.float32([[0.5]]), y, eps=0.3, step_size=0.1, steps=1, start="zero",
        loss_fn=peak, select=select,
    )  # fmt: skip
    np.testing.assert_allclose(x_adv, [[expected]], atol=2 * ULP)


def test_success_beats_loss_only_in_the_sound_rule(key):
    """Restarts that jump over the window end with a larger loss: the authors' rule returns those.

    A restart hits the window with probability about 0.5, so 8 restarts all miss in 0.4 % of the cases.
    """
    x, y = np.full((64, 1), 0.5, np.float32), np.zeros(64, np.int32)
    run = functools.partial(
        attacks.pgd, key, window_model, x, y, eps=0.3, step_size=0.1, steps=10, restarts=8, loss_fn=climb
    )
    with jax.debug_key_reuse(False):
        sound, authors = run(select="success"), run(select="loss")
    assert (window_model(sound).argmax(axis=1) != y).mean() > 0.95
    np.testing.assert_allclose(authors, 0.8, atol=2 * ULP)


@pytest.mark.filterwarnings("ignore::clustr_jax.attacks.UnattackedWarning")
def test_equal_losses_keep_the_later_restart():
    """The authors' >=: with a constant loss the second restart replaces the first."""
    x, y = np.full((8, 1), 0.5, np.float32), np.zeros(8, np.int32)
    flat = Partial(lambda x: jnp.zeros((x.shape[0], 2)) + jnp.array([[3.0, 0.0]]))
    one, two = (
        attacks.pgd(jax.random.key(0), flat, x, y, eps=0.3, step_size=0.1, steps=2, restarts=r, select="loss")
        for r in (1, 2)
    )
    assert (np.abs(one - two) > 1e-6).all()


def small_model(rng):
    """Three classes, one tanh layer; its weights are `model.args[0]`."""
    weights = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((16, 12), (12, 3))]
    return Partial(lambda weights, x: jnp.tanh(x @ weights[0]) @ weights[1], weights)


@pytest.mark.filterwarnings("ignore:logits_fn returned bounded scores")  # black images have logits of 0 here
@pytest.mark.filterwarnings("ignore::clustr_jax.attacks.UnattackedWarning")
def test_qtrades_starts_uniformly_in_the_ball(rng):
    """step_size = 0 shows the start: uniform in [-eps, eps] (Kolmogorov-Smirnov), clipped to the box."""
    eps, model = 0.1, small_model(rng)
    x, probs = rng.uniform(0.2, 0.8, size=(200, 16)).astype(np.float32), np.full((200, 3), 1 / 3, np.float32)
    start = attacks.qtrades(jax.random.key(0), model, x, probs, eps=eps, step_size=0.0)
    noise = np.asarray(start - x).ravel() / eps
    assert scipy.stats.kstest(noise, "uniform", args=(-1, 2)).pvalue > 1e-4
    few = attacks.qtrades(jax.random.key(0), model, x[:9], probs[:9], eps=eps, step_size=0.0)
    np.testing.assert_allclose(few, start[:9], atol=2 * ULP)  # the noise is that of the id, in any batch
    black = attacks.qtrades(jax.random.key(0), model, 0 * x, probs, eps=eps, step_size=0.0)
    np.testing.assert_allclose(black, np.maximum(eps * noise.reshape(x.shape), 0), atol=4 * ULP)


@pytest.mark.filterwarnings("ignore::clustr_jax.attacks.UnattackedWarning")
@pytest.mark.parametrize("step_size", [10 / 255, 2 / 255])
def test_qtrades_is_one_step_from_its_start(step_size, rng):
    """App. D: sign of the gradient of CE(p(x), p(x')) at the start, project, clip (1e-6: a few roundings)."""
    eps, model = 8 / 255, small_model(rng)
    x = rng.uniform(size=(6, 16)).astype(np.float32)
    x[0], x[1] = 0.0, 1.0
    probs = np.asarray(jax.nn.softmax(model(jnp.asarray(x))))
    run = functools.partial(attacks.qtrades, logits_fn=model, x=x, probs=probs, eps=eps)
    start = run(jax.random.key(0), step_size=0.0)
    weights = [np.float64(p) for p in model.args[0]]

    def loss(x_adv):
        logits = np.tanh(x_adv @ weights[0]) @ weights[1]
        return reference.cross_entropy(logits, probs).sum()

    expected = reference.qtrades(
        start, x, lambda s: reference.finite_difference(loss, s), eps=eps, step_size=step_size
    )
    np.testing.assert_allclose(run(jax.random.key(0), step_size=step_size), expected, atol=1e-6)
