"""Slow float64 NumPy references of the attacks, written from the papers; nothing here imports the package.

Croce & Hein 2020 a ("Reliable evaluation of adversarial robustness ...": APGD, DLR), Croce & Hein 2020 b
("Minimally distorted adversarial examples ...": FAB), Andriushchenko et al. 2020 (Square), Xie et al. 2025
(PMA), Pintor et al. 2021 (FMN), Rony et al. 2019 (DDN), Melamed et al. 2024 (MALT). One example at a time,
loops on purpose.
"""

import decimal
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
        A_ub=np.vstack([above, below]),
        b_ub=np.concatenate([x, -x]),
        A_eq=np.append(w, 0.0)[None],
        b_eq=[-offset],
        bounds=[*([bounds or (None, None)] * size), (0, None)],
    )
    return found.fun if found.success else None


def onto_hyperplane_l2(x, w, offset, bounds):
    """The same in l2: quadratic program by SLSQP. Returns the distance."""
    start = np.clip(x, *bounds) if bounds else x
    found = scipy.optimize.minimize(
        lambda z: np.sum((z - x) ** 2),
        start,
        jac=lambda z: 2 * (z - x),
        method="SLSQP",
        bounds=[bounds] * len(x) if bounds else None,
        constraints={"type": "eq", "fun": lambda z: w @ z + offset, "jac": lambda z: w},
        options={"maxiter": 500, "ftol": 1e-14},
    )
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


# Digits of decimals in which e^-700 is more than a rounding error of 1.
EXACT = dict(prec=400)


def softmax_exactly(logits):
    """exp(z_c) / sum exp(z) in the decimals of the current context."""
    powers = [decimal.Decimal(float(z)).exp() for z in logits]
    return [p / sum(powers) for p in powers]


def probability_gradient(probs, c):
    """d p_c / d z_j = p_c (delta_cj - p_j), [Y], in the numbers of `probs`."""
    return np.array([probs[c] * ((1 if c == j else 0) - p) for j, p in enumerate(probs)])


def pma(start, x, logits, jacobian, y, *, eps, steps, odd, norm, bounds):
    """Xie et al. 2025: the iterates of one restart on one example that never breaks.

    Ascends p_y in the first step, then -p_y (`odd`: the largest other probability) in the first half of the
    steps, then the latter minus p_y. `logits(z)` [Y], `jacobian(z)` [Y, pixels]; probabilities are exact.
    """
    first = math.ceil(steps / 2)
    iterates = [np.float64(start)]
    for k in range(steps):
        point = iterates[k]
        with decimal.localcontext(**EXACT):
            probs = softmax_exactly(logits(point))
            rival = max((p, c) for c, p in enumerate(probs) if c != y)[1]
            up_y, up_rival = probability_gradient(probs, y), probability_gradient(probs, rival)
            if k == 0:
                slope, phase = up_y, 0
            elif k < first:
                slope, phase = (up_rival if odd else -up_y), (k - 1) / first
            else:
                slope, phase = up_rival - up_y, (k - first) / (steps - first)
            slope = np.float64(slope / max(abs(slope)))
        slope = slope @ jacobian(point)
        size = 2 * eps * (1 + math.cos(math.pi * phase)) / 2
        move = np.sign(slope) if norm == "linf" else slope / np.linalg.norm(slope)
        following = reference.project((point + size * move)[None], x[None], eps=eps, norm=norm, bounds=bounds)
        iterates.append(following[0])
    return iterates


def _size(delta, norm):
    return np.abs(delta).max() if norm == "linf" else np.linalg.norm(delta)


def fmn(x, margin, gradient, *, steps, step_size, norm, bounds):
    """Pintor et al. 2021, algorithm 1, on one example: (nearest point of margin > 0 or None, iterates)."""
    farthest = _size(np.maximum(x - bounds[0], bounds[1] - x), norm) if bounds else math.inf
    best, best_size, radius, delta, iterates = None, math.inf, math.inf, np.zeros_like(x), []
    for k in range(steps):
        share = (1 + math.cos(math.pi * k / steps)) / 2
        gamma = 0.001 + (0.05 - 0.001) * share
        point = x + delta
        iterates.append(point)
        slope = gradient(point)
        if margin(point) > 0:
            if _size(delta, norm) < best_size:
                best, best_size = point, _size(delta, norm)
            radius = min(radius * (1 - gamma), best_size)
        elif best is None:
            dual = np.abs(slope).sum() if norm == "linf" else np.linalg.norm(slope)
            boundary = _size(delta, norm) + abs(margin(point)) / dual  # of the linearised margin
            radius = (1 + gamma) * max(boundary, radius if radius < math.inf else 0)  # paper: boundary
        else:
            radius *= 1 + gamma
        radius = min(radius, farthest)
        step = step_size * (0.01 + 0.99 * share)
        point = point + step * slope / np.linalg.norm(slope)
        delta = reference.project(point[None], x[None], eps=radius, norm=norm, bounds=bounds)[0] - x
    return best, iterates


def ddn(x, wrong, gradient, *, steps, step_size, bounds):
    """Rony et al. 2019, algorithm 1, on one example, without quantisation: (nearest point, iterates)."""
    farthest = np.linalg.norm(np.maximum(x - bounds[0], bounds[1] - x)) if bounds else math.inf
    best, best_size, radius, delta, iterates = None, math.inf, step_size, np.zeros_like(x), []
    for k in range(steps):
        point = x + delta
        iterates.append(point)
        slope = gradient(point)
        inside = wrong(point)
        if inside and np.linalg.norm(delta) < best_size:
            best, best_size = point, np.linalg.norm(delta)
        step = step_size * (0.01 + 0.99 * (1 + math.cos(math.pi * k / steps)) / 2)
        delta = delta + step * slope / np.linalg.norm(slope)
        radius = min(radius * (1 - 0.05 if inside else 1 + 0.05), farthest)
        point = x + radius * delta / np.linalg.norm(delta)
        delta = (np.clip(point, *bounds) if bounds else point) - x
    return best, iterates


def malt(logits, jacobian, y, *, norm, count, candidates):
    """MALT on one example: other classes by (z_y - z_c) / |grad z_y - grad z_c|, of the likeliest ones."""
    others = sorted((c for c in range(len(logits)) if c != y), key=lambda c: -logits[c])[:candidates]

    def distance(c):
        slope = jacobian[y] - jacobian[c]
        return (logits[y] - logits[c]) / (np.abs(slope).sum() if norm == "linf" else np.linalg.norm(slope))

    return sorted(others, key=distance)[:count]
