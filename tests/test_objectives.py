"""What every method minimises, and its options, by formulas in float64 NumPy.

A new method is one row of LOSSES: its loss per example, from its paper, in terms of what
`reference_objectives.Terms` holds. Objectives run twice: in float32, as in training, against the
value (FLOAT32), and in float64 against value and gradient, where rounding hides nothing (FLOAT64).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
import reference_objectives as naive
import reference_one_stage
from clustr_jax import models
from clustr_jax.clusters import Clusters
from clustr_jax.settings import TrainingSettings
from clustr_jax.training import objectives
from clustr_jax.training.adversaries import Adversarial
from clustr_jax.training.objectives import METHODS, Batch
from linear_problems import (
    FLOAT32,
    FLOAT64,
    get_config,
    label,
)


def heads_of(t, method):
    """(logits, adversarial, held ones) of the head that predicts, and the same of its single clusters."""
    if METHODS[method].head == "linear":
        logits = t.logits, t.logits_adv, t.logits_fixed
        return logits, logits
    each = [reference_one_stage.cluster_scores(z, t.centroids, t.variance, t.exists)
            for z in (t.z, t.z_adv, t.z_fixed)]  # fmt: skip
    return [t.log_scores(z) for z in (t.z, t.z_adv, t.z_fixed)], each


def one_stage(t, method):
    """CE(x, y) + beta KL(p(x) held || p(x_adv)), or CE(x_adv, y); + the weight of IKL's term times it."""
    (clean, adversarial, held), (each, moved, fixed) = heads_of(t, method)
    if t.c.train.loss == "ce":
        loss = reference.cross_entropy(adversarial, t.y)
    else:
        target = reference.softmax(held if t.c.train.stop_target else clean)
        loss = reference.cross_entropy(clean, t.y) + t.c.train.beta * reference.kl(adversarial, target)
    if t.c.train.ikl:
        weights = reference_one_stage.class_weights(fixed, t.y, t.mask, t.c.train.ikl_temperature)
        loss = loss + t.c.train.ikl * reference_one_stage.ikl(each, moved, weights)
    return loss


LOSSES = {
    "nominal": lambda t: reference.cross_entropy(t.logits, t.y),
    "free_at": lambda t: reference.cross_entropy(t.logits_adv, t.y),
    "fast_at": lambda t: reference.cross_entropy(t.logits_adv, t.y),
    "pgd_at": lambda t: reference.cross_entropy(t.logits_adv, t.y),
    "at_pretrain": lambda t: reference.cross_entropy(t.logits_adv, t.y),
    "trades": lambda t: (
        reference.cross_entropy(t.logits, t.y)
        + t.c.train.beta * reference.kl(t.logits_adv, reference.softmax(t.logits))
    ),
    "qtrades": lambda t: (
        reference.cross_entropy(t.logits, t.y)
        + t.c.train.lam * reference.cross_entropy(t.logits_adv, reference.softmax(t.logits))
    ),
    "magnet": lambda t: t.magnet(),
    "clustr": lambda t: t.magnet(),
    "clustr_qtrades": lambda t: (
        t.magnet() + t.c.train.lam * reference.cross_entropy(t.log_scores(t.z_adv), t.probs(t.z))
    ),
    "clustr_trades": lambda t: (
        t.magnet()
        + t.c.train.lam * reference.kl(t.log_scores(t.z_adv), t.probs(t.z))
        + t.c.train.xent_lam * reference.cross_entropy(t.log_scores(t.z), t.y)
    ),
    "clustr_at": lambda t: one_stage(t, "clustr_at"),
    "linear_at": lambda t: one_stage(t, "linear_at"),
}

