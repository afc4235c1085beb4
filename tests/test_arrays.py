"""The gate for arrays: doors x inputs. Equal input gives an equal message at every door, and what is right
comes out bit for bit as without the gate."""

import functools
import re
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustr_jax import UserError, certify, clusters, losses
from clustr_jax.clusters import Clusters
from clustr_jax.kmeans import _kmeans, kmeans
from clustr_jax.runtime import arrays

rng = np.random.default_rng(0)
Z = rng.normal(size=(12, 3)).astype(np.float32)
Y = (np.arange(12) % 3).astype(np.int32)
LOGITS = rng.normal(size=(12, 3)).astype(np.float32)
HEAD = Clusters(jnp.asarray(rng.normal(size=(3, 2, 3)), jnp.float32), jnp.float32(1.3))
PROBS = np.asarray(jax.nn.softmax(LOGITS))


def fresh():
    """The same key, never used before."""
    return jax.random.key(0)


def soft(y):
    return losses.cross_entropy(LOGITS, y)


# Of features [N, E] = [12, 3] for which the class does not matter; the name of the argument
FEATURES = {
    "kmeans": ("points", lambda z: kmeans(fresh(), z, 2)),
    "fit": ("z", lambda z: clusters.fit(fresh(), z, Y, num_classes=3)),
    "fit_assign": ("z", lambda z: clusters.fit_assign(fresh(), z, Y, num_classes=3)),
    "with_variance": ("z", lambda z: clusters.with_variance(HEAD, z, Y)),
    "squared_distances": ("z", HEAD.squared_distances),
    "exponents": ("z", HEAD.exponents),
    "log_scores": ("z", HEAD.log_scores),
    "nearest": ("z", functools.partial(HEAD.log_scores, nearest=2)),
    "scores": ("z", HEAD.scores),
    "probs": ("z", HEAD.probs),
    "radius": ("z", lambda z: certify.radius(HEAD, z, Y, lipschitz=1.0)),
    "distances": ("a", lambda z: losses.distances(z, Z)),
    "magnet_rows": (
        "z",
        lambda z: losses.magnet_loss_of_rows(z, Y, np.arange(3), np.ones(12, bool), alpha=1.0),
    ),
}
# Of labels [B] = [12] in 0..2
LABELS = {
    "fit": lambda y: clusters.fit(fresh(), Z, y, num_classes=3),
    "fit_assign": lambda y: clusters.fit_assign(fresh(), Z, y, num_classes=3),
    "with_variance": lambda y: clusters.with_variance(HEAD, Z, y),
    "radius": lambda y: certify.radius(HEAD, Z, y, lipschitz=1.0),
    "cross_entropy": lambda y: losses.cross_entropy(LOGITS, y),
    "margin": lambda y: losses.margin(LOGITS, y),
    "dlr": lambda y: losses.dlr(LOGITS, y),
}
ONLY_OUTSIDE_JIT = ("radius", "fit", "fit_assign")
# Of logits [B, Y]
LOGIT_DOORS = {
    "cross_entropy": lambda z: losses.cross_entropy(z, Y),
    "soft": lambda z: losses.cross_entropy(z, PROBS),
    "kl": lambda z: losses.kl(z, PROBS),
    "margin": lambda z: losses.margin(z, Y),
    "dlr": lambda z: losses.dlr(z, Y),
}
PROBABILITY_DOORS = {
    "cross_entropy": soft,
    "kl": lambda p: losses.kl(LOGITS, p),
    "negative_entropy": losses.negative_entropy,
}


def changed(array, place, value, dtype=None):
    array = array.astype(dtype or array.dtype)
    array[place] = value
    return array


def refused(call, value) -> str:
    """The message, one line that a terminal shows."""
    with pytest.raises(UserError) as caught:
        jax.block_until_ready(call(value))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500, text
    return text


