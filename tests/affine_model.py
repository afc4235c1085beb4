"""An affine model of 36 pixels and 5 classes, the attacks on it by name, and what their answers keep to.

Nearly all tests of the attacks share it, so that each attack is compiled once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from clustr_jax import attacks, losses

SHAPE, CLASSES, N = (6, 6, 1), 5, 48
STEPS, QUERIES, SLOTS = 20, 400, 16
EPS = {"linf": 0.03, "l2": 0.1}
# l2 without a box, which has a closed form; with one in the slow tests
BOUNDS = {"linf": (0.0, 1.0), "l2": None}
ULP = 6e-8


def affine(params, x):
    return x.reshape(x.shape[0], -1) @ params[0] + params[1][None]


def weights(classes=CLASSES, seed=0):
    """Weight and bias of logits W.(x - 1/2)."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(36, classes)).astype(np.float32)
    return weight, (-weight.sum(axis=0) / 2).astype(np.float32)


def images(rng, n=N):
    """Half of them with many pixels at the border of the box, half far from it."""
    x = rng.uniform(0.3, 0.7, (n, *SHAPE))
    x[: n // 2] = np.clip(rng.uniform(-0.7, 1.7, (n // 2, *SHAPE)), 0, 1)
    return x.astype(np.float32)


@functools.cache
def problem(classes=CLASSES):
    """(weight, bias, model, x, y): every label right but each ninth."""
    weight, bias = weights(classes)
    model = Partial(affine, [jnp.asarray(weight), jnp.asarray(bias)])
    x = images(np.random.default_rng(1))
    y = np.asarray(model(x)).argmax(axis=1).astype(np.int32)
    y[::9] = (y[::9] + 1) % classes
    return weight, bias, model, x, y


def call(name, key, model, x, y, *, eps, norm="linf", bounds="default", **more):
    """One of the attacks by name, at the common number of steps."""
    bounds = BOUNDS[norm] if bounds == "default" else bounds
    common = dict(eps=eps, norm=norm, bounds=bounds, **more)
    if name == "pgd":
        return np.asarray(
            attacks.pgd(key, model, x, y, step_size=eps / 4, steps=STEPS, loss_fn=losses.margin, **common)
        )
    if name == "fab":
        return attacks.fab(key, model, x, y, steps=STEPS, slots=SLOTS, **common)
    if name == "pma":
        return attacks.pma(key, model, x, y, steps=STEPS, slots=SLOTS, **common)
    if name == "square":
        return attacks.square(key, model, x, y, queries=QUERIES, slots=SLOTS, **common)
    return attacks.apgd(
        key, model, x, y, steps=STEPS, slots=SLOTS, targeted=name == "apgd-t",
        loss_fn=losses.dlr if name == "apgd-dlr" else losses.cross_entropy, **common,
    )  # fmt: skip


@functools.cache
def attacked(name, norm, bounds="default"):
    _, _, model, x, y = problem()
    return call(name, jax.random.key(3), model, x, y, eps=EPS[norm], norm=norm, bounds=bounds)


def wrong(model, x, y):
    return np.asarray(model(jnp.asarray(x))).argmax(axis=1) != y


def check_inside(x_adv, x, eps, norm, bounds):
    delta = (np.float64(x_adv) - x).reshape(len(x), -1)
    size = np.abs(delta).max(axis=1) if norm == "linf" else np.linalg.norm(delta, axis=1)
    assert np.isfinite(x_adv).all() and size.max() <= eps * (1 + 1e-6) + 6 * ULP  # sqrt(36) pixels
    if bounds is not None:
        assert x_adv.min() >= bounds[0] and x_adv.max() <= bounds[1]


def pairs(*names):
    """(name, norm) of attacks; a compilation each, so some of l2 only in the slow tests."""
    slow = [("pgd", "l2"), ("square", "l2")]
    both = [(name, norm) for name in names for norm in ("linf", "l2")]
    return [pytest.param(*pair, marks=[pytest.mark.slow] if pair in slow else []) for pair in both]
