"""The sound protocol: what counts as a success, and exact answers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from centroid_classifiers import (
    Stub,
    attack_soundly,
    eval_settings,
    exact_robust,
    linear_classifier,
    points,
    separated,
    silent,
    two_classes,
)
from clustr_jax.attacks import scheduler
from clustr_jax.evaluation import protocols, sound_protocol


def test_success_is_recomputed_outside_the_attack(key, monkeypatch):
    """What the attack believes does not count: a fresh forward pass has to confirm it."""
    examples = points(np.full((20, 1), -0.05), np.zeros(20))
    assert not attack_soundly(jax.random.clone(key), Stub(two_classes), examples)[0].any()
    nothing = lambda model, x, y: (np.zeros(len(x), bool), np.ones(len(x), bool))  # noqa: E731
    monkeypatch.setattr(scheduler, "judge", nothing)
    assert attack_soundly(key, Stub(two_classes), examples)[0].all()


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
    assert spent <= 2 * 16 * 20  # 20 pairs in two batches of 16 slots: broken at once, no further restarts
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


@pytest.mark.more
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


@pytest.mark.more
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