def same_everywhere(doors, value, message):
    """One message at all doors, but for the argument's name and how many examples an axis is called."""
    found = set()
    for name, call in doors.items():
        argument, call = call if isinstance(call, tuple) else (None, call)
        text = refused(call, value)
        assert re.search(message, text), (name, text)
        text = re.sub(r"\b[NM](?=,|\]| =)", "B", text)
        found.add(re.sub(rf"\b{argument}\b", "z", text) if argument else text)
    return found


# Features


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Z[:, 0], r"must be \[B, E\].*, got shape \(12,\)|must be \[N, E\].*, got shape \(12,\)"),
        (Z[None], r"got shape \(1, 12, 3\)"),
        (np.float32(1.0), r"got shape \(\)"),
        (np.zeros((12, 0), np.float32), "empty|with E = 3"),
        (changed(Z, (4, 1), np.nan), r"not finite in 1 of 12 rows, the first \w+\[4\]"),
        (changed(Z, (4, 1), np.inf), r"not finite in 1 of 12 rows, the first \w+\[4\]"),
        (changed(Z, (4, 1), -np.inf), r"not finite in 1 of 12 rows, the first \w+\[4\]"),
        (changed(Z, (4, 1), np.inf, np.float16), r"not finite in 1 of 12 rows, the first \w+\[4\]"),
        (changed(Z, (4, 1), np.nan, ml_dtypes.bfloat16), r"not finite in 1 of 12 rows, the first \w+\[4\]"),
        (Z.astype(complex), "must be an array of numbers"),
        (Z.astype(str), "must be an array of numbers"),
        ([[1.0, 2.0], [3.0]], "must be an array of numbers"),
        (None, "must be an array of numbers"),
    ],
    ids=str,
)
def test_features_that_are_none(value, message):
    found = same_everywhere(FEATURES, value, message)
    assert len(found) <= 2  # with the number of features, where it is known, and without


@pytest.mark.parametrize("value", [Z[:11], Z[:, :2]], ids=["an example less", "a feature less"])
def test_features_of_another_number(value):
    for name in ("with_variance", "radius", "fit", "magnet_rows"):
        if value.shape[1] == 3 or name in ("with_variance", "radius"):
            assert "must be [" in refused(FEATURES[name][1], value)
    # a size of 1 is no reason to broadcast
    assert "with E = 3" in refused(lambda b: losses.distances(Z, b), Z[:, :1])


@pytest.mark.parametrize("factor", [1e25, 1e-25])
@pytest.mark.parametrize("name", ["kmeans", "fit", "with_variance", "distances", "magnet_rows"])
def test_squares_that_are_no_floats(name, factor):
    assert "squared distances" in refused(FEATURES[name][1], Z * np.float32(factor))


@pytest.mark.parametrize("name", ["squared_distances", "exponents", "log_scores", "scores", "probs"])
def test_scores_that_would_overflow(name):
    """In float32 every class's score would be -inf, and the class 0."""
    assert "overflow float32" in refused(FEATURES[name][1], Z * np.float32(1e25))


def test_float64_beyond_float32():
    """JAX would make inf of it."""
    assert "as float32" in refused(FEATURES["fit"][1], changed(Z.astype(np.float64), (0, 0), 1e300))


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.uint8, np.int64, bool, list])
def test_other_types_are_widened(name, kind):
    """As if they had been float32 all along."""
    z = np.abs(10 * Z)
    given = z.astype(int).tolist() if kind is list else z.astype(kind)
    found, wanted = (FEATURES[name][1](v) for v in (given, np.asarray(given).astype(np.float32)))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert all(leaf.dtype.itemsize == 4 for leaf in jax.tree.leaves(found) if leaf.dtype != bool)


def test_float16_does_not_overflow_the_inertia():
    """300 squared is beyond float16."""
    points = np.array([[0.0], [300.0], [600.0], [900.0]], np.float16)
    assert kmeans(fresh(), points, 1).inertia == 450000.0


