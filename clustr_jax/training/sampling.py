"""Magnet batches, drawn on the device with static shapes (Rippel et al. 2016; paper appendix D).

A batch is one seed cluster, drawn in proportion to its mean loss, the M - 1 nearest clusters of
other classes ("impostors"), and S examples of each cluster without replacement.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clustr_jax.clusters import Clusters
from clustr_jax.runtime import struct


class Sampler(struct.PyTreeNode):
    """Who belongs to which cluster, and what each example's loss was when it was last seen."""

    members: Int[Array, "N"]  # example ids, sorted by cluster
    offsets: Int[Array, "C+1"]  # cluster c owns members[offsets[c]:offsets[c + 1]]
    losses: Float[Array, "N"]
    # Only with the authors' bookkeeping (`init`, stale=True):
    seen: Bool[Array, "N"] | None = None  # whether the example's loss was measured
    means: Float[Array, "C"] | None = None  # of the seen members of each cluster, when it was last in a batch


class MagnetBatch(struct.PyTreeNode):
    """Row 0 is the seed cluster, the others its impostors, nearest first."""

    ids: Int[Array, "M S"]
    classes: Int[Array, "M"]
    mask: Bool[Array, "M S"]
    rows: Int[Array, "M"]


def init(
    losses: Float[Array, "N"] | None,
    assignments: Int[Array, "N"],
    num_clusters: int,
    *,
    initial: float,
    stale: bool = False,
) -> Sampler:
    """A sampler for these assignments [N]. Unseen examples (`losses` None) start at `initial`.

    `initial` should be high (the margin alpha), so that clusters that were never seen are drawn. `stale` does
    as the authors. A cluster's mean is 0 until one of its members was in a batch, and is of the members seen
    so far. It is renewed only when the cluster is in a batch: until then, after a refit, it is that of the
    old members.
    """
    order = jnp.argsort(assignments, stable=True).astype(jnp.int32)
    counts = jnp.bincount(assignments, length=num_clusters)
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts).astype(jnp.int32)])
    if losses is None:
        losses = jnp.full(assignments.shape[0], initial, jnp.float32)
    sampler = Sampler(order, offsets, losses)
    if not stale:
        return sampler
    return sampler.replace(seen=jnp.zeros(assignments.shape[0], bool), means=jnp.zeros(num_clusters))


def refit(sampler: Sampler, assignments: Int[Array, "N"]) -> Sampler:
    """New clusters, the same examples: each keeps its loss, and the authors' means stay as they are."""
    new = init(sampler.losses, assignments, sampler.offsets.shape[0] - 1, initial=0.0)
    return new.replace(seen=sampler.seen, means=sampler.means)


def _owners(sampler: Sampler) -> Int[Array, "N"]:
    """The cluster of each of `members`."""
    counts = jnp.diff(sampler.offsets)
    size = sampler.members.shape[0]
    return jnp.repeat(jnp.arange(counts.shape[0]), counts, total_repeat_length=size)


def seed_probs(sampler: Sampler, *, floor: float = 0.05) -> Float[Array, "C"]:
    """Probability of each cluster to be the seed: its mean loss, mixed with a uniform share `floor`.

    The floor keeps every cluster reachable; with all losses zero the draw is uniform; an empty
    cluster is never drawn.
    """
    counts = jnp.diff(sampler.offsets)
    if sampler.means is None:
        total = jax.ops.segment_sum(sampler.losses[sampler.members], _owners(sampler), counts.shape[0])
        mean = total / jnp.maximum(counts, 1)
    else:
        mean = jnp.where(counts > 0, sampler.means, 0.0)
    uniform = (counts > 0) / jnp.sum(counts > 0)
    all_zero = jnp.sum(mean) <= 0
    proportional = mean / jnp.where(all_zero, 1.0, jnp.sum(mean))
    return jnp.where(all_zero, uniform, (1 - floor) * proportional + floor * uniform)