OPTIONS = [
    *(
        (method, changes, LOSSES[method])
        for method in ("clustr_at", "linear_at")
        for changes in (
            {"train.ikl": 0.0, "train.stop_target": False},
            {"train.loss": "ce"},
            {"train.loss": "ce", "train.ikl": 0.0},
            {"train.ikl_temperature": 1.0, "train.beta": 0.0},
        )
    ),
    ("trades", {"train.beta": 1.5}, LOSSES["trades"]),
    (
        "trades",
        {"train.stop_target": True},
        lambda t: (
            reference.cross_entropy(t.logits, t.y)
            + t.c.train.beta * reference.kl(t.logits_adv, reference.softmax(t.logits_fixed))
        ),
    ),
    (
        "qtrades",
        {"train.stop_target": True},
        lambda t: (
            reference.cross_entropy(t.logits, t.y)
            + t.c.train.lam * reference.cross_entropy(t.logits_adv, reference.softmax(t.logits_fixed))
        ),
    ),
    (
        "clustr_qtrades",
        {"train.consistency": "mse"},
        lambda t: t.magnet() + t.c.train.lam * np.mean((t.z_adv - t.z) ** 2, axis=1),
    ),
    (
        "clustr_qtrades",
        {"train.stop_target": True},
        lambda t: (
            t.magnet() + t.c.train.lam * reference.cross_entropy(t.log_scores(t.z_adv), t.probs(t.z_fixed))
        ),
    ),
    (
        "clustr_qtrades",
        {"train.consistency": "kl", "train.stop_target": True, "train.lam": 3.0},
        lambda t: t.magnet() + 3.0 * reference.kl(t.log_scores(t.z_adv), t.probs(t.z_fixed)),
    ),
    (
        "clustr_qtrades",
        {"train.consistency": "mse", "train.stop_target": True},
        lambda t: t.magnet() + t.c.train.lam * np.mean((t.z_adv - t.z_fixed) ** 2, axis=1),
    ),
    (
        "clustr_qtrades",
        {"train.xent_lam": 0.7},
        lambda t: LOSSES["clustr_qtrades"](t) + 0.7 * reference.cross_entropy(t.log_scores(t.z), t.y),
    ),
    ("clustr", {"magnet.alpha": 0.2}, lambda t: t.magnet()),  # some hinges are closed
    ("clustr", {"train.replays": 3}, lambda t: t.magnet(t.z_adv)),  # the authors' --minibatch-replays
    (
        "clustr_qtrades",
        {"train.nearest": 2, "train.xent_lam": 0.7},
        lambda t: (
            t.magnet()
            + t.c.train.lam * reference.cross_entropy(cut(t, t.z_adv), reference.softmax(cut(t, t.z)))
            + 0.7 * reference.cross_entropy(cut(t, t.z), t.y)
        ),
    ),
    (
        "clustr_qtrades",
        {"fidelity.scores": "exp", "train.xent_lam": 0.7},
        lambda t: (
            t.magnet()
            + t.c.train.lam * reference.cross_entropy(t.scores(t.z_adv), naive.authors_target(t.scores(t.z)))
            + 0.7 * reference.cross_entropy(t.scores(t.z), t.y)
        ),
    ),
    ("clustr", {"fidelity.hinge": "eps"}, lambda t: t.magnet_authors()),
    (
        "qtrades",
        {"fidelity.kl": "probs"},
        lambda t: (
            reference.cross_entropy(t.logits, t.y)
            + t.c.train.lam * naive.kl_of_probabilities(t.logits_adv, t.logits)
        ),
    ),
]


def cut(t, z):
    """Log scores of the D nearest clusters; a class that owns none of them is 50 nats below the best."""
    scores = t.log_scores(z, nearest=t.c.train.nearest)
    floor = scores.max(axis=1, keepdims=True) - 50.0
    return np.where(np.isneginf(scores), floor, scores)


MEAN, STD, WIDTH, CLASSES = (0.1, -0.2), (0.9, 1.3), 4, 3