@pytest.mark.parametrize("name", [name for name in FEATURES if name not in ONLY_OUTSIDE_JIT])
def test_inside_jit_shapes_and_types_are_checked(name):
    call = FEATURES[name][1]
    assert "got shape (12,)" in refused(jax.jit(call), Z[:, 0])
    assert "array of numbers" in refused(jax.jit(call), Z.astype(complex))
    widened = jax.jit(call)(Z.astype(np.float16))
    assert all(leaf.dtype.itemsize == 4 for leaf in jax.tree.leaves(widened) if leaf.dtype != bool)


def test_a_concrete_array_is_checked_inside_jit_as_well():
    """Captured ones have values there; a trace around must not get in the way, nor a device without NumPy."""
    bad, logits = jnp.asarray(changed(Z, (4, 1), np.nan)), jnp.asarray(LOGITS)
    assert "z[4]" in refused(jax.jit(lambda t: HEAD.log_scores(bad) * t), 1.0)
    assert "probs must" in refused(jax.jit(lambda t: losses.negative_entropy(logits) * t), 1.0)


def test_arrays_that_stay_on_their_device(monkeypatch):
    """The same verdicts where NumPy does not see the values."""
    bad, where = jnp.asarray(changed(Z, (4, 1), np.nan)), jnp.arange(12) != 4
    at_home = arrays.extent(Z, np.arange(12) > 3), arrays.extent(Z)
    monkeypatch.setattr(arrays, "_on_host", lambda array: False)
    assert "not finite" in refused(HEAD.log_scores, bad)
    assert "not finite" in refused(jax.jit(lambda t: HEAD.log_scores(bad) * t), 1.0)
    assert np.isfinite(arrays.extent(bad, where)).all() and np.isnan(arrays.extent(bad)).all()
    assert "0..2" in refused(LABELS["margin"], jnp.asarray(Y + 1))
    away = arrays.extent(jnp.asarray(Z), jnp.arange(12) > 3), arrays.extent(jnp.asarray(Z))
    assert at_home[1] == away[1] and at_home[0][0] >= at_home[1][0]


# Labels


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (changed(Y, 3, -1), r"^y must lie in 0\.\.2.*, got -1 to 2$"),
        (changed(Y, 3, 3), r"^y must lie in 0\.\.2.*, got 0 to 3$"),
        (changed(Y, 3, 2**32, np.int64), r"^y must lie in 0\.\.2.*, got 0 to 4294967296$"),
        (changed(Y, 3, 255, np.uint8), r"^y must lie in 0\.\.2.*, got 0 to 255$"),
        (changed(Y, 3, 0.5, np.float32), "^y must hold integer labels, got float32 with 0.5 in it$"),
        (changed(Y, 3, np.nan, np.float64), "^y must hold integer labels, got float64 with nan in it$"),
        (Y.astype(np.float32), r"^y must hold integer labels, got float32; \.astype\(int\) makes them so$"),
        (Y > 0, r"^y must hold integer labels, got bool; \.astype\(int\) makes them so$"),
        (Y[:, None], r"^y must be one label per example, .*\(12, 1\); y\[:, 0\] has that shape$"),
        (np.int32(1), "^y must be one label per example"),
        (Y[:11], r"^y must be \[[BN]\] with [BN] = 12, got shape \(11,\)$"),
        (Y[:1], r"^y must be \[[BN]\] with [BN] = 12, got shape \(1,\)$"),
        (Y.astype(str), "^y must be an array of numbers"),
        (None, "^y must be an array of numbers"),
    ],
    ids=str,
)
def test_labels_that_are_none(value, message):
    found = same_everywhere(LABELS, value, message)
    assert len({text.replace(", the classes of the logits", "") for text in found}) == 1


