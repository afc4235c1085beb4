"""The two protocols: the paper's against a slow NumPy version, the sound one against exact answers.

Most classifiers here have linear features and nearest-centroid heads, for which robustness to
an linf ball is known in closed form: the margin to class c falls by eps |mu_y - mu_c|_1.
"""

import dataclasses
import importlib
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import struct

import reference
from clustr_jax import data, models
from clustr_jax.attacks import aims, scheduler
from clustr_jax.attacks.aims import View
from clustr_jax.attacks.pgd import as_partial
from clustr_jax.attacks.scheduled_pgd import PGD
from clustr_jax.classifier import Classifier
from clustr_jax.clusters import Clusters
from clustr_jax.evaluation import protocols, sound_protocol
from clustr_jax.models import Outputs
from clustr_jax.settings import EvalSettings
from clustr_jax.storage import results


@dataclasses.dataclass(frozen=True)
class LinearNet:
    """f(x) = x W: in place of a network, so that everything can be computed by hand."""

    def eval(self, variables, x):
        z = x.reshape(x.shape[0], -1) @ variables["w"]
        return Outputs(z, z)


def linear_classifier(weight, centroids, variance, **settings):
    """Nearest-centroid (or cluster) head on x W."""
    clusters = Clusters(jnp.asarray(centroids, jnp.float32), jnp.float32(variance))
    return Classifier({"w": jnp.asarray(weight, jnp.float32)}, clusters, LinearNet(), **settings)


@struct.dataclass
class Stub:
    """A classifier of points x [B, 1] given by its functions."""

    scores_fn: object = struct.field(pytree_node=False)
    logits_fn: object = struct.field(pytree_node=False, default=None)
    deployed_fn: object = struct.field(pytree_node=False, default=None)
    bounds: object = struct.field(pytree_node=False, default=None)

    def scores(self, x):
        return self.scores_fn(x)

    def logits(self, x):
        return (self.logits_fn or self.scores_fn)(x)

    def deployed(self, x):
        return (self.deployed_fn or self.logits_fn or self.scores_fn)(x)

    def view(self, x):
        return View(self.logits(x), self.deployed(x))

    def predict(self, x):
        return jnp.argmax(self.deployed(x), axis=1)


def silent(*_):
    """A progress report that nobody reads."""


def points(x, y, ids=None):
    x = np.asarray(x, np.float32)
    return data.Examples(
        x, np.asarray(y, np.int32), np.arange(len(x), dtype=np.int32) if ids is None else ids
    )


def starts(key, x, eps, restarts, ids=None):
    """The random starts [R, N, ...] by the documented streams: fold_in(fold_in(key, id), restart)."""
    ids = range(len(x)) if ids is None else ids
    draw = [
        [
            jax.random.uniform(
                jax.random.fold_in(jax.random.fold_in(key, i), r), x.shape[1:], minval=-1.0, maxval=1.0
            )
            for i in ids
        ]
        for r in range(restarts)
    ]
    return x[None] + np.float32(eps) * np.asarray(draw, np.float32)


# The paper's protocol


def slow_paper_pgd(x, y, first, weight, centroids, variance, *, eps, step_size, steps, bounds):
    """The paper's protocol in loops, float64; `first` [R, N, E] are the starts. Returns the three outcomes.

    The gradient of the cross entropy of exp scores is written out:
    (1/s^2) [(1 - q_y) sum_{own} e^u (f - mu) - sum_{c != y} q_c sum_{k in c} e^u (f - mu_k)].
    """
    weight, centroids = np.float64(weight), np.float64(centroids)

    def look(point):
        f = point @ weight
        scores = reference.scores(f[None], centroids, variance)[0]
        return f, scores, reference.softmax(scores[None])[0]

    def gradient(point, label):
        f, _, q = look(point)
        total = 0.0
        for c, own in enumerate(centroids):
            factor = (1 - q[c]) if c == label else -q[c]
            for mu in own:
                total = total + factor * math.exp(-np.sum((f - mu) ** 2) / (2 * variance)) * (f - mu)
        return weight @ total / variance

    robust, any_restart, outside = [], [], []
    for i, (clean, label) in enumerate(zip(np.float64(x), y, strict=True)):
        best, best_loss, survived = clean, 0.0, True
        for start in np.float64(first[:, i]):
            point = start  # not clipped to the box
            for _ in range(steps):
                if look(point)[1].argmax() != label:
                    break  # frozen once fooled
                moved = point + step_size * np.sign(gradient(point, label))
                point = reference.project(moved[None], clean[None], eps=eps, norm="linf", bounds=bounds)[0]
            _, scores, q = look(point)
            survived &= scores.argmax() == label
            if -math.log(q[label]) >= best_loss:
                best, best_loss = point, -math.log(q[label])
        robust.append(look(best)[1].argmax() == label)
        any_restart.append(survived)
        inside = bounds is None or (best.min() >= bounds[0] - 1e-6 and best.max() <= bounds[1] + 1e-6)
        outside.append(not inside and not robust[-1])
    return np.array(robust), np.array(any_restart), np.array(outside)


