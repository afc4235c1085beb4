"""What every method minimises, its options, its adversary, and whole steps, by formulas in float64 NumPy.

A new method is one row of LOSSES: its loss per example, from its paper, in terms of what
`reference_objectives.Terms` holds. Objectives run twice: in float32, as in training, against the
value (FLOAT32), and in float64 against value and gradient, where rounding hides nothing (FLOAT64).
"""

import dataclasses
import functools
import importlib
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import reference_objectives as naive
import scipy.stats

from clustr_jax import data, fitting, models, objectives, sampling, settings, stages, train
from clustr_jax.classifier import Classifier
from clustr_jax.clusters import Clusters
from clustr_jax.models import Outputs
from clustr_jax.objectives import METHODS, Batch
from clustr_jax.stages import training

# A distance is a sum of a few squares and a loss the mean of some such terms, each rounded by 6e-8.
FLOAT32 = 1e-5
# Central differences of the reference are good to about 1e-9; both sides compute in float64.
FLOAT64 = 1e-7
# Coordinates near 1 after an addition or two in float32.
ULP = 3e-7


def get_config(method, name="toy2d", **changes):
    """A config of the project as it would run, with changes by dotted name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(pathlib.Path(__file__).parents[1]))
        config = importlib.import_module(f"configs.{name}").get_config(method)
    config.update_from_flattened_dict(changes)
    return settings.resolve(config)


def label(value):
    return (
        value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in getattr(value, "items", dict)())
    )


# Losses and gradients: networks without batch norm, adversarial images that are given.

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
}

OPTIONS = [
    ("trades", {"train.beta": 1.5}, LOSSES["trades"]),
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
            + t.c.train.lam * reference.cross_entropy(t.scores(t.z_adv), authors_target(t.scores(t.z)))
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


def authors_target(scores):
    """F.normalize(scores, p=1): divided by their sum, or by 1e-12 where that is smaller."""
    return scores / np.maximum(scores.sum(axis=1, keepdims=True), 1e-12)


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
            logits, z, logits_adv, z_adv, forward(self.params, self.x)[1], self.y, self.mask, self.classes,
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
                return self.method.objective(self.net, variables, batch, x_adv, clusters, self.config)

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
    if method == "free_at":  # its only images are adversarial
        own["accuracy"] = own["adversarial_accuracy"]
    per_example, weight = LOSSES[method](terms), 1.0
    if METHODS[method].objective in (objectives.trades, objectives.qtrades):
        own["natural"] = per_example = reference.cross_entropy(terms.logits, terms.y)
        weight = terms.c.train.beta if method == "trades" else terms.c.train.lam
    elif head:
        own["magnet"] = per_example = terms.magnet()
        own["hinge_active"], weight = per_example > 0, terms.c.train.lam
        own["variance"] = np.full(16, terms.magnet_variance())
    rest = LOSSES[method](terms) - per_example
    if head:
        rest = rest - terms.c.train.xent_lam * reference.cross_entropy(clean, terms.y)
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


# Networks whose steps can be written down


@dataclasses.dataclass(frozen=True)
class Linear:
    """models.Net's interface on x -> (normalise the channels, if `normed`) = embeddings -> x W + b.

    Batch norm as usual: the batch's mean and biased variance, running ones 0.9 old + 0.1 batch.
    `name` only makes it another static argument, where a test must not find compiled functions of another.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    normed: bool = False
    name: str = ""

    def _outputs(self, variables, x, mean, variance):
        if self.normed:
            x = (x - mean) / jnp.sqrt(variance + 1e-5)
        z = x.reshape(x.shape[0], -1)
        params = variables["params"]
        return Outputs(z @ params["kernel"] + params["bias"][None], z)

    def _expand(self, statistic):
        return jnp.reshape(statistic, (1,) * len(self.input_shape) + (-1,))

    def train(self, variables, x):
        if not self.normed:
            return self._outputs(variables, x, 0.0, 1.0), {}
        axes, old = tuple(range(x.ndim - 1)), variables["batch_stats"]
        mean, variance = jnp.mean(x, axis=axes), jnp.var(x, axis=axes)
        stats = {"mean": 0.9 * old["mean"] + 0.1 * mean, "var": 0.9 * old["var"] + 0.1 * variance}
        return self._outputs(variables, x, self._expand(mean), self._expand(variance)), stats

    def eval(self, variables, x):
        if not self.normed:
            return self._outputs(variables, x, 0.0, 1.0)
        stats = variables["batch_stats"]
        return self._outputs(variables, x, self._expand(stats["mean"]), self._expand(stats["var"]))

    def variables(self, rng):
        """Parameters and, if `normed`, running statistics that are not those of any batch."""
        size, channels = int(np.prod(self.input_shape)), self.input_shape[-1]
        params = {
            "kernel": rng.normal(size=(size, self.num_classes)),
            "bias": rng.normal(size=self.num_classes),
        }
        stats = (
            {"mean": rng.normal(size=channels), "var": rng.uniform(0.5, 2, channels)} if self.normed else {}
        )
        return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), {"params": params, "batch_stats": stats})


