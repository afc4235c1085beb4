"""Certified training losses against the formulas, and the certify stage on networks that it trained or made.

The stage itself raises where an attack succeeds inside a radius; here it is also made to.
"""

import contextlib
import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import reference
from clustr_jax import attacks, certify, clusters, data, lipschitz, losses, models, stages
from clustr_jax.classifier import Classifier
from clustr_jax.clusters import Clusters
from clustr_jax.evaluation import certificates
from clustr_jax.evaluation.protocols import Examples
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import CertifySettings, MagnetSettings, TrainingSettings
from clustr_jax.training import objectives
from marks import in_ci


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """The configs are files beside the package, not part of it."""
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1])


def get_config(name="digits", method="clustr_certified"):
    config = importlib.import_module(f"configs.{name}").get_config(method)
    config.smoke = True
    return config


def slow_magnet(z, classes, alpha, radius, sharpness):
    """Eq. 3 with sigma^2 / sharpness and radius |mu - mu_own| / sigma^2 on every other cluster's exponent."""
    z = np.float64(z)
    means = z.mean(axis=1)
    variance = np.sum((z - means[:, None]) ** 2) / (z.shape[0] * z.shape[1] - 1) / sharpness
    loss = np.zeros(z.shape[:2])
    for i, j in np.ndindex(loss.shape):
        own = np.sum((z[i, j] - means[i]) ** 2) / (2 * variance)
        others = [
            -np.sum((z[i, j] - means[m]) ** 2) / (2 * variance)
            + radius * np.linalg.norm(means[m] - means[i]) / variance
            for m in range(len(means))
            if classes[m] != classes[i]
        ]
        loss[i, j] = max(0.0, alpha + own + reference.logsumexp(others))
    return loss


@pytest.mark.parametrize(("radius", "sharpness"), [(0.0, 1.0), (0.3, 1.0), (0.0, 8.0), (0.3, 8.0)])
def test_magnet_with_a_radius_is_the_formula(rng, radius, sharpness):
    z, classes = np.float32(rng.standard_normal((4, 5, 3))), np.array([0, 1, 1, 2])
    expected = slow_magnet(z, classes, 0.5, radius, sharpness)
    found, _ = losses.magnet_loss(
        jnp.asarray(z), jnp.asarray(classes), alpha=0.5, radius=radius, sharpness=sharpness
    )
    reference.close(found, expected, rtol=1e-5)


def test_magnet_with_a_radius_bounds_the_loss_of_every_shift(rng):
    """Means and variance held: a shift of up to 0.3 never gives more; no shift gives less."""
    z, classes, radius = rng.standard_normal((4, 5, 3)), np.array([0, 1, 1, 2]), 0.3
    means = z.mean(axis=1)
    variance = np.sum((z - means[:, None]) ** 2) / 19
    bound, _ = losses.magnet_loss(jnp.float32(z), jnp.asarray(classes), alpha=2.0, radius=radius)

    def loss(f, i):
        own = np.sum((f - means[i]) ** 2)
        others = [
            -np.sum((f - m) ** 2) / (2 * variance)
            for m, c in zip(means, classes, strict=True)
            if c != classes[i]
        ]
        return max(0.0, 2.0 + own / (2 * variance) + reference.logsumexp(others))

    for i, j in np.ndindex(4, 5):
        shifts = rng.standard_normal((200, 3))
        shifts *= radius / np.linalg.norm(shifts, axis=1, keepdims=True)
        worst = max(loss(z[i, j] + s, i) for s in shifts)
        assert worst <= float(bound[i, j]) + 1e-5
        assert loss(z[i, j], i) < float(bound[i, j])


def test_coinciding_means_have_a_finite_gradient():
    """The distance of a mean to itself is 0, where the square root has no derivative."""
    z = jnp.ones((3, 4, 2)).at[0, 0, 0].set(2.0)
    gradient = jax.grad(lambda z: losses.magnet_loss(z, jnp.array([0, 1, 2]), radius=0.3)[0].sum())(z)
    assert np.isfinite(gradient).all()


class FixedNet:
    """A network whose embeddings are its inputs and whose head is given: objectives see nothing else."""

    def train(self, variables, x):
        head = variables["params"][models.HEAD]
        return models.Outputs(x @ head["kernel"] + head["bias"][None, :], x), {}