def bounded_problem(rng, n=60, classes=5, k=2, size=6, variance=0.05):
    """Points in the unit box near the centroids of 5 x 2 clusters in a random linear feature space."""
    weight = rng.normal(size=(size, 4)) / 2
    anchors = rng.uniform(0.0, 1.0, (classes, k, size))
    y = rng.integers(0, classes, n)
    noise = rng.uniform(-0.3, 0.3, (n, size))
    x = np.clip(anchors[y, rng.integers(0, k, n)] + noise, 0, 1)
    return weight.astype(np.float32), (anchors @ weight).astype(np.float32), variance, x.astype(np.float32), y


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None], ids=["box", "no_box"])
def test_paper_pgd_is_the_authors_protocol_to_the_letter(bounds, key, rng):
    """All three outcomes of every example equal those of the NumPy version."""
    weight, centroids, variance, x, y = bounded_problem(rng)
    settings = dict(eps=0.1, step_size=0.025, steps=6)
    clf = linear_classifier(weight, centroids, variance, bounds=bounds)
    found = protocols.paper_pgd(
        jax.random.clone(key), clf, points(x, y), restarts=4, slots=16, report=silent, **settings
    )
    first = starts(key, x, settings["eps"], 4)
    robust, any_restart, outside = slow_paper_pgd(
        x, y, first, weight, centroids, variance, bounds=bounds, **settings
    )
    np.testing.assert_array_equal(found["robust"], robust)
    np.testing.assert_array_equal(found["any_restart"], any_restart)
    np.testing.assert_array_equal(found["fooled_outside_box"], outside)
    # the problem has examples of every kind, so that agreement means something
    assert 10 < robust.sum() < 50 and (robust & ~any_restart).any()
    assert outside.any() == (bounds is not None)


def test_the_maximum_loss_rule_loses_successes(key):
    """Of an example's restarts the one with the largest loss counts, even where another one succeeded.

    Left of 0 all scores are 0: not fooled (ties go to class 0), and the loss is ln 10 = 2.303. Right
    of 0 class 1 wins by a hair, with loss 2.07 only. So one failing restart hides every success.
    """
    right = jnp.zeros(10).at[:2].set(jnp.array([0.30, 0.31]))

    def scores(x):
        return jnp.where(x > 0, right[None], jnp.zeros((1, 10)))

    x = np.zeros((40, 1), np.float32)
    found = protocols.paper_pgd(
        jax.random.clone(key), Stub(scores), points(x, np.zeros(40)),
        eps=1.0, step_size=0.0, steps=1, restarts=3, slots=16, report=silent,
    )  # fmt: skip
    fooled = starts(key, x, 1.0, 3)[..., 0] > 0
    np.testing.assert_array_equal(found["robust"], ~fooled.all(axis=0))
    np.testing.assert_array_equal(found["any_restart"], ~fooled.any(axis=0))
    lost = found["robust"] & ~found["any_restart"]
    assert lost.sum() > 20  # 3/4 of the examples have both outcomes


