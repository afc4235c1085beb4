"""Magnet batches and clusters: the refit, the head's variance, the losses the sampler remembers."""

import numpy as np
import pytest

import reference
from clustr_jax.training import refit
from runs import assert_same_arrays
from small_training import ids_of, numpy_mlp, problem, spy, squares


def test_numpy_mlp_is_the_mlp(rng):
    p = problem("nominal", rng)
    outputs = p.trainer.net.eval(p.state.variables, p.train_set.images)
    logits, embeddings = numpy_mlp(p.state.params, p.train_set.images)
    np.testing.assert_allclose(outputs.logits, logits, atol=1e-5)
    np.testing.assert_allclose(outputs.embeddings, embeddings, atol=1e-5)


def test_embeddings_of_the_whole_set_in_pieces(rng):
    """1,100 examples are not a multiple of the piece; each has its own embedding, in order."""
    p = problem("nominal", rng, split=squares(rng, n=1100, classes=2))
    z = refit.embed_all(p.trainer.net, p.state.variables, p.train_set)
    np.testing.assert_allclose(z, numpy_mlp(p.state.params, p.train_set.images)[1], atol=1e-5)


def test_sharpness_divides_the_variance_of_the_head(rng):
    """In what trains and in what is deployed; the centroids are the same."""
    changes = {"magnet.sharpness": 4.0, "train.ema": 0.9}
    seed = int(rng.integers(2**31))
    sharp, plain = (
        problem("clustr", np.random.default_rng(seed), **c) for c in (changes, {"train.ema": 0.9})
    )
    for name in ("clusters", "average_clusters"):
        a, b = getattr(sharp.state, name), getattr(plain.state, name)
        np.testing.assert_array_equal(a.centroids, b.centroids)
        np.testing.assert_allclose(a.variance, b.variance / 4, rtol=1e-6)


@pytest.mark.parametrize("k", [(2, 2, 2), (1, 3, 2)], ids=str)
def test_refit_clusters_are_consistent(k, rng, key):
    """Each example belongs to the nearest centroid of its own class; sigma^2 is that of these distances."""
    p = problem("clustr", rng, **{"magnet.k_per_class": k})
    clusters, sampler, labels = p.state.clusters, p.state.sampler, np.asarray(p.train_set.labels)
    np.testing.assert_array_equal(np.asarray(clusters.mask).sum(axis=1), k)
    members, offsets = np.asarray(sampler.members), np.asarray(sampler.offsets)
    np.testing.assert_array_equal(np.sort(members), np.arange(90))
    _, z = numpy_mlp(p.state.params, p.train_set.images)
    assert len(offsets) == 3 * max(k) + 1
    for c in range(3 * max(k)):
        for i in members[offsets[c] : offsets[c + 1]]:
            own = np.asarray(clusters.centroids)[labels[i]][: k[labels[i]]]
            distances = np.sum((z[i] - own) ** 2, axis=1)
            assert c // max(k) == labels[i]
            assert distances[c % max(k)] <= distances.min() * (1 + 1e-4) + 1e-9
    expected = reference.variance(z, labels, clusters.centroids, mask=clusters.mask)
    np.testing.assert_allclose(clusters.variance, expected, rtol=1e-4)
    np.testing.assert_array_equal(sampler.losses, np.full(90, p.trainer.settings.magnet.alpha, np.float32))


def test_refit_keeps_the_losses_and_follows_the_network(rng, key):
    """After some steps: new centroids from the new embeddings, every example's last seen loss kept."""
    p = problem("clustr", rng, **{"train.lr": 0.05})
    state = p.run(p.state, 4)
    again = refit.refit(p.trainer, state, p.train_set, key)
    np.testing.assert_array_equal(again.sampler.losses, state.sampler.losses)
    assert (np.asarray(again.clusters.centroids) != np.asarray(state.clusters.centroids)).any()
    _, z = numpy_mlp(state.params, p.train_set.images)
    expected = reference.variance(z, np.asarray(p.train_set.labels), again.clusters.centroids)
    np.testing.assert_allclose(again.clusters.variance, expected, rtol=1e-4)
    assert_same_arrays(again.params, state.params)
    assert int(again.step) == 4


@pytest.mark.more
@pytest.mark.parametrize("method", ["clustr", "clustr_qtrades"])
def test_losses_of_a_magnet_batch_land_in_the_sampler(method, rng):
    """Exactly the drawn examples get the Magnet loss they have in this batch, at the old parameters."""
    # clusters of about 15: some rows are masked
    p, step = spy(problem(method, rng, **{"magnet.samples": 20}))
    after, metrics = step(p.state)
    batch = metrics["batch"]
    mask, ids = np.asarray(batch.mask), ids_of(p, batch.x)
    assert 0 < (~mask).sum() and len(set(ids[mask])) == mask.sum()
    rows = len(batch.classes)
    _, z = numpy_mlp(p.state.params, batch.x)
    expected, _ = reference.magnet_loss(
        z.reshape(rows, -1, z.shape[-1]),
        np.asarray(batch.classes),
        alpha=p.trainer.settings.magnet.alpha,
        mask=mask.reshape(rows, -1),
    )
    losses = np.asarray(p.state.sampler.losses).copy()
    losses[ids[mask]] = expected.reshape(-1)[mask]
    np.testing.assert_allclose(after.sampler.losses, losses, rtol=1e-4, atol=1e-4)
    assert (losses != p.trainer.settings.magnet.alpha).any()
    # each row is one cluster, of the class it says
    labels = np.asarray(p.train_set.labels)
    np.testing.assert_array_equal(labels[ids].reshape(rows, -1)[:, 0], batch.classes)
    owner = np.empty(90, int)
    owner[np.asarray(p.state.sampler.members)] = np.repeat(np.arange(6), np.diff(p.state.sampler.offsets))
    for row, valid in zip(owner[ids].reshape(rows, -1), mask.reshape(rows, -1), strict=True):
        assert len(set(row[valid])) <= 1