class Golden:
    """Parameters, clusters, a batch and images near it, for one method; as JAX arrays of either precision.

    Magnet batches are 4 rows of 4 with masked entries; class 1 has one cluster, the others two.
    """

    def __init__(self, method, changes, seed=3, spread=1.0):
        rng = np.random.default_rng(seed)
        self.method, self.config = METHODS[method], get_config(method, **changes)
        self.net = models.build("mlp", num_classes=CLASSES, input_shape=(2,), mean=MEAN, std=STD, width=WIDTH)
        shapes = {"Dense_0": (2, WIDTH), "Dense_1": (WIDTH, WIDTH), "head": (WIDTH, CLASSES)}
        self.params = {
            name: {"kernel": 1.2 * rng.normal(size=shape), "bias": 0.5 * rng.normal(size=shape[1])}
            for name, shape in shapes.items()
        }
        self.classes = np.array([0, 1, 2, 1]) if self.method.sampler == "magnet" else None
        self.y = np.repeat([0, 1, 2, 1], 4)
        self.mask = np.ones(16, bool)
        self.mask[[7, 14, 15]] = False
        centres = rng.normal(size=(4, 1, 2))
        self.x = (centres + 0.6 * rng.normal(size=(4, 4, 2))).reshape(16, 2)
        self.x_adv = self.x + 0.3 * rng.normal(size=(16, 2))
        if self.method.adversary is None and self.config.train.replays == 1:
            self.x_adv = None
        self.centroids = spread * rng.normal(size=(CLASSES, 2, WIDTH))
        self.variance, self.exists = 0.9, np.array([[True, True], [True, False], [True, True]])

    def terms(self, params=None, x_adv=None):
        """float64, at these parameters; what is held constant is at the original ones."""
        forward = functools.partial(naive.mlp, mean=MEAN, std=STD)
        params = self.params if params is None else params
        x_adv = self.x_adv if x_adv is None else x_adv
        logits, z, _ = forward(params, self.x)
        logits_adv, z_adv, _ = forward(params, self.x if x_adv is None else x_adv)
        return naive.Terms(
            logits, z, logits_adv, z_adv, *forward(self.params, self.x)[:2], self.y, self.mask, self.classes,
            self.centroids, self.variance, self.exists, self.config,
        )  # fmt: skip

    def objective(self, dtype, gradient=True):
        """(loss, aux) of the package; with `gradient` also the gradients of (parameters, x_adv)."""
        with jax.enable_x64(dtype == np.float64):
            put = functools.partial(jnp.asarray, dtype=dtype)
            batch = Batch(put(self.x), jnp.asarray(self.y, jnp.int32), jnp.asarray(self.mask), None)
            if self.classes is not None:
                batch = batch.replace(classes=jnp.asarray(self.classes, jnp.int32))
            clusters = None
            if self.method.head == "clusters":
                clusters = Clusters(put(self.centroids), put(self.variance), jnp.asarray(self.exists))

            def loss(params, x_adv):
                variables = {"params": params, "batch_stats": {}}
                return self.method.objective(
                    self.net, variables, batch, Adversarial(x_adv), clusters, TrainingSettings.of(self.config)
                )

            x_adv = None if self.x_adv is None else put(self.x_adv)
            function = jax.value_and_grad(loss, (0, 1), has_aux=True) if gradient else loss
            return jax.device_get(jax.jit(function)(jax.tree.map(put, self.params), x_adv))

    def away_from_kinks(self):
        """No ReLU is so near its corner that finite differences step over it."""
        for x in (self.x, self.x_adv):
            if x is not None:
                assert np.abs(naive.mlp(self.params, x, MEAN, STD)[2]).min() > 1e-4
        if self.classes is not None:
            hinges = [
                self.config.magnet.alpha + own + np.log(others)
                for z in (self.terms().z, self.terms().z_adv)
                for _, own, others in self.terms().magnet_parts(z)
            ]
            assert np.abs(hinges).min() > 1e-4