def float64(tree):
    """As NumPy arrays, so that a reference starts from the same numbers."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def noise(key, count, shape, draw):
    """One draw per example from fold_in(fold_in(key, id), restart 0), as attacks.pgd documents it."""

    def one(i):
        return draw(jax.random.fold_in(jax.random.fold_in(key, i), 0), shape)

    return np.float64(jax.vmap(one)(jnp.arange(count)))


def uniform(key, shape):
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


# Adversaries


def attack(method, net, variables, x, key, y=None, clusters=None, **changes):
    """(x_adv, batch statistics) of the method's adversary."""
    y = np.zeros(len(x)) if y is None else y
    batch = Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32), jnp.ones(len(x), bool))
    return _adversary(method, net, tuple(changes.items()))(variables, batch, clusters, jax.random.clone(key))


@functools.cache
def _adversary(method, net, changes):
    return jax.jit(
        functools.partial(METHODS[method].adversary, net, config=get_config(method, **dict(changes)))
    )


def steps_of(steps, step_size, eps=0.1, start="zero", bn="batch"):
    values = {"steps": steps, "step_size": step_size, "eps": eps, "start": start}
    return {"train.attack_bn": bn, **{f"train.attack.{name}": value for name, value in values.items()}}


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
    target = authors_target(score(x))
    gradient = reference.finite_difference(
        lambda p: reference.cross_entropy(score(p), target).sum(), x + around
    )
    clear = np.abs(gradient) > 1e-5  # elsewhere float32 decides the sign
    assert clear.mean() > 0.9
    expected = x + np.clip(around + 0.03 * np.sign(gradient), -0.1, 0.1)
    np.testing.assert_allclose(np.asarray(run(**once)[0])[clear], expected[clear], atol=ULP)


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


# Batch statistics