def problem(rng, k=2):
    variables = {"params": {models.HEAD: {
        "kernel": jnp.float32(rng.standard_normal((3, 4))), "bias": jnp.float32(rng.standard_normal(4)),
    }}, "batch_stats": {}}  # fmt: skip
    classes = jnp.array([0, 1, 2, 3])
    batch = objectives.Batch(
        jnp.float32(rng.standard_normal((20, 3))), jnp.repeat(classes, 5), jnp.ones(20, bool), classes
    )
    return variables, batch, Clusters(jnp.float32(rng.standard_normal((4, k, 3))), jnp.float32(1.5))


def test_nominal_certified_is_cross_entropy_of_the_worst_logits(rng):
    variables, batch, _ = problem(rng)
    config = get_config(method="nominal_certified")
    config.train.radius = 0.4
    loss, aux = objectives.nominal_certified(
        FixedNet(), variables, batch, None, None, TrainingSettings.of(config)
    )
    w, b = (np.float64(variables["params"][models.HEAD][n]) for n in ("kernel", "bias"))
    worst = np.float64(batch.x) @ w + b
    for i, y in enumerate(np.asarray(batch.y)):
        worst[i] += 0.4 * np.linalg.norm(w - w[:, y : y + 1], axis=0)
    np.testing.assert_allclose(loss, reference.cross_entropy(worst, batch.y).mean(), rtol=1e-5)
    # and "certified" counts what the linear head's certificate does
    assert aux.metrics["certified"] == np.mean(worst.argmax(axis=1) == np.asarray(batch.y))


@pytest.mark.parametrize("temperature", [0.25, 2.0])
def test_a_temperature_is_that_of_a_head_of_unit_length(rng, temperature):
    """The formula; for orthonormal rows it is the plain division; and a longer head changes nothing."""
    variables, batch, _ = problem(rng)
    config = get_config(method="nominal_certified")
    config.train.radius, config.train.temperature = 0.4, temperature

    def loss(kernel, bias):
        head = {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}
        given = variables | {"params": {models.HEAD: head}}
        settings = TrainingSettings.of(config)
        return objectives.nominal_certified(FixedNet(), given, batch, None, None, settings)[0]

    def slow(w, b, length):
        worst = np.float64(batch.x) @ w + b
        for i, y in enumerate(np.asarray(batch.y)):
            worst[i] += 0.4 * np.linalg.norm(w - w[:, y : y + 1], axis=0)
        return reference.cross_entropy(worst / (temperature * length), batch.y).mean()

    w, b = (np.float64(variables["params"][models.HEAD][n]) for n in ("kernel", "bias"))
    pairs = [np.linalg.norm(w[:, i] - w[:, j]) for i in range(4) for j in range(4) if i != j]
    np.testing.assert_allclose(loss(w, b), slow(w, b, np.mean(pairs) / np.sqrt(2)), rtol=1e-5)
    np.testing.assert_allclose(loss(5 * w, 5 * b), loss(w, b), rtol=1e-5)
    simplex = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).T / 2.0  # |w_c - w_y| = sqrt(2)
    np.testing.assert_allclose(loss(simplex, b), slow(simplex, b, 1.0), rtol=1e-5)


def test_clustr_certified_is_magnet_plus_the_worst_cross_entropy(rng):
    variables, batch, heads = problem(rng)
    config = get_config()
    config.train.radius, config.train.xent_lam = 0.2, 0.7
    config.magnet.sharpness, config.magnet.alpha = 4.0, 0.5
    heads = heads.replace(variance=heads.variance / 4.0)  # as training hands it over
    loss, aux = objectives.clustr_certified(
        FixedNet(), variables, batch, None, heads, TrainingSettings.of(config)
    )
    magnet = slow_magnet(np.asarray(batch.x).reshape(4, 5, 3), np.arange(4), 0.5, 0.2, 4.0)
    mu, worst = np.float64(heads.centroids), np.float64(heads.log_scores(batch.x))
    for i, y in enumerate(np.asarray(batch.y)):
        for c in range(4):
            if c != y:
                worst[i, c] += 0.2 * max(np.linalg.norm(a - b) for a in mu[c] for b in mu[y]) / (1.5 / 4.0)
    cross = reference.cross_entropy(worst, batch.y)
    np.testing.assert_allclose(loss, magnet.mean() + 0.7 * cross.mean(), rtol=1e-5)
    np.testing.assert_allclose(aux.per_example, magnet.ravel(), rtol=1e-4, atol=1e-5)
    # the training's own estimate never counts more than the soft certificate grants
    r = certify.radius(heads, batch.x, np.asarray(batch.y), lipschitz=1.0, rule="soft", rounding=0.0)
    assert aux.metrics["certified"] <= np.mean(r >= 0.2 * (1 - 1e-6))


