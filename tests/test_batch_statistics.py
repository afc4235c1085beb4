"""Which passes update the running statistics of batch norm, in objectives, attacks and after epochs."""

import dataclasses
import functools
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference_objectives as naive
from clustr_jax import data, models, stages
from clustr_jax.clusters import Clusters
from clustr_jax.models import batch_norm
from clustr_jax.runtime import streams
from clustr_jax.settings import Settings, TrainingSettings
from clustr_jax.stages import training
from clustr_jax.storage import loading
from clustr_jax.training import objectives, refit, train
from clustr_jax.training.adversaries import Adversarial
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
    objective = jax.jit(
        functools.partial(METHODS[method].objective, net, settings=TrainingSettings.of(get_config(method)))
    )
    _, aux = objective(variables, batch, Adversarial(jnp.asarray(x[1]) if given else None), clusters)
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


@pytest.mark.more
@pytest.mark.parametrize("bn", ["batch", "eval"])
@pytest.mark.parametrize("method", ["qtrades", "trades", "clustr_qtrades"])
def test_the_authors_order_is_clean_attack_adversarial(method, bn, rng):
    """attack_statistics=update in a train step: 0.9 old + 0.1 batch, three times in that order."""
    net = Linear((3,), 3, normed=True)
    changes = {**steps_of(1, 0.03, eps=0.5, start="uniform", bn=bn), "fidelity.attack_statistics": "update"}
    p = problem(method, rng, net=net, **changes)

    @jax.jit
    def parts(state, key):
        batch, _, adversarial, _ = train.prepare(p.trainer, state, p.train_set, p.order, key)
        made = adversarial.make
        *shared, attack_key, settings, strength = made.args
        none = dataclasses.replace(settings.train.attack, steps=0)
        none = dataclasses.replace(settings, train=dataclasses.replace(settings.train, attack=none))
        start = made.func(*shared, jax.random.clone(attack_key), none, strength)[0]
        return batch.x, start, made()[0]

    found = [np.asarray(a) for a in parts(p.state, jax.random.clone(p.key))]
    after = p.run(1).batch_stats
    mean, variance = naive.running(p.state.batch_stats.values(), found)
    np.testing.assert_allclose(after["mean"], mean, rtol=FLOAT32, atol=1e-6)
    np.testing.assert_allclose(after["var"], variance, rtol=FLOAT32)
    other, _ = naive.running(p.state.batch_stats.values(), [found[i] for i in (1, 0, 2)])
    assert np.abs(other - mean).max() > 1e-4  # the order is seen


@pytest.mark.more
@pytest.mark.parametrize("where", ["alone", "cnn", "resnet8"])
def test_the_unbiased_running_variance(where, rng):
    """fidelity.running_variance: sum / (n - 1) is averaged, n pixels in the batch; nothing else changes."""
    if where == "alone":
        x = rng.normal(size=(5, 4, 3, 2)).astype(np.float32) + 3
        layer = batch_norm.BatchNorm(use_running_average=False, momentum=0.9)
        old = {"mean": np.array([1.0, 2.0], np.float32), "var": np.array([0.5, 4.0], np.float32)}
        variables = {"params": {"scale": np.ones(2), "bias": np.zeros(2)}, "batch_stats": old}
        outputs, new = layer.apply(variables, x, mutable=["batch_stats"])
        mean, variance = naive.running(old.values(), [x], ddof=1)
        np.testing.assert_allclose(new["batch_stats"]["mean"], mean, rtol=FLOAT32)
        np.testing.assert_allclose(new["batch_stats"]["var"], variance, rtol=FLOAT32)
        usual = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
        np.testing.assert_allclose(outputs, usual, atol=1e-4)
        return
    settings = dict(num_classes=4, input_shape=(8, 8, 1), mean=(0.3,), std=(0.4,), width=4)
    ours, theirs = (models.build(where, **settings, running_variance=v) for v in ("biased", "unbiased"))
    variables = ours.init(jax.random.key(0))
    assert jax.tree.structure(variables) == jax.tree.structure(theirs.init(jax.random.key(0)))
    x = jnp.asarray(rng.uniform(size=(6, 8, 8, 1)), jnp.float32)
    (out, biased), (same, unbiased) = ours.train(variables, x), theirs.train(variables, x)
    np.testing.assert_array_equal(out.logits, same.logits)
    for (path, b), (_, u) in zip(
        *(jax.tree_util.tree_leaves_with_path(s) for s in (biased, unbiased)), strict=True
    ):
        name = jax.tree_util.keystr(path)
        if "mean" in name:
            np.testing.assert_array_equal(b, u)
            continue
        factor = (np.float64(u) - 0.9) / (np.float64(b) - 0.9)  # the old ones are 1
        factor = factor[np.float64(b) - 0.9 > 1e-3]  # where a digit is left
        counts = 6 * np.array([64, 16, 4, 1])
        assert np.abs(factor[:, None] - counts / (counts - 1)).min(axis=1).max() < 1e-3, name
    np.testing.assert_array_equal(ours.eval(variables, x).logits, theirs.eval(variables, x).logits)


def test_the_config_builds_the_network_of_its_preset():
    split = data.Split(np.zeros((10, 8, 8, 1), np.uint8), np.zeros(10, np.int32), 10, 255.0, (0, 1), "")
    for preset, unbiased in (("paper_code", True), ("", False)):
        found = Settings.of(get_config("clustr", "digits", **{"fidelity.preset": preset}))
        net = loading.build_net(found.model, split, found.training.switches.running_variance)
        assert net.module.unbiased == unbiased