def test_one_hot_labels():
    """Right as probabilities; elsewhere the message says what makes labels of them."""
    one_hot = np.eye(3, dtype=np.float32)[Y]
    others = {name: call for name, call in LABELS.items() if name != "cross_entropy"}
    (text,) = same_everywhere(others, one_hot, r"one-hot rows take y\.argmax\(axis=1\)$")
    np.testing.assert_allclose(soft(one_hot), losses.cross_entropy(LOGITS, Y), rtol=1e-6)
    np.testing.assert_array_equal(soft(one_hot.astype(int)), soft(one_hot))


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int64, np.uint64, list, jnp.uint8])
def test_any_integer_type_is_a_label(name, kind):
    labels = Y.tolist() if kind is list else jnp.asarray(Y, kind) if kind is jnp.uint8 else Y.astype(kind)
    jax.tree.map(np.testing.assert_array_equal, LABELS[name](labels), LABELS[name](Y))


def test_uint8_labels_do_not_wrap_around():
    """class * K + cluster is beyond 255."""
    z, y = np.arange(400.0)[:, None], (np.arange(400) // 2).astype(np.uint8)
    found = clusters.fit_assign(fresh(), z, y, num_classes=200, k=2)[1]
    assert (np.asarray(found) // 2 == y).all()


@pytest.mark.parametrize("name", [name for name in LABELS if name not in ONLY_OUTSIDE_JIT])
def test_labels_inside_jit(name):
    """Their values are not known there, their type is."""
    assert "integer labels, got float32" in refused(jax.jit(LABELS[name]), Y.astype(np.float32))
    assert "(12, 1)" in refused(jax.jit(LABELS[name]), Y[:, None])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), jax.jit(LABELS[name])(Y), LABELS[name](Y)
    )


@pytest.mark.parametrize("name", ONLY_OUTSIDE_JIT)
def test_what_does_not_run_inside_jit_says_so(name):
    assert "inside jit" in refused(jax.jit(LABELS[name]), Y)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-3, 300), min_size=1, max_size=6),
    st.sampled_from([np.int8, np.uint8, np.int32, np.int64]),
    st.integers(1, 256),
)
def test_labels_pass_exactly_where_numpy_says_so(values, kind, num_classes):
    y = np.array(values).astype(kind)
    right = bool(((y.astype(int) >= 0) & (y.astype(int) < num_classes)).all())
    try:
        found = arrays.labels(y, num_classes, {})
        assert right and found.dtype == np.int32
        np.testing.assert_array_equal(found, y)
    except UserError:
        assert not right


# Logits and probabilities


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (LOGITS[0], r"^logits must be \[B, Y\], got shape \(3,\); one example wants logits\[None\]$"),
        (changed(LOGITS, (4, 1), np.nan), r"^logits has values that are .* in 1 of 12 rows, the first log"),
        (changed(LOGITS, (4, 1), np.inf), r"^logits has values that are .* in 1 of 12 rows, the first log"),
        (LOGITS.astype(complex), "^logits must be an array of numbers"),
    ],
    ids=str,
)
def test_logits_that_are_none(value, message):
    same_everywhere(LOGIT_DOORS, value, message)


def test_logits_of_minus_infinity():
    """A class that is ruled out, as with `nearest`; DLR is a ratio and has no value there."""
    z = np.array([[1.0, 0.0, -np.inf]], np.float32)
    np.testing.assert_allclose(losses.cross_entropy(z, np.array([0])), np.log(1 + np.exp(-1)), rtol=1e-6)
    assert losses.margin(z, np.array([0])) == -1
    assert "not finite" in refused(lambda z: losses.dlr(z, np.array([0])), z)