# A network on real images: SLL as it is made, with clusters fitted to its features.


@pytest.fixture(scope="module")
def digits():
    """(classifier, x, y) of the test digits; K = 2, so that the rules differ."""
    x, y = data.load("digits", "train")
    net = models.build("lip_sll", num_classes=10, input_shape=(8, 8, 1), mean=(0.3,), std=(1.0,), width=4)
    variables = jax.jit(net.init)(jax.random.key(0))
    z = jax.jit(net.eval)(variables, x).embeddings
    fitted = clusters.fit(jax.random.key(1), z, y, num_classes=10, k=2)
    # shrink the variance: Eq. 4 at its full size decides by the majority of clusters
    clf = Classifier(variables, fitted.replace(variance=fitted.variance / 50), net)
    x, y = data.load("digits", "test")
    return clf, x, y


@pytest.mark.slow
def test_attacks_inside_the_radius_fail_and_some_beyond_succeed(digits):
    """l2-PGD on the margin, and the centroid attack (towards the other centroids in feature space).

    Each example at 0.999 and at 4 times its own radius.
    """
    clf, x, y = digits
    upper = lipschitz.bound(clf.net.describe(clf.variables), clf.net.input_shape)
    radii = certify.radius(clf.clusters, clf.embed(x), y, lipschitz=upper)
    chosen = np.flatnonzero(radii > 0)[:64]
    assert len(chosen) == 64
    x, y = jnp.asarray(x[chosen]), jnp.asarray(y[chosen])

    def towards_centroids(logits, y):
        # the best other class, whatever becomes of the own: monotone in the distance to its centroids
        own = jnp.arange(10)[None, :] == y[:, None]
        return jnp.max(jnp.where(own, -jnp.inf, logits), axis=1)

    def scaled(clf, x, r, u):
        return clf.logits(x[None] + r * u)

    def fooled(factor, loss_fn):
        r = jnp.asarray(factor * radii[chosen])
        anywhere = clf.replace(bounds=None)

        def of_one(x, r, y):
            """One eps for all: u moves in the unit ball, x + r u goes into the network."""
            u = attacks.pgd(
                jax.random.key(0), Partial(scaled, anywhere, x, r), jnp.zeros_like(x)[None], y[None], eps=1.0,
                step_size=0.25, steps=20, norm="l2", bounds=None, loss_fn=loss_fn,
            )  # fmt: skip
            return anywhere.predict(x[None] + r * u)[0] != y

        return np.asarray(jax.jit(jax.vmap(of_one))(x, r, y))

    for loss_fn in (losses.margin, towards_centroids):
        assert not fooled(0.999, loss_fn).any()
    assert fooled(4.0, losses.margin).any()


def settings_for_stage(**changes):
    config = get_config()
    config.certify.update(changes)
    config.eval.slots = 32
    return config


def check(config):
    """As a run does."""
    magnet = MagnetSettings.of(config.magnet)
    certificates.check_config(CertifySettings.of(config.certify), magnet, config.eval.nearest)


@pytest.mark.parametrize("radii", [(5e-9, 0.25), (0.25, 0.25), (0.1, 0.10000001)])
def test_radii_that_are_written_alike_are_refused(radii):
    with pytest.raises(UserError, match="told apart by six decimals"):
        check(settings_for_stage(radii=radii))


@pytest.mark.more
def test_the_stage_s_result_is_consistent(digits, tmp_path):
    """Certified <= empirical at every radius, rules in their order, curve and table agree."""
    clf, x, y = digits
    examples = Examples(x[:40], y[:40], np.arange(40, dtype=np.int32))
    config = settings_for_stage(radii=(0.05, 0.2), steps=4, restarts=1)
    result, outcomes, _ = certificates.run(
        jax.random.key(0), clf, x, y, examples, CertifySettings.of(config.certify), lambda *_: None, slots=32
    )
    assert json.loads(json.dumps(result)) == result
    assert result["n"] == len(y) and result["robust"] == result["sweep"]["0.050000"] <= result["clean"]
    assert result["lipschitz"]["lower"] <= result["lipschitz"]["upper"] <= 1 + 1e-5
    assert result["empirical"]["violations"] == 0
    for at in result["empirical"]["at"].values():
        assert at["certified"] <= at["robust"] <= result["empirical"]["clean"]
    for rule in ("hard", "soft"):
        assert all(
            result["rules"]["any_d"][r] <= result["rules"][rule][r] + 1e-9 for r in result["rules"]["any_d"]
        )
    assert result["unsound_rules"] == ["hard", "paper"]  # K = 2: the nearest centroid is not what decides
    radii = outcomes["radius_any_d"]
    assert result["sweep"]["0.200000"] == np.mean(radii > np.float32(0.2))
    assert np.all(np.diff(result["curve"]["any_d"]) <= 0)
    certificates.draw(tmp_path / "curve.png", {"method": "m", "dataset": "d", **result})
    assert (tmp_path / "curve.png").stat().st_size > 5000


