"""Losses against the float64 references: values, gradients, masks and degenerate batches.

Tolerances: RTOL = 1e-5 is about 80 float32 roundings (6e-8 each) of a sum of at most a few
dozen terms of the size of the result; gradients get 1e-4 because their terms cancel.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from clustr_jax import losses
from clustr_jax.runtime.errors import UserError
from reference import close

RTOL, GRAD_RTOL = 1e-5, 1e-4
LABEL_LOSSES = [
    (losses.cross_entropy, reference.cross_entropy),
    (losses.margin, reference.margin),
    (losses.dlr, reference.dlr),
]
PROB_LOSSES = [(losses.cross_entropy, reference.cross_entropy), (losses.kl, reference.kl)]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(loss, logits, target):
    """Per-example values, and the gradient of their sum with respect to the logits."""
    return loss(logits, target), jax.grad(lambda z: loss(z, target).sum())(logits)


@functools.partial(jax.jit, static_argnames="alpha")
def magnet(z, classes, *, alpha=12.5, mask=None):
    """(loss, variance, gradient of the total loss plus three times the variance)."""

    def total(z):
        loss, variance = losses.magnet_loss(z, classes, alpha=alpha, mask=mask)
        return loss.sum() + 3 * variance, (loss, variance)

    gradient, (loss, variance) = jax.grad(total, has_aux=True)(z)
    return loss, variance, gradient


def random_probs(rng, shape):
    """Rows that sum to one, each with one class of probability exactly zero."""
    probs = rng.dirichlet(np.ones(shape[1]), size=shape[0])
    probs[:, 1] = 0.0
    return (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("ours, ref", LABEL_LOSSES)
def test_label_losses_match_the_reference(ours, ref, scale, rng):
    """Values and gradients for integer labels, for small and for saturated logits."""
    logits = rng.normal(size=(6, 5), scale=scale).astype(np.float32)
    y = np.array([0, 1, 2, 3, 4, 0])
    value, gradient = value_and_gradient(ours, logits, y)
    assert value.shape == (6,)
    close(value, ref(logits, y), RTOL)
    close(gradient, reference.finite_difference(lambda z: ref(z, y).sum(), logits), GRAD_RTOL)


@pytest.mark.parametrize("ours, ref", PROB_LOSSES)
def test_probability_losses_match_the_reference(ours, ref, rng):
    """Values and gradients for probability targets that contain exact zeros."""
    logits = rng.normal(size=(6, 5), scale=3.0).astype(np.float32)
    probs = random_probs(rng, (6, 5))
    value, gradient = value_and_gradient(ours, logits, probs)
    close(value, ref(logits, probs), RTOL)
    expected = reference.finite_difference(lambda z: ref(z, probs).sum(), logits)
    close(gradient, expected, GRAD_RTOL)


def test_kl_gradient_with_respect_to_the_target(rng):
    """Eq. 5 does not detach the clean probabilities: right inside, and finite where one is zero."""
    logits = rng.normal(size=(4, 5)).astype(np.float32)
    inner = rng.dirichlet(np.full(5, 5.0), size=4)
    target_gradient = jax.jit(jax.grad(lambda p: losses.kl(jnp.asarray(logits), p).sum()))
    gradient = target_gradient(jnp.float32(inner))
    expected = reference.finite_difference(lambda p: reference.kl(logits, p).sum(), inner)
    close(gradient, expected, GRAD_RTOL)
    assert np.isfinite(target_gradient(random_probs(rng, (4, 5)))).all()


def test_one_hot_probabilities_equal_labels(rng):
    """A label and its one-hot row give the same cross entropy, and kl equals it (entropy zero)."""
    logits = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    y = jnp.array([0, 1, 2, 3, 1])
    labels = losses.cross_entropy(logits, y)
    close(losses.cross_entropy(logits, jax.nn.one_hot(y, 4)), labels, RTOL)
    close(losses.kl(logits, jax.nn.one_hot(y, 4)), labels, RTOL)


def test_kl_of_a_distribution_with_itself_is_zero(rng):
    """KL(p || p) = 0 with zero gradient; 1e-6 is float32 rounding of logarithms near 1."""
    logits = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    probs = jax.nn.softmax(logits)
    value, gradient = value_and_gradient(losses.kl, logits, probs)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_a_class_without_clusters_contributes_nothing():
    """Logit -inf (no cluster among the nearest) with probability 0: finite value, finite gradient."""
    logits = jnp.array([[1.0, -jnp.inf, 0.0], [0.5, 2.0, -jnp.inf]])
    y = jnp.array([0, 1])
    probs = jnp.array([[0.7, 0.0, 0.3], [0.5, 0.5, 0.0]])
    for loss, ref, target in [
        (losses.cross_entropy, reference.cross_entropy, y),
        (losses.cross_entropy, reference.cross_entropy, probs),
        (losses.kl, reference.kl, probs),
    ]:
        value, gradient = value_and_gradient(loss, logits, target)
        close(value, ref(logits, target), RTOL)
        assert np.isfinite(gradient).all()


def test_hand_written_constants():
    """Numbers from fidelity 1.1 no. 2: cross entropy with exp scores as logits, 10 classes."""
    y = jnp.array([0])
    one_cluster = jnp.zeros((1, 10)).at[0, 0].set(1.0)  # the point lies on its own centroid
    assert losses.cross_entropy(one_cluster, y)[0] == pytest.approx(1.4612, abs=5e-5)
    assert losses.cross_entropy(2 * one_cluster, y)[0] == pytest.approx(0.797, abs=5e-4)
    assert losses.cross_entropy(jnp.zeros((1, 10)), y)[0] == pytest.approx(2.3026, abs=5e-5)
    worst = jnp.zeros((1, 10)).at[0, 1].set(1.0)
    assert losses.cross_entropy(worst, y)[0] == pytest.approx(2.461, abs=5e-4)
    logits = jnp.array([[3.0, 1.0, 2.0, 0.0]])
    assert losses.margin(logits, y)[0] == -1.0
    assert losses.dlr(logits, y)[0] == pytest.approx(-0.5)
    assert losses.dlr(logits, jnp.array([2]))[0] == pytest.approx(0.5)


def test_margin_gradient_survives_where_cross_entropy_is_flat():
    """100 nats from the boundary log-CE has gradient 0 in float32, the margin loss -1, 1 (fidelity 1.3)."""
    logits, y = jnp.array([[100.0, 0.0, -1.0]]), jnp.array([0])
    gradient = jax.grad(lambda z: losses.margin(z, y).sum())(logits)
    np.testing.assert_array_equal(gradient, [[-1.0, 1.0, 0.0]])


MASKS = {
    "full": np.ones((4, 3), bool),
    "ragged": np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1]], bool),
    "empty row": np.array([[1, 1, 1], [0, 0, 0], [1, 1, 0], [1, 1, 1]], bool),
}


@pytest.mark.parametrize("alpha", [0.0, 2.0, 12.5])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_magnet_loss_matches_equation_3(mask, alpha, rng):
    """Values, variance and gradient; masked entries hold huge garbage that must not count.

    Two rows share a class. alpha = 0 and 2 put some examples on the flat side of the hinge.
    """
    z = rng.normal(size=(4, 3, 5))
    z += 2 * np.array([0, 1, 0, 2])[:, None, None]
    z[~mask] = 1e4
    z = z.astype(np.float32)
    classes = np.array([0, 1, 0, 2])

    def reference_total(z):
        loss, variance = reference.magnet_loss(z, classes, alpha=alpha, mask=mask)
        return loss.sum() + 3 * variance

    loss, variance, gradient = magnet(z, classes, alpha=alpha, mask=mask)
    expected, expected_variance = reference.magnet_loss(z, classes, alpha=alpha, mask=mask)
    close(loss, expected, RTOL)
    close(variance, expected_variance, RTOL)
    assert np.all(np.asarray(loss)[~mask] == 0)
    assert np.all(np.asarray(gradient)[~mask] == 0)
    close(gradient, reference.finite_difference(reference_total, z), GRAD_RTOL)


def test_magnet_loss_by_hand():
    """Two rows {0, 2} and {10, 12}: means 1 and 11, sigma^2 = 4/3, d_own = 1, d_other = 11 or 9."""
    z = jnp.array([[[0.0], [2.0]], [[10.0], [12.0]]])
    loss, variance, _ = magnet(z, jnp.array([0, 1]), alpha=40.0)
    assert variance == pytest.approx(4 / 3)
    far, near = 40 + (1 - 121) * 3 / 8, 40 + (1 - 81) * 3 / 8
    np.testing.assert_allclose(loss, [[max(far, 0), near], [near, max(far, 0)]], rtol=1e-6)


def test_magnet_loss_default_alpha_and_mask(rng):
    """The defaults are alpha = 12.5 (the paper's CIFAR-10) and no mask."""
    z, classes = jnp.asarray(rng.normal(size=(3, 4, 2)), jnp.float32), jnp.array([0, 1, 2])
    expected, _ = reference.magnet_loss(z, [0, 1, 2], alpha=12.5)
    close(jax.jit(losses.magnet_loss)(z, classes)[0], expected, RTOL)


def test_magnet_loss_is_zero_without_another_class(rng):
    """A single class has nothing to be separated from: loss and gradient are zero, not -inf or nan."""
    z = jnp.asarray(rng.normal(size=(3, 4, 2)), jnp.float32)
    only = jnp.zeros(3, jnp.int32)
    loss, variance = jax.jit(losses.magnet_loss)(z, only)
    np.testing.assert_array_equal(loss, 0)
    assert np.isfinite(variance)
    gradient = jax.jit(jax.grad(lambda z: losses.magnet_loss(z, only)[0].sum()))(z)
    np.testing.assert_array_equal(gradient, 0)
    mask = jnp.array([[True] * 4, [True] * 4, [False] * 4])  # the other class has no members
    loss, _, _ = magnet(z, jnp.array([0, 0, 1]), mask=mask)
    np.testing.assert_array_equal(loss, 0)


@pytest.mark.parametrize("members", ["coinciding", "one", "none"])
def test_magnet_loss_is_finite_in_degenerate_batches(members):
    """All points equal (variance 0), a single valid example, no valid example: finite loss and gradient."""
    z = jnp.full((3, 4, 2), 0.5)  # representable, and 4 * 0.5 / 4 is exact: the variance is exactly 0
    mask = jnp.full((3, 4), members == "coinciding").at[0, 0].set(members != "none")
    classes = jnp.array([0, 1, 2])
    loss, variance, gradient = magnet(z, classes, mask=mask)
    assert np.isfinite(loss).all() and np.isfinite(variance) and np.isfinite(gradient).all()
    if members == "coinciding":  # d = 0 everywhere: alpha + log(2 other rows)
        np.testing.assert_allclose(loss, 12.5 + np.log(2), rtol=1e-6)


def test_magnet_loss_has_no_cap_for_far_misclassified_points(rng):
    """The authors' 1e-8 caps the loss at 18.42 and kills the gradient of a point among another class."""
    z = rng.normal(size=(3, 40, 1)).astype(np.float32)  # sigma^2 stays near 1 with one outlier in 120
    z += np.array([0, 10, 20], np.float32)[:, None, None]
    z[0, 0] = 10.0
    classes = jnp.arange(3)
    loss, gradient = jax.jit(jax.value_and_grad(lambda z: losses.magnet_loss(z, classes)[0][0, 0]))(z)
    assert loss > 30

    def outlier(value):
        moved = z.astype(np.float64)
        moved[0, 0] = value
        return reference.magnet_loss(moved, [0, 1, 2])[0][0, 0]

    close(gradient[0, 0], reference.finite_difference(outlier, z[0, 0]), GRAD_RTOL)


def test_smoothing_by_nothing_lets_a_logit_be_minus_infinity():
    z, y = jnp.array([[0.0, -jnp.inf], [1.0, 2.0]]), jnp.array([0, 1])
    np.testing.assert_array_equal(losses.smoothed_cross_entropy(z, y, 0.0), losses.cross_entropy(z, y))
    for smoothing in (1.7, -0.1):
        with pytest.raises(UserError, match="smoothing must be a share"):
            losses.smoothed_cross_entropy(z, y, smoothing)


@pytest.mark.parametrize("there", [np.nan, np.inf, 1e20])
def test_masked_embeddings_take_no_part(there, rng):
    """In jit, where nobody sees them."""
    z = rng.normal(size=(3, 4, 5)).astype(np.float32)
    mask = np.ones((3, 4), bool)
    mask[0, 1] = mask[2, 3] = False
    loss = jax.jit(lambda z: losses.magnet_loss(z, jnp.array([0, 1, 1]), mask=jnp.asarray(mask)))
    own, variance = loss(np.where(mask[..., None], z, 0.0))
    found, other = loss(np.where(mask[..., None], z, np.float32(there)))
    np.testing.assert_array_equal(found, own)
    assert variance == other and (np.asarray(own)[~mask] == 0).all()
    slope = jax.grad(lambda z: loss(z)[0].sum())(np.where(mask[..., None], z, np.float32(there)))
    assert np.isfinite(slope).all() and (np.asarray(slope)[~mask] == 0).all()