@pytest.mark.parametrize("method", LOSSES)  # 1-Lipschitz networks have none
def test_which_passes_update_the_running_statistics(method, rng):
    """One update for each forward pass of the objective, in order: clean, then adversarial."""
    net = Linear((3,), 2, normed=True)
    variables = net.variables(rng)
    x = rng.normal(size=(2, 6, 3)).astype(np.float32)
    clusters = Clusters(jnp.asarray(rng.normal(size=(2, 1, 3)), jnp.float32), jnp.float32(1.0))
    batch = Batch(jnp.asarray(x[0]), jnp.arange(6) // 3, jnp.ones(6, bool), jnp.arange(2))
    given = METHODS[method].adversary is not None or method == "free_at"
    objective = jax.jit(functools.partial(METHODS[method].objective, net, config=get_config(method)))
    _, aux = objective(variables, batch, jnp.asarray(x[1]) if given else None, clusters)
    both = METHODS[method].objective not in (objectives.nominal, objectives.adversarial)
    seen = (x if both else x[1:]) if given else x[:1]
    mean, variance = naive.running(variables["batch_stats"].values(), seen)
    np.testing.assert_allclose(aux.batch_stats["mean"], mean, rtol=FLOAT32, atol=1e-6)
    np.testing.assert_allclose(aux.batch_stats["var"], variance, rtol=FLOAT32)


@pytest.mark.parametrize("method", ["fast_at", "clustr_qtrades"])
def test_attack_statistics_update(method, rng, key):
    """The authors' switch: one more update, by a pass over the random start of the attack."""
    net = Linear((3,), 2, normed=True)
    variables, x = net.variables(rng), rng.normal(size=(6, 3))
    clusters = Clusters(jnp.asarray(rng.normal(size=(2, 1, 3)), jnp.float32), jnp.float32(1.0))
    changes = {**steps_of(1, 0.03, eps=0.5, start="uniform"), "fidelity.attack_statistics": "update"}
    _, stats = attack(method, net, variables, x, key, clusters=clusters, **changes)
    start = x + 0.5 * noise(key, 6, (3,), uniform)
    mean, variance = naive.running(variables["batch_stats"].values(), [start])
    np.testing.assert_allclose(stats["mean"], mean, rtol=FLOAT32, atol=1e-6)
    np.testing.assert_allclose(stats["var"], variance, rtol=FLOAT32)


@pytest.mark.parametrize("size", [50, 77])
def test_a_pass_in_train_mode(size, rng):
    """epoch_statistics=leak_test: one update for each 25 images in order, the rest left out."""
    net = Linear((4, 4, 2), 2, normed=True)
    variables, pixels = net.variables(rng), rng.normal(size=(size, 4, 4, 2)).astype(np.float32)
    stats = fitting.pass_in_train_mode(net, variables, pixels)
    batches = [pixels[i : i + 25] for i in range(0, size - 24, 25)]
    mean, variance = naive.running(variables["batch_stats"].values(), batches)
    np.testing.assert_allclose(stats["mean"], mean, rtol=FLOAT32, atol=1e-6)
    np.testing.assert_allclose(stats["var"], variance, rtol=FLOAT32)


@pytest.mark.parametrize("switch", ["keep", "leak_test"])
def test_statistics_after_an_epoch(switch, rng):
    """leak_test: what is saved has seen all of the train and then all of the test images in train mode."""
    net = Linear((3,), 3, normed=True)
    p = problem("nominal", rng, net=net, **{"fidelity.epoch_statistics": switch, "train.epochs": 1})
    images, labels = np.asarray(p.train_set.images), np.asarray(p.train_set.labels)
    test = rng.normal(size=(60, 3)).astype(np.float32)
    train_split = data.Split(images, labels, 3, 1.0, None, "")
    test_split = data.Split(test, np.zeros(60, np.int32), 3, 1.0, None, "")
    silent = types.SimpleNamespace(status=lambda text: None, line=lambda text: None)
    workdir = types.SimpleNamespace(records=list, log=lambda record: None)
    saved = []
    checkpoints = types.SimpleNamespace(directory="", save=lambda state, accuracy=None: saved.append(state))
    run = stages.Run(p.trainer.config, workdir, silent, net, train_split, train_split, test_split)
    key, state = jax.random.key(5), train.reset_totals(p.trainer, p.state, p.train_set, jax.random.key(7))
    training._epochs(run, stages.TRAIN, p.trainer, checkpoints, state, p.train_set, key)
    order = np.asarray(train.epoch_order(jax.random.clone(key), 40, 0)).reshape(4, 10)
    seen = [images[ids] for ids in order]
    if switch == "leak_test":
        seen += [images[:25], test[:25], test[25:50]]
    mean, variance = naive.running(p.state.batch_stats.values(), seen)
    np.testing.assert_allclose(saved[-1].batch_stats["mean"], mean, rtol=FLOAT32, atol=1e-6)
    np.testing.assert_allclose(saved[-1].batch_stats["var"], variance, rtol=FLOAT32)


# Steps


@dataclasses.dataclass
class Problem:
    """A stage of training of a Linear network at its start."""

    trainer: train.Trainer
    train_set: train.TrainSet
    state: train.TrainState
    order: jax.Array
    key: jax.Array

    def run(self, count, state=None):
        """`count` steps, as in a run."""
        state = self.state if state is None else state
        state = train.reset_totals(self.trainer, state, self.train_set, jax.random.key(7))
        key = jax.random.clone(self.key)
        return train.run_steps(self.trainer, state, self.train_set, self.order, key, count)

    def step(self, state=None):
        """One step: (state, metrics, (batch, x_adv) that the objective saw)."""
        return self._step(self.state if state is None else state, jax.random.clone(self.key))

    @functools.cached_property
    def _step(self):
        @jax.jit
        def step(state, key):
            seen = []
            objective = self.trainer.method.objective

            def spy(net, variables, batch, x_adv, clusters, config):
                # Free AT differentiates by its x_adv, so that is a tracer
                seen.append((batch, None if self.trainer.replays > 1 else x_adv))
                return objective(net, variables, batch, x_adv, clusters, config)

            method = dataclasses.replace(self.trainer.method, objective=spy)
            trainer = dataclasses.replace(self.trainer, method=method)
            state, metrics = train.train_step(trainer, state, self.train_set, self.order, key)
            return state, metrics, seen[-1]

        return step


def problem(method, rng, net=None, images=None, labels=None, fit=True, **changes):
    """`method` at step 0, on 40 points of three classes unless given others."""
    if images is None:
        labels = np.arange(40) % 3
        images = rng.normal(size=(40, 3)) + 2 * rng.normal(size=(3, 3))[labels]
    net = net or Linear(images.shape[1:], int(labels.max()) + 1)
    changes = {
        "train.optimizer": "sgd",
        "train.lr": 0.1,
        "train.schedule": "multistep",
        "train.milestones": (),
        "train.weight_decay": 0.01,
        "train.batch_size": 10,
        "train.epochs": 10,
        "magnet.samples": 4,
        "magnet.k": 1,
        "magnet.n_init": 1,
        "magnet.max_iter": 5,
        **changes,
    }
    config = get_config(method, **changes)
    trainer = train.Trainer(net, METHODS[method], config, config.train, len(labels))
    if images.dtype != np.uint8:
        images = np.float32(images)
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    train_set = train.TrainSet(
        jnp.asarray(images), jnp.asarray(labels, jnp.int32), scale=scale, augment=config.data.augment
    )
    state = train.create(trainer, net.variables(rng))
    if trainer.magnet and fit:
        state = fitting.refit(trainer, state, train_set, jax.random.key(8))
    order = train.epoch_order(jax.random.key(6), len(labels), 0)
    return Problem(trainer, train_set, state, order, jax.random.key(5))


def assert_close(found, expected, **tolerance):
    """Two dictionaries of arrays."""
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], err_msg=name, **tolerance)


