"""experiments/norm_statistics.py: whose statistics each row's network has, by the loops of `naive`."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference_objectives as naive
from clustr_jax import data
from clustr_jax.classifier import Classifier
from clustr_jax.clusters import Clusters
from experiment_modules import imported
from linear_problems import FLOAT32, Linear


@pytest.fixture(scope="module")
def module():
    with imported("child", "levers", "lever_tables", "result_tables", "norm_statistics") as modules:
        yield modules["norm_statistics"]


def problem(rng, module, monkeypatch):
    """(classifier, training split, the batches that are looked at)."""
    monkeypatch.setattr(module, "BATCH", 8)
    monkeypatch.setattr(module, "BATCHES", 3)
    net = Linear((4, 4, 3), 2, normed=True)
    head = Clusters(jnp.asarray(rng.normal(size=(2, 2, 48)), jnp.float32), jnp.float32(20.0))
    clf = Classifier(net.variables(rng), head, net)
    images = rng.integers(0, 256, (40, 4, 4, 3)).astype(np.uint8)
    split = data.Split(images, rng.integers(0, 2, 40).astype(np.int32), 2, 255.0, None, "")
    order = np.random.default_rng(3).permutation(40)[:24].reshape(3, 8)
    return clf, split, [images[np.sort(ids)] / 255 for ids in order]


def assert_of(found, before, batches):
    mean, variance = naive.running(before.values(), batches)
    np.testing.assert_allclose(found["mean"], mean, rtol=FLOAT32, atol=1e-6)
    np.testing.assert_allclose(found["var"], variance, rtol=FLOAT32)


def test_statistics_of_images_as_they_are(rng, module, monkeypatch):
    clf, split, batches = problem(rng, module, monkeypatch)
    found = module.with_statistics(clf, split, 3, adversary=False)
    assert_of(found.variables["batch_stats"], clf.variables["batch_stats"], batches)
    jax.tree.map(np.testing.assert_array_equal, found.variables["params"], clf.variables["params"])


def test_with_an_adversary_each_batch_is_seen_again_as_it_left_it(rng, module, monkeypatch):
    clf, split, batches = problem(rng, module, monkeypatch)
    asked = []

    def moved(key, scores, x, probs, **settings):
        asked.append(settings)
        np.testing.assert_allclose(jnp.sum(probs, axis=1), 1.0, rtol=FLOAT32)
        return x + 0.25

    monkeypatch.setattr(module, "attacks", types.SimpleNamespace(qtrades=moved))
    found = module.with_statistics(clf, split, 3, adversary=True)
    seen = [batch + shift for batch in batches for shift in (0.0, 0.25)]
    assert_of(found.variables["batch_stats"], clf.variables["batch_stats"], seen)
    assert asked == [{"eps": 8 / 255, "step_size": 10 / 255}] * 3
