"""Magnet batches: who may be in a batch, in which order, and with which frequency.

The frequencies are tested by chi-square at p > 1e-4 with fixed keys: a sampler without bias
fails one key in 10 000, and a biased one (see the cell counts) is off by far more.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from clustr_jax.clusters import Clusters
from clustr_jax.training import sampling

CLASSES, K = 4, 3
SIZES = [7, 3, 5, 0, 9, 4, 6, 6, 1, 5, 0, 8]  # members of the 12 clusters; two are empty
NUM_CLUSTERS, SAMPLES = 4, 4

init = jax.jit(sampling.init, static_argnums=2)
seed_probs = jax.jit(sampling.seed_probs)
draw = jax.jit(sampling.draw, static_argnames=("num_clusters", "samples"))
draw_many = jax.jit(
    lambda keys, *args: jax.vmap(
        lambda key: sampling.draw(key, *args, num_clusters=NUM_CLUSTERS, samples=SAMPLES)
    )(keys)
)


def example(sizes=SIZES, classes=CLASSES, losses=None, seed=0):
    """A sampler with the given cluster sizes (examples shuffled), its assignments, and random centroids."""
    rng = np.random.default_rng(seed)
    assignments = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
    centroids = rng.normal(size=(classes, len(sizes) // classes, 2)).astype(np.float32)
    head = Clusters(jnp.asarray(centroids), jnp.float32(1.0))
    losses = None if losses is None else jnp.asarray(losses, jnp.float32)
    sampler = init(losses, assignments, len(sizes), initial=12.5)
    return sampler, assignments, head


def chi_square_p(counts, probs):
    """p-value of the observed counts under these probabilities; zero-probability cells must be empty."""
    counts, probs = np.asarray(counts), np.asarray(probs, np.float64)
    assert (counts[probs == 0] == 0).all()
    expected = probs[probs > 0] / probs.sum() * counts.sum()
    assert expected.min() >= 5  # the usual condition for the test to be valid
    return scipy.stats.chisquare(counts[probs > 0], expected).pvalue


def test_init_sorts_the_examples_by_cluster():
    """members[offsets[c]:offsets[c + 1]] are exactly the examples of cluster c, empty ones included."""
    sampler, assignments, _ = example()
    assert sampler.members.dtype == jnp.int32 and sampler.offsets.dtype == jnp.int32
    np.testing.assert_array_equal(np.diff(sampler.offsets), SIZES)
    for c in range(len(SIZES)):
        members = np.sort(sampler.members[sampler.offsets[c] : sampler.offsets[c + 1]])
        np.testing.assert_array_equal(members, np.flatnonzero(assignments == c))


def test_unseen_examples_start_at_the_initial_loss():
    """Optimistic start: without it clusters that were never seen would never be seeds."""
    np.testing.assert_array_equal(example()[0].losses, 12.5)
    given_losses = np.arange(54, dtype=np.float32)
    np.testing.assert_array_equal(example(losses=given_losses)[0].losses, given_losses)


def test_seed_probs_are_the_mean_losses_with_a_floor():
    """(1 - floor) * mean loss / sum + floor / non-empty; empty clusters 0; sums to one."""
    losses = np.random.default_rng(1).exponential(size=54)
    sampler, assignments, _ = example(losses=losses)
    mean = np.array([losses[assignments == c].mean() if n else 0 for c, n in enumerate(SIZES)])
    uniform = (np.array(SIZES) > 0) / 10
    for floor in (0.0, 0.05, 0.5, 1.0):
        expected = (1 - floor) * mean / mean.sum() + floor * uniform
        probs = seed_probs(sampler, floor=floor)
        np.testing.assert_allclose(probs, expected, atol=1e-6)
        np.testing.assert_allclose(probs.sum(), 1, atol=1e-6)
    np.testing.assert_array_equal(seed_probs(sampler), seed_probs(sampler, floor=0.05))


def test_seed_probs_are_uniform_when_all_losses_are_zero():
    """The authors' sampler divides by zero here (fidelity 1.1 no. 11)."""
    sampler, _, head = example(losses=np.zeros(54))
    expected = (np.array(SIZES) > 0) / 10
    for floor in (0.0, 0.05):
        np.testing.assert_allclose(seed_probs(sampler, floor=floor), expected, atol=1e-6)
    assert draw(jax.random.key(0), sampler, head, num_clusters=3, samples=4).mask[0].any()