def test_a_restart_is_judged_by_its_last_image(key):
    """Not by its best: a failing restart may have passed through larger losses than it ends with.

    Right of 0 class 1 wins, loss 2.07. Left of 0 class 0 wins; the first step, far too long, goes from
    a second coordinate of small magnitude (loss about 2.25) to its end (1.5). So successes are kept.
    """

    def scores(x):
        side, height = x[:, :1], jnp.abs(x[:, 1:])
        own = 0.02 + 0.1 * height + 2 * jnp.maximum(height - 0.6, 0)
        fooled = jnp.asarray([[0.30, 0.31]])
        own = jnp.concatenate([own, jnp.zeros_like(own)], axis=1)
        return jnp.concatenate([jnp.where(side > 0, fooled, own), jnp.zeros((len(x), 8))], axis=1)

    x = np.zeros((40, 2), np.float32)
    found = protocols.paper_pgd(
        jax.random.clone(key), Stub(scores), points(x, np.zeros(40)),
        eps=1.0, step_size=2.0, steps=1, restarts=3, slots=16, report=silent,
    )  # fmt: skip
    fooled = starts(key, x, 1.0, 3)[..., 0] > 0
    np.testing.assert_array_equal(found["robust"], ~fooled.any(axis=0))
    np.testing.assert_array_equal(found["any_restart"], ~fooled.any(axis=0))
    assert 0 < found["robust"].sum() < 20


def test_later_restarts_win_ties_of_the_loss(key):
    """The authors' >= : with equal losses the last restart's image counts."""

    def scores(x):  # always fooled, by class 1 or by class 2, with the same loss
        side = jnp.where(x > 0, 1.0, -1.0)
        return jnp.concatenate([jnp.zeros_like(x), side, -side], axis=1)

    x = np.zeros((30, 1), np.float32)
    found = protocols.paper_pgd(
        jax.random.clone(key), Stub(scores, bounds=(0.0, 10.0)), points(x, np.zeros(30)),
        eps=1.0, step_size=0.0, steps=1, restarts=2, slots=16, report=silent,
    )  # fmt: skip
    assert not found["robust"].any() and not found["any_restart"].any()
    # which restart was kept shows in whether its image is outside the box
    np.testing.assert_array_equal(found["fooled_outside_box"], starts(key, x, 1.0, 2)[1, :, 0] < 0)


def test_a_start_outside_the_box_is_counted(key):
    """The authors do not clip the start: images fooled by negative pixels count as fooled; we say so."""

    def scores(x):
        return jnp.concatenate([jnp.zeros_like(x), jnp.where(x < 0, 1.0, -1.0)], axis=1)

    x = np.zeros((40, 1), np.float32)
    clf = Stub(scores, bounds=(0.0, 1.0))
    found = protocols.paper_pgd(
        jax.random.clone(key), clf, points(x, np.zeros(40)),
        eps=0.3, step_size=0.1, steps=3, restarts=1, slots=40, report=silent,
    )  # fmt: skip
    negative = starts(key, x, 0.3, 1)[0, :, 0] < 0
    assert 10 < negative.sum() < 30
    np.testing.assert_array_equal(found["fooled_outside_box"], negative)
    np.testing.assert_array_equal(found["robust"], ~negative)
    alive, _ = attack_soundly(
        jax.random.clone(key), clf, points(x, np.zeros(40)), eps=0.3, step_size=0.1, steps=3, restarts=1
    )
    assert alive.all()  # there is no such image


def test_what_is_wrong_from_the_start_is_no_success_outside_the_box(key):
    """Class 2 is never predicted: its images are fooled wherever the start is, and nobody attacked them."""

    def scores(x):
        return jnp.concatenate([jnp.zeros_like(x), jnp.where(x < 0, 1.0, -1.0), 0 * x - 2], axis=1)

    x, y = np.zeros((40, 1), np.float32), np.arange(40) % 2 * 2
    clf = Stub(scores, bounds=(0.0, 1.0))
    result, outcomes = protocols.run_paper(key, clf, points(x, y), small_attack(), silent)
    fooled = ~(outcomes["pgd3_0.050000"] & outcomes["pgd5_0.050000"])
    assert fooled[y == 2].all() and 0 < fooled[y == 0].sum() < 20
    assert result["successes_outside_box"] == fooled[y == 0].sum()  # only below 0


