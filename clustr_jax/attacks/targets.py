"""Which targets a targeted attack takes, and in which order: the likeliest ones, or MALT's nearest ones.

MALT (Melamed et al., NeurIPS 2024) ranks a class by (z_y - z_c) / |grad (z_y - z_c)| in the dual norm (l1 for
linf, l2 for l2): the distance to its boundary if the model were linear. A likely class may be far, where the
two logits move together. It costs one gradient per candidate.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from clustr_jax.attacks import scheduler
from clustr_jax.attacks.attack_losses import (
    Outputs,
    View,
    centroid,
    differentiated,
    logits_of,
    margin_targeted,
)
from clustr_jax.attacks.gate import admit
from clustr_jax.attacks.geometry import dual_length
from clustr_jax.attacks.input_checks import concrete
from clustr_jax.attacks.options import whole
from clustr_jax.runtime import mesh
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.promotion import promoting

__all__ = ["likely_targets", "malt_targets", "nearest_clusters"]
# Targets of APGD-T and FAB-T in AutoAttack's "standard", and how many classes MALT looks at for them.
TARGETS, CANDIDATES = 9, 100
# What `targets=` may be.
RANKINGS = ("likely", "malt")


class Chooser(Protocol):
    """Of each image the targets to try, best first; `outputs` are the model's on x [N, ...]."""

    def __call__(
        self,
        model: Callable,
        x: Float[np.ndarray, "N ..."],
        y: Int[np.ndarray, "N"],
        outputs: Any,
        norm: str,
        *,
        count: int = TARGETS,
        slots: int = 64,
    ) -> Int[np.ndarray, "T N"]: ...


def ranking_gradients(ranking: str, outputs: Any) -> int:
    """Gradients per image that this ranking takes: MALT's, one for each candidate."""
    if not ranking.startswith("malt"):
        return 0
    if ranking == "malt-clusters":  # of other classes
        classes, k = outputs.exponents.shape[1:]
        return min(CANDIDATES, (classes - 1) * k)
    return min(CANDIDATES, logits_of(outputs).shape[1] - 1)


def check_ranking(targets: str) -> None:
    """UserError for a word that is no ranking of targets."""
    if targets not in RANKINGS:
        raise UserError(f"targets must be one of {', '.join(RANKINGS)}, got {targets!r}")


def likely_targets(
    logits: Float[Array | np.ndarray, "B Y"], y: Int[np.ndarray, "B"] | Sequence[int], count: int = TARGETS
) -> Int[np.ndarray, "T B"]:
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


