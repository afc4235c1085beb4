"""What the checks read from a finished result, and the verdict."""

import dataclasses
import json

import numpy as np
import pytest

from checked_classifiers import linear, outputs_of
from clustr_jax.evaluation import checks, sound_protocol
from clustr_jax.evaluation import subject as subjects
from clustr_jax.evaluation.checks import FAIL, PASS, SKIP, WARN, Check
from test_golden import fixed

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
    assert got == {8: PASS, 9: PASS, 23: PASS, 11: PASS, 12: PASS, 13: PASS, 14: PASS, 15: PASS, 19: WARN}


@pytest.mark.parametrize(
    ("change", "number", "status"),
    [
        ({"curves/margin": {"restarts": [[1, 0.7], [5, 0.6]]}}, 9, WARN),
        ({"curves/margin": {"restarts": [[1, 0.6]]}, "curves/ce": {"restarts": [[1, 0.6]]}}, 9, SKIP),
        ({"curves/eps": [[0.0, 0.9], [0.1, 0.5], [0.5, 0.2], [1.0, 0.0]]}, 23, FAIL),
        ({"unconfirmed": 2}, 8, FAIL),
        ({"unconfirmed": None}, 8, SKIP),
        ({"unbounded": 0.02}, 11, FAIL),
        ({"unbounded": 0.01}, 11, PASS),
        ({"unbounded": None}, 11, SKIP),
    ],
)
def test_what_a_result_gives_away(change, number, status):
    assert statuses(*result(**change))[number] == status


def test_without_a_box_there_is_no_half_of_it():
    """Radii of 0.5 and more that leave something are no reason to distrust: pixels may be of any scale."""
    clf = fixed()[0]
    assert checks.half(clf.replace(bounds=None), (6, 6, 2)) is None and checks.half(clf, (6, 6, 2)) == 0.5
    found, outcomes = result(**{"curves/eps": [[0.0, 0.9], [0.1, 0.5], [0.5, 0.4], [1.0, 0.3]]})
    got = {c.number: c.status for c in checks.from_result(found, outcomes, None, half=None)}
    assert got[23] == SKIP and statuses(found, outcomes)[23] == FAIL


@pytest.mark.parametrize(("norm", "wanted"), [("linf", 240.0), ("l2", 240 * np.sqrt(12))])
def test_an_unbounded_attack_reaches_all_images(norm, wanted):
    """Without a box: their spread, however small eps is."""
    x = np.linspace(-120, 120, 5 * 12, dtype=np.float32).reshape(5, 12)
    subject = dataclasses.replace(subjects.of(fixed()[0]), bounds=None, norm=norm)
    assert sound_protocol.widest(subject, 0.01, x) == pytest.approx(wanted)
    assert sound_protocol.widest(subject, 100.0, x) == 1e4
    boxed = dataclasses.replace(subject, bounds=(0.0, 1.0))
    assert sound_protocol.widest(boxed, 0.01, x) == pytest.approx(wanted / 240)


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
    notes = {
        c.number: c.note
        for c in checks.from_result(*result(), {"robust": 0.7, "successes_lost_by_max_loss_rule": 13})
    }
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


@pytest.mark.parametrize(
    ("listed", "ending"),
    [
        (checks_of(PASS=[1, 2], SKIP=[18]), "(no check failed)"),
        (checks_of(PASS=[1, 2], WARN=[9], SKIP=[18]), "(no check failed; 9 warns)"),
        (checks_of(PASS=[1, 9], WARN=[9, 6], SKIP=[18]), "(no check failed; 6, 9 warn)"),
        (checks_of(PASS=[1], FAIL=[4]), "(expect less: check 4 failed)"),
        (checks_of(FAIL=[4, 6, 12], WARN=[7]), "(expect less: checks 4, 6, 12 failed)"),
    ],
)
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


def test_attacks_that_had_nothing_to_look_at_do_not_count():
    """14, 12, 15: by what they spent, and not by their names; but where nothing was left for them."""
    found, outcomes = result()
    assert statuses(found, outcomes)[14] == PASS
    found["attacks"]["fab-t"]["evaluations_needed"] = 0
    assert statuses(found, outcomes)[14] == FAIL
    found["attacks"]["square"]["evaluations_needed"] = 0
    got = statuses(found, outcomes)
    assert got[12] == got[15] == SKIP
    assert statuses({**found, "robust": 0.0}, outcomes)[14] == SKIP
    found, outcomes = result()
    found["attacks"]["apgd-t"]["targets"] = 0  # run without any, whatever it is called
    assert statuses(found, outcomes)[14] == FAIL
