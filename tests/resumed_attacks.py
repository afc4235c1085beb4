"""Attacks with folder=, small, and what two of their answers are compared by."""

import functools
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax import attacks
from clustr_jax.attacks import device_loop, ensemble, records, scheduler

N, SLOTS, EPS = 16, 4, 0.06
DOORS = {
    "apgd": functools.partial(attacks.apgd, steps=6, restarts=2),
    "fab": functools.partial(attacks.fab, steps=4),
    "square": functools.partial(attacks.square, queries=12, restarts=2),
    "pma": functools.partial(attacks.pma, steps=6),
    "fmn": lambda eps, **settings: attacks.fmn(**settings, steps=8, targeted=True),
    "adaptive": functools.partial(attacks.adaptive_restarts, steps=6, most=5, share=0.9),
    "autoattack": functools.partial(attacks.autoattack, attacks=("square", "apgd-ce", "square")),
}
WEIGHTS = np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)


def logits(x):
    return 3 * jnp.tanh(x.reshape(len(x), -1) @ WEIGHTS)


@functools.cache
def problem():
    x = np.random.default_rng(0).uniform(0.2, 0.8, (N, 4, 4, 1)).astype(np.float32)
    return x, np.asarray(logits(x)).argmax(axis=1)


def call(name, folder=None, **other):
    x, y = problem()
    settings = dict(key=jax.random.key(0), logits_fn=logits, x=x, y=y, eps=EPS, slots=SLOTS, progress=False)
    return DOORS[name](**settings | other, folder=folder)


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """The device comes back after each iteration or two; AutoAttack's attacks are short."""
    monkeypatch.setattr(scheduler, "_OPERATIONS", {"cpu": 1000.0})
    monkeypatch.setattr(ensemble, "STEPS", 4)
    monkeypatch.setattr(ensemble, "QUERIES", 6)


_whole = {}


def whole(name):
    """The result without an interruption and without a folder."""
    if name not in _whole:
        _whole[name] = call(name)
    return _whole[name]


def same(found, wanted):
    if isinstance(wanted, attacks.AutoAttackResult):
        np.testing.assert_array_equal(found.robust, wanted.robust)
        np.testing.assert_array_equal(found.broken_by, wanted.broken_by)
        assert found.notes == wanted.notes
        found, wanted = found.x_adv, wanted.x_adv
    if isinstance(wanted, attacks.NearestResult):
        np.testing.assert_array_equal(found.distance, wanted.distance)
        found, wanted = found.x_adv, wanted.x_adv
    np.testing.assert_array_equal(found, wanted)


def files(folder):
    return sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())


class Every:
    """Wraps a function; SIGINT comes at every `period`th call, before it or after it."""

    def __init__(self, f, period, before=True):
        self.f, self.period, self.before, self.calls = f, period, before, 0

    def __call__(self, *args, **settings):
        self.calls += 1
        now = self.calls % self.period == 0
        if now and self.before:
            os.kill(os.getpid(), signal.SIGINT)
        found = self.f(*args, **settings)
        if now and not self.before:
            os.kill(os.getpid(), signal.SIGINT)
        return found


PLACES = {
    "device": (device_loop, "advance", True),
    "judge": (scheduler, "misjudged", False),
    "inside": (scheduler, "verify_inside", True),
    "noted": (scheduler.Outcome, "become", False),
    "written": (records.np, "savez", False),
}
