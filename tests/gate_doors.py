"""Every door of the attacks, a linear model and images for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax import attacks
from clustr_jax.runtime.errors import UserError

SHAPE, CLASSES, B = (6, 6, 1), 3, 8
KEY = jax.random.key(0)
DOORS = {
    "pgd": functools.partial(attacks.pgd, eps=0.1, step_size=0.05, steps=2),
    "fgsm": functools.partial(attacks.fgsm, eps=0.1),
    "noise": functools.partial(attacks.noise, eps=0.1, draws=2),
    "apgd": functools.partial(attacks.apgd, eps=0.1, steps=2, slots=B),
    "fab": functools.partial(attacks.fab, eps=0.1, steps=2, slots=B),
    "square": functools.partial(attacks.square, eps=0.1, queries=4, slots=B),
    "pma": functools.partial(attacks.pma, eps=0.1, steps=2, slots=B),
    "apgd-malt": functools.partial(attacks.apgd, eps=0.1, steps=2, slots=B, targeted=True, targets="malt"),
    "adaptive": functools.partial(attacks.adaptive_restarts, eps=0.1, steps=2, most=2, slots=B),
    "autoattack": functools.partial(attacks.autoattack, eps=0.1, slots=B, attacks=("square",)),
}
# Those that take no radius; the last one takes no key, either
WITHOUT_RADIUS = {
    "fmn": functools.partial(attacks.fmn, steps=3, slots=B),
    "ddn": functools.partial(attacks.ddn, steps=3, slots=B),
    "fmn-malt": functools.partial(attacks.fmn, steps=3, slots=B, targeted=True),
    "malt": lambda key, f, x, y, **settings: attacks.malt_targets(f, x, y, slots=B, **settings),
}


def qtrades(key, logits_fn, x, y, eps=0.1, **settings):
    probs = jax.nn.one_hot(y, CLASSES) if np.ndim(y) == 1 else y
    return attacks.qtrades(key, logits_fn, x, probs, eps=eps, step_size=0.1, **settings)


@functools.cache
def weights():
    return jnp.asarray(np.random.default_rng(0).normal(size=(36, CLASSES)), jnp.float32)


def linear(x):
    return x.reshape(x.shape[0], -1) @ weights()


@functools.cache
def images():
    x = np.random.default_rng(1).uniform(size=(B, *SHAPE)).astype(np.float32)
    return x, np.asarray(linear(x)).argmax(axis=1).astype(np.int32)


def said(door, *args, **settings):
    """The one line with which it is refused."""
    with jax.debug_key_reuse(False), pytest.raises(UserError) as refused:
        door(*args, **settings)
    text = str(refused.value)
    assert len(text) <= 500 and "\n" not in text
    return text
