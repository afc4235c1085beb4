"""The classes or clusters that a targeted attack goes towards: a function per kind of choice."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int

from clustr_jax.attacks.attack_losses import View, logits_of


class Chooser(Protocol):
    """Of each image the targets to try, best first, as int32 [T, N]; `outputs` are the model's on `x`."""

    def __call__(
        self,
        model: Callable,
        x: Float[np.ndarray, "N ..."],
        y: Int[np.ndarray, "N"],
        outputs: Any,
        count: int,
    ) -> Int[np.ndarray, "T N"]: ...


def likely_targets(logits, y, count: int = 9) -> Int[np.ndarray, "T B"]:
    """For each image the `count` other classes with the largest clean logits, best first (at most Y - 1).

    >>> from clustr_jax.attacks import targets
    >>> z = np.array([[5.0, 1.0, 3.0], [0.0, 2.0, 1.0]])  # [B=2, Y=3]
    >>> print(targets.likely_targets(z, np.array([0, 1])))  # [T=2, B=2]
    [[2 2]
     [1 0]]
    """
    logits = np.array(logits, np.float32)
    logits[np.arange(len(y)), y] = -np.inf
    order = np.argsort(-logits, axis=1, kind="stable")
    return np.ascontiguousarray(order[:, : min(count, logits.shape[1] - 1)].T).astype(np.int32)


def nearest_clusters(exponents, y, count: int) -> Int[np.ndarray, "T B"]:
    """For each image the `count` clusters of other classes with the largest exponents [B, Y, K], best first.

    Clusters are numbered class * K + j; where a class has fewer than K, the best one stands in for the rest.

    >>> from clustr_jax.attacks import targets
    >>> u = np.array([[[-1.0, -9.0], [-3.0, -2.0]]])  # [B=1, Y=2, K=2]
    >>> print(targets.nearest_clusters(u, np.array([0]), 2))  # of class 1 the second cluster, then the first
    [[3]
     [2]]
    """
    size, classes, k = exponents.shape
    flat = np.array(exponents).reshape(size, classes * k)
    flat[np.arange(classes * k)[None, :] // k == np.asarray(y)[:, None]] = -np.inf
    order = np.argsort(-flat, axis=1, kind="stable")[:, : min(count, (classes - 1) * k)]
    missing = np.isneginf(np.take_along_axis(flat, order, axis=1))
    return np.where(missing, order[:, :1], order).T.astype(np.int32)


def _classes(model, x, y, outputs, count):
    return likely_targets(logits_of(outputs), y, count)


def _clusters(model, x, y, outputs: View, count):
    return nearest_clusters(outputs.exponents, y, count)


# What `Entry.targets` in the registry names.
CHOOSERS: dict[str, Chooser] = {"classes": _classes, "clusters": _clusters}