@pytest.mark.parametrize(("name", "classes"), [("margin", 2), ("dlr", 3)])
def test_too_few_classes(name, classes):
    """One class would have the margin -inf: robust to everything."""
    z, y = LOGITS[:, : classes - 1], 0 * Y
    assert f"at least {classes} classes" in refused(lambda z: getattr(losses, name)(z, y), z)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (LOGITS, "probabilities, rows in .* jax.nn.softmax"),
        (2 * PROBS, "probabilities"),
        (0 * PROBS, "probabilities"),
        (changed(PROBS, (4, 1), np.nan), "not finite"),
        (PROBS[:, :, None], r"got shape \(12, 3, 1\)"),
    ],
    ids=["logits", "twice", "nothing", "NaN", "an axis more"],
)
@pytest.mark.parametrize("name", PROBABILITY_DOORS)
def test_probabilities_that_are_none(name, value, message):
    assert re.search(message, refused(PROBABILITY_DOORS[name], value))


@pytest.mark.parametrize("name", ["cross_entropy", "kl"])
def test_probabilities_do_not_broadcast(name):
    for value in (PROBS[:1], PROBS[:, :1], PROBS[:, :2]):
        refused(PROBABILITY_DOORS[name], value)


@pytest.mark.parametrize("name", LOGIT_DOORS)
def test_half_precision_logits_are_widened(name):
    call = LOGIT_DOORS[name]
    half = LOGITS.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(call(half), call(half.astype(np.float32)))
    assert call(half).dtype == jnp.float32


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
        ".centroids", ".variance",
    ]  # fmt: skip


def test_a_head_can_be_written_by_flax():
    from flax import serialization

    head = HEAD.replace(mask=np.ones((3, 2), bool))
    found = serialization.from_bytes(head, serialization.to_bytes(head))
    assert isinstance(found, Clusters)
    jax.tree.map(np.testing.assert_array_equal, found, head)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, "1", None, True, np.ones(3)], ids=str)
def test_lipschitz_constants_that_are_none(value):
    text = refused(lambda v: certify.radius(HEAD, Z, Y, lipschitz=v), value)
    assert text.startswith("lipschitz must be a positive, finite upper bound, got ")


@pytest.mark.parametrize(
    ("radii", "r"),
    [
        (np.array([]), [0.1]), (np.array([np.nan]), [0.1]), (np.array([-0.1]), [0.1]),
        (np.array([[0.1]]), [0.1]), (np.array([0.1]), 0.1), (np.array([0.1]), [-1.0]),
    ],
)  # fmt: skip
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


# What is right


def test_empty_batches_have_empty_answers():
    """Where every example has its own; what is of all together is refused."""
    assert HEAD.log_scores(Z[:0]).shape == (0, 3) and losses.margin(LOGITS[:0], Y[:0]).shape == (0,)
    assert certify.radius(HEAD, Z[:0], Y[:0], lipschitz=1.0).shape == (0,)
    for call in (FEATURES["kmeans"][1], lambda z: clusters.fit(fresh(), z, Y[:0], num_classes=3)):
        assert "empty" in refused(call, Z[:0])


def test_what_is_right_is_passed_on_as_it_is():
    for array in (Z, jnp.asarray(Z), Z.astype(np.float64)):
        assert arrays.floats(array, "z", "N E") is array
    assert arrays.labels(Y, 3, {}) is Y
    found = kmeans(fresh(), Z, 2, n_init=3)
    jax.tree.map(np.testing.assert_array_equal, found, _kmeans(fresh(), Z, 2, None, 3, 20, None))


def test_the_gate_costs_next_to_nothing():
    """20,000 x 512 features: less than a twentieth of clustering them once into two."""
    z = rng.normal(size=(20_000, 512)).astype(np.float32)
    jax.block_until_ready(_kmeans(fresh(), z, 2, None, 1, 20, None))

    def seconds(call):
        started = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - started

    clustering = min(seconds(lambda: _kmeans(fresh(), z, 2, None, 1, 20, None)) for _ in range(3))
    gate = min(seconds(lambda: arrays.floats(z, "z", "N E", squares="between them")) for _ in range(5))
    assert gate < max(clustering / 20, 0.005), (gate, clustering)
