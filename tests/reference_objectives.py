"""Slow float64 references of whole objectives and train steps, written from the papers' formulas.

Like `reference.py`, which has the losses that these are made of, nothing here imports the package.
Linear softmax classifiers have gradients that can be written down, so whole steps of training do too.
"""

import dataclasses
import math
from typing import Any

import numpy as np

import reference


def mlp(params, x, mean, std):
    """Normalise, dense, ReLU, dense = z, ReLU, dense -> (logits, z, what goes into the two ReLUs)."""
    first, second, head = (params[name] for name in ("Dense_0", "Dense_1", "head"))
    before = (np.asarray(x, np.float64) - mean) / std @ first["kernel"] + first["bias"]
    embeddings = np.maximum(before, 0) @ second["kernel"] + second["bias"]
    logits = np.maximum(embeddings, 0) @ head["kernel"] + head["bias"]
    return logits, embeddings, np.concatenate([before, embeddings], axis=1)


@dataclasses.dataclass
class Terms:
    """What the formula of an objective is made of, float64: one batch at one set of parameters.

    `z`, `logits` are the clean images', `z_adv`, `logits_adv` the adversary's, `z_fixed` and
    `logits_fixed` the clean ones where they are held constant. Methods that take embeddings look at
    the fixed clusters.
    """

    logits: np.ndarray
    z: np.ndarray
    logits_adv: np.ndarray
    z_adv: np.ndarray
    logits_fixed: np.ndarray
    z_fixed: np.ndarray
    y: np.ndarray
    mask: np.ndarray
    classes: np.ndarray | None
    centroids: np.ndarray
    variance: float
    exists: np.ndarray
    c: Any  # the config

    def log_scores(self, z, nearest=None):
        """Eq. 4 in the log domain: the cluster head's logits."""
        return reference.log_scores(z, self.centroids, self.variance, mask=self.exists, nearest=nearest)

    def scores(self, z):
        """The authors' logits: Eq. 4's numerators."""
        return np.exp(self.log_scores(z))

    def probs(self, z):
        """Eq. 4."""
        return reference.softmax(self.log_scores(z))

    def magnet(self, z=None):
        """Eq. 3 of the batch, [B], masked entries 0."""
        loss, _ = reference.magnet_loss(*self._rows(z), alpha=self.c.magnet.alpha, mask=self._mask)
        return loss.reshape(-1)

    def magnet_variance(self):
        """sigma^2 of the batch."""
        return reference.magnet_loss(*self._rows(None), mask=self._mask)[1]

    def magnet_parts(self, z=None):
        """Of each unmasked example: place, |z - mu|^2 / 2 sigma^2, sum over other classes of exp(...)."""
        z, classes = self._rows(z)
        _, variance = reference.magnet_loss(z, classes, mask=self._mask)
        means = [row[valid].mean(axis=0) for row, valid in zip(z, self._mask, strict=True)]
        parts = []
        for i, j in zip(*np.nonzero(self._mask), strict=True):
            exponents = [-np.sum((z[i, j] - mean) ** 2) / (2 * variance) for mean in means]
            others = sum(math.exp(e) for e, c in zip(exponents, classes, strict=True) if c != classes[i])
            parts.append((i * z.shape[1] + j, -exponents[i], others))
        return parts

    def magnet_authors(self):
        """fidelity 1.1 row 8: relu(-log(num / (den + 1e-8) + 1e-8)), num = exp(-own - alpha)."""
        loss = np.zeros(len(self.z))
        for place, own, others in self.magnet_parts():
            ratio = math.exp(-own - self.c.magnet.alpha) / (others + 1e-8)
            loss[place] = max(0.0, -math.log(ratio + 1e-8))
        return loss

    def magnet_plus_k(self):
        """fidelity 1.1 rows 22 and 8: K more terms exp(0) in the sum over other classes, and the two 1e-8."""
        loss = np.zeros(len(self.z))
        for place, own, others in self.magnet_parts():
            total = others + self.centroids.shape[1]
            ratio = math.exp(-own - self.c.magnet.alpha) / (total + 1e-8)
            loss[place] = max(0.0, -math.log(ratio + 1e-8))
        return loss

    def mean(self, values):
        """Over the unmasked."""
        return float(np.mean(np.asarray(values)[self.mask]))

    @property
    def _mask(self):
        return self.mask.reshape(len(self.classes), -1)

    def _rows(self, z):
        z = self.z if z is None else z
        return z.reshape(len(self.classes), -1, z.shape[-1]), self.classes


