"""The paper's protocol against a slow NumPy version, to the letter."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from centroid_classifiers import (
    Stub,
    attack_soundly,
    bounded_problem,
    linear_classifier,
    points,
    silent,
    small_attack,
    starts,
    two_classes,
)
from clustr_jax.evaluation import protocols


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


@pytest.mark.more
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


@pytest.mark.more
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