def check(golden, formula):
    """The value in both precisions; in float64 the gradients of parameters and adversarial images.

    Gradients are compared along a random direction of each array at a time, so an error anywhere shows.
    """
    golden.away_from_kinks()
    terms = golden.terms()
    value = terms.mean(formula(terms))
    single, _ = golden.objective(np.float32, gradient=False)
    np.testing.assert_allclose(single, value, rtol=FLOAT32)
    (double, aux), gradients = golden.objective(np.float64)
    np.testing.assert_allclose(double, value, rtol=1e-12)

    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten((golden.params, golden.x_adv))
    slopes = []
    for i, gradient in enumerate(jax.tree.leaves(gradients)):
        direction = rng.normal(size=leaves[i].shape)

        def along(step, i=i, direction=direction):
            moved = [*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]]
            terms = golden.terms(*jax.tree.unflatten(structure, moved))
            return terms.mean(formula(terms))

        slopes.append((np.sum(gradient * direction), reference.finite_difference(along, 0.0, step=1e-6)))
    found, expected = np.array(slopes).T
    np.testing.assert_allclose(found, expected, rtol=FLOAT64, atol=FLOAT64 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-2
    return terms, aux


def test_the_table_has_every_method():
    """The two certified ones have their formulas in test_certified.py."""
    assert [*LOSSES, "nominal_certified", "clustr_certified"] == list(METHODS)


@pytest.mark.parametrize("method", LOSSES)
def test_loss_and_gradient(method):
    """By the formula of the paper, under its own settings (`configs/`). Masked entries count nowhere.

    So do the metrics, and the losses that the sampler remembers.
    """
    check_metrics(method, *check(Golden(method, {}), LOSSES[method]))


def check_metrics(method, terms, aux):
    """Accuracies are those of the head that predicts; the other metrics are what their names say."""
    head = METHODS[method].head == "clusters"
    clean, adversarial = terms.logits, terms.logits_adv
    if head:
        clean, adversarial = terms.log_scores(terms.z), terms.log_scores(terms.z_adv)
    own = {
        "accuracy": clean.argmax(axis=1) == terms.y,
        "adversarial_accuracy": adversarial.argmax(axis=1) == terms.y,
    }
    one_stage = METHODS[method].objective is objectives.single_stage
    only_adversarial = method in ("free_at", "fast_at", "pgd_at", "at_pretrain")
    assert ("accuracy" in aux.metrics) != only_adversarial
    per_example, weight = LOSSES[method](terms), 1.0
    if one_stage:
        (clean, adversarial, held), (each, moved, fixed) = heads_of(terms, method)
        own["natural"] = per_example = reference.cross_entropy(clean, terms.y)
        own["consistency"] = reference.kl(adversarial, reference.softmax(held))
        weights = reference_one_stage.class_weights(fixed, terms.y, terms.mask, terms.c.train.ikl_temperature)
        own["ikl"] = reference_one_stage.ikl(each, moved, weights)
        assert aux.metrics.keys() == own.keys()
    elif METHODS[method].objective in (objectives.trades, objectives.qtrades):
        own["natural"] = per_example = reference.cross_entropy(terms.logits, terms.y)
        weight = terms.c.train.beta if method == "trades" else terms.c.train.lam
    elif head:
        own["magnet"] = per_example = terms.magnet()
        own["hinge_active"], weight = per_example > 0, terms.c.train.lam
        own["variance"] = np.full(16, terms.magnet_variance())
    rest = LOSSES[method](terms) - per_example
    if head:
        rest = rest - terms.c.train.xent_lam * reference.cross_entropy(clean, terms.y)
    if not one_stage:
        own["consistency"] = rest / weight
    for name in aux.metrics.keys() & own.keys():  # accuracies are float32 even here
        np.testing.assert_allclose(aux.metrics[name], terms.mean(own[name]), rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(aux.per_example, per_example, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("alpha", [12.5, 0.2])
def test_logged_loss_plus_k(alpha):
    """The authors' log: K more terms exp(0) in the sum of Eq. 3, whatever the distance to the own cluster."""
    golden = Golden("clustr", {"fidelity.logged_loss": "plus_k", "magnet.alpha": alpha})
    golden.exists[:] = True  # the same K for all classes, as the authors have it
    _, aux = golden.objective(np.float32, gradient=False)
    terms = golden.terms()
    np.testing.assert_allclose(aux.metrics["magnet_plus_k"], terms.mean(terms.magnet_plus_k()), rtol=FLOAT32)
    ours = Golden("clustr", {}).objective(np.float32, gradient=False)[1]
    assert "magnet_plus_k" not in ours.metrics


@pytest.mark.parametrize(("method", "changes", "formula"), OPTIONS, ids=label)
@pytest.mark.one_in(3)
def test_options(method, changes, formula):
    check(Golden(method, changes), formula)


def test_some_hinges_are_closed_and_some_open():
    """What the alpha of the options above is for."""
    golden = Golden("clustr", {"magnet.alpha": 0.2})
    loss = golden.terms().magnet()[golden.mask]
    assert 0.2 < np.mean(loss > 0) < 0.8


def test_nearest_cuts_classes_in_the_batch():
    """What the option above is about: some labels and some predictions own no cluster that counts."""
    terms = Golden("clustr_qtrades", {"train.nearest": 2}).terms()
    gone = np.isneginf(terms.log_scores(terms.z, nearest=2))
    assert gone[np.arange(16), terms.y].any() and not gone.all(axis=1).any()


@pytest.mark.parametrize("nearest", [0, 2])
def test_only_classes_without_a_near_cluster_are_cut(nearest):
    """A class that owns one of the nearest clusters keeps its log score, and gradient, however low."""
    golden = Golden("clustr", {"train.nearest": nearest, "train.xent_lam": 1.0}, spread=12.0)
    terms = golden.terms()
    kept = terms.log_scores(terms.z, nearest=nearest or None)
    far = np.isfinite(kept) & (kept < kept.max(axis=1, keepdims=True) - 50)
    assert far[np.arange(16), terms.y][golden.mask].any()
    formula = (lambda t: cut(t, t.z)) if nearest else (lambda t: t.log_scores(t.z))
    check(golden, lambda t: t.magnet() + reference.cross_entropy(formula(t), t.y))


@pytest.mark.parametrize("changes", [{}, {"fidelity.kl": "probs"}], ids=label)
@pytest.mark.parametrize("method", ["trades", "qtrades"])
def test_gradients_are_finite_where_a_probability_underflows(method, changes):
    """Logits hundreds of nats apart: p log p is 0 there, and so is its derivative."""
    golden = Golden(method, changes)
    golden.params["head"]["kernel"] *= 300
    assert np.float32(reference.softmax(golden.terms().logits)).min() == 0
    (loss, _), gradients = golden.objective(np.float32)
    assert np.isfinite(loss)
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all()
