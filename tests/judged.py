"""Small models to judge, with budgets of seconds."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

import clustr_jax
from clustr_jax.evaluation import judging

N, SHAPE, CLASSES, EPS, SLOTS = 32, (6, 6, 1), 4, 0.02, 32


@functools.cache
def weights():
    return jnp.asarray(np.random.default_rng(0).normal(size=(36, 16)) / 3, jnp.float32), jnp.asarray(
        np.random.default_rng(1).normal(size=(16, CLASSES)), jnp.float32
    )


def curved(x):
    """[B, 6, 6, 1] -> [B, 4]: a hidden layer of tanh."""
    a, b = weights()
    return 4 * jnp.tanh((x.reshape(len(x), -1) - 0.5) @ a) @ b


@functools.cache
def images():
    """Images and what `curved` says of them, but for two that it gets wrong."""
    x = np.random.default_rng(2).uniform(size=(N, *SHAPE)).astype(np.float32)
    y = np.asarray(curved(x)).argmax(axis=1)
    y[:2] = (y[:2] + 1) % CLASSES
    return x, y


def small(eps=EPS, **changes):
    """The budget of a sound protocol, small."""
    attack = dict(steps=8, restarts=2)
    budget = judging.budget(eps, SLOTS, curve=(0.5,))
    budget = dataclasses.replace(budget, attack=dataclasses.replace(budget.attack, **attack))
    return dataclasses.replace(budget, **dict(apgd_steps=8, queries=20) | changes)


def judged(model=curved, x=None, y=None, eps=EPS, settings=None, **more):
    """A judgement within seconds."""
    own_x, own_y = images()
    return clustr_jax.judge(
        model, own_x if x is None else x, own_y if y is None else y, eps=eps, slots=SLOTS, progress=False,
        settings=settings or small(eps), **more,
    )  # fmt: skip


def statuses(judgement):
    return {check["number"]: check["status"] for check in judgement.checks}


def timeless(value):
    """Without times."""
    if isinstance(value, dict):
        return {name: timeless(v) for name, v in value.items() if not name.endswith("_seconds")}
    return [timeless(v) for v in value] if isinstance(value, list) else value
