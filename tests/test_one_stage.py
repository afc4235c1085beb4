"""What clustr_at and linear_at are made of, by float64 references: term, head, rival, noise, radius."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import reference
import reference_one_stage as slow
from clustr_jax.clusters import Clusters
from clustr_jax.models import Outputs
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import Recipe, TermSettings, TrainingSettings
from clustr_jax.stages import refusals
from clustr_jax.training import between, cost, learned, trainers
from clustr_jax.training.objectives import METHODS, draws_clusters
from linear_problems import ULP, Linear, attack, float64, get_config, noise, uniform
from small_training import problem

Y, K, E, B = 3, 2, 4, 12


@pytest.fixture
def head(rng):
    """Centroids [Y, K, E], variance, which exist: class 1 has one cluster."""
    exists = np.array([[True, True], [True, False], [True, True]])
    return rng.normal(size=(Y, K, E)), 0.7, exists


@pytest.fixture
def batch(rng):
    """(features, shifted features, labels, mask): every class has several examples that count."""
    y, mask = np.arange(B) % Y, np.ones(B, bool)
    mask[[4, 11]] = False
    z = rng.normal(size=(B, E))
    return z, z + 0.3 * rng.normal(size=(B, E)), y, mask


def clusters_of(head):
    return Clusters(jnp.asarray(head[0]), jnp.asarray(head[1]), jnp.asarray(head[2]))


def test_term_and_gradient(head, batch):
    """IKL's double sum, and its gradient by both sides, in float64; masked examples weigh nothing."""
    z, moved, y, mask = batch
    scores, adversarial = (slow.cluster_scores(a, *head) for a in (z, moved))
    weights = slow.class_weights(scores, y, mask, 4.0)
    with jax.enable_x64(True):
        each, other = (clusters_of(head).exponents(jnp.asarray(a)) for a in (z, moved))
        arguments = jnp.asarray(y), jnp.asarray(mask), 4.0
        found = between.consistency(each, other, *arguments)
        total = jax.grad(lambda *a: jnp.sum(between.consistency(*a, *arguments)), (0, 1))(each, other)
    np.testing.assert_allclose(found, slow.ikl(scores, adversarial, weights), rtol=1e-12)
    finite = np.isfinite(scores)
    expected = slow.ikl_gradient(*(np.where(finite, a, 0.0) for a in (scores, adversarial)), weights)
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(np.reshape(total[0], scores.shape), expected, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(np.reshape(total[1], scores.shape), -expected, rtol=1e-11, atol=1e-14)


def test_term_of_one_cluster_is_the_shift_between_centroids(rng, batch):
    """(mu_j - mu_k).(f - f') / sigma^2: moving clean and adversarial features together costs nothing."""
    z, moved, y, mask = batch
    head = rng.normal(size=(Y, 1, E)), 0.7, np.ones((Y, 1), bool)
    with jax.enable_x64(True):
        clusters = clusters_of(head)
        found = between.consistency(
            clusters.exponents(jnp.asarray(z)), clusters.exponents(jnp.asarray(moved)),
            jnp.asarray(y), jnp.asarray(mask), 2.0,
        )  # fmt: skip
    weights = slow.class_weights(slow.cluster_scores(z, *head), y, mask, 2.0)
    expected = []
    for i in range(B):
        apart = head[0][:, 0][:, None] - head[0][:, 0][None]  # [Y, Y, E]
        shifts = (apart @ (z[i] - moved[i]) / head[1]) ** 2
        expected.append(weights[i] @ shifts @ weights[i] / 4)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_linear_head_is_a_cluster_per_class():
    """Its logits are the scores that the term looks at."""
    logits = jnp.arange(6.0).reshape(2, 3)
    assert between.scores(Outputs(logits, jnp.zeros((2, 4))), None).shape == (2, 3, 1)


@pytest.mark.parametrize("learn_variance", [False, True])
def test_head_that_is_learned(learn_variance, head, batch, rng):
    """mu0 + sigma0 nu and sigma0^2 exp(t), in the log domain; the start is the start, to the last bit."""
    train = dataclasses.replace(terms(), learn_variance=learn_variance)
    start, params = clusters_of(head), learned.parameters(train, Y, K, E)
    own, same = learned.split({"layer": 1, learned.HEAD: params}, start)
    assert own == {"layer": 1} and len(params) == 1 + learn_variance
    assert jnp.array_equal(same.centroids, start.centroids) and same.variance == start.variance
    nu, t = rng.normal(size=(Y, K, E)), 0.4 * learn_variance
    values = {"offsets": jnp.asarray(nu)} | ({"log_scale": jnp.asarray(t)} if learn_variance else {})
    with jax.enable_x64(True):
        values = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), values)
        found = learned.split({learned.HEAD: values}, clusters_of(head))[1].log_scores(jnp.asarray(batch[0]))
    expected = reference.log_scores(
        batch[0], head[0] + np.sqrt(head[1]) * nu, head[1] * np.exp(t), mask=head[2], nearest=None
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


HEADS = [
    ({}, True, False),
    ({"train.learn_variance": True}, True, True),
    ({"train.centroids": "simplex", "magnet.k": 1}, False, False),
    ({"train.centroids": "simplex", "magnet.k": 1, "train.learn_variance": True}, False, True),
]


@pytest.mark.parametrize(("changes", "centroids", "variance"), HEADS)
@pytest.mark.one_in(2)
def test_what_is_trained_moves(changes, centroids, variance, rng):
    """And what is held stays; the average starts where training does and follows."""
    p = problem("clustr_at", rng, **{"train.batch_size": 8, "train.ema": 0.9, **changes})
    start, after = p.state.deployed[1], p.run(p.state, 3)
    averaged, now = after.deployed[1], learned.split(after.params, after.clusters)[1]
    for head in (averaged, now):
        assert (not jnp.array_equal(head.centroids, start.centroids)) == centroids
        assert bool(head.variance != start.variance) == variance
    assert learned.HEAD not in after.deployed[0]["params"]
    if centroids:  # it is behind
        far, near = (jnp.linalg.norm(head.centroids - start.centroids) for head in (now, averaged))
        assert 0 < near < far


def terms():
    return TermSettings.of(get_config("clustr_at").train)


@pytest.mark.parametrize(("num_classes", "k", "size"), [(2, 1, 1), (3, 1, 2), (10, 1, 16), (4, 3, 11)])
def test_simplex(num_classes, k, size):
    """The Gram matrix of Pang et al.'s construction, which is that of the largest smallest distance."""
    points = np.float64(learned.simplex(jax.random.key(0), num_classes, k, size)).reshape(-1, size)
    expected = slow.max_mahalanobis(num_classes * k, max(size, num_classes * k))
    np.testing.assert_allclose(points @ points.T, expected @ expected.T, atol=1e-6)
    np.testing.assert_allclose(points.sum(axis=0), 0, atol=1e-6)


def test_simplex_needs_room():
    with pytest.raises(UserError, match="lower magnet.k"):
        learned.simplex(jax.random.key(0), 4, 2, 6)


def test_simplex_lies_around_the_embeddings(rng):
    """At their mean, as far away as they are; the variance is their trace."""
    z = rng.normal(size=(50, 6)) + 3
    found = learned.around(jax.random.key(1), jnp.asarray(z, jnp.float32), 3, 2)
    trace = np.sum(np.var(z, axis=0))
    centroids = np.float64(found.centroids).reshape(-1, 6)
    np.testing.assert_allclose(centroids.mean(axis=0), z.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(np.sum((centroids - z.mean(axis=0)) ** 2, axis=1), trace, rtol=1e-5)
    np.testing.assert_allclose(found.variance, trace, rtol=1e-5)


def test_rival_of_clusters(head, batch):
    """The cluster with the smallest margin over the length of its gradient: by finite differences."""
    z, _, y, _ = batch
    with jax.enable_x64(True):
        found = between.against_rival(
            Outputs(jnp.zeros((B, Y)), jnp.asarray(z)), clusters_of(head), jnp.asarray(y)
        )
    chosen, scores = slow.rival(z, y, *head), slow.cluster_scores(z, *head)
    nearest = [
        max((s, j) for j, s in enumerate(row) if j // K != c)[1] for row, c in zip(scores, y, strict=True)
    ]
    assert (chosen != nearest).any()  # the length matters
    label = [reference.logsumexp(s for s in row[c * K : c * K + K]) for row, c in zip(scores, y, strict=True)]
    np.testing.assert_allclose(found, np.stack([label, scores[np.arange(B), chosen]], axis=1), rtol=1e-6)


def test_rival_of_a_linear_head(rng, batch):
    """That of the clusters which classify alike."""
    z, _, y, _ = batch
    w = rng.normal(size=(E, Y))
    logits = z @ w
    with jax.enable_x64(True):
        outputs = Outputs(jnp.asarray(logits), jnp.asarray(z))
        found = between.against_rival(outputs, jnp.asarray(w), jnp.asarray(y))
    expected = []
    for i, c in enumerate(y):
        ratios = {
            j: (logits[i, c] - logits[i, j]) / np.linalg.norm(w[:, c] - w[:, j]) for j in range(Y) if j != c
        }
        expected.append([logits[i, c], logits[i, min(ratios, key=ratios.get)]])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_noisy_step(rng, key):
    """From noise of 2 eps, cut to the box and to no ball, one step of its own length."""
    net = Linear((3,), 2)
    variables = net.variables(rng)
    w = float64(variables["params"]["kernel"])
    x, y = np.float64(np.float32(rng.uniform(size=(40, 3)))), rng.integers(0, 2, 40)
    changes = {
        "data.name": "digits", "train.attack.eps": 0.1, "train.attack.step_size": 0.07, "train.noise": 2.0,
    }  # fmt: skip
    found, _ = attack("fast_at", net, variables, x, key, y, **changes)
    direction = np.sign(w[:, 1 - y] - w[:, y]).T
    drawn = 0.2 * noise(key, 40, (3,), uniform)
    expected = slow.noisy_step(x, drawn, lambda start: direction, 0.07, (0, 1))
    np.testing.assert_allclose(found, expected, atol=2 * ULP)
    assert np.abs(found - x).max() > 0.15  # further than the radius
    still, _ = attack("fast_at", net, variables, x, key, y, **changes | {"train.noise": 0.0})
    assert np.abs(still - x).max() < 0.1 + ULP


def test_radius_grows(rng):
    """Share of the radius by the step."""
    trainer = problem("clustr_at", rng, **{"train.eps_ramp": 2.0, "train.batch_size": 8}).trainer
    for step in range(3 * trainer.steps_per_epoch):
        share = slow.radius_share(step, 2.0, trainer.steps_per_epoch)
        np.testing.assert_allclose(trainers.strength(trainer, step), share, rtol=1e-6)


PASSES = {
    ("fast_at",): 2, ("clustr_at",): 3, ("linear_at",): 3,
    ("clustr_at", "train.loss", "ce"): 3,  # the term looks at clean images
    ("clustr_at", "train.loss", "ce", "train.ikl", 0.0): 2,
    ("clustr_at", "train.aim", "rival"): 3, ("clustr_at", "train.aim", "clean"): 3,
    ("linear_at", "train.awp", 0.01): 5,
}  # fmt: skip


@pytest.mark.parametrize(("what", "count"), PASSES.items(), ids=str)
def test_passes(what, count):
    """Gradient passes of a step: one for the adversary, one for each set of images; no aim costs another."""
    method, *changes = what
    config = get_config(method, **dict(zip(changes[::2], changes[1::2], strict=True)))
    assert cost.gradients(method, TrainingSettings.of(config), Recipe.of(config.train)) == count


def test_twin_has_the_same_settings():
    """All but the name of the method, in every data set's config and variant."""
    for name, variant in (("toy2d", ""), ("cifar10", ""), ("cifar10", ",fast"), ("svhn", ",cpu")):
        ours, twin = (get_config(m + variant, name).to_dict() for m in ("clustr_at", "linear_at"))
        assert ours.pop("method") != twin.pop("method") and ours == twin
    assert METHODS["clustr_at"].objective is METHODS["linear_at"].objective
    assert METHODS["clustr_at"].adversary is METHODS["linear_at"].adversary


@pytest.mark.parametrize("method", ["clustr_at", "linear_at"])
def test_sampler_is_a_setting(method):
    for sampler in ("uniform", "magnet"):
        settings = TrainingSettings.of(get_config(method, **{"train.sampler": sampler}))
        assert draws_clusters(METHODS[method], settings) == (sampler == "magnet")
        assert not draws_clusters(METHODS["trades"], settings)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train.noise": 1.0, "train.attack.steps": 3}, "take one step"),
        ({"train.noise": -1.0}, "train.noise must be >= 0"),
        ({"train.ikl": -1.0}, "train.ikl must be >= 0"),
        ({"train.ikl_temperature": 0.0}, "ikl_temperature must be > 0"),
        ({"train.loss": "mse"}, "train.loss must be one of ce, trades"),
        ({"train.aim": "all"}, "train.aim must be one of labels, clean, rival"),
        ({"train.centroids": "fixed"}, "train.centroids must be one of learned, simplex"),
        ({"train.sampler": "class"}, "train.sampler must be one of uniform, magnet"),
    ],
)
def test_settings_that_cannot_work(changes, told):
    with pytest.raises(UserError, match=told):
        refusals.check_terms(TermSettings.of(get_config("clustr_at", **changes).train))


def test_share_of_noise_is_uniform(rng, key):
    """The start is uniform in the cube of noise times eps."""
    drawn = 0.2 * noise(key, 400, (3,), uniform)
    assert scipy.stats.kstest(drawn.ravel() / 0.4 + 0.5, "uniform").pvalue > 1e-3