def check_batch(batch, assignments, head, num_clusters, samples, sizes=SIZES):
    """Every promise about the content of one batch."""
    k = head.centroids.shape[1]
    ids, classes, mask, rows = (np.asarray(a) for a in (batch.ids, batch.classes, batch.mask, batch.rows))
    assert ids.shape == mask.shape == (num_clusters, samples)
    assert classes.shape == rows.shape == (num_clusters,)
    assert ids.dtype == classes.dtype == rows.dtype == np.int32 and mask.dtype == bool
    assert ((0 <= ids) & (ids < len(assignments))).all()  # masked ones too: they index the data set
    flat = np.asarray(head.centroids).reshape(-1, head.centroids.shape[-1])
    owner = np.arange(len(flat)) // k
    seed = rows[0]
    distance = ((flat - flat[seed]) ** 2).sum(axis=1)
    others = [c for c in np.argsort(distance) if owner[c] != owner[seed] and sizes[c]]
    present = 1 + min(num_clusters - 1, len(others))
    np.testing.assert_array_equal(rows[1:present], others[: present - 1])  # nearest first
    assert not mask[present:].any()
    for row in range(present):
        members = ids[row][mask[row]]
        assert classes[row] == owner[rows[row]]
        assert len(members) == min(samples, sizes[rows[row]])
        assert len(set(members.tolist())) == len(members)
        assert (assignments[members] == rows[row]).all()


@given(seed=st.integers(0, 10_000), zero=st.booleans())
def test_every_batch_is_well_formed(seed, zero):
    """Distinct true members, impostors of other classes sorted by distance, small clusters whole."""
    losses = np.random.default_rng(seed).exponential(size=54) * (not zero)
    sampler, assignments, head = example(losses=losses, seed=seed)
    batch = draw(jax.random.key(seed), sampler, head, num_clusters=NUM_CLUSTERS, samples=SAMPLES)
    check_batch(batch, assignments, head, NUM_CLUSTERS, SAMPLES)


@pytest.mark.parametrize("num_clusters", [2, 5, 9])
def test_missing_impostors_leave_masked_rows(num_clusters):
    """Two classes x 2 clusters, one of them empty: at most two impostors, also where M > all clusters."""
    sizes = [3, 4, 0, 5]
    sampler, assignments, head = example(sizes, classes=2)
    for seed in range(5):
        batch = draw(jax.random.key(seed), sampler, head, num_clusters=num_clusters, samples=3)
        check_batch(batch, assignments, head, num_clusters, 3, sizes)


def test_a_single_class_has_no_impostors():
    """Row 0 is drawn, everything else is masked."""
    sampler, assignments, head = example([3, 4, 5], classes=1)
    batch = draw(jax.random.key(0), sampler, head, num_clusters=3, samples=4)
    check_batch(batch, assignments, head, 3, 4, [3, 4, 5])
    assert batch.mask[0].any() and not batch.mask[1:].any()


def test_seed_clusters_are_drawn_with_their_probability():
    """20 000 draws; empty clusters never; chi-square over the 10 others (expected counts 140 and up)."""
    losses = np.random.default_rng(1).exponential(size=54)
    sampler, _, head = example(losses=losses)
    batch = draw_many(jax.random.split(jax.random.key(1), 20_000), sampler, head)
    counts = np.bincount(batch.rows[:, 0], minlength=len(SIZES))
    assert chi_square_p(counts, seed_probs(sampler)) > 1e-4


def test_members_are_drawn_uniformly():
    """All 4-subsets of a 7-member cluster are equally likely (35 cells), as seed and as impostor.

    Subsets, not members: a sampler that walks a shuffled ring would pass a test of single members.
    """
    sampler, assignments, head = example()
    batch = draw_many(jax.random.split(jax.random.key(2), 20_000), sampler, head)
    rows, ids = np.asarray(batch.rows), np.sort(batch.ids, axis=-1)
    for drawn in (ids[:, 0][rows[:, 0] == 0], ids[:, 1:][rows[:, 1:] == 0]):
        subsets, counts = np.unique(drawn, axis=0, return_counts=True)
        assert len(subsets) == 35
        assert chi_square_p(counts, np.ones(35)) > 1e-4


def test_rows_are_drawn_independently():
    """The position of the draw in one row says nothing about another row (same random bits would)."""
    sampler, _, head = example([6] * 12)
    batch = draw_many(jax.random.split(jax.random.key(3), 4_000), sampler, head)
    rank = np.argsort(sampler.members) % 6  # position of an example in its cluster
    first = rank[np.asarray(batch.ids)].min(axis=-1)  # 0, 1 or 2 for 4 of 6 members
    table = np.zeros((3, 3))
    np.add.at(table, (first[:, 0], first[:, 1]), 1)
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-4


