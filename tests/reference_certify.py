"""Slow float64 NumPy references for certificates: exact flip distances and explicit matrices.

Nothing here imports the package. Features are the inputs (f = identity, Lipschitz constant 1), so that
a flip distance in feature space is one in input space. O are the clusters of the own class, C the rest.
"""

import itertools

import numpy as np

import reference


def log_scores(f, centroids, mask, variance, nearest=None):
    """Eq. 4 before normalisation for one feature vector: [Y], -inf for a class without kept clusters."""
    terms = sorted(
        (float(np.sum((f - centroids[c, k]) ** 2)), c)
        for c in range(centroids.shape[0])
        for k in range(centroids.shape[1])
        if mask[c, k]
    )
    scores = []
    for c in range(centroids.shape[0]):
        scores.append(reference.logsumexp(-d / (2 * variance) for d, owner in terms[:nearest] if owner == c))
    return np.array(scores)


def predicts(f, y, centroids, mask, variance, nearest=None):
    """Whether class y wins strictly. nearest=1 is the hard rule."""
    scores = log_scores(f, centroids, mask, variance, nearest)
    return bool(scores[y] > np.max(np.delete(scores, y)))


def distance_to_halfspaces(f, normals, offsets):
    """min |g - f| over {g: normals g >= offsets}, by trying every active set (few constraints)."""
    if np.all(normals @ f >= offsets):
        return 0.0
    best = np.inf
    for count in range(1, len(offsets) + 1):
        for active in itertools.combinations(range(len(offsets)), count):
            a, b = normals[list(active)], offsets[list(active)]
            step, *_ = np.linalg.lstsq(a, b - a @ f, rcond=None)
            g = f + step
            if np.all(normals @ g >= offsets - 1e-9 * (1 + np.abs(offsets))):
                best = min(best, float(np.linalg.norm(step)))
    return best


def hard_flip_distance(f, y, centroids, mask):
    """Exact distance from f to the nearest point that some other centroid owns at least as much.

    min over l in C of the distance to {g: |g - mu_l| <= |g - mu_j| for all j in O}, a polytope.
    """
    own = centroids[y][mask[y]]
    best = np.inf
    for c in range(len(centroids)):
        for k in range(centroids.shape[1]):
            if c != y and mask[c, k]:
                other = centroids[c, k]
                # |g - mu_l|^2 <= |g - mu_j|^2  <=>  2 (mu_l - mu_j) g >= |mu_l|^2 - |mu_j|^2
                normals = 2 * (other - own)
                offsets = np.sum(other**2) - np.sum(own**2, axis=1)
                best = min(best, distance_to_halfspaces(f, normals, offsets))
    return best


def theorem_1(f, own, other):
    """(|f - mu_2|^2 - |f - mu_1|^2) / (2 |mu_2 - mu_1|), Eq. 1 with Lipschitz constant 1."""
    return (np.sum((f - other) ** 2) - np.sum((f - own) ** 2)) / (2 * np.linalg.norm(other - own))


def worst_points(f, y, centroids, mask, variance, radius, steps=15):
    """Points at `radius` from f that try to make each other class win: a [P, E] array.

    Ascent of z_c - z_y over the sphere, from the directions between pairs of centroids; its gradient is
    the difference of the two classes' posterior means of centroids.
    """
    points = []
    own = centroids[y][mask[y]]
    for c in range(len(centroids)):
        others = centroids[c][mask[c]]
        if c == y or not len(others):
            continue
        for start in (others - own[:1]).tolist() + (others[:1] - own).tolist():
            direction = np.array(start)
            for _ in range(steps):
                length = np.linalg.norm(direction)
                if length == 0:
                    break
                g = f + radius * direction / length
                points.append(g)
                direction = _posterior_mean(g, others, variance) - _posterior_mean(g, own, variance)
    return np.array(points)


def _posterior_mean(g, centroids, variance):
    squared = np.sum((g - centroids) ** 2, axis=1)
    weights = np.exp(-(squared - squared.min()) / (2 * variance))
    return weights @ centroids / weights.sum()


def convolution_matrix(kernel, height, width, stride, padding):
    """The matrix of a zero-padded convolution (cross-correlation), [outputs, inputs], entry by entry."""
    k, _, channels, features = kernel.shape
    rows = (height + 2 * padding - k) // stride + 1
    columns = (width + 2 * padding - k) // stride + 1
    matrix = np.zeros((rows, columns, features, height, width, channels))
    for i, j, a, b in itertools.product(range(rows), range(columns), range(k), range(k)):
        y, x = i * stride + a - padding, j * stride + b - padding
        if 0 <= y < height and 0 <= x < width:
            matrix[i, j, :, y, x, :] += kernel[a, b].T
    return matrix.reshape(rows * columns * features, height * width * channels)


def largest_singular_value(matrix):
    """By a full SVD."""
    return float(np.linalg.svd(matrix, compute_uv=False)[0])
