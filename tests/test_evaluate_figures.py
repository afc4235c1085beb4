"""The figures of an evaluation: which are compared, their intervals, how radii are written."""

import numpy as np
import pytest
import scipy.stats

from clustr_jax.evaluation import intervals
from clustr_jax.storage import results


@pytest.mark.parametrize(
    "change",
    [{"n": 9}, {"eps": 0.2}, {"nearest": 2}, {"protocol": "sound-2-quick"}],
)
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


def newcombe(both, mine, other, neither):
    """Newcombe 1998, method 10, from the four counts of the pairs: as the paper writes it."""
    n = both + mine + other + neither
    p, q = (both + mine) / n, (both + other) / n
    (l1, u1), (l2, u2) = intervals.wilson(both + mine, n), intervals.wilson(both + other, n)
    product = (both + mine) * (other + neither) * (both + other) * (mine + neither)
    excess = both * neither - mine * other
    if excess > n / 2:
        excess -= n / 2
    elif excess >= 0:
        excess = 0
    phi = excess / np.sqrt(product) if product else 0.0
    delta = np.sqrt((p - l1) ** 2 - 2 * phi * (p - l1) * (u2 - q) + (u2 - q) ** 2)
    epsilon = np.sqrt((q - l2) ** 2 - 2 * phi * (q - l2) * (u1 - p) + (u1 - p) ** 2)
    return p - q, p - q - delta, p - q + epsilon


def pairs(*counts):
    """Bool [2, N] with so many pairs of both, of the first alone, of the second alone, of neither."""
    kinds = np.repeat(np.array([[1, 1], [1, 0], [0, 1], [0, 0]], bool), counts, axis=0)
    return kinds.T


@pytest.mark.parametrize(
    "counts", [(36, 12, 2, 0), (0, 0, 0, 30), (20, 0, 0, 20), (0, 15, 15, 0), (3, 9, 1, 40), (50, 0, 1, 0)]
)
def test_paired_differences_are_newcombes(counts):
    found = intervals.paired(*pairs(*counts))
    np.testing.assert_allclose(found, newcombe(*counts), atol=1e-12)
    value, low, high = found
    assert -1 <= low < value < high <= 1  # agreement everywhere is no certainty
    turned = intervals.paired(*pairs(*counts)[::-1])
    np.testing.assert_allclose(turned, (-value, -high, -low), atol=1e-12)


@pytest.mark.parametrize("shares", [(0.6, 0.1, 0.05, 0.25), (0.3, 0.02, 0.02, 0.66), (0.1, 0.3, 0.2, 0.4)])
def test_paired_intervals_hold_the_truth(shares, rng):
    """19 of 20 times, but for what 2,000 draws leave open; and images in common make them narrower."""
    truth, held, width, apart = shares[1] - shares[2], 0, 0.0, 0.0
    for counts in rng.multinomial(100, shares, size=2000):
        _, low, high = intervals.paired(*pairs(*counts))
        held += low <= truth <= high
    assert 0.93 < held / 2000 < 0.985
    for counts in rng.multinomial(100, shares, size=20):
        first, second = pairs(*counts)
        width += np.diff(intervals.paired(first, second)[1:])[0]
        apart += np.diff(intervals.paired(first, rng.permutation(second))[1:])[0]
    assert (width < apart) == (shares[0] * shares[3] > shares[1] * shares[2])


def test_paired_of_nothing_knows_nothing():
    assert intervals.paired([], []) == (0.0, -1.0, 1.0)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123, "+1.2"), (-0.2, "-20.0"), (0.0001, "0.0"), (-1e-9, "0.0")]
)
def test_points(value, text):
    assert intervals.points(value) == text


def test_wilson_of_nothing_knows_nothing():
    assert intervals.wilson(0, 0) == (0.0, 1.0)


def test_wilson_ends_where_all_or_none_are():
    assert all(intervals.wilson(n, n)[1] == 1.0 and intervals.wilson(0, n)[0] == 0.0 for n in range(1, 300))


def test_over_seeds_of_one_image():
    assert intervals.over_seeds([[True]] * 2, [[False]] * 2) == (1.0, -1.0, 1.0)


@pytest.mark.parametrize(
    ("eps", "text"),
    [(8 / 255, "8/255"), (0.03137255, "8/255"), (2 / 255, "2/255"), (0.2, "0.2"), (0.0, "0/255")],
)
def test_radii_are_written_as_the_paper_writes_them(eps, text):
    assert intervals.radius(eps) == text
