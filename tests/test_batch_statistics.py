"""Which passes update the running statistics of batch norm, in objectives, attacks and after epochs."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference_objectives as naive
from clustr_jax import data, stages
from clustr_jax.clusters import Clusters
from clustr_jax.stages import training
from clustr_jax.training import objectives, refit, train
from clustr_jax.training.objectives import METHODS, Batch
from linear_problems import (
    FLOAT32,
    Linear,
    attack,
    get_config,
    noise,
    problem,
    steps_of,
    uniform,
)


@pytest.mark.parametrize(
    "method", [m for m in METHODS if not m.endswith("_certified")]
)  # 1-Lipschitz networks have none
def test_which_passes_update_the_running_statistics(method, rng):
    """One update for each forward pass of the objective, in order: clean, then adversarial."""
    net = Linear((3,), 2, normed=True)
    variables = net.variables(rng)
    x = rng.normal(size=(2, 6, 3)).astype(np.float32)
    clusters = Clusters(jnp.asarray(rng.normal(size=(2, 1, 3)), jnp.float32), jnp.float32(1.0))
    batch = Batch(jnp.asarray(x[0]), jnp.arange(6) // 3, jnp.ones(6, bool), jnp.arange(2))
    given = METHODS[method].adversary is not None or method == "free_at"
    objective = jax.jit(functools.partial(METHODS[method].objective, net, config=get_config(method)))
    _, aux = objective(variables, batch, jnp.asarray(x[1]) if given else None, clusters)
    both = METHODS[method].objective is not objectives.nominal
    seen = (x if both else x[1:]) if given else x[:1]
    mean, variance = naive.running(variables["batch_stats"].values(), seen)
    np.testing.assert_allclose(aux.batch_stats["mean"], mean, rtol=FLOAT32, atol=1e-6)
    np.testing.assert_allclose(aux.batch_stats["var"], variance, rtol=FLOAT32)


@pytest.mark.parametrize("method", ["fast_at", "clustr_qtrades"])
def test_attack_statistics_update(method, rng, key):
    """The authors' switch: one more update, by a pass over the random start of the attack."""
    net = Linear((3,), 2, normed=True)
    variables, x = net.variables(rng), rng.normal(size=(6, 3))
    clusters = Clusters(jnp.asarray(rng.normal(size=(2, 1, 3)), jnp.float32), jnp.float32(1.0))
    changes = {**steps_of(1, 0.03, eps=0.5, start="uniform"), "fidelity.attack_statistics": "update"}
    _, stats = attack(method, net, variables, x, key, clusters=clusters, **changes)
    start = x + 0.5 * noise(key, 6, (3,), uniform)
    mean, variance = naive.running(variables["batch_stats"].values(), [start])
    np.testing.assert_allclose(stats["mean"], mean, rtol=FLOAT32, atol=1e-6)
    np.testing.assert_allclose(stats["var"], variance, rtol=FLOAT32)


@pytest.mark.parametrize(("size", "batch"), [(50, 1), (801, 3)])
def test_a_pass_in_train_mode(size, batch, rng):
    """epoch_statistics=leak_test: 400 updates, or as many as batches of one size allow, the rest a batch."""
    net = Linear((4, 4, 2), 2, normed=True)
    variables, pixels = net.variables(rng), rng.normal(size=(size, 4, 4, 2)).astype(np.float32)
    stats = refit.pass_in_train_mode(net, variables, pixels)
    batches = [pixels[i : i + batch] for i in range(0, size, batch)]
    mean, variance = naive.running(variables["batch_stats"].values(), batches)
    np.testing.assert_allclose(stats["mean"], mean, rtol=FLOAT32, atol=1e-6)
    np.testing.assert_allclose(stats["var"], variance, rtol=FLOAT32)


def trained(method, rng, **changes):
    """([(state, its score) of each save], the problem, its test images) of a stage without files."""
    net = Linear((3,), 3, normed=True)
    p = problem(method, rng, net=net, **changes)
    images, labels = np.asarray(p.train_set.images), np.asarray(p.train_set.labels)
    test = rng.normal(size=(60, 3)).astype(np.float32)
    train_split = data.Split(images, labels, 3, 1.0, None, "")
    test_split = data.Split(test, np.zeros(60, np.int32), 3, 1.0, None, "")
    silent = types.SimpleNamespace(status=lambda text: None, line=lambda text: None)
    workdir = types.SimpleNamespace(records=list, log=lambda record: None)
    saved = []
    checkpoints = types.SimpleNamespace(directory="", save=lambda *what: saved.append(what))
    run = stages.Run(p.trainer.config, workdir, silent, net, train_split, train_split, test_split)
    state = train.with_totals(p.trainer, p.state, p.train_set, jax.random.key(7))
    training._epochs(run, stages.TRAIN, p.trainer, checkpoints, state, p.train_set, jax.random.key(5))
    return saved, p, test


def statistics_after_an_epoch(method, rng, switch):
    """(what is saved, what was there before, the batches of a uniform epoch, training and test images)."""
    changes = {"fidelity.epoch_statistics": switch, "train.epochs": 1}
    saved, p, test = trained(method, rng, **changes)
    images, order = np.asarray(p.train_set.images), train.epoch_order(jax.random.key(5), 40, 0)
    batches = images[np.asarray(order).reshape(4, 10)]
    return saved[-1][0].batch_stats, p.state.batch_stats, batches, images, test


def test_no_model_is_the_best_while_the_radius_grows(rng):
    """select=best goes by clean accuracy, which is highest where the adversary can do least."""
    changes = {"train.epochs": 4, "train.eps_ramp": 2.5, "train.monitor": False}
    saved, *_ = trained("pgd_at", rng, **changes)
    assert [accuracy is None for _, accuracy in saved] == [True, True, False, False]


def assert_statistics(found, before, batches):
    mean, variance = naive.running(before.values(), batches)
    np.testing.assert_allclose(found["mean"], mean, rtol=FLOAT32, atol=1e-6)
    np.testing.assert_allclose(found["var"], variance, rtol=FLOAT32)


@pytest.mark.parametrize("switch", ["keep", "leak_test"])
def test_statistics_after_an_epoch(switch, rng):
    """Those of its batches, in order. (The authors' passes are of trainings with the Magnet loss alone.)"""
    found, before, batches, *_ = statistics_after_an_epoch("nominal", rng, switch)
    assert_statistics(found, before, batches)


def test_the_authors_passes_after_an_epoch():
    """leak_test: the statistics have seen all training, then all test images, of these few one by one."""
    kept, *_ = statistics_after_an_epoch("clustr", np.random.default_rng(0), "keep")
    found, _, _, images, test = statistics_after_an_epoch("clustr", np.random.default_rng(0), "leak_test")
    assert_statistics(found, kept, [x[None] for x in (*images, *test)])