def test_a_radius_given_as_a_decimal_is_attacked_once(key):
    """0.05 and what a command line makes of it: the same keys."""
    x, y = np.linspace(-1, 1, 40, dtype=np.float32)[:, None], np.zeros(40, int)
    config = dataclasses.replace(small_attack(), sweep=(0.0500000004, 0.1, 0.1000000002))
    result, _ = protocols.run_paper(key, Stub(two_classes), points(x, y), config, silent)
    assert list(result["sweep"]) == ["0.100000"] and list(result["attacks"]) == ["pgd3", "pgd5"]


# The sound protocol


def attack_soundly(key, clf, examples, alive=None, aim=aims.margin, **changes):
    """(which of `alive` survive PGD, evaluations spent)"""
    settings = dict(eps=0.1, step_size=0.025, steps=20, restarts=2, slots=16) | changes
    alive = np.ones(len(examples), bool) if alive is None else alive
    part = examples.take(np.flatnonzero(alive))
    attack = PGD(
        eps=jnp.float32(settings["eps"]), step_size=jnp.float32(settings["step_size"]),
        steps=settings["steps"], norm="linf", bounds=clf.bounds, aim=aims.one(aim),
    )  # fmt: skip
    outcome = scheduler.run(
        attack, key, as_partial(clf.view), part.x, part.y, ids=part.ids, restarts=settings["restarts"],
        slots=settings["slots"],
    )  # fmt: skip
    survive = alive.copy()
    survive[np.flatnonzero(alive)[outcome.broken]] = False
    return survive, outcome.evaluations


def two_classes(x):
    """Class 1 from 0 on, class 0 below."""
    return jnp.concatenate([-x, x], axis=1)


def test_success_is_recomputed_outside_the_attack(key, monkeypatch):
    """What the attack believes does not count: a fresh forward pass has to confirm it."""
    examples = points(np.full((20, 1), -0.05), np.zeros(20))
    assert not attack_soundly(jax.random.clone(key), Stub(two_classes), examples)[0].any()
    nothing = lambda model, x, y: (np.zeros(len(x), bool), np.ones(len(x), bool))  # noqa: E731
    monkeypatch.setattr(scheduler, "judge", nothing)
    assert attack_soundly(key, Stub(two_classes), examples)[0].all()


@pytest.mark.slow
def test_what_nothing_confirms_is_counted(small, key, monkeypatch):
    """Images that attacks fooled in their own program and that stand all the same (check 8)."""
    clf, examples = small
    config = eval_settings(**{"eval.quick": True, "eval.attack.eps": 0.1, "eval.slots": 16})
    counts = []
    for _ in range(2):
        result, outcomes = sound_protocol.run_sound(jax.random.clone(key), clf, examples, config, silent)
        counts.append((result["unconfirmed"], int(outcomes["robust"].sum()), int(outcomes["clean"].sum())))
        nothing = lambda model, x, y: (np.zeros(len(x), bool), np.ones(len(x), bool))  # noqa: E731
        monkeypatch.setattr(scheduler, "judge", nothing)
    (confirmed, left, clean), (unconfirmed, all_left, _) = counts
    assert confirmed == 0 and left < clean == all_left and unconfirmed == clean - left


def test_either_rule_counts_as_a_success(key):
    """The deployed rule may differ from the logits (nearest D clusters): wrong by one of them is broken."""
    examples = points(np.full((20, 1), -0.05), np.zeros(20))

    def never(x):
        return jnp.concatenate([jnp.ones_like(x), jnp.zeros_like(x)], axis=1)

    def gradient_only(x):  # correct within the ball, and it drives the attack to the right
        return two_classes(x - 0.5)

    clone = jax.random.clone
    assert not attack_soundly(clone(key), Stub(never, two_classes, never), examples)[0].any()
    assert not attack_soundly(clone(key), Stub(never, gradient_only, two_classes), examples)[0].any()
    assert attack_soundly(clone(key), Stub(two_classes, gradient_only, never), examples)[0].all()


