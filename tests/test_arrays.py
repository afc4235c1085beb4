"""The gate for arrays: doors x inputs. Equal input gives an equal message at every door, and what is right
comes out bit for bit as without the gate. Counts, masks, heads and numbers: test_array_settings.py.
"""

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

from array_doors import (
    FEATURES,
    HEAD,
    LABELS,
    LOGIT_DOORS,
    LOGITS,
    ONLY_OUTSIDE_JIT,
    PROBABILITY_DOORS,
    PROBS,
    Y,
    Z,
    changed,
    fresh,
    refused,
    rng,
    same_everywhere,
    soft,
)
from clustr_jax import UserError, certify, clusters, losses
from clustr_jax.kmeans import _kmeans, kmeans
from clustr_jax.runtime import arrays

pytestmark = pytest.mark.wrong_arrays  # what the gate is for

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
