"""Slow float64 NumPy references, written from the formulas of the paper (arXiv 2006.07682).

Nothing here imports the package: the tests compare the package with this file. Loops
over examples, clusters and pixels are on purpose: each line should be readable beside
the formula it comes from. Notation: B batch, Y classes, K clusters per class, M x S
Magnet batch, E embedding.
"""

import math

import numpy as np


def close(actual, expected, rtol):
    """Equal up to rtol of the largest finite entry: float32 rounds against the size of what is summed."""
    expected = np.asarray(expected)
    scale = np.abs(expected[np.isfinite(expected)]).max()
    assert np.shape(actual) == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * max(scale, 1e-3))


def finite_difference(function, x, step=1e-5):
    """Central finite differences of a scalar function: (f(x + h) - f(x - h)) / 2h.

    In float64 the error is about h^2 f'''/6 + 1e-16 f / h, so below 1e-9 for values near 1.
    """
    x = np.asarray(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[index] += step
        below[index] -= step
        gradient[index] = (function(above) - function(below)) / (2 * step)
    return gradient


def logsumexp(values):
    """log sum exp of a list; -inf for an empty list."""
    values = list(values)
    top = max(values, default=-math.inf)
    if top == -math.inf:
        return -math.inf
    return top + math.log(sum(math.exp(v - top) for v in values))


def softmax(logits):
    """[B, Y] -> [B, Y], each row exp(z_c) / sum exp(z)."""
    rows = []
    for z in np.asarray(logits, np.float64):
        total = logsumexp(z)
        rows.append([math.exp(v - total) for v in z])
    return np.array(rows)


def cross_entropy(logits, y):
    """L_ce of section 4.2: -log softmax(z)_y; for probabilities -sum_c p_c log softmax(z)_c.

    A class of probability zero contributes nothing, whatever its logit.
    """
    losses = []
    for z, target in zip(np.asarray(logits, np.float64), np.asarray(y), strict=True):
        total = logsumexp(z)
        if np.ndim(target) == 0:
            losses.append(total - z[target])
        else:
            terms = [p * (total - v) for p, v in zip(target, z, strict=True) if p > 0]
            losses.append(sum(terms))
    return np.array(losses)


def kl(logits, probs):
    """KL(p || softmax(z)) = sum_c p_c (log p_c - log softmax(z)_c), with 0 log 0 = 0."""
    losses = []
    for z, target in zip(np.asarray(logits, np.float64), np.asarray(probs), strict=True):
        total, loss = logsumexp(z), 0.0
        for p, v in zip(target, z, strict=True):
            if p > 0:
                loss += p * (math.log(p) - (v - total))
        losses.append(loss)
    return np.array(losses)


def margin(logits, y):
    """max_{c != y} z_c - z_y: positive exactly where another class wins."""
    rows = zip(np.asarray(logits, np.float64), y, strict=True)
    return np.array([max(v for c, v in enumerate(z) if c != t) - z[t] for z, t in rows])


def dlr(logits, y):
    """Difference of logits ratio (Croce & Hein 2020): -(z_y - max_other) / (z_(1) - z_(3) + 1e-12)."""
    losses = []
    for z, loss in zip(np.asarray(logits, np.float64), margin(logits, y), strict=True):
        ordered = sorted(z, reverse=True)
        losses.append(loss / (ordered[0] - ordered[2] + 1e-12))
    return np.array(losses)


def magnet_loss(z, classes, *, alpha=12.5, mask=None):
    """Eq. 3 on one batch z [M, S, E]: ([M, S] losses, sigma^2), masked entries zero.

    mu of row m is the mean of its valid examples; sigma^2 = 1/(N-1) sum |z - mu(z)|^2; the
    sum in the logarithm runs over the non-empty rows of other classes; {.}_+ = max(0, .).
    """
    z = np.asarray(z, np.float64)
    m, s, _ = z.shape
    mask = np.ones((m, s), bool) if mask is None else np.asarray(mask)
    means = {i: z[i][mask[i]].mean(axis=0) for i in range(m) if mask[i].any()}
    valid = [(i, j) for i in range(m) for j in range(s) if mask[i, j]]
    variance = sum(np.sum((z[i, j] - means[i]) ** 2) for i, j in valid)
    variance = max(variance / max(len(valid) - 1, 1), 1e-12)
    loss = np.zeros((m, s))
    for i, j in valid:
        own = np.sum((z[i, j] - means[i]) ** 2) / (2 * variance)
        others = [
            -np.sum((z[i, j] - mean) ** 2) / (2 * variance)
            for row, mean in means.items()
            if classes[row] != classes[i]
        ]
        loss[i, j] = max(0.0, alpha + own + logsumexp(others))
    return loss, variance


def log_scores(z, centroids, variance, *, mask=None, nearest=None):
    """Logarithm of the numerator of Eq. 4: log sum_j exp(-|z - mu_cj|^2 / 2 sigma^2), [B, Y].

    With `nearest` = D only the D nearest clusters over all classes count (App. E.4).
    """
    centroids = np.asarray(centroids, np.float64)
    classes, clusters, _ = centroids.shape
    exists = np.ones((classes, clusters), bool) if mask is None else np.asarray(mask)
    rows = []
    for point in np.asarray(z, np.float64):
        distance = {
            (c, j): np.sum((point - centroids[c, j]) ** 2)
            for c in range(classes)
            for j in range(clusters)
            if exists[c, j]
        }
        kept = sorted(distance, key=distance.get)[:nearest]
        rows.append(
            [logsumexp(-distance[c, j] / (2 * variance) for c, j in kept if c == k) for k in range(classes)]
        )
    return np.array(rows)


def scores(z, centroids, variance, **options):
    """Numerator of Eq. 4, not normalised: what the authors' code treats as logits."""
    return np.exp(log_scores(z, centroids, variance, **options))


def probs(z, centroids, variance, **options):
    """Eq. 4: the scores divided by their sum over the classes."""
    return softmax(log_scores(z, centroids, variance, **options))


def exp_score_cross_entropy(z, y, centroids, variance, **options):
    """The paper's protocol (fidelity 1.1 no. 2): cross entropy with the scores of Eq. 4 as logits."""
    return cross_entropy(scores(z, centroids, variance, **options), y)


def variance(z, y, centroids, mask=None):
    """sigma^2 at inference: 1/(N-1) sum of squared distances to the nearest centroid of the own class."""
    exists = np.ones(np.shape(centroids)[:2], bool) if mask is None else np.asarray(mask)
    total = 0.0
    for point, c in zip(np.asarray(z, np.float64), y, strict=True):
        own = np.asarray(centroids, np.float64)[c][exists[c]]
        total += min(np.sum((point - mu) ** 2) for mu in own)
    return total / (len(z) - 1)


def project(x_adv, x, *, eps, norm, bounds=(0.0, 1.0)):
    """Pi_S of section 4.2: back into the eps-ball around x ("linf" or "l2"), then into the box."""
    delta = np.asarray(x_adv, np.float64) - x
    if norm == "linf":
        delta = np.clip(delta, -eps, eps)
    else:
        for row in delta:  # one example at a time
            length = math.sqrt(np.sum(row**2))
            row *= min(1.0, eps / length) if length > 0 else 1.0
    return np.clip(x + delta, *bounds) if bounds else x + delta


def qtrades(start, x, gradient, *, eps, step_size, bounds=(0.0, 1.0)):
    """App. D: one ascent step on CE(p(x), p(x')) from the random start x', then Pi_S.

    `gradient(start)` is the gradient of that cross entropy with respect to x'.
    """
    moved = np.asarray(start, np.float64) + step_size * np.sign(gradient(start))
    return project(moved, x, eps=eps, norm="linf", bounds=bounds)


def pgd_linear(x, weight, *, eps, step_size, steps, norm, bounds=(0.0, 1.0)):
    """Section 4.2 from x itself on a loss whose gradient is `weight` everywhere.

    linf steps along sign(w), l2 along w / |w|; project after every step.
    """
    x = np.asarray(x, np.float64)
    weight = np.asarray(weight, np.float64)
    direction = np.sign(weight) if norm == "linf" else weight / np.linalg.norm(weight)
    x_adv = x.copy()
    for _ in range(steps):
        x_adv = project(x_adv + step_size * direction, x, eps=eps, norm=norm, bounds=bounds)
    return x_adv


def inertia(points, centroids):
    """k-means objective: sum over the points of the squared distance to the nearest centroid."""
    return sum(
        min(np.sum((p - mu) ** 2) for mu in np.asarray(centroids, np.float64))
        for p in np.asarray(points, np.float64)
    )


def conv2d(x, kernel, stride=1, padding=1):
    """Cross-correlation of x [N, H, W, C] with kernel [kh, kw, C, O], zero padding on every side."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    kh, kw, _, channels = kernel.shape
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height = (x.shape[1] - kh) // stride + 1
    width = (x.shape[2] - kw) // stride + 1
    out = np.zeros((x.shape[0], height, width, channels))
    for i in range(height):
        for j in range(width):
            patch = x[:, i * stride : i * stride + kh, j * stride : j * stride + kw, :]
            out[:, i, j, :] = np.tensordot(patch, kernel, axes=3)
    return out
