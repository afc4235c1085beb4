"""MALT's ranking of targets, of classes and of clusters, against a slow one; who asks for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import reference_attacks
from clustr_jax import attacks
from clustr_jax.attacks import attack_losses, scheduler, targets
from clustr_jax.attacks.attack_losses import View
from clustr_jax.clusters import Clusters
from clustr_jax.runtime.errors import UserError


def tanh_model(params, x):
    return jnp.tanh(x @ params[0]) @ params[1]


@functools.cache
def curved(classes=12):
    """(model, x, y, logits, Jacobians): some images right, some wrong."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(8, 20)).astype(np.float32), rng.normal(size=(20, classes)).astype(np.float32)
    b *= rng.exponential(size=classes).astype(np.float32) ** 2  # some classes move much, some little
    x = rng.uniform(size=(11, 8)).astype(np.float32)
    model = Partial(tanh_model, [jnp.asarray(a), jnp.asarray(b)])
    z = np.tanh(np.float64(x) @ a) @ np.float64(b)
    jacobians = [(np.float64(a) @ ((1 - np.tanh(np.float64(p) @ a) ** 2)[:, None] * b)).T for p in x]
    y = z.argmax(axis=1).astype(np.int32)
    y[:3] = z[:3].argsort(axis=1)[:, -2]
    return model, x, y, z, jacobians


