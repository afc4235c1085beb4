"""k-means++ and Lloyd's algorithm, compiled, with masks. Knows nothing of classes.

Seeding is the greedy k-means++ of Arthur & Vassilvitskii (2007), section 4: each new centroid is
the best of 2 + floor(ln k) candidates drawn in proportion to the squared distance.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from clustr_jax.runtime import arrays, struct
from clustr_jax.runtime.promotion import promoting


class KMeans(struct.PyTreeNode):
    """Result of `kmeans`. Clusters without members (fewer distinct points than k) have `valid` False."""

    centroids: Float[Array, "k E"]
    assignments: Int[Array, "N"]
    inertia: Float[Array, ""]
    valid: Bool[Array, "k"]


def kmeans(
    key: Array,
    points: Float[Array, "N E"],
    k: int,
    *,
    mask: Bool[Array, "N"] | None = None,
    n_init: int = 1,
    max_iter: int = 20,
    limit: Int[Array, ""] | None = None,
) -> KMeans:
    """Greedy k-means++ and Lloyd's algorithm on the points where `mask` is True.

    Inertia is the sum of squared distances to the assigned centroid. A cluster that loses all its members
    moves to the point that is farthest from its centroid. float16, bfloat16 and whole numbers are computed in
    float32.

    Args:
        key: of `jax.random.key`.
        points: [N, E].
        k: clusters.
        mask: [N]; a point where it is False gets assignment -1 and counts for nothing.
        n_init: seedings, of which the best inertia wins.
        max_iter: Lloyd iterations, at most.
        limit: (traced) uses only the first so many of the k clusters: classes with different numbers of
            clusters share one compilation.

    Returns:
        a `KMeans`: centroids [k, E], assignments [N], inertia [], valid [k].

    Raises:
        UserError: for points that are not [N, E] or not finite, for a mask without any True, and for a k that
            is no whole number above 0. (In jit nobody sees such a mask, and no cluster is valid.)

    >>> points = jnp.array([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 1.0]])  # [N=4, E=2]
    >>> km = kmeans(jax.random.key(0), points, 2)
    >>> print(sorted(km.centroids.tolist()), km.inertia)
    [[0.0, 0.5], [9.0, 0.5]] 1.0
    >>> print(km.assignments[0] == km.assignments[1], km.assignments[1] == km.assignments[2])
    True False
    >>> print(kmeans(jax.random.key(0), points, 2, mask=points[:, 0] < 5).assignments[2:])
    [-1 -1]
    """
    arrays.key(key)
    k, n_init = arrays.whole(k, "k"), arrays.whole(n_init, "n_init")
    max_iter = arrays.whole(max_iter, "max_iter", low=0)
    if limit is not None and arrays.concrete(limit):
        arrays.whole(limit, "limit")
    sizes = {}
    points = arrays.as_array(points, "points")
    arrays.check_shape(points, "points", "N E", sizes)
    if mask is not None:
        mask = arrays.mask(mask, "mask", "N", sizes, some="point")
    points = arrays.floats(points, "points", "N E", sizes, where=mask, squares="between them")
    return _kmeans(key, points, k, mask, n_init, max_iter, limit)


@functools.partial(jax.jit, static_argnames=("k", "n_init", "max_iter"))
@promoting
def _kmeans(key, points, k, mask, n_init, max_iter, limit) -> KMeans:
    if mask is None:
        mask = jnp.ones(points.shape[0], bool)
    points = jnp.where(mask[:, None], points, 0.0)
    # Centring keeps the expanded square of `_squared_distances` accurate.
    centre = jnp.sum(points, axis=0) / jnp.maximum(jnp.sum(mask), 1)
    centred = jnp.where(mask[:, None], points - centre[None, :], 0.0)

    def run(key):
        # Seeds are chosen among the points as given: equal points have distance exactly 0, which the
        # compiler's rounding of centred ones does not promise.
        centroids, valid = _seed(key, points, mask, k, k if limit is None else limit)
        centroids = centroids - centre[None, :]
        return _lloyd(centred, mask, centroids, valid, max_iter)

    centroids, assignments, inertia, valid = lax.map(run, jax.random.split(key, n_init))
    best = jnp.argmin(inertia)
    return KMeans(
        centroids=centroids[best] + centre[None, :],
        assignments=jnp.where(mask, assignments[best], -1),
        inertia=inertia[best],
        valid=valid[best],
    )


def _squared_distances(points, centroids):
    """|p|^2 - 2 p.c + |c|^2, clipped at 0; one matrix product, for choosing a centroid only."""
    product = jnp.matmul(points, centroids.T, precision=lax.Precision.HIGHEST)
    squares = jnp.sum(points**2, axis=1)[:, None] + jnp.sum(centroids**2, axis=1)[None, :]
    return jnp.maximum(squares - 2 * product, 0.0)


def _exact(points, centroids):
    """Squared distances to a centroid each (or one for all), from differences: exactly 0 for equal points."""
    return jnp.sum(jnp.square(points - centroids), axis=-1)


def _seed(key, points, mask, k, limit):
    """Greedy k-means++. Returns (centroids [k, E], valid [k])."""
    candidates = 2 + int(math.log(k))

    first_key, others_key = jax.random.split(key)
    first = points[jax.random.categorical(first_key, jnp.where(mask, 0.0, -jnp.inf))]
    centroids = jnp.zeros((k, points.shape[1]), points.dtype).at[:].set(first[None, :])
    valid = jnp.zeros(k, bool).at[0].set(jnp.any(mask))
    nearest = jnp.where(mask, _exact(points, first[None, :]), 0.0)

    def add(carry, step):
        centroids, valid, nearest = carry
        i, key = step
        some_left = jnp.any(nearest > 0) & (i < limit)  # no distinct point is left, or no cluster
        log_weight = jnp.where(nearest > 0, jnp.log(nearest), -jnp.inf)
        log_weight = jnp.where(some_left, log_weight, 0.0)
        drawn = jax.random.categorical(key, log_weight, shape=(candidates,))
        reduced = jnp.minimum(nearest[None, :], jax.vmap(lambda c: _exact(points, c[None, :]))(points[drawn]))
        best = jnp.argmin(jnp.sum(jnp.where(mask[None, :], reduced, 0.0), axis=1))
        centroid = jnp.where(some_left, points[drawn[best]], centroids[0])
        nearest = jnp.where(some_left & mask, reduced[best], nearest)
        return (centroids.at[i].set(centroid), valid.at[i].set(some_left), nearest), None

    if k > 1:
        steps = (jnp.arange(1, k), jax.random.split(others_key, k - 1))
        (centroids, valid, _), _ = lax.scan(add, (centroids, valid, nearest), steps)
    return centroids, valid


def _lloyd(points, mask, centroids, valid, max_iter):
    """Lloyd iterations until no assignment changes, or `max_iter`."""
    k = centroids.shape[0]

    def assign(centroids):
        squared = jnp.where(valid[None, :], _squared_distances(points, centroids), jnp.inf)
        return jnp.argmin(squared, axis=1)

    def update(centroids, assignments):
        member = jax.nn.one_hot(assignments, k, dtype=points.dtype) * mask[:, None]
        counts = jnp.sum(member, axis=0)
        sums = jnp.matmul(member.T, points, precision=lax.Precision.HIGHEST)
        means = jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1.0)[:, None], centroids)
        empty = valid & (counts == 0)

        def repair(means):
            distances = jnp.where(mask, _exact(points, means[assignments]), -1.0)
            # the i-th empty cluster takes the i-th farthest point
            _, farthest = lax.top_k(distances, min(k, distances.shape[0]))
            rank = jnp.cumsum(empty) - 1
            return jnp.where(empty[:, None], points[farthest[jnp.maximum(rank, 0)]], means)

        return lax.cond(jnp.any(empty), repair, lambda means: means, means)

    def unfinished(carry):
        _, _, moved, i = carry
        return moved & (i < max_iter)

    def iterate(carry):
        centroids, assignments, _, i = carry
        centroids = update(centroids, assignments)
        new = assign(centroids)
        return centroids, new, jnp.any((new != assignments) & mask), i + 1

    start = (centroids, assign(centroids), jnp.array(True), jnp.array(0))
    centroids, *_ = lax.while_loop(unfinished, iterate, start)
    # once more from differences: a point far from all others hides theirs in the expanded square
    squared = lax.map(lambda c: _exact(points, c[None, :]), centroids)  # [k, N]
    squared = jnp.where(valid[:, None], squared, jnp.inf)
    assignments = jnp.argmin(squared, axis=0)
    members = jnp.sum(jax.nn.one_hot(assignments, k) * mask[:, None], axis=0)
    inertia = jnp.sum(jnp.where(mask, jnp.min(squared, axis=0), 0.0))
    return centroids, assignments, inertia, valid & (members > 0)
