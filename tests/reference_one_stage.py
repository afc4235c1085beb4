"""Slow float64 references of the one-stage methods, written from the papers' formulas; no package here."""

import math

import numpy as np

import reference


def cluster_scores(z, centroids, variance, exists=None):
    """-|z - mu|^2 / 2 sigma^2 of every cluster, classes one after another: [B, Y K], -inf for none."""
    num_classes, k, _ = centroids.shape
    found = np.full((len(z), num_classes * k), -np.inf)
    for i, point in enumerate(np.asarray(z, np.float64)):
        for c in range(num_classes):
            for j in range(k):
                if exists is None or exists[c, j]:
                    found[i, c * k + j] = -np.sum((point - centroids[c, j]) ** 2) / (2 * variance)
    return found


def class_weights(fixed, y, mask, temperature):
    """The mean over each example's class of softmax(scores / T), [B, C]."""
    probs = reference.softmax(np.asarray(fixed) / temperature)
    weights = []
    for label in y:
        members = [i for i in range(len(y)) if y[i] == label and mask[i]]
        weights.append(np.mean(probs[members], axis=0))
    return np.array(weights)


def ikl(scores, adversarial, weights):
    """1/4 sum_jk w_j w_k (D_jk(x) - D_jk(x_adv))^2, D_jk = s_j - s_k, example by example."""
    found = []
    for s, t, w in zip(scores, adversarial, weights, strict=True):
        total = 0.0
        for j in range(len(s)):
            for k in range(len(s)):
                if np.isfinite(s[j]) and np.isfinite(s[k]):
                    total += w[j] * w[k] * ((s[j] - s[k]) - (t[j] - t[k])) ** 2
        found.append(total / 4)
    return np.array(found)


def ikl_gradient(scores, adversarial, weights):
    """Of `ikl` by the scores of x: w_j (d_j - sum_k w_k d_k), d = s(x) - s(x_adv).

    By those of x_adv: minus it.
    """
    found = np.zeros_like(scores)
    for i, (s, t, w) in enumerate(zip(scores, adversarial, weights, strict=True)):
        shift = [a - b for a, b in zip(s, t, strict=True)]
        centre = sum(weight * d for weight, d in zip(w, shift, strict=True))
        for j, d in enumerate(shift):
            found[i, j] = w[j] * (d - centre)
    return found


def max_mahalanobis(count, size):
    """Pang et al. 2018, Algorithm 1: unit vectors mu_1 .. mu_L with inner products -1 / (L - 1)."""
    means = np.zeros((count, size))
    means[0, 0] = 1.0
    for i in range(1, count):
        for j in range(i):
            inner = sum(means[i, m] * means[j, m] for m in range(size))
            means[i, j] = -(1 + inner * (count - 1)) / (means[j, j] * (count - 1))
        if i < size:
            means[i, i] = math.sqrt(max(0.0, 1 - np.sum(means[i] ** 2)))
    return means


def rival(z, y, centroids, variance, exists=None):
    """Of each example the cluster of another class with the smallest (z_y - s_j) / |grad_z (z_y - s_j)|.

    z_y is the logsumexp over the own clusters; the gradient is by central differences.
    """
    k, found = centroids.shape[1], []
    for point, label in zip(np.asarray(z, np.float64), y, strict=True):

        def margin(at, j, label=label):
            scores = cluster_scores(at[None], centroids, variance, exists)[0]
            own = [s for s in scores[label * k : label * k + k] if np.isfinite(s)]
            return reference.logsumexp(own) - scores[j]

        best = (math.inf, -1)
        for j in range(centroids.shape[0] * k):
            if j // k != label and (exists is None or exists[j // k, j % k]):
                slope = reference.finite_difference(lambda at, j=j: margin(at, j), point)
                best = min(best, (margin(point, j) / np.linalg.norm(slope), j))
        found.append(best[1])
    return np.array(found)


def radius_share(step, ramp, per_epoch):
    """Of the radius at this step (from 0): it grows in equal parts over `ramp` epochs, then it is whole."""
    return min(1.0, (step + 1) / (ramp * per_epoch)) if ramp else 1.0


def noisy_step(x, noise, gradient_sign, step, box):
    """N-FGSM (de Jorge et al. 2022): x + noise, cut to the box; + step sign(gradient there), cut again."""
    start = np.clip(x + noise, *box)
    return np.clip(start + step * gradient_sign(start), *box)