def assert_same(a, b):
    """Two pytrees, equal to the last bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("box", [(-np.inf, np.inf), (0.0, 1.0)])
def test_free_at_is_algorithm_1(rng, box):
    """Shafahi et al. 2019: two batches, each three times; weights and perturbation after every step."""
    eps, replays = 0.1, 3
    changes = {"train.replays": replays, "train.attack.eps": eps, "train.attack.step_size": eps}
    if box[1] == 1.0:  # pixels; many at the ends of the box, or nearer to them than eps
        images = np.clip(rng.normal(0.5, 0.6, size=(40, 3)), 0, 1)
        changes |= {"images": images, "labels": np.arange(40) % 3, "data.name": "digits"}
    p = problem("free_at", rng, **changes)
    x, y = float64(p.train_set.images)[p.order], np.asarray(p.train_set.labels)[p.order]
    expected = naive.free_at(
        float64(p.state.params), [(x[:10], y[:10]), (x[10:20], y[10:20])],
        replays=replays, eps=eps, sgd=naive.Sgd(0.1, 0.01), box=box,
    )  # fmt: skip
    assert len(expected) == 2 * replays
    for i, (params, delta, gradient) in enumerate(expected):
        assert np.abs(gradient).min() > 1e-6  # no sign hangs on rounding
        state = p.run(i + 1)
        # up to six steps in float32, parameters near 1
        assert_close(state.params, params, rtol=FLOAT32, atol=1e-6)
        np.testing.assert_allclose(state.delta, delta, rtol=FLOAT32, atol=ULP)
    # after the first step on the second batch: eps where both batches agree, else 0
    agree = np.abs(expected[replays][1]) > eps / 2
    assert agree.any() and not agree.all()
    beyond = np.clip(x[:10] + expected[replays - 1][1], *box) != x[:10] + expected[replays - 1][1]
    assert beyond.any() == (box[1] == 1.0)


@pytest.mark.parametrize("method", ["free_at", "clustr"])
def test_replays_are_of_the_same_batch(method, rng):
    """The same views of the same images three times, then others.

    With Magnet batches (the authors' option) as well: their losses change from replay to replay, here
    from alpha to 0, and with them the chances of the next seed cluster, but not of this one.
    """
    if method == "free_at":
        labels, changes = np.arange(40) % 3, {"data.augment": "crop_flip"}
        images = rng.integers(0, 256, (40, 4, 4, 1)).astype(np.uint8)
    else:
        labels, changes = np.arange(60) % 3, {"magnet.k": 2, "magnet.clusters": 3}
        clump = 5 * rng.normal(size=(3, 2, 3))[labels, np.arange(60) // 3 % 2]
        images = clump + 0.3 * rng.normal(size=(60, 3))
    p = problem(method, rng, images=images, labels=labels, **{"train.replays": 3, **changes})
    state, seen = p.state, []
    for _ in range(30):
        state, _, (batch, _) = p.step(state)
        seen.append(np.asarray(batch.x))
    others = 0
    for i in range(0, 30, 3):
        np.testing.assert_array_equal(seen[i + 1], seen[i], err_msg=f"step {i + 1}")
        np.testing.assert_array_equal(seen[i + 2], seen[i], err_msg=f"step {i + 2}")
        others += i > 0 and (seen[i] != seen[i - 1]).any()
    assert others == 9


def test_trades_steps_by_hand(rng):
    """Two steps, two classes: the adversary in its corner, the loss, both gradients, Nesterov momentum."""
    eps, beta = 0.1, 6.0
    labels = np.arange(40) % 2
    images = rng.normal(size=(40, 3)) + 1.5 * rng.normal(size=(2, 3))[labels]
    p = problem(
        "trades",
        rng,
        images=images,
        labels=labels,
        **{"train.attack.eps": eps, "train.attack.step_size": eps / 4},
    )
    assert p.trainer.config.train.beta == beta and p.trainer.config.train.attack.steps == 10
    x, y = float64(p.train_set.images)[p.order], labels[p.order]
    state, params, sgd = p.state, float64(p.state.params), naive.Sgd(0.1, 0.01)
    for i in range(2):
        rows = slice(10 * i, 10 * i + 10)
        after, metrics, (batch, x_adv) = p.step(state)
        np.testing.assert_allclose(batch.x, x[rows], atol=0)
        # which of the two opposite corners depends on the random start: take that from the first coordinate
        corner = np.sign(params["kernel"][:, 1] - params["kernel"][:, 0])
        side = np.sign((np.asarray(x_adv) - x[rows])[:, :1] * corner[0])
        corners = x[rows] + eps * side * corner[None]
        np.testing.assert_allclose(x_adv, corners, atol=1e-6)
        assert (side > 0).any() and (side < 0).any()
        gradients, loss = naive.trades_gradients(params, x[rows], corners, y[rows], beta)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=FLOAT32)
        params = sgd.step(params, gradients)
        # x_adv is rounded by 1e-7 and beta multiplies what that changes
        assert_close(after.params, params, rtol=FLOAT32, atol=2e-6)
        state = after
    assert_close(p.run(2).params, params, rtol=FLOAT32, atol=2e-6)


@pytest.mark.parametrize("gamma", [0.005, 0.3])
def test_worst_weights(gamma, rng):
    """Wu et al. 2020: v = gamma |w| g / |g| for each kernel by itself; vectors and scalars stay."""
    shapes = {"conv": (3, 3, 2, 4), "dense": (4, 5), "bias": (5,), "scale": (4,), "scalar": ()}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    gradients = {
        name: jnp.asarray(10.0 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }
    found = train.worst_weights(gradients, params, gamma)
    for name, (w, g) in ((name, float64((params[name], gradients[name]))) for name in shapes):
        expected = w + gamma * np.sqrt(np.sum(w**2)) * g / np.sqrt(np.sum(g**2)) if w.ndim > 1 else w
        np.testing.assert_allclose(found[name], expected, rtol=FLOAT32, atol=1e-6 if w.ndim > 1 else 0)
    still = train.worst_weights(jax.tree.map(jnp.zeros_like, params), params, gamma)
    assert_same(still, params)


def test_a_step_with_awp(rng):
    """The gradient at the worst weights is applied to the weights themselves; the bias is not perturbed."""
    p = problem("nominal", rng, **{"train.awp": 0.3})
    x, y = float64(p.train_set.images)[p.order][:10], np.asarray(p.train_set.labels)[p.order][:10]
    params = float64(p.state.params)
    g, _ = naive.softmax_gradients(params, x, y)
    worst = dict(params)
    worst["kernel"] = params["kernel"] + 0.3 * np.linalg.norm(params["kernel"]) * g[
        "kernel"
    ] / np.linalg.norm(g["kernel"])
    expected = naive.Sgd(0.1, 0.01).step(params, naive.softmax_gradients(worst, x, y)[0])
    assert_close(p.run(1).params, expected, rtol=FLOAT32, atol=1e-6)
    assert np.abs(expected["kernel"] - naive.Sgd(0.1, 0.01).step(params, g)["kernel"]).max() > 1e-3


def test_the_moving_average_is_what_is_deployed(rng):
    """a <- d a + (1 - d) v, d = min(ema, (1 + step) / (10 + step)), of parameters and running statistics.

    Its clusters are fitted on its own embeddings: with one per class, the class means.
    """
    net = Linear((3,), 3, normed=True)
    p = problem("clustr", rng, net=net, **{"train.ema": 0.15, "train.lr": 0.5})
    state, average = p.state, float64(p.state.variables)
    for i in range(4):
        state, _, _ = p.step(state)
        d = min(0.15, (1 + i) / (10 + i))
        average = jax.tree.map(lambda a, v, d=d: d * a + (1 - d) * np.float64(v), average, state.variables)
    assert state.deployed[0] is state.average
    for name in ("params", "batch_stats"):
        assert_close(state.average[name], average[name], rtol=FLOAT32, atol=1e-6)
    assert np.abs(average["batch_stats"]["mean"] - state.batch_stats["mean"]).max() > 1e-3
    state = fitting.refit(p.trainer, state, p.train_set, jax.random.key(2))
    for clusters, stats in (
        (state.clusters, state.batch_stats),
        (state.deployed[1], state.average["batch_stats"]),
    ):
        z = normalise(float64(p.train_set.images), stats["mean"], stats["var"])
        assert_class_means(clusters, z, np.asarray(p.train_set.labels))
    plain = problem("clustr", rng)
    assert plain.state.deployed[0]["params"] is plain.state.params
    assert plain.state.deployed[1] is plain.state.clusters


# Switches of the sampler and of the clusters


@pytest.mark.parametrize("samples", [4, 20])
def test_small_clusters_skip(samples, rng):
    """A batch with a masked entry (20 samples, clusters of 13) changes nothing but the step."""
    changes = {"magnet.samples": samples, "train.ema": 0.5, "fidelity.small_clusters": "skip"}
    p = problem("clustr", rng, **changes)
    after, _, (batch, _) = p.step()
    assert int(after.step) == 1
    assert np.all(batch.mask) == (samples == 4)
    if samples == 20:
        assert_same(after.replace(step=p.state.step), p.state)
    else:  # the weights decay, if nothing else
        assert (np.asarray(after.params["kernel"]) != np.asarray(p.state.params["kernel"])).all()
        assert (np.asarray(after.sampler.losses) != np.asarray(p.state.sampler.losses)).any()


def test_a_stale_sampler(rng):
    """Losses start at 0, no floor, and stay at their place in the sorted list, whoever stands there now."""
    p = problem("clustr", rng, **{"magnet.k": 2, "fidelity.sampler": "stale"})
    assert not np.any(p.state.sampler.losses)
    losses = rng.uniform(size=40).astype(np.float32)
    old = rng.integers(0, 6, 40)
    sampler = sampling.init(jnp.asarray(losses), jnp.asarray(old), 6, initial=0.0)
    new = fitting.refit(p.trainer, p.state.replace(sampler=sampler), p.train_set, jax.random.key(3)).sampler
    np.testing.assert_array_equal(new.losses[new.members], losses[np.argsort(old, kind="stable")])
    assert (np.asarray(new.losses) != losses).any()
    kept = sampling.refit(sampler, jnp.asarray(np.roll(old, 1)))
    np.testing.assert_array_equal(kept.losses, losses)

    # the only cluster that was ever seen is the only seed (row 0 of a batch)
    offsets, members = np.asarray(p.state.sampler.offsets), np.asarray(p.state.sampler.members)
    only = members[offsets[4] : offsets[5]]
    seen = jnp.zeros(40).at[only].set(1.0)
    state = p.state.replace(sampler=p.state.sampler.replace(losses=seen))
    draw = jax.jit(functools.partial(train.draw_batch, p.trainer))
    for i in range(20):
        batch, ids = draw(state, p.train_set, p.order, jax.random.key(i))
        assert set(np.asarray(ids)[:4][np.asarray(batch.mask)[:4]]) <= set(only)


def normalise(x, mean, variance):
    """Batch norm, then flat."""
    z = (x - np.float64(mean)) / np.sqrt(np.float64(variance) + 1e-5)
    return z.reshape(len(x), -1)


def assert_class_means(clusters, z, labels, z_variance=None):
    """One cluster per class, its mean; sigma^2 from these embeddings, or `z_variance`, about these means."""
    means = np.stack([z[labels == c].mean(axis=0) for c in range(labels.max() + 1)])
    np.testing.assert_allclose(np.asarray(clusters.centroids)[:, 0], means, rtol=1e-4, atol=1e-5)
    spread = z if z_variance is None else z_variance
    variance = np.sum((spread - means[labels]) ** 2) / (len(labels) - 1)
    np.testing.assert_allclose(clusters.variance, variance, rtol=1e-4)


SIDE = (4, 4, 2)


def embeddings(pixels, stats, mode):
    """Train mode normalises each 500 images by their own statistics."""
    if mode == "eval":
        return normalise(pixels, stats["mean"], stats["var"])
    pieces = [pixels[i : i + 500] for i in range(0, len(pixels), 500)]
    return np.concatenate([normalise(p, p.mean(axis=(0, 1, 2)), p.var(axis=(0, 1, 2))) for p in pieces])


def check_refit(rng, monkeypatch, name, size, **switches):
    """Clusters at the first and at a later refit. The augmentation is 255 - image, so that it is known."""
    monkeypatch.setattr(data, "crop_flip", lambda key, images, **_: 255 - images)
    labels = np.arange(size) % 3
    bright = np.linspace(40, 160, size)[:, None, None, None] + 20 * labels[:, None, None, None]
    images = np.uint8(np.clip(bright + 30 * rng.normal(size=(size, *SIDE)), 0, 255))
    net = Linear(SIDE, 3, normed=True, name=name)
    changes = {f"fidelity.{switch}": value for switch, value in switches.items()}
    p = problem(
        "clustr",
        rng,
        net=net,
        images=images,
        labels=labels,
        fit=False,
        **{"data.augment": "crop_flip", **changes},
    )
    views = {"clean": np.float64(images) / 255, "augmented": np.float64(255 - images) / 255}
    modes = {"clean": "eval", "augmented": "train"}  # of the variance
    state = p.state
    for first in (True, False):
        state = fitting.refit(p.trainer, state, p.train_set, jax.random.key(1 + first))
        mode = switches.get("first_clusters", "eval") if first else "eval"
        z = embeddings(views[switches.get("cluster_images", "clean")], state.batch_stats, mode)
        spread = None
        if "variance_images" in switches:
            spread = embeddings(views["augmented"], state.batch_stats, modes["augmented"])
        assert_class_means(state.clusters, z, labels, spread)
    assert_same(state.batch_stats, p.state.batch_stats)


REFITS = [
    {},
    {"first_clusters": "train"},
    {"cluster_images": "augmented"},
    {"variance_images": "augmented"},
    {"first_clusters": "train", "cluster_images": "augmented", "variance_images": "augmented"},
]


@pytest.mark.parametrize("switches", REFITS, ids=label)
def test_images_and_modes_of_the_clusters(switches, rng, monkeypatch):
    """Whose embeddings make centroids and variance: clean or augmented images, in eval or train mode."""
    check_refit(rng, monkeypatch, f"1000 {switches}", 1000, **switches)


@pytest.mark.parametrize("switches", [REFITS[1], REFITS[3]], ids=label)
def test_train_mode_statistics_are_of_the_images_alone(switches, rng, monkeypatch):
    """A set that is no multiple of 500: what fills up the last piece is no image of it."""
    check_refit(rng, monkeypatch, f"600 {switches}", 600, **switches)


# The catastrophic overfitting monitor


@dataclasses.dataclass(frozen=True)
class Pocket:
    """A network that single steps cannot fool: class 1 only near x + eps / 2, in all coordinates at once.

    Images lie on whole numbers. The loss pulls each coordinate towards the pocket: ten steps of eps / 4
    end within eps / 4 of it on average; one step of 1.25 eps jumps across, and a random start is elsewhere.
    """

    eps: float

    def eval(self, variables, x):
        away = jnp.mean(jnp.abs(x - jnp.round(x) - self.eps / 2), axis=1) / self.eps
        return Outputs(jnp.stack([10 * (away - 0.3), jnp.zeros_like(away)], axis=1), x)


def monitored(net, variables, eps, x, y, **changes):
    """(metrics, printed lines) of training._monitor on these held-out images."""
    lines = []
    config = get_config("fast_at", **{"train.attack.eps": eps, **changes})
    split = data.Split(np.float32(x), np.int32(y), 2, 1.0, None, "")
    run = stages.Run(config, None, types.SimpleNamespace(line=lines.append), net, split, split, split)
    clf = Classifier(variables, None, net, bounds=None)
    found = training._monitor(run, clf, jax.random.key(0))
    training._warn_of_overfitting(run, stages.TRAIN, found)
    return found, lines


def test_the_monitor_warns_of_catastrophic_overfitting(rng):
    """One step leaves all, ten steps nothing."""
    found, lines = monitored(Pocket(0.1), {}, 0.1, rng.integers(-3, 4, (30, 64)), np.zeros(30))
    assert found == {"single_step_accuracy": 1.0, "multi_step_accuracy": 0.0}
    (line,) = lines
    assert line.startswith("2_train: warning: catastrophic overfitting") and "held-out images" in line
    assert "100.0%" in line and "0.0%" in line


def test_the_monitor_is_silent_about_a_linear_classifier(rng):
    """One step from anywhere reaches the worst corner: both figures are the true robust accuracy, no line."""
    net = Linear((64,), 2)
    variables, x = net.variables(rng), rng.normal(size=(300, 64))
    params = float64(variables["params"])
    gap = (x @ params["kernel"] + params["bias"]) @ np.array([-1.0, 1.0])
    y = rng.integers(0, 2, 300)
    worst = np.where(y == 1, gap, -gap) - 0.1 * np.abs(params["kernel"] @ np.array([-1.0, 1.0])).sum()
    found, lines = monitored(net, variables, 0.1, x, y)
    # one step of 1.25 eps reaches the corner from 7/8 of the starts: between the two a few images may differ
    robust = np.mean(worst[:256] > 0)
    assert found["multi_step_accuracy"] == robust and 0.1 < robust < 0.9
    assert robust <= found["single_step_accuracy"] <= robust + 0.1
    assert not lines


def test_the_monitor_can_be_turned_off(rng):
    x = rng.normal(size=(4, 3))
    net = Linear((3,), 2)
    assert monitored(net, net.variables(rng), 0.1, x, np.zeros(4), **{"train.monitor": False}) == ({}, [])
    assert monitored(net, net.variables(rng), 0.1, x[:0], np.zeros(0)) == ({}, [])
