"""The figures of an evaluation: which are compared, their intervals, how radii are written."""

import numpy as np
import pytest
import scipy.stats

from clustr_jax.evaluation import intervals
from clustr_jax.storage import results


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
    np.testing.assert_allclose(intervals.wilson(successes, n), (low, high), atol=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (5, 10), (32, 32), (9103, 10_000)])
def test_wilson_agrees_with_scipy(successes, n):
    interval = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(intervals.wilson(successes, n), interval, atol=1e-6)
    low, high = intervals.wilson(successes, n)
    assert 0.0 <= low <= successes / n <= high <= 1.0


def test_wilson_of_nothing_knows_nothing():
    assert intervals.wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("eps", "text"),
    [(8 / 255, "8/255"), (0.03137255, "8/255"), (2 / 255, "2/255"), (0.2, "0.2"), (0.0, "0/255")],
)
def test_radii_are_written_as_the_paper_writes_them(eps, text):
    assert intervals.radius(eps) == text