def test_same_key_same_batch():
    """And another key gives another batch."""
    sampler, _, head = example()
    run = functools.partial(draw, num_clusters=NUM_CLUSTERS, samples=SAMPLES)
    first, again = (run(jax.random.key(7), sampler, head) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    other = run(jax.random.key(8), sampler, head)
    assert not np.array_equal(first.ids, other.ids)


def test_update_changes_exactly_the_unmasked_examples():
    """Masked entries may repeat an id that was seen: they must not overwrite it."""
    sampler, _, _ = example(losses=np.arange(54))
    ids = jnp.array([[3, 5, 9], [20, 3, 5]])
    mask = jnp.array([[True, True, True], [True, False, False]])
    seen = jax.jit(sampling.update)(sampler, ids, jnp.full((2, 3), -1.0).at[0, 1].set(-2.0), mask)
    expected = np.arange(54, dtype=np.float32)
    expected[[3, 9, 20]], expected[5] = -1, -2
    np.testing.assert_array_equal(seen.losses, expected)
    np.testing.assert_array_equal(seen.members, sampler.members)


def test_refit_keeps_the_loss_of_every_example():
    """New assignments: losses stay with their examples, so cluster means are those of the new members."""
    losses = np.random.default_rng(1).exponential(size=54)
    sampler, _, _ = example(losses=losses)
    assignments = np.random.default_rng(2).integers(0, 11, size=54)
    refitted = jax.jit(sampling.refit)(sampler, jnp.asarray(assignments))
    np.testing.assert_array_equal(refitted.losses, sampler.losses)
    mean = np.array([losses[assignments == c].mean() for c in range(11)] + [0])
    np.testing.assert_allclose(seed_probs(refitted, floor=0.0), mean / mean.sum(), atol=1e-6)


class Bookkeeping:
    """The authors' (fidelity 1.1 no. 11), written slowly: dictionaries by example and by cluster."""

    def __init__(self, assignments, num_clusters):
        self.assignments, self.losses = assignments, {}
        self.means = dict.fromkeys(range(num_clusters), 0.0)

    def see(self, ids, losses):
        """Of each cluster in the batch, the mean over those of its members that were ever seen."""
        self.losses |= zip(ids, losses, strict=True)
        for cluster in {self.assignments[i] for i in ids}:
            members = [self.losses[i] for i in self.losses if self.assignments[i] == cluster]
            self.means[cluster] = sum(members) / len(members)

    def probs(self):
        """Of clusters without members nothing; uniform where theirs is 0 / 0."""
        found = np.array([v if c in self.assignments else 0.0 for c, v in self.means.items()])
        inside = np.isin(np.arange(len(found)), self.assignments)
        return found / found.sum() if found.sum() else inside / inside.sum()


def test_the_authors_bookkeeping():
    """Batches with masked entries and other clusters in between: the seeds' probabilities after each."""
    rng = np.random.default_rng(0)
    assignments = rng.integers(0, 11, size=54)
    slow = Bookkeeping(assignments, 12)  # the last cluster is empty
    sampler = sampling.init(None, jnp.asarray(assignments), 12, initial=12.5, stale=True)
    update, refit = jax.jit(sampling.update), jax.jit(sampling.refit)
    stale = 0
    for step in range(12):
        np.testing.assert_allclose(seed_probs(sampler, floor=0.0), slow.probs(), atol=1e-6)
        if step % 4 == 3:
            slow.assignments = rng.integers(0, 12, size=54)
            sampler = refit(sampler, jnp.asarray(slow.assignments))
            now = [
                np.mean([slow.losses.get(i, 0.0) for i in np.flatnonzero(slow.assignments == c)])
                for c in range(12)
            ]
            stale += np.abs(now / np.sum(now) - slow.probs()).max() > 0.01
            continue
        ids, losses = rng.choice(54, size=(2, 3), replace=False), rng.exponential(size=(2, 3))
        mask = rng.random((2, 3)) < 0.7
        mask[0, 0] = True
        slow.see(ids[mask], np.float32(losses[mask]))
        sampler = update(sampler, jnp.asarray(ids), jnp.asarray(losses, jnp.float32), jnp.asarray(mask))
    assert stale == 3  # each refit left means that are not those of the losses of the new members
