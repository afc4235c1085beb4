"""The adversary of every method, step by step, on networks whose gradients can be written down."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import reference
import reference_objectives as naive
from clustr_jax.clusters import Clusters
from clustr_jax.training.objectives import METHODS
from linear_problems import (
    ULP,
    Linear,
    attack,
    float64,
    get_config,
    noise,
    steps_of,
    uniform,
)


def test_towards_labels_on_a_linear_classifier(rng, key):
    """Two classes: every step goes along sign(w_other - w_y), misclassified or not, up to eps."""
    net = Linear((3,), 2)
    variables = net.variables(rng)
    w = float64(variables["params"]["kernel"])
    x, y = rng.normal(size=(40, 3)), rng.integers(0, 2, 40)
    wrong = (x @ w + float64(variables["params"]["bias"])).argmax(axis=1) != y
    assert wrong.any() and not wrong.all()
    direction = np.sign(w[:, 1 - y] - w[:, y]).T
    for steps in (1, 3, 7):
        found, _ = attack("pgd_at", net, variables, x, key, y, **steps_of(steps, 0.03))
        np.testing.assert_allclose(found, x + min(0.03 * steps, 0.1) * direction, atol=ULP)
    start = x + 0.1 * noise(key, 40, (3,), uniform)
    found, _ = attack("fast_at", net, variables, x, key, y, **steps_of(1, 0.125, start="uniform"))
    np.testing.assert_allclose(found, x + np.clip(start + 0.125 * direction - x, -0.1, 0.1), atol=ULP)


def test_towards_labels_stays_in_the_box(rng, key):
    """Pixels have one, points do not; the closed form is clipped to it."""
    net = Linear((3,), 2)
    variables = net.variables(rng)
    w = float64(variables["params"]["kernel"])
    x, y = np.float64(np.float32(rng.uniform(size=(40, 3)))), rng.integers(0, 2, 40)
    direction = np.sign(w[:, 1 - y] - w[:, y]).T
    changes = {"data.name": "digits", **steps_of(4, 0.1, eps=0.3)}
    found, _ = attack("pgd_at", net, variables, x, key, y, **changes)
    np.testing.assert_allclose(found, np.clip(x + 0.3 * direction, 0, 1), atol=ULP)
    assert np.min(found) == 0 and np.max(found) == 1


@pytest.mark.parametrize(
    ("method", "scores"),
    [("trades", "log"), ("qtrades", "log"), ("clustr_qtrades", "log"), ("clustr_qtrades", "exp")],
)
def test_towards_clean_on_a_linear_classifier(method, scores, rng, key):
    """Two classes: to a corner of the ball; to which of two, the side of w.x decides that the start is on.

    Log scores of one cluster per class are linear; exp scores are not, but their first step is
    checked by finite differences below.
    """
    net = Linear((3,), 2)
    variables = net.variables(rng)
    clusters, w = None, float64(variables["params"]["kernel"])
    if METHODS[method].head == "clusters":
        centroids = rng.normal(size=(2, 1, 3)).astype(np.float32)
        clusters = Clusters(jnp.asarray(centroids), jnp.float32(1.3))
        w = np.float64(centroids)[:, 0].T
    w = w[:, 1] - w[:, 0]
    x = rng.normal(size=(40, 3))
    around = 0.1 * noise(key, 40, (3,), uniform)
    side = np.sign(around @ w)
    assert (side > 0).any() and (side < 0).any()
    many = steps_of(8, 0.05, start="uniform")
    once = steps_of(1, 0.03, start="uniform")
    run = functools.partial(
        attack, method, net, variables, x, key, clusters=clusters, **{"fidelity.scores": scores}
    )
    if scores == "log":
        np.testing.assert_allclose(run(**many)[0], x + 0.1 * side[:, None] * np.sign(w)[None], atol=ULP)
        expected = np.clip(around + 0.03 * side[:, None] * np.sign(w)[None], -0.1, 0.1)
        np.testing.assert_allclose(run(**once)[0], x + expected, atol=ULP)
        return
    score = functools.partial(reference.scores, centroids=centroids, variance=1.3)
    target = naive.authors_target(score(x))
    gradient = reference.finite_difference(
        lambda p: reference.cross_entropy(score(p), target).sum(), x + around
    )
    clear = np.abs(gradient) > 1e-5  # elsewhere float32 decides the sign
    assert clear.mean() > 0.9
    expected = x + np.clip(around + 0.03 * np.sign(gradient), -0.1, 0.1)
    np.testing.assert_allclose(np.asarray(run(**once)[0])[clear], expected[clear], atol=ULP)


@pytest.mark.parametrize("method", ["qtrades", "trades", "clustr_qtrades"])
def test_the_authors_term_is_what_they_step_on(method, rng, key):
    """fidelity.kl=probs, QTRADES alone: away from <p, p_adv>, so towards the class that is not predicted.

    By cross entropy, as other methods still do, to the side of w.x that the start is on.
    """
    net = Linear((3,), 2)
    variables = net.variables(rng)
    clusters, w = None, float64(variables["params"]["kernel"])
    x = rng.normal(size=(40, 3))
    if METHODS[method].head == "clusters":
        centroids = rng.normal(size=(2, 1, 3)).astype(np.float32)
        clusters, w = Clusters(jnp.asarray(centroids), jnp.float32(1.3)), np.float64(centroids)[:, 0].T
    predicted = np.argmax(x @ w + float64(variables["params"]["bias"]), axis=1)
    w = w[:, 1] - w[:, 0]
    around = 0.1 * noise(key, 40, (3,), uniform)
    side = 1 - 2 * predicted if method == "qtrades" else np.sign(around @ w)
    assert (side != np.sign(around @ w)).sum() in ((range(5, 36)) if method == "qtrades" else (0,))
    changes = {**steps_of(1, 0.03, start="uniform"), "fidelity.kl": "probs"}
    found, _ = attack(method, net, variables, x, key, clusters=clusters, **changes)
    expected = np.clip(around + 0.03 * side[:, None] * np.sign(w)[None], -0.1, 0.1)
    np.testing.assert_allclose(found, x + expected, atol=ULP)


@pytest.mark.parametrize("method", ["clustr_qtrades", "clustr_trades", "qtrades"])
def test_what_compares_embeddings_steps_on_their_distance(method, rng, key):
    """train.consistency=mse: here the embedding is the point itself, so straight away from it.

    The linear head has no such term, and its adversary does not change.
    """
    net = Linear((3,), 2)
    variables, x = net.variables(rng), rng.normal(size=(40, 3))
    clusters = None
    if METHODS[method].head == "clusters":
        clusters = Clusters(jnp.asarray(rng.normal(size=(2, 1, 3)), jnp.float32), jnp.float32(1.0))
    around = 0.1 * noise(key, 40, (3,), uniform)
    changes = {**steps_of(1, 0.03, start="uniform"), "train.consistency": "mse"}
    found, _ = attack(method, net, variables, x, key, clusters=clusters, **changes)
    direction = np.sign(around)
    if clusters is None:
        w = float64(variables["params"]["kernel"])
        w = w[:, 1] - w[:, 0]
        direction = np.sign(around @ w)[:, None] * np.sign(w)[None]
    np.testing.assert_allclose(found, x + np.clip(around + 0.03 * direction, -0.1, 0.1), atol=ULP)


@pytest.mark.parametrize("method", ["trades", "clustr_trades"])
def test_trades_starts_from_small_normal_noise(method, rng, key):
    """0.001 times a standard normal (the authors' code), for each coordinate on its own."""
    net = Linear((50,), 2)
    clusters = Clusters(jnp.asarray(rng.normal(size=(2, 1, 50)), jnp.float32), jnp.float32(1.0))
    assert get_config(method).train.attack.start == "normal"
    x = np.zeros((400, 50))  # at 0 the sum is not rounded
    found, _ = attack(method, net, net.variables(rng), x, key, clusters=clusters, **{"train.attack.steps": 0})
    # at the 0.1 % level: 20,000 draws tell a scale from another 3 % away
    assert scipy.stats.kstest(np.asarray(found).reshape(-1) / 1e-3, "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(np.asarray(found).T) - np.eye(50)).max() < 0.3


@pytest.mark.parametrize(
    ("method", "bn"), [("pgd_at", "batch"), ("trades", "eval"), ("clustr_trades", "batch")]
)
def test_an_adversary_carries_no_gradient(method, bn, rng, key):
    """Neither images nor batch statistics: their derivatives by variables, clusters and pixels are 0."""
    net = Linear((3,), 2, normed=True)
    clusters = Clusters(jnp.asarray(rng.normal(size=(2, 1, 3)), jnp.float32), jnp.float32(1.0))
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    changes = {**steps_of(2, 0.05, start="uniform", bn=bn), "fidelity.attack_statistics": "update"}

    def total(variables, clusters, x):
        found = attack(method, net, variables, x, key, clusters=clusters, **changes)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(found))

    for gradient in jax.tree.leaves(jax.grad(total, (0, 1, 2))(net.variables(rng), clusters, x)):
        assert not np.any(gradient)


@pytest.mark.parametrize("method", ["fast_at", "trades"])
def test_which_statistics_the_attack_uses(method, rng, key):
    """ "eval": the running ones, each image on its own; "batch": those of the batch. So the clean target.

    By finite differences of each. Either way the running statistics stay as they were.
    """
    net = Linear((3,), 3, normed=True)
    variables, x, y = net.variables(rng), rng.normal(size=(6, 3)), np.array([0, 1, 2, 0, 1, 2])
    params, stats = (float64(variables[name]) for name in ("params", "batch_stats"))
    other = {**variables, "batch_stats": net.variables(rng)["batch_stats"]}
    start = x + 0.4 * noise(key, 6, (3,), uniform)

    def logits(points, bn):
        mean, variance = (stats["mean"], stats["var"]) if bn == "eval" else (points.mean(0), points.var(0))
        return (points - mean) / np.sqrt(variance + 1e-5) @ params["kernel"] + params["bias"]

    signs = {}
    for bn in ("eval", "batch"):
        once = steps_of(1, 0.05, eps=0.4, start="uniform", bn=bn)
        found, after = attack(method, net, variables, x, key, y, **once)
        target = reference.softmax(logits(x, bn)) if method == "trades" else y

        def loss(points, bn=bn, target=target):
            return reference.cross_entropy(logits(points, bn), target).sum()

        gradient = reference.finite_difference(loss, start)
        assert np.abs(gradient).min() > 1e-4  # no sign hangs on rounding
        signs[bn] = np.sign(gradient)
        np.testing.assert_allclose(found, x + np.clip(start + 0.05 * signs[bn] - x, -0.4, 0.4), atol=ULP)
        elsewhere, kept = attack(method, net, other, x, key, y, **once)
        assert (np.asarray(elsewhere) != np.asarray(found)).any() == (bn == "eval")
        first, _ = attack(method, net, variables, x[:2], key, y[:2], **once)
        assert (np.asarray(first) != np.asarray(found)[:2]).any() == (bn == "batch")
        for before, now in ((variables, after), (other, kept)):
            np.testing.assert_array_equal(now["mean"], before["batch_stats"]["mean"])
            np.testing.assert_array_equal(now["var"], before["batch_stats"]["var"])
    assert (signs["eval"] != signs["batch"]).any()