def draw(
    key: Array, sampler: Sampler, clusters: Clusters, *, num_clusters: int, samples: int, floor: float = 0.05
) -> MagnetBatch:
    """Draw a batch of `num_clusters` (M) clusters x `samples` (S) examples.

    A cluster with fewer than S members gives them all and masks the rest; where there are fewer
    than M - 1 clusters of other classes, the surplus rows are fully masked.
    """
    seed_key, member_key = jax.random.split(key)
    num_classes, k, _ = clusters.centroids.shape
    counts = jnp.diff(sampler.offsets)
    owner = jnp.arange(num_classes * k) // k
    seed = jax.random.categorical(seed_key, jnp.log(seed_probs(sampler, floor=floor)))

    centroids = clusters.centroids.reshape(num_classes * k, -1)
    squared = jnp.sum(jnp.square(centroids - centroids[seed][None, :]), axis=1)
    impostor = (owner != owner[seed]) & (counts > 0)
    closeness = jnp.where(impostor, -squared, -jnp.inf)
    found = min(num_clusters - 1, closeness.shape[0])
    closeness, nearest = jax.lax.top_k(closeness, found)
    surplus = (0, num_clusters - 1 - found)
    closeness = jnp.pad(closeness, surplus, constant_values=-jnp.inf)
    nearest = jnp.pad(nearest, surplus)
    rows = jnp.concatenate([seed[None], nearest]).astype(jnp.int32)
    present = jnp.concatenate([jnp.ones(1, bool), closeness > -jnp.inf])

    size = jnp.where(present, counts[rows], 0)
    position = _choose(member_key, size, samples)
    mask = jnp.arange(samples)[None, :] < size[:, None]
    last = sampler.members.shape[0] - 1
    ids = sampler.members[jnp.clip(sampler.offsets[rows][:, None] + position, 0, last)]
    return MagnetBatch(ids, owner[rows], mask, rows)


def _choose(key, size, samples):
    """S distinct positions in 0..size-1 for each row; where size < S, the positions 0..S-1 (to be masked).

    Floyd's algorithm (Bentley & Floyd 1987): for j = size - S .. size - 1 draw t in 0..j and take t,
    or j where t is taken already. It costs O(S^2), independent of the size of the cluster.
    """
    uniform = jax.random.uniform(key, (samples, size.shape[0]))

    def take(i, chosen):
        top = size - samples + i
        # float32 has 2^24 steps: clusters of up to a million members are drawn without visible bias
        t = jnp.minimum((uniform[i] * (top + 1)).astype(jnp.int32), top)
        taken = jnp.any(chosen == t[:, None], axis=1)
        return chosen.at[:, i].set(jnp.where(taken, top, t))

    chosen = jax.lax.fori_loop(0, samples, take, jnp.full((size.shape[0], samples), -1, jnp.int32))
    return jnp.where((size < samples)[:, None], jnp.arange(samples)[None, :], chosen)


def update(
    sampler: Sampler, ids: Int[Array, "*batch"], losses: Float[Array, "*batch"], mask: Bool[Array, "*batch"]
) -> Sampler:
    """Remember the losses of the examples just seen; masked entries change nothing."""
    index = jnp.where(mask, ids, sampler.losses.shape[0]).reshape(-1)  # out of range = dropped
    sampler = sampler.replace(losses=sampler.losses.at[index].set(losses.reshape(-1), mode="drop"))
    if sampler.means is None or sampler.seen is None:
        return sampler
    num_clusters = sampler.means.shape[0]
    seen = sampler.seen.at[index].set(True, mode="drop")
    owner = _owners(sampler)
    now = jnp.zeros_like(seen).at[index].set(True, mode="drop")[sampler.members]
    in_batch = jax.ops.segment_sum(now.astype(jnp.int32), owner, num_clusters) > 0
    measured = seen[sampler.members]
    total = jax.ops.segment_sum(
        jnp.where(measured, sampler.losses[sampler.members], 0.0), owner, num_clusters
    )
    counts = jax.ops.segment_sum(measured.astype(jnp.int32), owner, num_clusters)
    means = jnp.where(in_batch, total / jnp.maximum(counts, 1), sampler.means)
    return sampler.replace(seen=seen, means=means)
