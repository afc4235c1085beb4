"""The checks: each passes on a small healthy classifier and notices one built to violate it.

The healthy one has linear features and a nearest-centroid head, whose robust examples are known exactly.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from centroid_classifiers import eval_settings, silent
from checked_classifiers import EPS, N, by_number, fits, linear, outputs_of, probe, problem
from clustr_jax.attacks.pgd import as_partial
from clustr_jax.attacks.scheduled_pgd import PGD
from clustr_jax.evaluation import checks, known_answers, sound_protocol
from clustr_jax.evaluation.checks import FAIL, PASS, SKIP, WARN, Probe
from clustr_jax.evaluation.subject import Subject, of_classifier


def test_the_problem_has_both_kinds():
    clf, examples, _, exact = problem()
    assert (np.asarray(clf.predict(examples.x)) == examples.y).all()
    assert 5 <= exact.sum() <= N - 5


# Healthy


@pytest.mark.parametrize("part", ["outputs", "gradients", "precision", "slopes", "effort", "black_box"])
def test_a_healthy_classifier_passes(part):
    checks = list(getattr(probe(), part)())
    assert checks and all(check.status == PASS and fits(check) for check in checks), checks
    expected = {
        "outputs": [2, 3, 26],
        "gradients": [4, 22, 28],
        "precision": [5],
        "slopes": [30],
        "effort": [1, 7, 25, 10, 20],
        "black_box": [24, 27],
    }[part]
    assert [check.number for check in checks] == expected


def test_scaled_logits_break_nothing_more():
    """Scaled by 1000, cross entropy saturates: a warning about that loss, no failure."""
    (check,) = probe().scales()
    assert check.number == 6 and check.status in (PASS, WARN) and fits(check)


@pytest.mark.slow
def test_all_checks_of_a_healthy_classifier():
    """From the sound protocol to the verdict: each number once, in order, nothing failed."""
    clf, examples, _, exact = problem()
    config = eval_settings(**{
        "eval.attack.eps": EPS, "eval.attack.step_size": EPS / 4, "eval.slots": N, "eval.curve": (0.15, 1.5),
    })  # fmt: skip
    result, outcomes = sound_protocol.run_sound(jax.random.key(0), clf, examples, config, silent)
    outcomes |= {"ids": examples.ids, "y": examples.y}
    np.testing.assert_array_equal(outcomes["robust"], exact)
    radius = np.where(exact, 1.001 * EPS * np.sqrt(examples.x[0].size), 0.0)
    paper = {"robust": 1.0, "successes_lost_by_max_loss_rule": 2}
    listed = checks.run(
        jax.random.key(1), clf, examples, config, sound=result, outcomes=outcomes, paper=paper, radius=radius
    )
    numbers = [check.number for check in listed]
    assert numbers == [*range(1, 29), 30]
    assert not [check for check in listed if check.status == FAIL], listed
    assert "(no check failed" in checks.verdict(result, listed)
    found = json.loads(json.dumps(checks.as_result(result, listed, paper)))
    assert found["failed"] == [] and len(found["checks"]) == len(listed)
    assert found["masking_gap"] == pytest.approx(1.0 - exact.mean())


def test_logits_that_change_from_call_to_call_fail():
    calls = []

    def fickle(x):
        calls.append(1)
        return linear(x) * (1 + 0.01 * len(calls))

    deterministic, span, _ = outputs_of(fickle)
    assert (deterministic.number, deterministic.status, span.status) == (2, FAIL, PASS)
    assert deterministic.value > 1e-2


def test_logits_that_depend_on_the_batch_fail():
    deterministic, *_ = probe("batch").outputs()
    assert deterministic.status == FAIL and deterministic.value > 1e-4
    size, *_ = outputs_of(lambda x: linear(x) * (1 + 1e-3 * len(x)))
    assert size.status == FAIL
    fine, *_ = outputs_of(linear)
    assert fine.status == PASS and fine.value == 0.0


def test_a_class_that_is_ruled_out_excuses_nothing():
    """2: its score at the end of float32 is no measure of the others' differences."""
    lowest = float(np.finfo(np.float32).min)

    def masked(x):
        z = linear(x) * (1 + 1e-3 * len(x))
        return np.where(np.arange(5) == 4, lowest, z)

    same, *_ = outputs_of(masked)
    assert (same.number, same.status) == (2, FAIL) and fits(same)
    fine, *_ = outputs_of(lambda x: np.where(np.arange(5) == 4, lowest, linear(x)))
    assert fine.status == PASS