@pytest.mark.more
def test_a_wrong_constant_is_found_out(digits, monkeypatch):
    """The control: with a bound that is 50 times too small an attack succeeds inside a radius: it raises."""
    clf, x, y = digits
    true = certificates.bounds(clf, x)
    examples = Examples(x[:40], y[:40], np.arange(40, dtype=np.int32))
    settings = CertifySettings.of(settings_for_stage(radii=(1.0,), steps=20, restarts=1).certify)
    wrong = {**true, "upper": true["upper"] / 50}
    # the steepest Jacobian shows it at once; where that has missed it the attack does
    for found, told in (
        (wrong, "the Lipschitz bound is none"),
        ({**wrong, "lower": wrong["upper"]}, "broken inside their certified radius"),
    ):
        monkeypatch.setattr(certificates, "bounds", lambda *_, found=found: found)
        with pytest.raises(AssertionError, match=told):
            certificates.run(jax.random.key(0), clf, x, y, examples, settings, lambda *_: None, slots=32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "paper"}, "certify.rule must be one of hard, soft, any_d"),
        ({"radii": ()}, "certify.radii"),
        ({"radii": (0.1, -1.0)}, "certify.radii"),
        ({"steps": 0}, "certify.steps"),
        ({"restarts": 0}, "certify.steps and certify.restarts"),
    ],
)
def test_settings_that_cannot_be_certified_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check(settings_for_stage(**changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "model"),
    in_ci(
        [
            ("digits", "clustr_certified", "lip_sll"),
            ("digits", "clustr_certified", "lip_aol"),
            ("digits", "clustr_certified", "lip_cpl"),
            ("digits", "clustr_certified", "lip_orthogonal"),
            ("digits", "clustr", "cnn"),
            ("toy2d", "clustr_certified", "lip_sll"),
            ("toy2d", "clustr_certified", "lip_orthogonal"),
            ("toy2d", "magnet", "mlp"),
        ],
        ("digits", "clustr", "cnn"),
        ("toy2d", "clustr_certified", "lip_sll"),
    ),
)
def test_training_to_certificate(name, method, model, tmp_path, monkeypatch):
    """Training and certificate; no attack succeeds inside a radius (else it raises); a second run skips."""
    config = get_config(name, method)
    config.model.name = model
    stages.run(config, str(tmp_path / "run"), ("1_warmup", "2_train", "certify"))
    path = tmp_path / "run" / "results" / "certified.json"
    result = json.loads(path.read_text())
    assert result["protocol"] == "certified-2" and result["empirical"]["violations"] == 0
    assert (path.parent / "certified.png").exists() and (path.parent / "certified.npz").exists()
    before = path.stat().st_mtime_ns
    stages.run(config, str(tmp_path / "run"), ("certify",))
    assert path.stat().st_mtime_ns == before


def test_a_linear_head_has_no_certify_stage():
    """Its certificate would need another formula; nothing is promised."""
    assert "certify" not in stages._wanted(None, "nominal")
    with pytest.raises(UserError, match="certify .*nominal"):
        stages._wanted(("certify",), "nominal")
    assert "certify" in stages._wanted(None, "clustr_certified")


@pytest.mark.parametrize(
    ("k", "nearest", "rule", "message"),
    [
        (1, 20, "hard", None),
        (1, 20, "soft", None),
        (2, 0, "soft", None),
        (2, 20, "any_d", None),
        (2, 0, "hard", "K = 2 clusters per class with eval.nearest=0; these hold for it: soft, any_d"),
        (2, 1, "hard", "these hold for it: any_d"),
        (2, 20, "soft", "these hold for it: any_d"),
    ],
)
def test_a_rule_is_refused_where_it_is_about_another_decision(k, nearest, rule, message):
    config = settings_for_stage(rule=rule)
    config.magnet.k, config.eval.nearest = k, nearest
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check(config)
