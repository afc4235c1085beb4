"""Classifiers with linear features and nearest-centroid heads, and small evaluations of them.

Their robustness to an linf ball is known in closed form: the margin to class c falls by eps |mu_y - mu_c|_1.
"""

import dataclasses
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from clustr_jax import data
from clustr_jax.attacks import attack_losses, scheduler
from clustr_jax.attacks.attack_losses import View
from clustr_jax.attacks.pgd import as_partial
from clustr_jax.attacks.scheduled_pgd import PGD
from clustr_jax.classifier import Classifier
from clustr_jax.clusters import Clusters
from clustr_jax.models import Outputs
from clustr_jax.settings import EvalSettings


@dataclasses.dataclass(frozen=True)
class LinearNet:
    """f(x) = x W: in place of a network, so that everything can be computed by hand."""

    def eval(self, variables, x):
        z = x.reshape(x.shape[0], -1) @ variables["w"]
        return Outputs(z, z)


def linear_classifier(weight, centroids, variance, **settings):
    """Nearest-centroid (or cluster) head on x W."""
    clusters = Clusters(jnp.asarray(centroids, jnp.float32), jnp.float32(variance))
    return Classifier({"w": jnp.asarray(weight, jnp.float32)}, clusters, LinearNet(), **settings)


@struct.dataclass
class Stub:
    """A classifier of points x [B, 1] given by its functions."""

    scores_fn: object = struct.field(pytree_node=False)
    logits_fn: object = struct.field(pytree_node=False, default=None)
    deployed_fn: object = struct.field(pytree_node=False, default=None)
    bounds: object = struct.field(pytree_node=False, default=None)

    def scores(self, x):
        return self.scores_fn(x)

    def logits(self, x):
        return (self.logits_fn or self.scores_fn)(x)

    def deployed(self, x):
        return (self.deployed_fn or self.logits_fn or self.scores_fn)(x)

    def view(self, x):
        return View(self.logits(x), self.deployed(x))

    def predict(self, x):
        return jnp.argmax(self.deployed(x), axis=1)


def silent(*_):
    """A progress report that nobody reads."""


def points(x, y, ids=None):
    x = np.asarray(x, np.float32)
    return data.Examples(
        x, np.asarray(y, np.int32), np.arange(len(x), dtype=np.int32) if ids is None else ids
    )


def starts(key, x, eps, restarts, ids=None):
    """The random starts [R, N, ...] by the documented streams: fold_in(fold_in(key, id), restart)."""
    ids = range(len(x)) if ids is None else ids
    draw = [
        [
            jax.random.uniform(
                jax.random.fold_in(jax.random.fold_in(key, i), r), x.shape[1:], minval=-1.0, maxval=1.0
            )
            for i in ids
        ]
        for r in range(restarts)
    ]
    return x[None] + np.float32(eps) * np.asarray(draw, np.float32)


def bounded_problem(rng, n=60, classes=5, k=2, size=6, variance=0.05):
    """Points in the unit box near the centroids of 5 x 2 clusters in a random linear feature space."""
    weight = rng.normal(size=(size, 4)) / 2
    anchors = rng.uniform(0.0, 1.0, (classes, k, size))
    y = rng.integers(0, classes, n)
    noise = rng.uniform(-0.3, 0.3, (n, size))
    x = np.clip(anchors[y, rng.integers(0, k, n)] + noise, 0, 1)
    return weight.astype(np.float32), (anchors @ weight).astype(np.float32), variance, x.astype(np.float32), y


def attack_soundly(key, clf, examples, alive=None, loss=attack_losses.margin, **changes):
    """(which of `alive` survive PGD, evaluations spent)"""
    settings = dict(eps=0.1, step_size=0.025, steps=20, restarts=2, slots=16) | changes
    alive = np.ones(len(examples), bool) if alive is None else alive
    part = examples.take(np.flatnonzero(alive))
    attack = PGD(
        eps=jnp.float32(settings["eps"]),
        step_size=jnp.float32(settings["step_size"]),
        steps=settings["steps"],
        norm="linf",
        bounds=clf.bounds,
        loss=attack_losses.one(loss),
    )
    outcome = scheduler.run(
        attack, key, as_partial(clf.view), part.x, part.y, ids=part.ids, restarts=settings["restarts"],
        slots=settings["slots"],
    )  # fmt: skip
    survive = alive.copy()
    survive[np.flatnonzero(alive)[outcome.broken]] = False
    return survive, outcome.evaluations


def two_classes(x):
    """Class 1 from 0 on, class 0 below."""
    return jnp.concatenate([-x, x], axis=1)


def separated(rng, n=80, classes=10, size=20, scale=1.0, noise=0.3):
    """Nearest-centroid classes in R^20; the median margin is `scale` x 12 nats (10 classes)."""
    centroids = rng.normal(size=(classes, 1, size)).astype(np.float32)
    y = rng.integers(0, classes, n)
    x = (centroids[y, 0] + noise * rng.normal(size=(n, size))).astype(np.float32)
    return np.eye(size, dtype=np.float32), centroids, 1.0 / scale, x, y


def exact_robust(x, y, centroids, eps):
    """Nearest centroid, f(x) = x, no box: min_c (mu_y - mu_c)(x - mid) - eps |mu_y - mu_c|_1 > 0."""
    mu = np.float64(centroids[:, 0])
    robust = []
    for point, c in zip(np.float64(x), y, strict=True):
        margins = [
            (mu[c] - mu[o]) @ (point - (mu[c] + mu[o]) / 2) - eps * np.abs(mu[c] - mu[o]).sum()
            for o in range(len(mu))
            if o != c
        ]
        robust.append(min(margins) > 0)
    return np.array(robust)


def eval_config(**changes):
    """The evaluation section of the configs, small."""
    root = str(pathlib.Path(__file__).parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        config = importlib.import_module("configs.common").base("digits")
    config.eval.attack.update(eps=0.2, step_size=0.05, steps=20, restarts=5)
    config.eval.update(slots=32, paper_steps=(20,), sweep=(), curve=(), apgd_steps=20, queries=100, targets=3)
    config.update_from_flattened_dict(changes)
    return config


def eval_settings(**changes):
    """The same, typed."""
    return EvalSettings.of(eval_config(**changes).eval)


def small_attack(**changes):
    settings = {
        "eval.attack.eps": 0.05,
        "eval.attack.step_size": 0.0125,
        "eval.attack.steps": 5,
        "eval.attack.restarts": 2,
        "eval.paper_steps": (3, 5),
        "eval.sweep": (0.02, 0.1),
    }
    return eval_settings(**settings | changes)
