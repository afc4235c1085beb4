"""The gate for what stands beside arrays: counts, keys, masks, heads, constants."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from array_doors import (
    HEAD,
    Y,
    Z,
    changed,
    fresh,
    refused,
)
from clustr_jax import certify, clusters, losses
from clustr_jax.clusters import Clusters
from clustr_jax.kmeans import kmeans

pytestmark = pytest.mark.wrong_arrays  # what the gate is for

# k, counts, numbers, keys, masks

COUNTS = {
    "kmeans k": lambda k: kmeans(fresh(), Z, k),
    "fit k": lambda k: clusters.fit(fresh(), Z, Y, num_classes=3, k=k),
    "fit_assign k": lambda k: clusters.fit_assign(fresh(), Z, Y, num_classes=3, k=k),
    "kmeans n_init": lambda n: kmeans(fresh(), Z, 2, n_init=n),
    "fit n_init": lambda n: clusters.fit(fresh(), Z, Y, num_classes=3, n_init=n),
    "nearest": lambda n: HEAD.log_scores(Z, n),
    "num_classes": lambda n: clusters.fit(fresh(), Z, np.clip(Y, 0, 1), num_classes=n),
}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, True, np.True_, jnp.asarray(True), 2.0, np.float32(2), "2", np.nan])
def test_counts_that_are_none(name, value):
    text = refused(COUNTS[name], value)
    assert re.search(r"^\w+ must be a whole number of at least 1, got ", text)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.asarray, jnp.asarray])
def test_any_integer_type_is_a_count(name, kind):
    jax.tree.map(np.testing.assert_array_equal, COUNTS[name](kind(2)), COUNTS[name](2))


def test_k_of_each_class():
    wanted = clusters.fit(fresh(), Z, Y, num_classes=3, k=(1, 2, 3))
    for k in ([1, 2, 3], np.array([1, 2, 3]), (np.int8(1), 2, 3)):
        jax.tree.map(np.testing.assert_array_equal, clusters.fit(fresh(), Z, Y, num_classes=3, k=k), wanted)
    assert "one for each of the 3 classes, got 2" in refused(COUNTS["fit k"], (1, 2))
    assert "at least 1, got 0" in refused(COUNTS["fit k"], (1, 2, 0))
    assert "class 0 has 4 examples, fewer than k=5" in refused(COUNTS["fit k"], 5)


def test_more_clusters_than_points_are_surplus():
    """Documented: `valid` says which there are."""
    assert kmeans(fresh(), Z, 20).valid.sum() == 12


def test_a_traced_count_is_told_to_be_static():
    assert "static_argnames" in refused(jax.jit(COUNTS["kmeans k"]), 2)


@pytest.mark.parametrize("value", [0, None, np.zeros(3), jax.random.split(fresh(), 2)], ids=str)
@pytest.mark.parametrize("call", [lambda k: kmeans(k, Z, 2), lambda k: clusters.fit(k, Z, Y, num_classes=3)])
def test_keys_that_are_none(call, value):
    assert refused(call, value).startswith("key must be a key of jax.random")
    call(jax.random.PRNGKey(0))


MASKS = {
    "kmeans": (lambda m: kmeans(fresh(), Z, 2, mask=m), np.arange(12) > 3),
    "Clusters": (lambda m: HEAD.replace(mask=m), np.array([[True, True], [True, False], [True, True]])),
    "magnet": (
        lambda m: losses.magnet_loss(Z.reshape(3, 4, 3), np.arange(3), mask=m),
        np.arange(12).reshape(3, 4) > 3,
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    call, mask = MASKS[name]
    assert "mask must be [" in refused(call, mask[:-1])
    assert "mask must be [" in refused(call, mask.reshape(-1, 1, 1))
    assert "True and False, got float32" in refused(call, mask.astype(np.float32))
    assert "True and False" in refused(call, 2 * mask.astype(int))
    jax.tree.map(np.testing.assert_array_equal, call(mask.astype(np.int8)), call(mask))


def rows(mask):
    return losses.magnet_loss_of_rows(Z, Y, np.arange(3), mask.reshape(-1), alpha=1.0)


@pytest.mark.parametrize("name", [*MASKS, "magnet_rows"])
@pytest.mark.parametrize("kind", [bool, np.uint8, np.int64, jnp.int32, jnp.bool_])
def test_masks_that_leave_nothing(name, kind):
    """An inertia, a loss and scores of nothing would be 0, or -inf, without a word."""
    call, mask = (rows, np.ones(12)) if name == "magnet_rows" else MASKS[name]
    nothing = jnp.zeros(mask.shape, kind) if kind in (jnp.int32, jnp.bool_) else np.zeros(mask.shape, kind)
    assert "mask is False everywhere, and leaves no " in refused(call, nothing)
    one = np.zeros(mask.shape, bool)
    one.reshape(-1)[-1] = True
    call(one)


def test_labels_of_a_class_without_clusters():
    """Their distance to the nearest own cluster, and so the variance, would be infinite."""
    head = HEAD.replace(mask=np.array([[True, True], [False, False], [True, False]]))
    text = refused(lambda y: clusters.with_variance(head, Z, y), Y)
    assert "no cluster of class 1, and y has 4 examples" in text
    assert np.isfinite(clusters.with_variance(head, Z, np.where(Y == 1, 2, Y)).variance)
    others = HEAD.replace(mask=np.array([[True, True], [False, True], [True, False]]))
    assert np.isfinite(clusters.with_variance(others, Z, Y).variance)


def test_what_is_masked_out_may_be_anything():
    mask = np.arange(12) > 3
    bad = changed(Z, (0, 0), np.nan)
    jax.tree.map(
        np.testing.assert_array_equal, kmeans(fresh(), bad, 2, mask=mask), kmeans(fresh(), Z, 2, mask=mask)
    )
    exists = np.array([[True, True], [True, False], [True, True]])
    centroids = HEAD.centroids.at[1, 1].set(jnp.nan)
    found = HEAD.replace(centroids=centroids, mask=exists).log_scores(Z)
    np.testing.assert_array_equal(found, HEAD.replace(mask=exists).log_scores(Z))


# The head itself


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variance": 0.0}, "variance must be positive and finite, got"),
        ({"variance": -1.0}, "variance must be positive and finite, got"),
        ({"variance": 1e-42}, "variance must be positive and finite, got"),
        ({"variance": np.float32(np.nan)}, "variance has values that are not finite"),
        ({"variance": np.inf}, "variance has values that are not finite"),
        ({"variance": np.ones(1, np.float32)}, r"got shape \(1,\); one number for all wants variance\[0\]"),
        ({"variance": np.ones((3, 2), np.float32)}, r"got shape \(3, 2\)"),
        ({"centroids": np.zeros((3, 3))}, r"got shape \(3, 3\); one centroid per class wants"),
        ({"centroids": changed(np.zeros((3, 2, 3)), (1, 1, 1), np.nan)}, r"the first centroids\[1\]"),
        ({"centroids": np.zeros((3, 0, 3))}, "empty"),
        ({"mask": np.ones((2, 2), bool)}, r"mask must be \[Y, K\] with Y = 3 and K = 2"),
    ],
)
def test_heads_that_are_none(changes, message):
    """When they are made, by `replace`, and when something that JAX made is used."""
    fields = {"centroids": HEAD.centroids, "variance": HEAD.variance, "mask": None} | changes
    found = refused(lambda f: Clusters(**f), fields)
    assert re.search(message, found)
    assert refused(lambda c: HEAD.replace(**c), changes) == found
    made = jax.tree.unflatten(jax.tree.structure(HEAD.replace(mask=np.ones((3, 2), bool))), fields.values())
    for use in (made.log_scores, made.probs, made.squared_distances):
        assert refused(use, Z) == found
    assert refused(lambda c: certify.radius(c, Z, Y, lipschitz=1.0), made) == found
    assert refused(lambda c: clusters.with_variance(c, Z, Y), made) == found


def test_heads_of_half_precision_are_widened():
    half = HEAD.replace(centroids=HEAD.centroids.astype(jnp.bfloat16), variance=jnp.float16(1.5))
    assert half.centroids.dtype == half.variance.dtype == jnp.float32


def test_jax_puts_anything_into_a_head():
    """Shapes, gradients, many heads at once: a head is a pytree like any."""
    assert jax.tree.map(jnp.shape, HEAD).centroids == (3, 2, 3)
    assert jax.eval_shape(lambda c: c, HEAD).variance.shape == ()
    assert jax.tree.map(jnp.zeros_like, HEAD).variance == 0
    gradient = jax.grad(lambda c: c.log_scores(Z).sum())(HEAD)
    assert isinstance(gradient, Clusters) and np.isfinite(gradient.centroids).all()
    many = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), HEAD)
    found = jax.vmap(lambda c: c.log_scores(Z))(many)
    np.testing.assert_allclose(found[0], HEAD.log_scores(Z), rtol=1e-6)
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(HEAD)] == [
        ".centroids",
        ".variance",
    ]


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, "1", None, True, np.ones(3)], ids=str)
def test_lipschitz_constants_that_are_none(value):
    text = refused(lambda v: certify.radius(HEAD, Z, Y, lipschitz=v), value)
    assert text.startswith("lipschitz must be a positive, finite upper bound, got ")


@pytest.mark.parametrize(
    ("radii", "r"),
    [
        (np.array([]), [0.1]),
        (np.array([np.nan]), [0.1]),
        (np.array([-0.1]), [0.1]),
        (np.array([[0.1]]), [0.1]),
        (np.array([0.1]), 0.1),
        (np.array([0.1]), [-1.0]),
    ],
)
def test_certified_accuracy_of_no_radii(radii, r):
    refused(lambda radii: certify.accuracy(radii, np.asarray(r)), radii)


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": np.nan},
        {"alpha": "1"},
        {"eps": -1e-8},
        {"radius": np.inf},
        {"sharpness": 0.0},
        {"surplus": -1},
    ],
    ids=str,
)
def test_settings_of_the_magnet_loss(changes):
    refused(lambda c: losses.magnet_loss(Z.reshape(3, 4, 3), np.arange(3), **c), changes)


@pytest.mark.parametrize("classes", [np.arange(2), np.array([0.0, 1.0, 2.0]), np.array([0, 1, -1])], ids=str)
def test_classes_of_the_magnet_loss(classes):
    refused(lambda c: losses.magnet_loss(Z.reshape(3, 4, 3), c), classes)


@pytest.mark.parametrize("bad", ["kernel", "bias", "means"])
def test_linear_heads(bad):
    given = {"kernel": np.eye(3), "bias": np.zeros(3), "means": np.eye(3)}
    call = lambda g: clusters.of_linear_head(**g)  # noqa: E731
    assert "must be [" in refused(call, given | {bad: given[bad][:2]})
    assert f"{bad} has values that are not finite" in refused(
        call, given | {bad: changed(given[bad], 0, np.nan)}
    )
