"""Accuracies as numbers and as text: intervals, percents, and how radii are written."""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % Wilson score interval of a fraction (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # at the ends exactly what the formula is there, whose roundings differ
    return 0.0 if successes <= 0 else centre - half, 1.0 if successes >= n else centre + half


def paired(first: ArrayLike, second: ArrayLike) -> tuple[float, float, float]:
    """(difference of two fractions of the same N examples, low, high): 95 %, Newcombe 1998, method 10.

    `first` and `second` are bool [N], example by example. The ends are those of Wilson's intervals, put
    together with the correlation that the pairs have. Where all examples agree an interval is left as well.

    >>> intervals.paired([True, True, True, False], [True, False, False, False])[0]
    0.5
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    n = len(a)
    if not n:
        return 0.0, -1.0, 1.0
    both, neither = int(np.sum(a & b)), int(np.sum(~a & ~b))
    mine, other = int(np.sum(a & ~b)), int(np.sum(~a & b))
    p, q = (both + mine) / n, (both + other) / n
    (p_low, p_high), (q_low, q_high) = wilson(both + mine, n), wilson(both + other, n)
    spread = math.sqrt((both + mine) * (other + neither) * (both + other) * (mine + neither))
    cross = both * neither - mine * other
    cross = max(cross - n / 2, 0.0) if cross > 0 else float(cross)  # the correction for small counts
    phi = cross / spread if spread else 0.0
    down, up = p - p_low, q_high - q
    low = p - q - math.sqrt(max(down * down - 2 * phi * down * up + up * up, 0.0))
    down, up = q - q_low, p_high - p
    high = p - q + math.sqrt(max(down * down - 2 * phi * down * up + up * up, 0.0))
    return p - q, max(low, -1.0), min(high, 1.0)


def over_seeds(first: ArrayLike, second: ArrayLike) -> tuple[float, float, float]:
    """(difference of two fractions, low, high) of S pairs of runs on the same N images: bool [S, N].

    Runs are of the same images and err on the same ones. So an image is one observation, the mean of its
    differences. The interval is 95 % by their standard error, and at least 3 / N: what N images without a
    difference leave open. What another seed would give beyond these S is no part of it.

    >>> intervals.over_seeds([[True, True, False, False]] * 2, [[True, False, False, False]] * 2)
    (0.25, -0.5, 1.0)
    """
    by_image = np.mean(np.asarray(first, np.float64) - np.asarray(second, np.float64), axis=0)
    n, mean = len(by_image), float(np.mean(by_image))
    spread = float(np.std(by_image, ddof=1)) if n > 1 else 0.0
    half = max(1.96 * spread / math.sqrt(n), 3 / n)
    return mean, max(mean - half, -1.0), min(mean + half, 1.0)


def points(value: float) -> str:
    """A difference of two fractions as "+1.2" or "-1.2", in points of a percent."""
    return f"{100 * value:+.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0")


def fraction(mask: ArrayLike) -> float:
    """Mean of a boolean array as a plain float."""
    return float(np.mean(np.asarray(mask, np.float64)))


def percent(value: float | None, result: dict | None = None, key: str = "robust") -> str:
    """ "12.3" or, with the result it comes from, "12.3 [10.1, 14.8]"; "-" for None."""
    if value is None:
        return "-"
    text = f"{100 * value:.2f}"
    if result is not None:
        low, high = wilson(round(value * result["n"]), result["n"])
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return text


def radius(eps: float) -> str:
    """8/255 for the radii that are quoted so (up to 32/255), else the number."""
    scaled = eps * 255
    return f"{scaled:.3g}/255" if abs(scaled - round(scaled)) < 1e-3 and scaled < 33 else f"{eps:.4g}"


def length(value: float) -> str:
    """A distance that was measured, to three digits.

    >>> print(intervals.length(0.0212345), intervals.length(1.5))
    0.0212 1.5
    """
    return f"{value:.3g}"


def other_radii(radii: Iterable[float], eps: float) -> list[float]:
    """Those that are not `eps`, each once, to the six digits that a radius has in a result's keys.

    On the command line 4/255 is a decimal.

    >>> intervals.other_radii((0.015686, 2 / 255, 0.00784314), 4 / 255)
    [0.00784313725490196]
    """
    found = {f"{eps:.6f}": eps}
    for radius in radii:
        found.setdefault(f"{radius:.6f}", radius)
    return list(found.values())[1:]