def test_logits_that_overflow_when_scaled_are_a_warning():
    """6: of a class that is ruled out; what the other scales break still decides."""
    masked = masked_probe()
    (check,) = masked.scales()
    assert (check.number, check.status, check.value) == (6, WARN, None) and "not finite" in check.note
    masked.robust = np.ones(N, bool)
    (check,) = masked.scales()
    assert check.status == FAIL and fits(check)


def masked_probe():
    """The healthy classifier's logits, with a sixth class at the end of float32."""
    clf, examples, config, exact = problem()

    def masked(x):
        z = clf.view(x).logits
        return jnp.pad(z, ((0, 0), (0, 1)), constant_values=float(np.finfo(np.float32).min))

    subject = Subject(as_partial(masked), masked, lambda: "", None)
    return Probe(jax.random.key(1), subject, examples, config, exact)


def test_probabilities_fail_and_bounded_scores_warn():
    def probabilities(x):
        return np.asarray(jax.nn.softmax(jnp.asarray(linear(x))))

    def exp_scores(x):
        return np.exp(-np.square(linear(x)))

    for logits, status, word in (
        (probabilities, FAIL, "probabilities"),
        (exp_scores, WARN, "bounded scores"),
        (linear, PASS, ""),
        (lambda x: np.full((len(x), 5), np.nan), FAIL, "not finite"),
        (lambda x: linear(x) / 100, WARN, ""),
    ):
        _, span, _ = outputs_of(logits)
        assert (span.number, span.status) == (3, status) and word in span.note


def test_a_model_without_gradients_fails():
    """stop_gradient: the attack sees nothing (4), float64 has no sign to agree with (5), noise wins (12)."""
    blind = probe("stopped", robust=np.ones(N, bool))
    zero, *_ = blind.gradients()
    assert (zero.number, zero.status, zero.value) == (4, FAIL, 1.0)
    (sign,) = blind.precision()
    assert (sign.number, sign.status) == (5, FAIL)


def test_a_gradient_that_is_not_the_derivative_fails():
    """Half the gradient has every sign right, in float32 as in float64; differences tell (5)."""
    (right,), (halved,) = probe().precision(), probe("halved").precision()
    assert (right.status, halved.status) == (PASS, FAIL)
    assert (right.value, right.limit) == (1.0, ">= 99 %")
    assert halved.value == pytest.approx(0.5, abs=1e-3) and halved.limit == "<= 0.01", halved


def test_a_model_that_casts_to_float32_is_not_compared():
    """Its differences are rounding, and no evidence against its gradient: no verdict of this check."""
    clf, examples, config, exact = problem()
    casts = dataclasses.replace(
        of_classifier(clf), opened=Partial(lambda clf, x: 1.0 * clf.logits(x.astype(jnp.float32)), clf)
    )
    (check,) = Probe(jax.random.key(1), casts, examples, config, exact).precision()
    assert check.status == SKIP and "float32" in check.note


@pytest.mark.parametrize("kind", ["plain", "halved", "stopped", "rounded", "batch"])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_the_number_that_is_shown_is_the_one_that_decides(kind, scale):
    """Beside its own limit: beyond it where the check warns or fails, within it where it passes."""
    looked = probe(kind, scale)
    for part in (looked.outputs, looked.gradients, looked.precision, looked.slopes):
        for check in part():
            assert check.value is None or fits(check), check


@pytest.mark.slow
def test_rounding_hides_the_gradient():
    """Gradients of 0 almost everywhere: 4 fails, and random points break what the attack calls robust."""
    hidden = probe("rounded")
    hidden.eps = 4 * EPS
    robust = ~hidden._pgd(steps=20).broken
    assert robust.any()
    masked = probe("rounded", robust=robust)
    masked.eps = 4 * EPS
    zero, *_ = masked.gradients()
    assert zero.status == FAIL
    noise, _ = masked.black_box()
    assert noise.status == FAIL and noise.value > 0


