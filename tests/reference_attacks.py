"""Slow float64 NumPy references of the attacks, written from the papers; nothing here imports the package.

Croce & Hein 2020 a ("Reliable evaluation of adversarial robustness ...": APGD, DLR), Croce & Hein 2020 b
("Minimally distorted adversarial examples ...": FAB), Andriushchenko et al. 2020 (Square). One example at
a time, loops on purpose.
"""

import math
from fractions import Fraction

import numpy as np
import scipy.optimize

import reference


def most_gained(gradient, x, eps, norm, bounds):
    """max g.delta over ball and box: clipping per coordinate (linf), eps |g|_2 (l2, no box)."""
    if norm == "l2":
        assert bounds is None
        return eps * np.linalg.norm(gradient)
    low, high = np.full_like(x, -eps), np.full_like(x, eps)
    if bounds is not None:
        low, high = np.maximum(low, bounds[0] - x), np.minimum(high, bounds[1] - x)
    return np.sum(np.maximum(gradient * low, gradient * high))


def linear_robust(x, y, weight, bias, *, eps, norm="linf", bounds=None):
    """Slack [B] of the logits x W + b: min_c (z_y - z_c - the most that c can gain), positive iff robust."""
    slack = []
    for point, own in zip(np.float64(x).reshape(len(x), -1), y, strict=True):
        z, w = point @ np.float64(weight) + bias, np.float64(weight)
        slack.append(
            min(
                z[own] - z[c] - most_gained(w[:, c] - w[:, own], point, eps, norm, bounds)
                for c in range(len(z))
                if c != own
            )
        )
    return np.array(slack)


def dlr_targeted(logits, y, target):
    """Eq. 7 of APGD, to be maximised: -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)."""
    values = []
    for z, own, other in zip(np.float64(logits), y, target, strict=True):
        ordered = sorted(z, reverse=True)
        values.append(-(z[own] - z[other]) / (ordered[0] - (ordered[2] + ordered[3]) / 2))
    return np.array(values)


def checkpoints(steps):
    """Section 3.1: p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06); w_j = p_j steps."""
    p = [Fraction(0), Fraction(22, 100)]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - Fraction(3, 100), Fraction(6, 100)))
    return [q * steps for q in p[1:] if q < 1]


def apgd(start, x, value, gradient, at, *, eps, steps, norm, bounds):
    """Algorithm 1 on one example whose loss is never large enough to stop. Returns (iterates, step sizes).

    `at` are the checkpoints w_1 < w_2 < ...; iterate 0 is the start, and step size k is the one of the move
    from iterate k to k + 1.
    """

    def ascend(point, slope, size):
        if norm == "linf":
            return point + size * np.sign(slope)
        return point + size * slope / np.linalg.norm(slope)

    def inside(point):
        return reference.project(point[None], x[None], eps=eps, norm=norm, bounds=bounds)[0]

    iterates, f = [np.float64(start)], [value(np.float64(start))]
    size, sizes, best, halved, checked, last = 2 * eps, [], (f[0], iterates[0]), False, f[0], 0
    previous = iterates[0]
    for k in range(steps):
        point = iterates[k]
        if k in at:
            rises = sum(f[i + 1] > f[i] for i in range(last, k))
            assert rises != 0.75 * (k - last)  # where paper (<) and published code (<=) differ
            halve = rises < 0.75 * (k - last) or (not halved and checked == best[0])
            if halve:
                size, point = size / 2, best[1]
            halved, checked, last = halve, best[0], k
        sizes.append(size)
        z = inside(ascend(point, gradient(point), size))
        share = 1.0 if k == 0 else 0.75
        following = inside(point + share * (z - point) + (1 - share) * (point - previous))
        previous = point
        iterates.append(following)
        f.append(value(following))
        if f[-1] > best[0]:
            best = (f[-1], following)
    return iterates, sizes


def onto_hyperplane_linf(x, w, offset, bounds):
    """FAB eq. 4 as a linear program: min t, |z - x| <= t, w.z + offset = 0, z in the box, or None."""
    size = len(x)
    above = np.hstack([np.eye(size), -np.ones((size, 1))])
    below = np.hstack([-np.eye(size), -np.ones((size, 1))])
    found = scipy.optimize.linprog(
        np.append(np.zeros(size), 1.0),
        A_ub=np.vstack([above, below]), b_ub=np.concatenate([x, -x]),
        A_eq=np.append(w, 0.0)[None], b_eq=[-offset],
        bounds=[*([bounds or (None, None)] * size), (0, None)],
    )  # fmt: skip
    return found.fun if found.success else None


def onto_hyperplane_l2(x, w, offset, bounds):
    """The same in l2: quadratic program by SLSQP. Returns the distance."""
    start = np.clip(x, *bounds) if bounds else x
    found = scipy.optimize.minimize(
        lambda z: np.sum((z - x) ** 2), start, jac=lambda z: 2 * (z - x), method="SLSQP",
        bounds=[bounds] * len(x) if bounds else None,
        constraints={"type": "eq", "fun": lambda z: w @ z + offset, "jac": lambda z: w},
        options={"maxiter": 500, "ftol": 1e-14},
    )  # fmt: skip
    assert found.success
    return math.sqrt(found.fun)


def square_share(query, queries):
    """Section 3.1: p = 0.8, halved at the iterations 10, 50, 200, ... of 10,000, rescaled to the budget."""
    at = query * 10_000 / queries
    return 0.8 / 2 ** sum(at > h for h in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))


def exponents(z, centroids, variance):
    """-|z - mu_cj|^2 / 2 sigma^2, [B, Y, K]."""
    z, mu = np.float64(z), np.float64(centroids)
    return np.array([[[-np.sum((p - m) ** 2) / (2 * variance) for m in own] for own in mu] for p in z])