@pytest.mark.parametrize("slots", [4, 64])
@pytest.mark.parametrize("count, candidates", [(9, 100), (3, 5)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_malt_matches_a_slow_one(norm, count, candidates, slots):
    model, x, y, z, jacobians = curved()
    found = attacks.malt_targets(model, x, y, norm=norm, count=count, candidates=candidates, slots=slots)
    assert found.shape == (count, len(x)) and found.dtype == np.int32
    likely = targets.likely_targets(z, y, count)
    assert (found != likely).any()
    for i in range(len(x)):
        expected = reference_attacks.malt(
            z[i], jacobians[i], y[i], norm=norm, count=count, candidates=candidates
        )
        np.testing.assert_array_equal(found[:, i], expected)


def test_few_classes_and_no_images():
    model, x, y, _, _ = curved(2)
    np.testing.assert_array_equal(attacks.malt_targets(model, x, y), 1 - y[None])
    assert attacks.malt_targets(model, x[:0], y[:0]).shape[1] == 0


def test_a_class_without_a_gradient_comes_last():
    """However likely it is."""

    def logits(x):
        z = x[:, 0]
        return jnp.stack([z, 0 * z + 0.4, -z, 0 * z - 5 * z], axis=1)

    x = np.array([[0.5]], np.float32)
    found = attacks.malt_targets(logits, x, np.array([1]))
    np.testing.assert_array_equal(found[:, 0], [0, 3, 2])  # 0.1 / 1 above it, then 2.9 / 5, 0.9 / 1
    flat = attacks.malt_targets(lambda x: logits(x) * jnp.array([[0.0, 1.0, 1.0, 1.0]]), x, np.array([1]))
    np.testing.assert_array_equal(flat[:, 0], [3, 2, 0])


def view(head, x):
    z = x.reshape(x.shape[0], -1)
    scores = head.log_scores(z)
    return View(scores, scores, head.exponents(z))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_of_clusters_the_nearest_bisector_comes_first(norm):
    """With features for pixels, (u_own - u_t) / |mu_own - mu_t|_q sigma^2 is the distance to the bisector."""
    rng = np.random.default_rng(1)
    mu, variance = rng.uniform(size=(4, 3, 6)).astype(np.float32), 0.3
    mask = np.ones((4, 3), bool)
    mask[2, 1:] = mask[3, 2] = False
    head = Clusters(jnp.asarray(mu), jnp.float32(variance), jnp.asarray(mask))
    x, y = rng.uniform(size=(9, 6)).astype(np.float32), np.arange(9, dtype=np.int32) % 4
    found = attacks.malt_targets(Partial(view, head), x, y, norm=norm, count=20, clusters=True)
    u = reference_attacks.exponents(x, mu, variance)
    u[:, ~mask] = -np.inf
    changed = 0
    for i in range(len(x)):
        own = u[i, y[i]].argmax()

        def distance(t, i=i, own=own):
            slope = np.float64(mu[y[i], own] - mu[t // 3, t % 3]) / variance
            gap = u[i, y[i], own] - u[i, t // 3, t % 3]
            return gap / (np.abs(slope).sum() if norm == "linf" else np.linalg.norm(slope))

        others = [t for t in range(12) if t // 3 != y[i] and mask[t // 3, t % 3]]
        expected = sorted(others, key=distance)
        likely = sorted(others, key=lambda t, i=i: -u[i, t // 3, t % 3])
        changed += expected != likely
        np.testing.assert_array_equal(found[: len(others), i], expected)
        assert (found[len(others) :, i] == expected[0]).all()  # the best one stands in for missing ones
        assert len(found) == 9
    assert changed


def test_memory_is_that_of_one_gradient_however_many_classes():
    """Temporary memory of the compiled ranking for 10 and for 100 candidates of a convolution's size."""

    def model(params, x):
        return jnp.tanh(jnp.tanh(x @ params[0]) @ params[1]) @ params[2]

    rng = np.random.default_rng(0)
    sizes = ((64, 512), (512, 512), (512, 200))
    params = [jnp.asarray(rng.normal(size=s) / 20, jnp.float32) for s in sizes]
    x, y = jnp.zeros((64, 64)), jnp.zeros(64, jnp.int32)

    def memory(count):
        candidates = jnp.ones((64, count), jnp.int32)
        lowered = targets._linear_distances.lower(
            Partial(model, params), x, y, candidates, loss=attack_losses.margin_targeted, norm="linf"
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert memory(100) <= memory(10) + 64 * 100 * 8 + 4096


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_who_asks_for_it(norm, monkeypatch):
    """apgd with targets="malt"; AutoAttack and the default have the likeliest classes."""
    model, x, y, z, _ = curved()
    seen = []

    def run(attack, key, model, x, y, *, targets, **more):
        seen.append(targets)
        return scheduler.Outcome.fresh(x, 9)

    monkeypatch.setattr(scheduler, "run", run)
    right = np.flatnonzero(z.argmax(axis=1) == y)
    call = functools.partial(attacks.apgd, jax.random.key(0), model, x, y, eps=0.1, norm=norm, targeted=True)
    call(targets="malt")
    np.testing.assert_array_equal(seen.pop(), attacks.malt_targets(model, x, y, norm=norm)[:, right])
    call()
    attacks.autoattack(jax.random.key(0), model, x, y, eps=0.1, norm=norm, attacks=("apgd-t",))
    for found in seen:
        np.testing.assert_array_equal(found, targets.likely_targets(z, y)[:, right])


def test_malt_breaks_what_the_likeliest_does_not():
    """One target at a time: the class that is likelier does not move at all."""

    def logits(x):
        z = x[:, 0]
        return jnp.stack([0 * z, -0.5 + 0.001 * z, 20 * (z - 0.6)], axis=1)

    x, y = np.array([[0.5]], np.float32), np.array([0])
    np.testing.assert_array_equal(targets.likely_targets(logits(x), y)[:, 0], [1, 2])
    np.testing.assert_array_equal(attacks.malt_targets(logits, x, y)[:, 0], [2, 1])


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(count=0), "count must be at least 1"),
        (dict(candidates=2.5), "candidates must be a whole number"),
        (dict(slots=0), "slots must be at least 1"),
        (dict(clusters=True), "clusters=True needs a model that returns its clusters"),
    ],
)
def test_settings_that_are_refused(change, text):
    model, x, y, _, _ = curved()
    with pytest.raises(UserError, match=text):
        attacks.malt_targets(model, x, y, **change)


def test_words_that_are_no_ranking():
    model, x, y, _, _ = curved()
    with pytest.raises(UserError, match="targets must be one of likely, malt, got 'nearest'"):
        attacks.apgd(jax.random.key(0), model, x, y, eps=0.1, targeted=True, targets="nearest")


def test_not_inside_jit():
    model, x, y, _, _ = curved()
    with pytest.raises(UserError, match="cannot be inside jit"):
        jax.jit(lambda x: attacks.malt_targets(model, x, y))(x)
