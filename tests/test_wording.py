"""A verdict in plain words says what the figures say, and no more."""

import pytest

from clustr_jax.evaluation import wording


def content(robust=0.5, clean=0.9, constant=0.1, **by_status):
    """A judgement with these checks."""
    by_status = by_status or {"PASS": [1]}
    listed = [{"number": n, "status": status} for status, numbers in by_status.items() for n in numbers]
    return {"robust": robust, "clean": clean, "n": 100, "constant": constant, "checks": listed}


@pytest.mark.parametrize(
    ("robust", "constant", "said"),
    [
        (0.25, 0.25, "Not robust: no better than always guessing one class."),
        (0.2, 0.25, "Not robust: no better than always guessing one class."),
        (1.0, 1.0, "Robust against all that was tried"),  # labels of one class
        (0.6, 1.0, "Partly robust: most"),
        (0.6, None, "Partly robust: most"),
        (0.0, 1.0, "Not robust: no image withstood the attacks."),
        (0.26, 0.25, "No verdict: so few images cannot tell it from always guessing one class."),
        (0.33, 0.25, "No verdict: so few images"),  # Wilson's interval begins at 24.6 %
        (0.34, 0.25, "Partly robust: fewer than half"),
    ],
)
def test_a_constant_answer(robust, constant, said):
    assert wording.words(content(robust, max(robust, 0.9), constant)).startswith(said)


def test_one_class_that_withstands_everything_is_robust():
    assert wording.answer(content(1.0, 1.0, 1.0)) == ("ROBUST SO FAR", "pass")


@pytest.mark.parametrize(
    ("by_status", "ending"),
    [
        ({"PASS": [1, 2]}, "no reason to distrust itself."),
        ({"PASS": [1], "WARN": [9]}, "no reason to distrust itself, but 1 check warns."),
        ({"PASS": [1], "WARN": [9, 6, 9]}, "no reason to distrust itself, but 2 checks warn."),
        ({"FAIL": [4], "WARN": [9]}, "check 4 failed, and the truth may be far lower."),
        ({"SKIP": [4]}, "No check could look at it."),
    ],
)
def test_warnings_are_told(by_status, ending):
    assert wording.words(content(**by_status)).endswith(ending)