@pytest.mark.parametrize(("size", "batch"), [(50, 1), (50, 25), (20, 25), (801, 3)])
def test_a_pass_in_train_mode(size, batch, rng):
    """epoch_statistics=leak_test: an update for each batch, the rest a batch of its own."""
    net = Linear((4, 4, 2), 2, normed=True)
    variables, pixels = net.variables(rng), rng.normal(size=(size, 4, 4, 2)).astype(np.float32)
    stats = refit.pass_in_train_mode(net, variables, pixels, batch)
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
    workdir = types.SimpleNamespace(
        records=list, log=lambda record: None, stage=lambda name: pathlib.Path("no such folder")
    )
    saved = []
    checkpoints = types.SimpleNamespace(directory="", save=lambda *what: saved.append(what))
    settings = types.SimpleNamespace(training=p.trainer.settings, data=types.SimpleNamespace(name="digits"))
    run = stages.Run(None, settings, workdir, silent, net, train_split, train_split, test_split)
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


def test_clean_statistics_come_before_the_clusters(rng):
    """epoch_statistics=clean: the statistics have seen the training images, and the clusters are theirs."""
    kept, *_ = statistics_after_an_epoch("clustr", np.random.default_rng(0), "keep")
    changes = {"fidelity.epoch_statistics": "clean", "train.epochs": 1}
    saved, p, _ = trained("clustr", np.random.default_rng(0), **changes)
    state, images = saved[-1][0], np.asarray(p.train_set.images)
    assert_statistics(state.batch_stats, kept, [images])  # fewer than a batch of the authors'
    again = refit.refit(p.trainer, state.replace(sampler=None), p.train_set, jax.random.key(5))
    np.testing.assert_array_equal(again.clusters.centroids, state.clusters.centroids)
    left = state.replace(batch_stats=kept, sampler=None)
    of_kept = refit.refit(p.trainer, left, p.train_set, jax.random.key(5))
    assert not np.allclose(of_kept.clusters.centroids, state.clusters.centroids)


def test_clean_statistics_are_of_whole_batches_in_an_order_of_their_own(rng):
    net = Linear((3,), 3, normed=True)
    p = problem("clustr", rng, net=net)
    images = np.asarray(p.train_set.images)
    some = p.train_set.replace(authors_batch=16)  # of 40: two batches, the rest is left out
    found = refit.with_clean_statistics(p.trainer, p.state, some, jax.random.key(5))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), streams.Training.STATISTICS), p.state.step)
    order = np.asarray(jax.random.permutation(key, 40))
    assert (order != np.arange(40)).any()
    assert_statistics(found.batch_stats, p.state.batch_stats, [images[order[:16]], images[order[16:32]]])


def test_clean_statistics_reach_the_average_of_weights(rng):
    """From statistics of its own; the averaged weights stay as they are."""
    p = problem("clustr", rng, net=Linear((3,), 3, normed=True))
    before = jax.tree.map(lambda leaf: leaf + 1.0, p.state.batch_stats)
    params = jax.tree.map(lambda leaf: leaf + 0.5, p.state.params)
    state = p.state.replace(average={"params": params, "batch_stats": before})
    found = refit.with_clean_statistics(p.trainer, state, p.train_set, jax.random.key(5))
    images = [np.asarray(p.train_set.images)]
    assert_statistics(found.batch_stats, p.state.batch_stats, images)
    assert_statistics(found.average["batch_stats"], before, images)
    jax.tree.map(np.testing.assert_array_equal, found.average["params"], params)


@pytest.mark.parametrize("sharded", [False, True])
def test_of_a_large_set_the_last_batches_are_passed_wherever_it_lies(rng, monkeypatch, sharded):
    p = problem("clustr", rng, net=Linear((3,), 3, normed=True))
    monkeypatch.setattr(refit, "_BATCHES", 1)
    some = p.train_set.replace(authors_batch=16, sharded=sharded)  # of 40: the second batch of two
    found = refit.with_clean_statistics(p.trainer, p.state, some, jax.random.key(5))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), streams.Training.STATISTICS), p.state.step)
    order = np.asarray(jax.random.permutation(key, 40))
    images = np.asarray(p.train_set.images)
    assert_statistics(found.batch_stats, p.state.batch_stats, [images[order[16:32]]])


def assert_statistics(found, before, batches):
    mean, variance = naive.running(before.values(), batches)
    np.testing.assert_allclose(found["mean"], mean, rtol=FLOAT32, atol=1e-6)
    np.testing.assert_allclose(found["var"], variance, rtol=FLOAT32)


@pytest.mark.parametrize("switch", ["keep", "leak_test"])
def test_statistics_after_an_epoch(switch, rng):
    """Those of its batches, in order. (The authors' passes are of trainings with the Magnet loss alone.)"""
    found, before, batches, *_ = statistics_after_an_epoch("nominal", rng, switch)
    assert_statistics(found, before, batches)


@pytest.mark.more
def test_the_authors_passes_after_an_epoch():
    """leak_test: the statistics have seen 40 training images at once, then 60 test images, 25 at a time."""
    kept, *_ = statistics_after_an_epoch("clustr", np.random.default_rng(0), "keep")
    found, _, _, images, test = statistics_after_an_epoch("clustr", np.random.default_rng(0), "leak_test")
    assert_statistics(found, kept, [images, test[:25], test[25:50], test[50:]])