def test_a_figure_that_is_too_high_fails():
    """A protocol that left what other attacks break: scaled logits (6), more steps (7), noise (12)."""
    claimed = probe(robust=np.ones(N, bool))
    (scale,) = claimed.scales()
    assert (scale.number, scale.status) == (6, FAIL) and scale.value > 0.1
    effort = by_number(claimed.effort())
    assert effort[7][0].status == FAIL and effort[7][0].value > 0.1
    assert [effort[n][0].status for n in (1, 25, 20)] == [PASS] * 3


def test_random_points_that_break_more_fail():
    """At a large radius noise alone breaks some: a protocol that left them all is not to be believed."""
    claimed = probe(robust=np.ones(N, bool))
    claimed.eps = 4 * EPS
    noise, _ = claimed.black_box()
    assert (noise.number, noise.status) == (24, FAIL) and noise.value > 0


def test_saturated_cross_entropy_is_a_warning():
    """Margins of 200 nats: cross entropy has no gradient, margin has; the figure stands."""
    sure = probe(scale=20.0)
    zero, *_ = sure.gradients()
    assert (zero.number, zero.status, "cross entropy" in zero.note) == (4, WARN, True) and fits(zero)
    (scale,) = sure.scales()
    assert (scale.status, "cross entropy" in scale.note) == (WARN, True) and fits(scale)


def test_statistics_that_move_are_noticed():
    """20: a hash of all arrays before and after."""
    moved = probe()
    moved.before = "something else"
    assert by_number(moved.effort())[20][0].status == FAIL


def test_the_images_looked_at_are_of_every_class(monkeypatch):
    """Image folders are stored class by class; the checks look at the first few of a shuffled set."""
    clf, examples, config, exact = problem()
    order = np.argsort(examples.y, kind="stable")
    monkeypatch.setattr(checks, "IMAGES", 16)
    seen = []

    class Spy(Probe):
        def __init__(self, key, clf, examples, config, robust):
            seen.append(examples.y)
            raise KeyboardInterrupt

    monkeypatch.setattr(checks, "Probe", Spy)
    outcomes = {"broken_by": np.where(exact[order], "", "margin"), "robust": exact[order]}
    with pytest.raises(KeyboardInterrupt):
        checks.run(
            jax.random.key(0), clf, examples.take(order), config, sound={}, outcomes=outcomes, paper=None
        )
    assert len(seen[0]) == 16 and set(seen[0]) == set(range(5))


def test_images_that_the_logits_have_wrong_are_not_looked_at(monkeypatch):
    """Those that only the deployed rule has right: no attack ran on them."""
    clf, examples, config, exact = problem()
    seen = []

    class Spy(Probe):
        def __init__(self, key, clf, examples, config, robust):
            seen.append(set(examples.ids.tolist()))
            raise KeyboardInterrupt

    monkeypatch.setattr(checks, "Probe", Spy)
    by = np.where(np.arange(N) < 3, "clean", "")
    outcomes = {"clean": np.ones(N, bool), "robust": exact, "broken_by": by}
    with pytest.raises(KeyboardInterrupt):
        checks.run(jax.random.key(0), clf, examples, config, sound={}, outcomes=outcomes, paper=None)
    assert seen[0] == set(examples.ids[3:].tolist())


def test_no_image_is_right():
    """A classifier that is always wrong has nothing to attack, and so nothing to check."""
    clf, examples, config, _ = problem()
    outcomes = {"broken_by": np.full(N, "clean"), "robust": np.zeros(N, bool)}
    listed = checks.run(jax.random.key(0), clf, examples, config, sound={}, outcomes=outcomes, paper=None)
    assert [check.number for check in listed] == [*range(1, 29), 30]
    assert all(check.status == SKIP for check in listed)


# A known answer


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_toy_is_solved(norm, seed):
    check = checks.toy(jax.random.key(seed), norm)
    assert check.note == norm
    assert (check.number, check.status, check.value) == (17, PASS, 0)


def test_the_toy_notices_a_crippled_attack(monkeypatch):
    monkeypatch.setattr(
        known_answers, "PGD", lambda **settings: PGD(**settings | {"step_size": jnp.float32(0.0)})
    )
    check = checks.toy(jax.random.key(5))
    assert check.status == FAIL and check.value > 10