def kl_of_probabilities(logits, target_logits):
    """fidelity 1.1 row 25: F.kl_div(softmax(adv), softmax(clean)); its first argument should be logarithms.

    Element mean, so divided by the number of classes as well: sum_c p_c (log p_c - p_adv_c) / Y.
    """
    losses = []
    for q, p in zip(reference.softmax(logits), reference.softmax(target_logits), strict=True):
        losses.append(sum(b * (math.log(b) - a) for a, b in zip(q, p, strict=True)) / len(p))
    return np.array(losses)


def authors_target(scores):
    """F.normalize(scores, p=1): divided by their sum, or by 1e-12 where that is smaller."""
    return scores / np.maximum(scores.sum(axis=1, keepdims=True), 1e-12)


def one_hot(y, classes):
    """[B] -> [B, Y]"""
    return np.eye(classes)[np.asarray(y)]


class Sgd:
    """Nesterov momentum 0.9 and weight decay (PyTorch): g += d w; v = 0.9 v + g; w -= rate (g + 0.9 v)."""

    def __init__(self, rate, decay):
        self.rate, self.decay, self.velocity = rate, decay, {}

    def step(self, params, gradients):
        """The new parameters."""
        new = {}
        for name, w in params.items():
            g = gradients[name] + self.decay * w
            v = 0.9 * self.velocity.get(name, 0.0) + g
            self.velocity[name] = v
            new[name] = w - self.rate * (g + 0.9 * v)
        return new


def softmax_gradients(params, x, y):
    """Mean cross entropy of logits x W + b: gradients of W and b, and of x (per example, over B)."""
    d = (reference.softmax(x @ params["kernel"] + params["bias"]) - one_hot(y, len(params["bias"]))) / len(x)
    return {"kernel": x.T @ d, "bias": d.sum(axis=0)}, d @ params["kernel"].T


def free_at(params, batches, *, replays, eps, sgd, box=(-np.inf, np.inf)):
    """Shafahi et al. 2019, Algorithm 1, linear softmax: (params, delta, gradient of x) after each step.

    delta starts at 0 once, is carried from batch to batch, and moves by eps sign(gradient) with the
    gradient that moves the weights. The network sees x + delta cut to the box (not in Algorithm 1), delta
    is not cut to it, and the gradient of delta goes through the cut.
    """
    delta, states = np.zeros_like(batches[0][0]), []
    for x, y in batches:
        for _ in range(replays):
            moved = x + delta
            gradients, ascent = softmax_gradients(params, np.clip(moved, *box), y)
            params = sgd.step(params, gradients)
            delta = np.clip(
                delta + eps * np.sign(ascent) * ((box[0] <= moved) & (moved <= box[1])), -eps, eps
            )
            states.append((params, delta, ascent))
    return states


def trades_gradients(params, x, x_adv, y, beta):
    """Zhang et al. 2019: mean of CE(f(x), y) + beta KL(p || q), p and q the clean and adversarial softmax.

    dKL/d(adversarial logits) = q - p, and dKL/d(clean logits) = p (log p - log q - KL).
    """
    p, q = (reference.softmax(points @ params["kernel"] + params["bias"]) for points in (x, x_adv))
    ratio = np.log(p) - np.log(q)
    kl = np.sum(p * ratio, axis=1, keepdims=True)
    clean = (p - one_hot(y, p.shape[1]) + beta * p * (ratio - kl)) / len(x)
    adversarial = beta * (q - p) / len(x)
    loss = np.mean(-np.log(p[np.arange(len(y)), y]) + beta * kl[:, 0])
    gradients = {
        "kernel": x.T @ clean + x_adv.T @ adversarial,
        "bias": clean.sum(axis=0) + adversarial.sum(axis=0),
    }
    return gradients, loss


def running(old, batches, ddof=0):
    """Batch norm's running (mean, variance) after these batches: 0.9 old + 0.1 batch.

    `ddof` 0 is the biased variance, 1 the unbiased one of PyTorch.
    """
    mean, variance = (np.asarray(a, np.float64) for a in old)
    for batch in batches:
        flat = np.asarray(batch, np.float64).reshape(-1, np.shape(batch)[-1])
        mean = 0.9 * mean + 0.1 * flat.mean(axis=0)
        variance = 0.9 * variance + 0.1 * flat.var(axis=0, ddof=ddof)
    return mean, variance