def nearest_clusters(
    exponents: Float[Array | np.ndarray, "B Y K"], y: Int[np.ndarray, "B"] | Sequence[int], count: int
) -> Int[np.ndarray, "T B"]:
    """For each image the `count` clusters of other classes with the largest exponents [B, Y, K], best first.

    Clusters are numbered class * K + j; where a class has fewer than K, the best one stands in for the rest.

    >>> from clustr_jax.attacks import targets
    >>> u = np.array([[[-1.0, -9.0], [-2.0, -3.0]]])  # [B=1, Y=2, K=2]
    >>> print(targets.nearest_clusters(u, np.array([0]), 2))
    [[2]
     [3]]
    """
    size, classes, k = exponents.shape
    flat = np.array(exponents).reshape(size, classes * k)
    flat[np.arange(classes * k)[None, :] // k == np.asarray(y)[:, None]] = -np.inf
    order = np.argsort(-flat, axis=1, kind="stable")[:, : min(count, (classes - 1) * k)]
    missing = np.isneginf(np.take_along_axis(flat, order, axis=1))
    return np.where(missing, order[:, :1], order).T.astype(np.int32)


@promoting
def malt_targets(
    logits_fn: Callable,
    x: Float[np.ndarray, "B ..."],
    y: Int[np.ndarray, "B"],
    *,
    norm: str = "linf",
    count: int = TARGETS,
    candidates: int = CANDIDATES,
    clusters: bool = False,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    slots: int = 64,
) -> Int[np.ndarray, "T B"]:
    """The nearest other classes by MALT's linear distance (Melamed et al. 2024), best first.

    Of class c it is (z_y - z_c) / |grad (z_y - z_c)|, in the dual norm; a class without a gradient comes
    last. One candidate is looked at after the other: the memory is that of one gradient, whatever the number
    of classes.

    Args:
        logits_fn: any function of images [B, ...] -> logits [B, Y]; `wrap` says which models do.
        x: images [B, ...], pixels in `bounds`.
        y: labels [B].
        norm: "linf" or "l2".
        count: targets of each image.
        candidates: likeliest other classes that are ranked.
        clusters: for a model that returns its clusters (`clf.view`). Targets are then clusters of other
            classes, numbered class * K + j: the exponent u_c of cluster c takes the place of its logit, the
            largest one of the label's clusters that of z_y.
        bounds: box of the pixels, (low, high); None for no box.
        slots: images that the device works on at once: they decide the memory.

    Returns:
        classes (or clusters) [T, B].

    Raises:
        UserError: for bad input, and inside jit.

    Class 2 is the likelier one, and class 1 the nearer: its logit moves ten times as fast.

    >>> def logits(x):
    ...     z = x[:, 0]
    ...     return jnp.stack([jnp.zeros_like(z), 10 * (z - 0.8), 0.1 * (z - 0.8) - 1], axis=1)
    >>> x, y = np.array([[0.5]], np.float32), np.array([0])
    >>> print(logits(x))
    [[ 0.   -3.   -1.03]]
    >>> print(attacks.malt_targets(logits, x, y)[:, 0])
    [1 2]
    """
    count, candidates = whole("count", count, 1), whole("candidates", candidates, 1)
    slots = whole("slots", slots, 1)
    rows = -(-slots // mesh.devices())
    given = admit(jax.random.key(0), logits_fn, x, y, eps=0.0, norm=norm, bounds=bounds, rows=rows)
    if not concrete(given.x, given.y):
        raise UserError("malt_targets cannot be inside jit: it ranks on the host")
    if given.y.ndim != 1:
        raise UserError(f"y must be labels [B], got probabilities {given.y.shape}; give y.argmax(axis=1)")
    x, y = np.asarray(given.x), np.asarray(given.y).astype(np.int32)
    outputs = scheduler.forward(given.model, x, slots)
    if clusters and not (isinstance(outputs, View) and outputs.exponents is not None):
        raise UserError("clusters=True needs a model that returns its clusters: give clf.view")
    rank = nearest_by_cluster if clusters else nearest_by_class
    return rank(given.model, x, y, outputs, given.norm, count=count, candidates=candidates, slots=slots)


def nearest_by_class(
    model: Callable,
    x: Float[np.ndarray, "B ..."],
    y: Int[np.ndarray, "B"],
    outputs: Outputs,
    norm: str,
    *,
    count: int = TARGETS,
    candidates: int = CANDIDATES,
    slots: int = 64,
) -> Int[np.ndarray, "T B"]:
    """`malt_targets` for a model that is known; `outputs` are its clean ones [B, ...]."""
    found = likely_targets(logits_of(outputs), y, candidates)
    distance = _distances(model, x, y, found, margin_targeted, norm, slots)
    return _first(found, distance, count)


def nearest_by_cluster(
    model: Callable,
    x: Float[np.ndarray, "B ..."],
    y: Int[np.ndarray, "B"],
    outputs: View,
    norm: str,
    *,
    count: int = TARGETS,
    candidates: int = CANDIDATES,
    slots: int = 64,
) -> Int[np.ndarray, "T B"]:
    """The same with clusters for targets; `outputs` have exponents."""
    assert outputs.exponents is not None
    found = nearest_clusters(outputs.exponents, y, candidates)
    distance = _distances(model, x, y, found, centroid, norm, slots)
    distance[1:][found[1:] == found[:1]] = np.inf  # it stands in for clusters that there are not
    return _first(found, distance, count)


def _likely(model, x, y, outputs, norm, *, count=TARGETS, slots=64):
    return likely_targets(logits_of(outputs), y, count)


def _clusters(model, x, y, outputs, norm, *, count=TARGETS, slots=64):
    return nearest_clusters(outputs.exponents, y, count)


# By the name in an attack's entry of the registry. Targets of the last two are clusters.
CHOOSERS: dict[str, Chooser] = {
    "likely": _likely,
    "malt": nearest_by_class,
    "clusters": _clusters,
    "malt-clusters": nearest_by_cluster,
}


def _first(candidates, distance, count):
    """Those with the smallest distances; of equal ones the likelier."""
    order = np.argsort(distance, axis=0, kind="stable")[:count]
    ranked = np.take_along_axis(candidates, order, axis=0)
    stands_in = np.isposinf(np.take_along_axis(distance, order, axis=0))
    return np.ascontiguousarray(np.where(stands_in, ranked[:1], ranked))


def _distances(model, x, y, candidates, loss, norm, slots) -> Float[np.ndarray, "C B"]:
    """Of `slots` images at a time."""
    found = np.zeros(candidates.shape, np.float32)
    for start in range(0, len(x), slots):
        place = np.arange(start, start + slots) % len(x)
        part = _linear_distances(model, x[place], y[place], candidates[:, place].T, loss=loss, norm=norm)
        kept = min(slots, len(x) - start)
        found[:, start : start + kept] = np.asarray(part)[:kept].T
    return found


@functools.partial(jax.jit, static_argnames=("loss", "norm"))
def _linear_distances(model, x, y, candidates, *, loss, norm) -> Float[Array, "B C"]:
    """-loss / |grad loss| towards each candidate [B, C]: one forward pass, and a gradient per candidate."""

    def rows(model, x, y, candidates):
        with differentiated():
            outputs, pull_back = jax.vjp(model, x)

        def distance(target):
            value, to_outputs = jax.vjp(lambda outputs: loss(outputs, y, target).astype(jnp.float32), outputs)
            gradient = pull_back(to_outputs(jnp.ones_like(value))[0])[0]
            size = dual_length(gradient, norm)
            return jnp.where(size > 0, -value / jnp.where(size > 0, size, 1.0), jnp.finfo(value.dtype).max)

        with differentiated():
            return jax.lax.map(distance, candidates.T).T

    return mesh.by_rows(rows, model, x, y, candidates)
