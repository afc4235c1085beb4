"""How far an adversarial image may lie outside the ball because x + delta is rounded, with NumPy alone.

One allowance for attacks, checks and `verify`. A pixel is rounded in proportion to its own size. So the
allowance goes with the unit of the pixels, and a large pixel does not excuse a small one.
"""

import numpy as np

# Of the radius, which is compared in float32; and of a pixel: eight times half a unit in its last place.
OF_RADIUS, OF_PIXEL = 1e-6, 2.0**-21


def lengths(x_adv: np.ndarray, x: np.ndarray, norm: str) -> np.ndarray:
    """[B] how far each image [B, ...] was moved, linf or l2, in float64."""
    delta = (np.asarray(x_adv, np.float64) - x).reshape(len(x), int(np.prod(np.shape(x)[1:])))
    return np.abs(delta).max(axis=1, initial=0.0) if norm == "linf" else np.linalg.norm(delta, axis=1)


def outside(x_adv: np.ndarray, x: np.ndarray, eps: float, norm: str) -> np.ndarray:
    """[B] how far beyond the ball of eps and rounding each image [B, ...] lies; at most 0 inside it."""
    x_adv, x = (np.asarray(a, np.float64).reshape(len(a), int(np.prod(np.shape(a)[1:]))) for a in (x_adv, x))
    delta = np.abs(x_adv - x)
    allowed = OF_PIXEL * np.maximum(np.abs(x), np.abs(x_adv))
    eps = float(eps) * (1 + OF_RADIUS)
    if norm == "linf":
        return (delta - allowed).max(axis=1, initial=0.0) - eps
    return np.linalg.norm(delta, axis=1) - np.linalg.norm(allowed, axis=1) - eps
