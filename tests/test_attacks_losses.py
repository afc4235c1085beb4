"""What the attacks climb: losses, targets, clusters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
import reference_attacks
from clustr_jax.attacks import attack_losses, targets
from clustr_jax.attacks.attack_losses import View
from clustr_jax.clusters import Clusters


def test_targeted_dlr(rng):
    logits, y = rng.normal(size=(20, 6)).astype(np.float32), rng.integers(0, 6, 20)
    target = (y + 1 + rng.integers(0, 5, 20)) % 6
    reference.close(
        attack_losses.dlr_targeted(logits, y, target), reference_attacks.dlr_targeted(logits, y, target), 1e-5
    )
    few = logits[:, :3]
    y, target = y % 3, (y % 3 + 1) % 3
    expected = [z[t] - z[c] for z, c, t in zip(few, y, target, strict=True)]
    np.testing.assert_allclose(attack_losses.dlr_targeted(few, y, target), expected, rtol=1e-6)
    np.testing.assert_allclose(attack_losses.margin_targeted(few, y, target), expected, rtol=1e-6)


def test_targets_are_the_likeliest_other_classes():
    logits = np.array([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 5.0, 1.0]])
    np.testing.assert_array_equal(targets.likely_targets(logits, [0, 3], 2), [[2, 1], [1, 2]])
    np.testing.assert_array_equal(targets.likely_targets(logits, [1, 1], 9), [[0, 2], [2, 3], [3, 0]])
    assert logits[0, 0] == 3.0  # the argument is left as it was


def test_nearest_clusters_are_those_of_other_classes():
    """Numbered class * K + j, best first; where clusters are missing the best one stands in."""
    u = np.array([[[-1.0, -9.0], [-2.0, -3.0], [-0.5, -np.inf]]])
    np.testing.assert_array_equal(targets.nearest_clusters(u, [0], 9), [[4], [2], [3], [4]])
    np.testing.assert_array_equal(targets.nearest_clusters(u, [1], 2), [[4], [0]])
    np.testing.assert_array_equal(targets.nearest_clusters(u, [2], 3), [[0], [2], [3]])


def cluster_view(z, centroids, variance, mask=None):
    head = Clusters(jnp.asarray(centroids), jnp.float32(variance), mask)
    scores = head.log_scores(z)
    return View(scores, scores, head.exponents(z))


def test_cluster_aims_match_their_formulas(rng):
    """Of points about 3 classes x 2 clusters: centroid, feature, magnet, hinged magnet, away."""
    mu, z = rng.normal(size=(3, 2, 4)).astype(np.float32), rng.normal(size=(9, 4)).astype(np.float32)
    y, target, variance = rng.integers(0, 3, 9), rng.integers(0, 6, 9), 0.7
    view = cluster_view(z, mu, variance)
    u = reference_attacks.exponents(z, mu, variance)
    own = np.array([u[i, c].max() for i, c in enumerate(y)])
    goal = u.reshape(9, 6)[np.arange(9), target]
    others = np.array([reference.logsumexp(np.delete(u[i], c, axis=0).ravel()) for i, c in enumerate(y)])
    for loss, expected in (
        (attack_losses.centroid, goal - own),
        (attack_losses.feature, goal),
        (attack_losses.away, -own),
        (attack_losses.magnet, others - own),
        (attack_losses.magnet_hinged(1.0), np.maximum(1.0 + others - own, 0)),
    ):
        reference.close(loss(view, y, target), expected, 1e-5)
    assert (1.0 + others - own < 0).any() and (1.0 + others - own > 0).any()


@pytest.mark.slow
def test_missing_clusters_take_no_part(rng):
    """Values and gradients stay finite, and are those of the clusters that exist."""
    mu, z = rng.normal(size=(3, 2, 4)).astype(np.float32), rng.normal(size=(6, 4)).astype(np.float32)
    mask = jnp.array([[True, True], [True, False], [True, False]])
    y, target = np.arange(6) % 3, np.array([2, 4, 0, 4, 1, 2])
    u = reference_attacks.exponents(z, mu, 1.0)
    u[1:, :, 1] = u[1:, :, 1]
    u[:, 1:, 1] = -np.inf
    own = np.array([u[i, c].max() for i, c in enumerate(y)])
    others = np.array([reference.logsumexp(np.delete(u[i], c, axis=0).ravel()) for i, c in enumerate(y)])
    reference.close(attack_losses.magnet(cluster_view(z, mu, 1.0, mask), y, target), others - own, 1e-5)
    reference.close(attack_losses.away(cluster_view(z, mu, 1.0, mask), y, target), -own, 1e-5)
    for loss in (attack_losses.centroid, attack_losses.feature, attack_losses.magnet, attack_losses.away):
        slope = jax.grad(lambda p, loss=loss: jnp.sum(loss(cluster_view(p, mu, 1.0, mask), y, target)))(z)
        assert np.isfinite(slope).all() and (np.abs(slope).max(axis=1) > 0).all()


def test_the_hinge_hides_what_is_far(rng):
    """Where the margin exceeds alpha the paper's adaptive attack has no gradient; without a hinge it has."""
    mu = np.array([[[0.0, 0.0]], [[10.0, 0.0]]], np.float32)
    z, y = np.array([[0.0, 0.0], [4.9, 0.0]], np.float32), np.zeros(2, np.int32)

    def slope(loss):
        return np.asarray(jax.grad(lambda p: jnp.sum(loss(cluster_view(p, mu, 1.0), y, y)))(z))

    hinged, free = slope(attack_losses.magnet_hinged(12.5)), slope(attack_losses.magnet)
    np.testing.assert_array_equal(hinged[0], 0)  # margin 50
    np.testing.assert_allclose(hinged[1], free[1])  # margin 1
    np.testing.assert_allclose(free, [[10, 0], [10, 0]], rtol=1e-5)
    assert attack_losses.magnet_hinged(12.5) is attack_losses.magnet_hinged(12.5)  # compared by identity
