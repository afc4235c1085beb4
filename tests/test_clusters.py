"""Cluster head: Eq. 4 in the log domain, its gradients, the `nearest` option, and the fit.

RTOL = 1e-5 of the largest entry covers sums of ~10 float32 terms; gradients get 1e-4.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from clustr_jax import clusters, losses
from clustr_jax.clusters import Clusters
from clustr_jax.runtime.errors import UserError
from reference import close

RTOL, GRAD_RTOL = 1e-5, 1e-4
log_scores = jax.jit(Clusters.log_scores, static_argnames="nearest")
SIZES = [(6, 9), (20, 4), (3, 3)]  # of the two blobs of each class
MASK = np.array([[1, 1], [1, 0], [1, 1], [0, 1]], bool)  # classes with one and with two clusters


def example(rng, spread=2.0, variance=3.0):
    """Six embeddings, 4 classes x 2 clusters in 5 dimensions, labels; float32."""
    centroids = rng.normal(size=(4, 2, 5), scale=spread).astype(np.float32)
    z = rng.normal(size=(6, 5), scale=spread).astype(np.float32)
    return z, np.array([0, 1, 2, 3, 0, 1]), centroids, np.float32(variance)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("nearest", [None, 1, 3, 6, 8])
def test_scores_match_equation_4(nearest, mask, rng):
    """log_scores, scores and probs, with and without masked clusters and the D nearest only.

    With the mask 6 clusters exist, so nearest = 6 and 8 must both mean all of them.
    """
    z, _, centroids, variance = example(rng)
    head = Clusters(jnp.asarray(centroids), variance, mask=None if mask is None else jnp.asarray(mask))
    options = dict(mask=mask, nearest=nearest)
    expected = reference.log_scores(z, centroids, variance, **options)
    actual = log_scores(head, z, nearest=nearest)
    assert actual.shape == (6, 4) and actual.dtype == jnp.float32
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
    close(actual, expected, RTOL)
    close(head.scores(z, nearest=nearest), reference.scores(z, centroids, variance, **options), RTOL)
    probs = head.probs(z, nearest=nearest)
    close(probs, reference.probs(z, centroids, variance, **options), RTOL)
    np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("nearest", [None, 5])
def test_gradients_match_finite_differences(nearest, rng):
    """d/dz, d/d centroids, d/d variance of a weighted sum of the log scores; weight 0 where -inf."""
    z, _, centroids, variance = example(rng)
    mask = np.array([[1, 1], [1, 1], [1, 0], [0, 1]], bool)
    weights = rng.normal(size=(6, 4))
    weights[np.isneginf(reference.log_scores(z, centroids, variance, mask=mask, nearest=nearest))] = 0

    def total(z, *head):
        scores = Clusters(*head, mask=jnp.asarray(mask)).log_scores(z, nearest=nearest)
        return jnp.sum(jnp.where(weights != 0, weights * scores, 0))

    def expected(*inputs):
        scores = reference.log_scores(*inputs, mask=mask, nearest=nearest)
        return np.sum(weights[weights != 0] * scores[weights != 0])

    inputs = [z, centroids, variance]
    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*inputs)
    for i in range(3):
        moved = functools.partial(lambda i, v: expected(*inputs[:i], v, *inputs[i + 1 :]), i)
        close(gradients[i], reference.finite_difference(moved, inputs[i]), GRAD_RTOL)


def test_cross_entropy_gradient_points_to_the_other_centroids(rng):
    """fidelity 1.3: grad of log-domain CE = (1/s^2) sum_{c != y} p_c (mubar_c - mubar_y)."""
    z, y, centroids, variance = example(rng)
    head = Clusters(jnp.asarray(centroids), variance)
    gradient = jax.jit(jax.grad(lambda z: losses.cross_entropy(head.log_scores(z), y).sum()))(z)
    probs = reference.probs(z, centroids, variance)
    for i, own in enumerate(y):
        squared = ((np.float64(z[i]) - centroids) ** 2).sum(axis=-1)
        mean = (reference.softmax(-squared / (2 * variance))[:, :, None] * centroids).sum(axis=1)
        expected = sum(probs[i, c] * (mean[c] - mean[own]) for c in range(4)) / variance
        np.testing.assert_allclose(gradient[i], expected, atol=GRAD_RTOL * np.abs(gradient).max())


@pytest.mark.parametrize("separation", [1.0, 20.0, 200.0])
def test_margin_gradient_never_fades(separation, rng):
    """K = 1: grad of the margin is exactly (mu_c - mu_y) / s^2 at any confidence (up to 20 000 nats here)."""
    centroids = jnp.array([[[0.0, 0.0]], [[separation, 0.0]]])
    z = jnp.asarray(rng.normal(size=(5, 2)), jnp.float32)
    head, y = Clusters(centroids, jnp.float32(1.0)), jnp.zeros(5, jnp.int32)
    gradient = jax.jit(jax.grad(lambda z: losses.margin(head.log_scores(z), y).sum()))(z)
    np.testing.assert_allclose(gradient, [[separation, 0.0]] * 5, atol=1e-5 * separation)


def test_paper_protocol_cross_entropy(rng):
    """Exp scores as logits, value and gradient: the loss that the authors' attack climbs."""
    z, y, centroids, variance = example(rng)
    head = Clusters(jnp.asarray(centroids), variance)

    def expected(z):
        return reference.exp_score_cross_entropy(z, y, centroids, variance).sum()

    loss = jax.value_and_grad(lambda z: losses.cross_entropy(head.scores(z), y).sum())
    value, gradient = jax.jit(loss)(z)
    np.testing.assert_allclose(value, expected(z), rtol=RTOL)
    close(gradient, reference.finite_difference(expected, z), GRAD_RTOL)