def test_only_the_living_are_attacked(key):
    """`alive` False stays False and costs nothing."""
    examples = points(np.full((40, 1), -0.05), np.zeros(40))
    alive = np.arange(40) % 2 == 0
    survive, spent = attack_soundly(jax.random.clone(key), Stub(two_classes), examples, alive, restarts=3)
    assert not survive.any()
    assert alive.sum() == 20  # the argument is left as it was
    assert spent <= 2 * 16 * 20  # 20 pairs in two batches of 16 lanes: broken at once, no further restarts
    survive, spent = attack_soundly(key, Stub(two_classes), examples, np.zeros(40, bool))
    assert not survive.any() and spent == 0


@pytest.mark.parametrize(
    ("x_adv", "bounds", "fine"),
    [
        ([[0.6]], (0.0, 1.0), True),
        ([[0.6000002]], (0.0, 1.0), True),
        ([[0.61]], (0.0, 1.0), False),
        ([[0.61]], None, False),
        ([[math.nan]], None, False),
    ],
)
def test_images_outside_the_ball_raise(x_adv, bounds, fine):
    x_adv, x = np.array(x_adv, np.float32), np.array([[0.5]], np.float32)
    if fine:
        scheduler.verify_inside(x_adv, x, 0.1, "linf", bounds)
    else:
        with pytest.raises(AssertionError, match="left the linf ball"):
            scheduler.verify_inside(x_adv, x, 0.1, "linf", bounds)


@pytest.mark.parametrize("pixel", [-0.05, 1.05])
def test_images_outside_the_box_raise(pixel):
    x_adv, x = np.array([[pixel]], np.float32), np.clip(np.array([[pixel]], np.float32), 0, 1)
    scheduler.verify_inside(x_adv, x, 0.1, "linf", None)
    with pytest.raises(AssertionError, match="left the box"):
        scheduler.verify_inside(x_adv, x, 0.1, "linf", (0.0, 1.0))


# Exact answers


def separated(rng, n=80, classes=10, size=20, scale=1.0, noise=0.3):
    """Nearest-centroid classes in R^20; the median margin is `scale` x 12 nats (10 classes)."""
    centroids = rng.normal(size=(classes, 1, size)).astype(np.float32)
    y = rng.integers(0, classes, n)
    x = (centroids[y, 0] + noise * rng.normal(size=(n, size))).astype(np.float32)
    return np.eye(size, dtype=np.float32), centroids, 1.0 / scale, x, y


def exact_robust(x, y, centroids, eps):
    """Nearest centroid, f(x) = x, no box: min_c (mu_y - mu_c)(x - mid) - eps |mu_y - mu_c|_1 > 0."""
    mu = np.float64(centroids[:, 0])
    robust = []
    for point, c in zip(np.float64(x), y, strict=True):
        margins = [
            (mu[c] - mu[o]) @ (point - (mu[c] + mu[o]) / 2) - eps * np.abs(mu[c] - mu[o]).sum()
            for o in range(len(mu))
            if o != c
        ]
        robust.append(min(margins) > 0)
    return np.array(robust)


