"""The twenty-one checks: each passes on a small healthy classifier and notices one built to violate it.

The healthy one has linear features and a nearest-centroid head, whose robust examples are known exactly.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax.attacks.scheduled_pgd import PGD
from clustr_jax.classifier import Classifier
from clustr_jax.clusters import Clusters
from clustr_jax.evaluation import checks, probes, sound_protocol
from clustr_jax.evaluation.checks import FAIL, PASS, SKIP, WARN, Check, Probe
from clustr_jax.models import Outputs
from test_evaluate import LinearNet, eval_settings, exact_robust, points, separated, silent

N, EPS = 32, 0.3


@dataclasses.dataclass(frozen=True)
class Features(LinearNet):
    """x W, or something that hides its gradient, or lets the batch decide."""

    kind: str = "plain"

    def eval(self, variables, x):
        if self.kind == "rounded":  # gradient 0 almost everywhere
            x = jnp.round(x * 64) / 64
        if self.kind == "halved":  # half of the gradient, with the right signs
            x = (x + jax.lax.stop_gradient(x)) / 2
        if self.kind == "stopped":
            x = jax.lax.stop_gradient(x)
        z = x @ variables["w"]
        if self.kind == "batch":
            z = z + 0.3 * jnp.mean(z, axis=0)[None]
        return Outputs(z, z)


@functools.cache
def problem(kind="plain", scale=1.0):
    """(classifier, examples, config, which are robust)."""
    weight, mu, variance, x, y = separated(
        np.random.default_rng(0), n=N, classes=5, size=12, scale=scale, noise=0.4
    )
    mu, x, variance = mu / 2, x / 2, variance / 4  # so that 0.5 is a large radius, as it is for pixels
    clf = Classifier(
        {"w": jnp.asarray(weight)},
        Clusters(jnp.asarray(mu), jnp.float32(variance)),
        Features(kind),
        bounds=None,
    )
    config = eval_settings(**{"eval.attack.eps": EPS, "eval.attack.step_size": EPS / 4, "eval.slots": N})
    return clf, points(x, y), config, exact_robust(x, y, mu, EPS)


def probe(kind="plain", scale=1.0, robust=None):
    clf, examples, config, exact = problem(kind, scale)
    return Probe(jax.random.key(1), clf, examples, config, exact if robust is None else robust)


def by_number(checks):
    found = {}
    for check in checks:
        found.setdefault(check.number, []).append(check)
    return found


def test_the_problem_has_both_kinds():
    clf, examples, _, exact = problem()
    assert (np.asarray(clf.predict(examples.x)) == examples.y).all()
    assert 5 <= exact.sum() <= N - 5


# Healthy


@pytest.mark.parametrize("part", ["outputs", "gradients", "precision", "effort", "black_box"])
def test_a_healthy_classifier_passes(part):
    checks = list(getattr(probe(), part)())
    assert checks and all(check.status == PASS for check in checks), checks
    expected = {
        "outputs": [2, 3], "gradients": [4, 7], "precision": [5], "effort": [1, 7, 8, 10, 20],
        "black_box": [12],
    }[part]  # fmt: skip
    assert [check.number for check in checks] == expected


def test_scaled_logits_break_nothing_more():
    """Scaled by 1000, cross entropy saturates: a warning about that loss, no failure."""
    (check,) = probe().scales()
    assert check.number == 6 and check.status in (PASS, WARN) and check.value == 0.0


@pytest.mark.slow
def test_all_checks_of_a_healthy_classifier():
    """From the sound protocol to the verdict: each number once or twice, in order, nothing failed."""
    clf, examples, _, exact = problem()
    config = eval_settings(**{
        "eval.attack.eps": EPS, "eval.attack.step_size": EPS / 4, "eval.slots": N, "eval.curve": (0.15, 1.5),
    })  # fmt: skip
    result, outcomes = sound_protocol.run_sound(jax.random.key(0), clf, examples, config, silent)
    outcomes |= {"ids": examples.ids, "y": examples.y}
    np.testing.assert_array_equal(outcomes["robust"], exact)
    radius = np.where(exact, 1.001 * EPS * np.sqrt(examples.x[0].size), 0.0)
    paper = {"robust": 1.0, "successes_lost_by_max_loss_rule": 2}
    listed = checks.run(jax.random.key(1), clf, examples, config, result, outcomes, paper, radius)
    numbers = [check.number for check in listed]
    assert numbers == sorted(numbers) and set(numbers) == set(range(1, 22))
    assert not [check for check in listed if check.status == FAIL], listed
    assert "(no check failed" in checks.verdict(result, listed)
    found = json.loads(json.dumps(checks.as_result(result, listed, paper)))
    assert found["failed"] == [] and len(found["checks"]) == len(listed)
    assert found["masking_gap"] == pytest.approx(1.0 - exact.mean())


# Built to violate one


class Plain:
    """A classifier of which only the logits are looked at."""

    variables, clusters, bounds = {}, None, None

    def __init__(self, logits):
        self.logits, self.calls = logits, 0


def outputs_of(logits):
    _, examples, config, _ = problem()
    return list(Probe(jax.random.key(0), Plain(logits), examples, config, np.ones(N, bool)).outputs())


def linear(x):
    return np.asarray(x)[:, :5] * 10


def test_logits_that_change_from_call_to_call_fail():
    calls = []

    def fickle(x):
        calls.append(1)
        return linear(x) * (1 + 0.01 * len(calls))

    deterministic, span = outputs_of(fickle)
    assert (deterministic.number, deterministic.status, span.status) == (2, FAIL, PASS)
    assert deterministic.value > 1e-2


def test_logits_that_depend_on_the_batch_fail():
    deterministic, _ = list(probe("batch").outputs())
    assert deterministic.status == FAIL and deterministic.value > 1e-4
    size, _ = outputs_of(lambda x: linear(x) * (1 + 1e-3 * len(x)))
    assert size.status == FAIL
    fine, _ = outputs_of(linear)
    assert fine.status == PASS and fine.value == 0.0


def test_probabilities_fail_and_bounded_scores_warn():
    def probabilities(x):
        return np.asarray(jax.nn.softmax(jnp.asarray(linear(x))))

    def exp_scores(x):
        return np.exp(-np.square(linear(x)))

    for logits, status, word in (
        (probabilities, FAIL, "probabilities"), (exp_scores, WARN, "bounded scores"), (linear, PASS, ""),
        (lambda x: np.full((len(x), 5), np.nan), FAIL, "not finite"), (lambda x: linear(x) / 100, WARN, ""),
    ):  # fmt: skip
        _, span = outputs_of(logits)
        assert (span.number, span.status) == (3, status) and word in span.note


def test_a_model_without_gradients_fails():
    """stop_gradient: the attack sees nothing (4), float64 has no sign to agree with (5), noise wins (12)."""
    blind = probe("stopped", robust=np.ones(N, bool))
    zero, _ = blind.gradients()
    assert (zero.number, zero.status, zero.value) == (4, FAIL, 1.0)
    (sign,) = blind.precision()
    assert (sign.number, sign.status) == (5, FAIL)


def test_a_gradient_that_is_not_the_derivative_fails():
    """Half the gradient has every sign right, in float32 as in float64; differences tell (5)."""
    (right,), (halved,) = probe().precision(), probe("halved").precision()
    assert (right.status, halved.status) == (PASS, FAIL)
    assert right.value == halved.value == 1.0
    error = float(halved.note.split()[3].rstrip(";"))
    assert error == pytest.approx(0.5, abs=1e-3), halved.note


@pytest.mark.slow
def test_rounding_hides_the_gradient():
    """Gradients of 0 almost everywhere: 4 fails, and random points break what the attack calls robust."""
    hidden = probe("rounded")
    hidden.eps = 4 * EPS
    robust = ~hidden._pgd(steps=20).broken
    assert robust.any()
    masked = probe("rounded", robust=robust)
    masked.eps = 4 * EPS
    zero, _ = masked.gradients()
    assert zero.status == FAIL
    (noise,) = masked.black_box()
    assert noise.status == FAIL and noise.value > 0


def test_a_figure_that_is_too_high_fails():
    """A protocol that left what other attacks break: scaled logits (6), more steps (7), noise (12)."""
    claimed = probe(robust=np.ones(N, bool))
    (scale,) = claimed.scales()
    assert (scale.number, scale.status) == (6, FAIL) and scale.value > 0.1
    effort = by_number(claimed.effort())
    assert effort[7][0].status == FAIL and effort[7][0].value > 0.1
    assert [effort[n][0].status for n in (1, 8, 20)] == [PASS] * 3


def test_random_points_that_break_more_fail():
    """At a large radius noise alone breaks some: a protocol that left them all is not to be believed."""
    claimed = probe(robust=np.ones(N, bool))
    claimed.eps = 4 * EPS
    (noise,) = claimed.black_box()
    assert (noise.number, noise.status) == (12, FAIL) and noise.value > 0


def test_saturated_cross_entropy_is_a_warning():
    """Margins of 200 nats: cross entropy has no gradient, margin has; the figure stands."""
    sure = probe(scale=20.0)
    zero, _ = sure.gradients()
    assert (zero.number, zero.status, zero.value) == (4, WARN, 0.0)
    (scale,) = sure.scales()
    assert (scale.status, scale.value) == (WARN, 0.0)


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
    outcomes = {"clean": np.ones(N, bool), "robust": exact[order]}
    with pytest.raises(KeyboardInterrupt):
        checks.run(jax.random.key(0), clf, examples.take(order), config, {}, outcomes, None)
    assert len(seen[0]) == 16 and set(seen[0]) == set(range(5))


def test_no_image_is_right():
    """A classifier that is always wrong has nothing to attack, and so nothing to check."""
    clf, examples, config, _ = problem()
    outcomes = {"clean": np.zeros(N, bool), "robust": np.zeros(N, bool)}
    listed = checks.run(jax.random.key(0), clf, examples, config, {}, outcomes, None)
    assert [check.number for check in listed] == list(range(1, 22))
    assert all(check.status == SKIP for check in listed)


# A known answer


def test_the_toy_is_solved():
    check = checks.toy(jax.random.key(5))
    assert (check.number, check.status, check.value) == (17, PASS, 0)


def test_the_toy_notices_a_crippled_attack(monkeypatch):
    monkeypatch.setattr(probes, "PGD", lambda **settings: PGD(**settings | {"step_size": jnp.float32(0.0)}))
    check = checks.toy(jax.random.key(5))
    assert check.status == FAIL and check.value > 10


# From a result


def result(**changes):
    """A sound result of 100 images and its outcomes, with nothing wrong."""
    survivors = {
        name: np.arange(100) < 60 for name in ("ce", "margin", "centroid", "feature", "apgd-t", "fab-t")
    }
    survivors["square"] = np.arange(100) < 70
    found = {
        "n": 100, "eps": 8 / 255, "robust": 0.6, "unbounded": 0.0, "unconfirmed": 1,
        "attacks": {name: {"robust": float(s.mean()), "unique_kills": 0} for name, s in survivors.items()},
        "curves": {
            "ce": {"restarts": [[1, 0.62], [5, 0.6]]}, "margin": {"restarts": [[1, 0.6]]},
            "eps": [[0.0, 0.9], [8 / 255, 0.6], [0.3, 0.1], [1.0, 0.0]],
        },
    }  # fmt: skip
    outcomes = {f"robust_{name}": s for name, s in survivors.items()}
    outcomes |= {"y": np.arange(100) % 10, "robust": np.arange(100) < 60, "clean": np.arange(100) < 90}
    for path, value in changes.items():
        place, names = found, path.split("/")
        for name in names[:-1]:
            place = place[name]
        place[names[-1]] = value
    return found, outcomes


def statuses(found, outcomes, paper=None):
    return {c.number: c.status for c in checks.from_result(found, outcomes, paper)}


def test_a_healthy_result():
    found, outcomes = result(**{"curves/ce": {"restarts": [[1, 0.605], [5, 0.6]]}})
    got = statuses(found, outcomes)
    # 100 images are few: the interval is about 19 points wide
    assert got == {8: PASS, 9: PASS, 10: PASS, 11: PASS, 12: PASS, 13: PASS, 14: PASS, 15: PASS, 19: WARN}


@pytest.mark.parametrize(("change", "number", "status"), [
    ({"curves/margin": {"restarts": [[1, 0.7], [5, 0.6]]}}, 9, WARN),
    ({"curves/margin": {"restarts": [[1, 0.6]]}, "curves/ce": {"restarts": [[1, 0.6]]}}, 9, SKIP),
    ({"curves/eps": [[0.0, 0.9], [0.1, 0.5], [0.5, 0.2], [1.0, 0.0]]}, 10, FAIL),
    ({"unconfirmed": 2}, 8, FAIL),
    ({"unconfirmed": None}, 8, SKIP),
    ({"unbounded": 0.02}, 11, FAIL),
    ({"unbounded": 0.01}, 11, PASS),
    ({"unbounded": None}, 11, SKIP),
])  # fmt: skip
def test_what_a_result_gives_away(change, number, status):
    assert statuses(*result(**change))[number] == status


def test_black_boxes_and_adaptive_attacks():
    """12, 15: Square breaks what gradients do not. 13: cluster attacks lag. 14: no targeted one."""
    found, outcomes = result()
    outcomes["robust_square"] = np.arange(100) < 57
    got = statuses(found, outcomes)
    assert got[12] == FAIL and got[15] == WARN
    outcomes["robust_square"] = np.arange(100) < 59  # one image of 100 is within the limit
    got = statuses(found, outcomes)
    assert got[12] == PASS and got[15] == PASS
    outcomes["robust_centroid"] = outcomes["robust_feature"] = np.arange(100) < 70
    assert statuses(found, outcomes)[13] == WARN
    for name in ("fab-t", "centroid", "feature"):
        del found["attacks"][name]
    got = statuses(found, outcomes)
    assert got[14] == FAIL and got[13] == SKIP
    del found["attacks"]["square"]
    got = statuses(found, outcomes)
    assert got[15] == SKIP and got[12] == SKIP


def test_lost_successes_are_quoted():
    notes = {c.number: c.note for c in checks.from_result(
        *result(), {"robust": 0.7, "successes_lost_by_max_loss_rule": 13}
    )}  # fmt: skip
    assert "13" in notes[9]


def test_certified_and_broken_is_a_failure():
    """18: a radius of at least eps on an image that was broken."""
    found, outcomes = result()
    radius = np.where(np.arange(100) < 60, 8.01 / 255, 0.03)
    assert checks.certificates(found, outcomes, radius, 1).status == PASS
    radius[80] = 8.01 / 255
    check = checks.certificates(found, outcomes, radius, 1)
    assert (check.number, check.status, check.value) == (18, FAIL, 1)
    # an l2 ball holds the linf ball of a radius that is smaller by the root of the dimensions
    assert checks.certificates(found, outcomes, radius, 4).status == PASS
    assert checks.certificates(found, outcomes, None, 1).status == SKIP


# The verdict


def checks_of(**by_status):
    return [Check(n, "", status, None, "") for status, numbers in by_status.items() for n in numbers]


@pytest.mark.parametrize(("listed", "ending"), [
    (checks_of(PASS=[1, 2], SKIP=[18]), "(no check failed)"),
    (checks_of(PASS=[1, 2], WARN=[9], SKIP=[18]), "(no check failed; 9 warns)"),
    (checks_of(PASS=[1, 9], WARN=[9, 6], SKIP=[18]), "(no check failed; 6, 9 warn)"),
    (checks_of(PASS=[1], FAIL=[4]), "(expect less: check 4 failed)"),
    (checks_of(FAIL=[4, 6, 12], WARN=[7]), "(expect less: checks 4, 6, 12 failed)"),
])  # fmt: skip
def test_verdict(listed, ending):
    """The issue's sentence, with the Wilson interval of 50 in 100."""
    found = {"robust": 0.5, "eps": 8 / 255, "n": 100}
    text = checks.verdict(found, listed)
    assert text == f"robust accuracy 50.00 [40.4, 59.6] % at eps 8/255 {ending}"


def test_a_number_that_fails_twice_is_named_once():
    """Checks 7 and 12 have two lines each."""
    text = checks.verdict({"robust": 0.5, "eps": 8 / 255, "n": 100}, checks_of(FAIL=[12, 12]))
    assert text.endswith("(expect less: check 12 failed)")


def test_the_result_is_json():
    listed = [*checks.from_result(*result(), None), *checks_of(FAIL=[4, 12, 12])]
    listed += outputs_of(linear)
    found = json.loads(json.dumps(checks.as_result(result()[0], listed, {"robust": 0.75})))
    assert found["failed"] == [4, 12] and found["masking_gap"] == pytest.approx(0.15)
    assert found["verdict"] == checks.verdict(result()[0], listed)
    assert found["checks"][0] == dataclasses.asdict(listed[0])
    assert checks.as_result(result()[0], listed, None)["masking_gap"] is None