def test_log_scores_stay_finite_where_scores_underflow():
    """1000 nats from every centroid the scores are 0 with gradient 0; the log scores keep both."""
    head = Clusters(jnp.array([[[0.0, 0.0]], [[10.0, 0.0]]]), jnp.float32(0.5))
    z, y = jnp.array([[0.0, 40.0]]), jnp.array([0])
    np.testing.assert_array_equal(head.scores(z), 0)
    blind = jax.jit(jax.grad(lambda z: losses.cross_entropy(head.scores(z), y)[0]))(z)
    np.testing.assert_array_equal(blind, 0)
    np.testing.assert_allclose(head.log_scores(z), [[-1600.0, -1700.0]])
    seeing = jax.jit(jax.grad(lambda z: losses.margin(head.log_scores(z), y)[0]))(z)
    np.testing.assert_allclose(seeing, [[20.0, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("nats", [80.0, 88.0, 95.0, 103.0])
def test_scores_below_the_smallest_normal_number_are_zero(nats):
    """exp(-88) and less: 0 here, denormal in PyTorch down to exp(-103.3) (docs/fidelity.md)."""
    head = Clusters(jnp.zeros((1, 1, 1)), jnp.float32(0.5))
    found = jax.jit(head.scores)(np.array([[np.sqrt(nats)]], np.float32))[0, 0]
    exact = np.float32(np.exp(-nats))  # NumPy keeps denormals
    assert exact > 0
    if nats < 87:
        np.testing.assert_allclose(found, exact, rtol=1e-4)
    else:
        assert found == 0


def test_distances_keep_their_digits_far_from_the_origin(rng):
    """Offset 30, E = 16: the expanded square would be off by |f|^2 * 6e-8 = 1e-3 nats or more.

    Differences of nearby float32 numbers are exact, so 1e-4 of a nat is generous.
    """
    centroids = (30 + rng.normal(size=(3, 2, 16), scale=0.3)).astype(np.float32)
    z = (30 + rng.normal(size=(8, 16), scale=0.3)).astype(np.float32)
    head = Clusters(jnp.asarray(centroids), jnp.float32(0.05))
    expected = reference.log_scores(z, centroids, np.float32(0.05))
    np.testing.assert_allclose(jax.jit(head.log_scores)(z), expected, atol=1e-4, rtol=1e-6)


@given(seed=st.integers(0, 10_000), nearest=st.sampled_from([None, 3]))
def test_scores_and_log_scores_agree_on_the_class(seed, nearest):
    """argmax(scores) = argmax(log_scores) wherever the largest score is not zero (or tied)."""
    rng = np.random.default_rng(seed)
    z, _, centroids, variance = example(rng, spread=rng.uniform(0.5, 20))
    head = Clusters(jnp.asarray(centroids), variance)
    scores = np.asarray(head.scores(z, nearest=nearest))
    logs = np.asarray(log_scores(head, z, nearest=nearest))
    ordered = np.sort(scores, axis=1)
    decided = ordered[:, -1] > ordered[:, -2] * (1 + 1e-6)  # not a tie of the rounded exponentials
    np.testing.assert_array_equal(scores.argmax(axis=1)[decided], logs.argmax(axis=1)[decided])
    assert (scores >= 0).all() and np.isfinite(log_scores(head, z)).all()


@pytest.mark.parametrize("nearest", [1, 2])
def test_gradients_are_finite_where_a_class_has_no_near_cluster(nearest, rng):
    """-inf log scores of cut classes must not turn the gradient of a loss into nan."""
    z, _, centroids, variance = example(rng)
    head = Clusters(jnp.asarray(centroids), variance, mask=jnp.asarray(MASK))
    y = log_scores(head, z, nearest=nearest).argmax(axis=1)

    def total(z):
        scores, probs = head.log_scores(z, nearest=nearest), head.probs(z, nearest=nearest)
        return jnp.sum(losses.cross_entropy(scores, y) + losses.margin(scores, y)) + jnp.sum(probs**2)

    assert np.isfinite(jax.jit(jax.grad(total))(z)).all()


def test_clusters_are_a_pytree_with_an_optional_mask(rng):
    """Goes through jit as an argument; mask=None equals a mask of True; a single class is possible."""
    z, _, centroids, variance = example(rng)
    open_head = Clusters(jnp.asarray(centroids), variance)
    masked = open_head.replace(mask=jnp.ones((4, 2), bool))
    # Two compilations, so equal up to one rounding of the last bit.
    np.testing.assert_allclose(log_scores(open_head, z), log_scores(masked, z), rtol=1e-6)
    np.testing.assert_array_equal(Clusters(jnp.asarray(centroids[:1]), variance).probs(z), 1)


def blobs(rng):
    """45 shuffled examples: class c has two well separated blobs of SIZES[c]; also the blob of each."""
    blob = rng.permutation(np.repeat(np.arange(6), np.ravel(SIZES)))
    z = 20.0 * np.stack([blob, blob // 2, 0 * blob], axis=1) + rng.normal(size=(45, 3), scale=0.3)
    return z.astype(np.float32), (blob // 2).astype(np.int32), blob


def test_fit_recovers_the_blobs_of_every_class(key, rng):
    """Classes of different sizes: centroids are the blob means, sigma^2 is that of Eq. 3 at inference."""
    z, y, blob = blobs(rng)
    head, assigned = clusters.fit_assign(jax.random.clone(key), z, y, num_classes=3, k=2)
    again = clusters.fit(key, z, y, num_classes=3, k=2)
    jax.tree.map(np.testing.assert_array_equal, head, again)  # same key, same clusters, bit for bit
    assert head.centroids.shape == (3, 2, 3) and head.variance.shape == ()
    assert assigned.dtype == jnp.int32
    assert len(set(zip(blob.tolist(), np.asarray(assigned).tolist(), strict=True))) == 6
    for i in range(6):
        own = head.centroids.reshape(6, 3)[assigned[blob == i][0]]
        np.testing.assert_allclose(own, z[blob == i].mean(axis=0), rtol=1e-5, atol=1e-4)
    # Centroids are rounded to 1e-5 at 100, the spread is 0.3: the variance is good to 1e-4.
    np.testing.assert_allclose(head.variance, reference.variance(z, y, head.centroids), rtol=1e-4)


def test_fit_assigns_to_the_nearest_cluster_of_the_own_class(key, rng):
    """Overlapping classes: class * K + nearest own centroid, even where another class is nearer."""
    z, y = rng.normal(size=(45, 3)).astype(np.float32), blobs(rng)[1]
    head, assigned = clusters.fit_assign(key, z, y, num_classes=3, k=3)
    centroids = np.float64(head.centroids)
    squared = ((z[:, None] - centroids[y]) ** 2).sum(axis=-1)
    np.testing.assert_array_equal(assigned, y * 3 + squared.argmin(axis=1))
    np.testing.assert_allclose(head.variance, reference.variance(z, y, centroids), rtol=RTOL)


def test_fit_with_a_different_k_per_class(key, rng):
    """k = (1, 3, 2): K = 3, the surplus clusters are masked and never assigned or scored."""
    z, y, _ = blobs(rng)
    head, assigned = clusters.fit_assign(key, z, y, num_classes=3, k=(1, 3, 2))
    assert head.centroids.shape == (3, 3, 3)
    np.testing.assert_array_equal(head.mask.sum(axis=1), [1, 3, 2])
    assert head.mask.reshape(-1)[assigned].all()
    np.testing.assert_allclose(head.variance, reference.variance(z, y, head.centroids, head.mask), rtol=1e-4)
    np.testing.assert_allclose(head.centroids[0][head.mask[0]], z[y == 0].mean(axis=0)[None], atol=1e-4)


def test_fit_masks_clusters_that_a_class_cannot_fill(key, rng):
    """A class whose embeddings coincide gets one cluster; the scores of all classes stay finite."""
    z, y, _ = blobs(rng)
    z[y == 1] = z[y == 1][0]
    head = clusters.fit(key, z, y, num_classes=3, k=2)
    np.testing.assert_array_equal(head.mask.sum(axis=1), [2, 1, 2])
    assert np.isfinite(log_scores(head, z)).all()
    np.testing.assert_array_equal(log_scores(head, z).argmax(axis=1), y)


def test_fit_of_coinciding_embeddings_has_a_usable_variance(key, rng):
    """A collapsed network: variance 0 would make every score nan.

    A centroid off by one rounding (6e-8) at the floored variance 1e-12 moves a score by 0.5 %.
    """
    z, y = np.ones((45, 3), np.float32), blobs(rng)[1]
    head = clusters.fit(key, z, y, num_classes=3, k=2)
    assert head.variance > 0
    np.testing.assert_allclose(head.probs(z), 1 / 3, rtol=0.02)


@pytest.mark.parametrize("labels, k", [([0, 0, 0, 1, 2, 2], 2), ([0, 0, 2, 2, 2, 0], 1)])
def test_fit_names_the_class_that_is_too_small(key, labels, k):
    """ValueError in one line with the class and both counts, also for a class without any example."""
    z = jnp.arange(12.0).reshape(6, 2)
    with pytest.raises(ValueError, match=r"class 1\b") as error:
        clusters.fit(key, z, jnp.array(labels), num_classes=3, k=k)
    assert "\n" not in str(error.value)
    assert {str(labels.count(1)), str(k)} <= set(re.findall(r"\d+", str(error.value)))


def linear_head(rng, classes=4, size=6):
    """Weights [E, Y], biases and class means [Y, E], the weights roughly towards the means."""
    means = rng.normal(size=(classes, size)) * 3 + rng.normal(size=size) * 5
    kernel = means.T * 0.4 + rng.normal(size=(size, classes)) * 0.3
    return kernel, rng.normal(size=classes), means


@pytest.mark.parametrize(("classes", "size"), [(4, 6), (2, 1), (10, 9), (10, 64)])
def test_a_linear_head_is_one_centroid_per_class(classes, size, rng):
    """Log scores minus logits are the same for all classes of an example: in float64, by Eq. 4."""
    kernel, bias, means = linear_head(rng, classes, size)
    head = clusters.of_linear_head(kernel, bias, means)
    z = rng.normal(size=(50, size)) * 4
    centroids, variance = np.asarray(head.centroids, np.float64), float(head.variance)
    scores = reference.log_scores(z, centroids, variance)
    difference = scores - (z @ kernel + bias)
    spread = difference - difference.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(spread, 0, atol=2e-6 * np.abs(scores).max())  # float32 centroids
    assert head.valid.all() and head.centroids.shape == (classes, 1, size)


def test_its_centroids_are_the_nearest_to_the_means(rng):
    """No other s, and for this s no other solution of the equations, has a smaller squared distance."""
    kernel, bias, means = linear_head(rng)
    head = clusters.of_linear_head(kernel, bias, means)
    found = np.sum(np.square(np.asarray(head.centroids)[:, 0] - means))
    w = kernel.T
    centre = np.eye(4) - 1 / 4

    def distance(s):
        """The least one for this s: its equations solved and its free part fitted, by least squares."""
        right = centre @ (-bias / s - np.sum(w**2, axis=1) / 2)
        solution = np.linalg.lstsq(centre @ w, right, rcond=None)[0]
        free = np.linalg.svd(centre @ w)[2][3:]  # directions that no equation sees
        rest = (means - s * (w + solution)).mean(axis=0)
        return np.sum(np.square(s * (w + solution) + free.T @ (free @ rest) - means))

    s = float(head.variance)
    np.testing.assert_allclose(found, distance(s), rtol=1e-5)
    assert all(distance(s * factor) > found for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0))


def test_heads_that_are_no_centroids_are_refused(rng):
    kernel, bias, means = linear_head(rng)
    with pytest.raises(UserError, match="must span 3 dimensions"):
        clusters.of_linear_head(kernel[:2], bias, means[:, :2])
    with pytest.raises(UserError, match="do not point to the means"):
        clusters.of_linear_head(-kernel, bias, means)


@pytest.mark.parametrize(("classes", "size", "common"), [(10, 256, 10), (100, 512, 10), (10, 64, 100)])
def test_a_vector_common_to_all_weights_moves_no_centroid(classes, size, common, rng):
    """It is in every logit alike. Its rounding must not be taken for a direction of the weights."""
    kernel, bias, means = linear_head(rng, classes, size)
    apart = kernel - kernel.mean(axis=1, keepdims=True)
    shared = rng.normal(size=(size, 1))
    shared *= common * np.linalg.norm(apart) / np.sqrt(classes) / np.linalg.norm(shared)
    one, other = (clusters.of_linear_head(k, bias, means) for k in (apart, apart + shared))
    np.testing.assert_allclose(other.variance, one.variance, rtol=1e-5)
    np.testing.assert_allclose(other.centroids, one.centroids, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("there", [np.nan, np.inf, 1e30])
def test_what_stands_at_a_masked_place_is_in_no_score_and_no_gradient(there, rng):
    z, y, centroids, variance = example(rng)
    centroids[~MASK] = there
    heads = [Clusters(jnp.asarray(c), jnp.float32(variance), jnp.asarray(MASK)) for c in (
        centroids, np.where(MASK[..., None], centroids, 0.0))]  # fmt: skip
    values = [head.log_scores(z, nearest) for head in heads for nearest in (None, 3)]
    np.testing.assert_array_equal(values[:2], values[2:])
    total = [
        jax.grad(lambda z, head=head: losses.cross_entropy(head.log_scores(z), y).sum())(z) for head in heads
    ]
    assert np.isfinite(total).all()
    np.testing.assert_array_equal(*total)


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1e3])
def test_the_unit_of_the_embeddings_does_not_matter(scale, rng):
    """Eq. 3 and Eq. 4 divide it out; what the variance is at least must not bring it back."""
    z, y, *_ = example(rng)
    probs, loss = [], []
    for unit in (1.0, scale):
        # powers of two apart from rounding: the embeddings themselves are scaled in float64
        head = clusters.fit(jax.random.key(0), np.float32(z * unit), y % 2, num_classes=2, k=1)
        probs.append(head.probs(np.float32(z * unit)))
        rows = np.float32(z[:6].reshape(2, 3, -1) * unit)
        loss.append(losses.magnet_loss(rows, np.array([0, 1]))[0])
    close(probs[1], probs[0], 1e-4)
    close(loss[1], loss[0], 1e-4)