def eval_config(**changes):
    """The evaluation section of the configs, small."""
    root = str(pathlib.Path(__file__).parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        config = importlib.import_module("configs.common").base("digits")
    config.eval.attack.update(eps=0.2, step_size=0.05, steps=20, restarts=5)
    config.eval.update(slots=32, paper_steps=(20,), sweep=(), curve=(), apgd_steps=20, queries=100, targets=3)
    config.update_from_flattened_dict(changes)
    return config


def eval_settings(**changes):
    """The same, typed."""
    return EvalSettings.of(eval_config(**changes).eval)


@pytest.mark.parametrize("eps", [0.5, 0.7, 0.9])
def test_sound_pgd_finds_the_exact_robust_accuracy(eps, key, rng):
    """Two classes, example by example: what the closed form calls robust survives, the rest is broken."""
    weight, centroids, variance, x, y = separated(rng, n=150, classes=2, noise=0.8)
    clf = linear_classifier(weight, centroids, variance, bounds=None)
    config = eval_settings(**{"eval.attack.eps": eps, "eval.attack.step_size": eps / 4})
    result, outcomes = sound_protocol.run_sound(key, clf, points(x, y), config, silent)
    exact = exact_robust(x, y, centroids, eps)
    assert 0.1 < exact.mean() < 0.9
    np.testing.assert_array_equal(outcomes["robust"], exact)
    assert result["robust"] == exact.mean() < result["clean"]


@pytest.mark.parametrize(("scale", "eps"), [(1.0, 0.6), (1.0, 1.0), (1.6, 1.0)])
def test_the_paper_protocol_overestimates(scale, eps, key, rng):
    """Ten classes: the sound protocol comes to the exact answer, the paper's does not.

    Margins of about 12 and 19 nats; the cross entropy of exp scores points away from the own centroid
    instead of towards the others.
    """
    weight, centroids, variance, x, y = separated(rng, scale=scale)
    clf = linear_classifier(weight, centroids, variance, bounds=None)
    exact = exact_robust(x, y, centroids, eps)
    assert exact.mean() == (0.775 if eps == 0.6 else 0.0)
    config = eval_settings(**{"eval.attack.eps": eps, "eval.attack.step_size": eps / 4})
    examples = points(x, y)
    found, outcomes = sound_protocol.run_sound(jax.random.clone(key), clf, examples, config, silent)
    paper, _ = protocols.run_paper(jax.random.clone(key), clf, examples, config, silent)
    assert (outcomes["robust"] >= exact).all()  # a robust example cannot be broken
    # towards each of the three nearest clusters the steps are exact: nothing is missed
    np.testing.assert_array_equal(outcomes["robust"], exact)
    assert found["robust"] == exact.mean() and found["clean"] == 1.0 and paper["robust"] > 0.9


def test_log_cross_entropy_alone_is_not_enough_for_large_margins(key, rng):
    """At 30 nats and more its float32 gradient is 0; the margin loss does not depend on the scale."""
    weight, centroids, variance, x, y = separated(rng, scale=20.0, noise=0.05)
    clf = linear_classifier(weight, centroids, variance, bounds=None)
    _, outcomes = sound_protocol.run_sound(
        key,
        clf,
        points(x, y),
        eval_settings(**{"eval.attack.eps": 1.0, "eval.attack.step_size": 0.1}),
        silent,
    )
    assert not outcomes["robust"].any()
    assert outcomes["robust_ce"].mean() > 0.9 and not outcomes["robust_margin"].any()


# Protocol results


def small_problem(net, variables, shape):
    """70 inputs, some misclassified, with clusters at random embeddings; two deployed rules (D = 4 of 6)."""
    rng = np.random.default_rng(5)
    x = rng.uniform(size=(70, *shape)).astype(np.float32)
    z = np.asarray(net.eval(variables, x).embeddings)
    variance = np.var(z, axis=0).sum() / 20
    head = Clusters(jnp.asarray(z[:6].reshape(3, 2, -1)), jnp.float32(variance))
    clf = Classifier(variables, head, net, nearest=4)
    y = np.asarray(clf.predict(x)).copy()
    y[::9] = (y[::9] + 1) % 3
    return clf, points(x, y, ids=rng.permutation(1000)[:70].astype(np.int32))


@dataclasses.dataclass(frozen=True)
class TanhNet(LinearNet):
    """f(x) = tanh(x W): the cheapest classifier that is not linear."""

    num_classes = 5

    def eval(self, variables, x):
        z = jnp.tanh(super().eval(variables, x).embeddings)
        return Outputs(z, z)


@pytest.fixture(scope="module")
def small():
    weight = np.random.default_rng(6).normal(size=(12, 5)).astype(np.float32) / 2
    return small_problem(TanhNet(), {"w": jnp.asarray(weight)}, (12,))


@pytest.fixture(scope="module")
def small_cnn():
    net = models.build("cnn", num_classes=3, input_shape=(8, 8, 1), mean=(0.3,), std=(0.4,), width=4)
    return small_problem(net, net.init(jax.random.key(1)), (8, 8, 1))


def small_attack(**changes):
    settings = {
        "eval.attack.eps": 0.05, "eval.attack.step_size": 0.0125, "eval.attack.steps": 5,
        "eval.attack.restarts": 2, "eval.paper_steps": (3, 5), "eval.sweep": (0.02, 0.1),
    }  # fmt: skip
    return eval_settings(**settings | changes)


@pytest.mark.parametrize("name", ["paper", pytest.param("sound", marks=pytest.mark.slow)])
def test_padding_is_not_counted(name, small, key):
    """70 images in lanes of 32 are 70 images; each appears once and fractions are of 70."""
    clf, examples = small
    result, outcomes, seconds = protocols.run(name, key, clf, examples, small_attack(), silent)
    assert result["n"] == 70 and seconds > 0
    assert all(len(values) == 70 for values in outcomes.values())
    np.testing.assert_array_equal(outcomes["ids"], examples.ids)
    np.testing.assert_array_equal(outcomes["y"], examples.y)
    for figure in ("clean", "robust"):
        assert (result[figure] * 70) % 1 in (0, pytest.approx(0), pytest.approx(1))
    assert 0 < result["robust"] < result["clean"] < 1


@pytest.mark.parametrize("protocol", ["paper", "sound"])
def test_every_batch_has_the_same_number_of_lanes(protocol, key):
    """70 images x 2 restarts in lanes of 32: the attack is compiled for 32 images and for nothing else."""
    seen = set()

    def scores(x):
        if isinstance(x, jax.core.Tracer):
            seen.add(x.shape[0])
        return two_classes(x)

    examples = points(np.linspace(-1, -0.01, 70)[:, None], np.zeros(70))
    settings = dict(eps=0.5, step_size=0.125, steps=8, restarts=2, slots=32, report=silent)
    if protocol == "paper":
        robust = protocols.paper_pgd(key, Stub(scores), examples, **settings)["robust"]
    else:
        settings.pop("report")
        robust, _ = attack_soundly(key, Stub(scores), examples, **settings)
    assert seen == {32}
    np.testing.assert_array_equal(robust, examples.x[:, 0] < -0.5)


def test_sound_outcomes_are_nested(small, key):
    """robust implies clean, `broken_by` says for the others why, and the figures are their means."""
    clf, examples = small
    result, outcomes = sound_protocol.run_sound(key, clf, examples, small_attack(), silent)
    robust, clean, broken_by = outcomes["robust"], outcomes["clean"], outcomes["broken_by"]
    assert (clean >= robust).all() and result["robust"] <= result["clean"]
    np.testing.assert_array_equal(clean, np.asarray(clf.predict(examples.x)) == examples.y)
    np.testing.assert_array_equal(robust, broken_by == "")
    assert set(broken_by) <= {"", "clean", "smaller-eps", *result["attacks"]}
    assert (broken_by[~clean] == "clean").all()
    assert result["clean"] == clean.mean() and result["robust"] == robust.mean()
    survivors = {name: outcomes[f"robust_{name}"] for name in result["attacks"]}
    for name, survived in survivors.items():
        assert result["attacks"][name]["robust"] == survived.mean() >= result["robust"]
        others = [s for n, s in survivors.items() if n != name]
        kills = np.all(others, axis=0) & ~survived & clean
        assert result["attacks"][name]["unique_kills"] == kills.sum()


def test_paper_result_is_the_worst_case_of_its_attacks(small, key):
    """`robust` counts examples that survive both PGD^3 and PGD^5; other radii go under `sweep`."""
    clf, examples = small
    result, outcomes = protocols.run_paper(key, clf, examples, small_attack(), silent)
    both = outcomes["pgd3_0.050000"] & outcomes["pgd5_0.050000"] & outcomes["clean"]
    assert result["robust"] == both.mean() <= min(result["attacks"].values())
    assert result["attacks"] == {name: outcomes[f"{name}_0.050000"].mean() for name in ("pgd3", "pgd5")}
    assert set(result["sweep"]) == {"0.020000", "0.100000"}
    for eps, attacks in result["sweep"].items():
        assert attacks == {name: outcomes[f"{name}_{eps}"].mean() for name in ("pgd3", "pgd5")}
    assert result["attack"]["restarts"] == 2 and result["attack"]["steps"] == [3, 5]


def test_quick_runs_only_the_main_radius(small, key):
    clf, examples = small
    quick = small_attack(**{"eval.quick": True})
    paper, _ = protocols.run_paper(jax.random.clone(key), clf, examples, quick, silent)
    assert list(paper["attacks"]) == ["pgd20"] and paper["sweep"] == {}


@pytest.mark.parametrize("protocol", [pytest.param("paper", marks=pytest.mark.slow), "sound"])
def test_outcomes_do_not_depend_on_order_or_split(protocol, small_cnn, key):
    """At a fixed number of lanes an example's outcome is its own, whoever is beside it."""
    clf, examples = small_cnn
    settings = dict(eps=0.05, step_size=0.0125, steps=5, restarts=2, slots=16)

    def outcome(index):
        part = data.Examples(examples.x[index], examples.y[index], examples.ids[index])
        if protocol == "paper":
            found = protocols.paper_pgd(jax.random.clone(key), clf, part, report=silent, **settings)
            names = ("robust", "any_restart", "fooled_outside_box")
            return np.stack([found[name] for name in names], axis=1)
        return attack_soundly(jax.random.clone(key), clf, part, **settings)[0]

    whole = outcome(np.arange(70))
    assert 0 < whole.mean() < 1
    order = np.random.default_rng(3).permutation(70)
    np.testing.assert_array_equal(outcome(order), whole[order])
    parts = np.array_split(np.arange(70), [1, 20, 57])
    np.testing.assert_array_equal(np.concatenate([outcome(part) for part in parts]), whole)


def test_outcomes_depend_on_key_and_ids(small, key):
    """Restarts and data set indices have randomness of their own (so the test above is not vacuous)."""
    clf, examples = small
    settings = dict(eps=0.05, step_size=0.0, steps=1, restarts=1, slots=70)
    first, _ = attack_soundly(jax.random.clone(key), clf, examples, **settings)
    other = dataclasses.replace(examples, ids=examples.ids + 1)
    assert (attack_soundly(jax.random.clone(key), clf, other, **settings)[0] != first).any()
    assert (attack_soundly(jax.random.key(9), clf, examples, **settings)[0] != first).any()


def test_more_restarts_break_more(small, key):
    clf, examples = small
    settings = dict(eps=0.03, step_size=0.0075, steps=5)
    one, _ = attack_soundly(jax.random.clone(key), clf, examples, restarts=1, **settings)
    four, _ = attack_soundly(jax.random.clone(key), clf, examples, restarts=4, **settings)
    assert (four <= one).all() and four.sum() < one.sum()


def test_run_clean_is_the_deployed_rule(small):
    clf, examples = small
    result, outcomes, _ = protocols.run_clean(clf, examples.x, examples.y)
    correct = np.asarray(clf.deployed(examples.x)).argmax(axis=1) == examples.y
    np.testing.assert_array_equal(outcomes["clean"], correct)
    assert (
        result["n"] == 70 and result["clean"] == result["robust"] == correct.mean() and result["eps"] == 0.0
    )
    guesses = np.asarray(clf.deployed(examples.x)).argmax(axis=1)
    for name, classes in (("predicted", guesses), ("labelled", examples.y)):
        assert result[name] == [float(np.mean(classes == c)) for c in range(clf.net.num_classes)], name


# Figures


@pytest.mark.parametrize("change", [{"n": 9}, {"eps": 0.2}, {"nearest": 2}])
def test_results_of_other_images_radii_or_rules_are_not_compared(change):
    one = {"n": 8, "eps": 0.1, "nearest": 0, "robust": 0.5}
    assert results.comparable(one, one | {"robust": 0.1, "restarts": 3})
    assert not results.comparable(one, one | change)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes, n, low, high):
    """Newcombe 1998, table I, method 3."""
    np.testing.assert_allclose(results.wilson(successes, n), (low, high), atol=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (5, 10), (32, 32), (9103, 10_000)])
def test_wilson_agrees_with_scipy(successes, n):
    interval = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(results.wilson(successes, n), interval, atol=1e-6)
    low, high = results.wilson(successes, n)
    assert 0.0 <= low <= successes / n <= high <= 1.0


def test_wilson_of_nothing_knows_nothing():
    assert results.wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("eps", "text"),
    [(8 / 255, "8/255"), (0.03137255, "8/255"), (2 / 255, "2/255"), (0.2, "0.2"), (0.0, "0/255")],
)
def test_radii_are_written_as_the_paper_writes_them(eps, text):
    assert results.radius(eps) == text
