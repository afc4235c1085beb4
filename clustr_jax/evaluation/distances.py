"""Robust accuracy over the radius: what follows from the nearest adversarial image that is known of each one.

Every distance is one of an image that is there, so that the curve is an upper bound at each radius, and at
eps it is the figure. NumPy alone: `verify` counts it again.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from clustr_jax.runtime.rounding import lengths

# Radii at which the curve is read off, in eps.
_TIMES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)


def of(found: Any) -> np.ndarray:
    """[N] of a witness: 0 where the image itself is misclassified, inf where no adversarial image is known.

    What counts as broken at eps lies within it, but for the rounding that the ball allows.
    """
    distance = np.full(len(found.y), np.inf)
    distance[found.attack == "clean"] = 0.0
    own = lengths(found.x_adv, found.x[found.broken], found.norm)
    distance[found.broken] = np.minimum(own, found.eps)
    if len(found.near):
        near = lengths(found.x_near, found.x[found.near], found.norm)
        distance[found.near] = np.minimum(distance[found.near], near)
    return distance


def radii(eps: float, others: Iterable[float] = ()) -> list[float]:
    """Where the curve is read off: parts and multiples of eps, and these other radii, each once."""
    wanted = {f"{eps * times:.6g}": eps * times for times in _TIMES}
    for radius in others:
        wanted.setdefault(f"{radius:.6g}", float(radius))
    return sorted(wanted.values())


def summary(distance: np.ndarray, at: list[float]) -> dict[str, Any]:
    """`median` over the images that are right (None: of half of them nothing is known), `known` and `curve`.

    `known`: of how many of them an adversarial image is known. `curve` has [radius, share of all images that
    are right and have no known adversarial image within it].
    """
    right = distance[distance > 0]
    median = float(np.median(right)) if len(right) else np.inf
    return {
        "median": median if np.isfinite(median) else None,
        "known": float(np.mean(np.isfinite(right))) if len(right) else 1.0,
        "curve": [[radius, float(np.mean(distance > radius))] for radius in at],
    }
