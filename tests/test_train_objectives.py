"""What a train step minimises: every method, ClusTR+QTRADES by the formula, masked means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from clustr_jax.training import objectives, refit, train
from clustr_jax.training.adversaries import Adversarial
from clustr_jax.training.objectives import METHODS, Batch
from small_training import numpy_mlp, problem

# Objectives


def trained(p, steps):
    """Mean loss of the first and of the last of ten epochs, with a refit after each as in training."""
    tenth, state, found = steps // 10, p.state, []
    for _ in range(10):
        state = p.run(state, tenth)
        found.append(float(state.totals["loss"]) / tenth)
        if p.trainer.magnet:
            state = refit.refit(p.trainer, state, p.train_set, jax.random.key(1))
        state = train.with_totals(p.trainer, state, p.train_set, jax.random.key(0))
    return found[0], found[-1]


@pytest.mark.parametrize(
    "method",
    [
        m if m in ("free_at", "pgd_at") else pytest.param(m, marks=pytest.mark.slow)
        for m in METHODS
        if not m.endswith("_certified")
    ],
)
def test_every_method_lowers_its_loss(method, rng):
    """900 steps of Adam on three classes of two clumps, with a small adversary."""
    # at 0.02 the Magnet loss jumps: its end is with one processor or JAX above the limit, with another below
    rate = 0.005 if METHODS[method].sampler == "magnet" else 0.02
    p = problem(
        method, rng,
        **{"train.lr": rate, "train.optimizer": "adam", "train.schedule": "multistep", "train.milestones": (),
           "train.weight_decay": 0.0, "train.batch_size": 30, "train.attack.eps": 0.02,
           "train.attack.step_size": 0.02, "model.width": 12,
           "train.lam": 1.0},  # the entropy of the clean predictions, lam times, is no part of the progress
    )  # fmt: skip
    first, last = trained(p, 900)
    assert np.isfinite(last) and last < 0.9 * first


def test_clustr_qtrades_by_the_formula(rng):
    """Eq. 5 in float64 and loops: value, and gradient by finite differences.

    Masked entries count nowhere; clusters and adversarial images are constants; both sides of the
    cross entropy are differentiated. Other methods: test_steps.py; other losses: test_objectives.py.
    """
    p = problem("clustr_qtrades", rng)
    classes, samples = np.array([0, 1, 0, 2, 1]), 4
    labels = np.asarray(p.train_set.labels)
    ids = np.stack([rng.choice(np.flatnonzero(labels == c), samples, replace=False) for c in classes])
    mask = np.ones((5, samples), bool)
    mask[2, 3] = mask[4, 2:] = False
    x = np.asarray(p.train_set.images)[ids.reshape(-1)]
    x_adv = np.clip(x + rng.uniform(-0.05, 0.05, x.shape), 0, 1).astype(np.float32)
    batch = Batch(x, labels[ids.reshape(-1)], mask.reshape(-1), classes)
    config, clusters = p.trainer.settings, p.state.clusters

    @jax.jit
    @jax.value_and_grad
    def objective(params):
        variables = {"params": params, "batch_stats": {}}
        adversarial = Adversarial(jnp.asarray(x_adv))
        return METHODS["clustr_qtrades"].objective(
            p.trainer.net, variables, batch, adversarial, clusters, config
        )[0]

    flat, unravel = _ravel(jax.tree.map(np.float64, p.state.params))
    head = functools.partial(
        reference.log_scores, centroids=np.asarray(clusters.centroids), variance=float(clusters.variance)
    )

    def naive(vector):
        _, z = numpy_mlp(unravel(vector), x)
        _, z_adv = numpy_mlp(unravel(vector), x_adv)
        magnet, _ = reference.magnet_loss(
            z.reshape(5, samples, -1), classes, alpha=config.magnet.alpha, mask=mask
        )
        consistency = reference.cross_entropy(head(z_adv), reference.softmax(head(z)))
        return np.mean((magnet.reshape(-1) + config.train.lam * consistency)[mask.reshape(-1)])

    value, gradient = objective(p.state.params)
    np.testing.assert_allclose(value, naive(flat), rtol=1e-4)
    expected = reference.finite_difference(naive, flat)
    found, _ = _ravel(jax.tree.map(np.float64, gradient))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-3


def _ravel(tree):
    """A pytree of NumPy arrays as one vector, and the way back."""
    leaves, structure = jax.tree.flatten(tree)
    flat = np.concatenate([leaf.reshape(-1) for leaf in leaves])
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def unravel(vector):
        parts = np.split(vector, ends)
        return jax.tree.unflatten(structure, [v.reshape(x.shape) for v, x in zip(parts, leaves, strict=True)])

    return flat, unravel


def test_the_adversary_depends_on_the_parameters(rng, key):
    """(That no gradient flows through its making is in test_adversaries.py.)"""
    p = problem("clustr_qtrades", rng, **{"train.attack.eps": 0.1, "train.attack.step_size": 0.05})
    x, y = p.train_set.images[:20], p.train_set.labels[:20]
    batch = Batch(x, y, jnp.ones(20, bool), jnp.zeros(5, int))

    @jax.jit
    def attack(params, clusters):
        variables = {"params": params, "batch_stats": {}}
        return p.trainer.method.adversary(p.trainer.net, variables, batch, clusters, key, p.trainer.settings)[
            0
        ]

    with jax.debug_key_reuse(False):  # the same attack on purpose
        other = jax.tree.map(lambda w: w[::-1], p.state.params)
        x_adv, other_adv = (
            np.asarray(attack(params, p.state.clusters)) for params in (p.state.params, other)
        )
    assert (x_adv != other_adv).any()
    assert 0.04 < np.abs(x_adv - np.asarray(x)).max() <= 0.1 + 1e-6


# Masked means


def test_mean_counts_the_unmasked(rng):
    values, mask = rng.normal(size=10).astype(np.float32), rng.random(10) < 0.5
    np.testing.assert_allclose(objectives.mean(values, mask), values[mask].mean(), rtol=1e-6)
    assert float(objectives.mean(values, np.zeros(10, bool))) == 0.0
