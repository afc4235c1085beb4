"""Public functions that take arrays, by what they take: what tests of the gate for arrays go through."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax import UserError, certify, clusters, losses
from clustr_jax.clusters import Clusters
from clustr_jax.kmeans import kmeans

rng = np.random.default_rng(0)
Z = rng.normal(size=(12, 3)).astype(np.float32)
Y = (np.arange(12) % 3).astype(np.int32)
LOGITS = rng.normal(size=(12, 3)).astype(np.float32)
HEAD = Clusters(jnp.asarray(rng.normal(size=(3, 2, 3)), jnp.float32), jnp.float32(1.3))
PROBS = np.asarray(jax.nn.softmax(LOGITS))


def fresh():
    """The same key, never used before."""
    return jax.random.key(0)


def soft(y):
    return losses.cross_entropy(LOGITS, y)


# Of features [N, E] = [12, 3] for which the class does not matter; the name of the argument
FEATURES = {
    "kmeans": ("points", lambda z: kmeans(fresh(), z, 2)),
    "fit": ("z", lambda z: clusters.fit(fresh(), z, Y, num_classes=3)),
    "fit_assign": ("z", lambda z: clusters.fit_assign(fresh(), z, Y, num_classes=3)),
    "with_variance": ("z", lambda z: clusters.with_variance(HEAD, z, Y)),
    "squared_distances": ("z", HEAD.squared_distances),
    "exponents": ("z", HEAD.exponents),
    "log_scores": ("z", HEAD.log_scores),
    "nearest": ("z", functools.partial(HEAD.log_scores, nearest=2)),
    "scores": ("z", HEAD.scores),
    "probs": ("z", HEAD.probs),
    "radius": ("z", lambda z: certify.radius(HEAD, z, Y, lipschitz=1.0, rounding=0.02)),
    "distances": ("a", lambda z: losses.distances(z, Z)),
    "magnet_rows": (
        "z",
        lambda z: losses.magnet_loss_of_rows(z, Y, np.arange(3), np.ones(12, bool), alpha=1.0),
    ),
}
# Of labels [B] = [12] in 0..2
LABELS = {
    "fit": lambda y: clusters.fit(fresh(), Z, y, num_classes=3),
    "fit_assign": lambda y: clusters.fit_assign(fresh(), Z, y, num_classes=3),
    "with_variance": lambda y: clusters.with_variance(HEAD, Z, y),
    "radius": lambda y: certify.radius(HEAD, Z, y, lipschitz=1.0),
    "cross_entropy": lambda y: losses.cross_entropy(LOGITS, y),
    "margin": lambda y: losses.margin(LOGITS, y),
    "dlr": lambda y: losses.dlr(LOGITS, y),
    "probability_margin": lambda y: losses.probability_margin(LOGITS, y),
}
ONLY_OUTSIDE_JIT = ("radius", "fit", "fit_assign")
# Of logits [B, Y]
LOGIT_DOORS = {
    "cross_entropy": lambda z: losses.cross_entropy(z, Y),
    "soft": lambda z: losses.cross_entropy(z, PROBS),
    "kl": lambda z: losses.kl(z, PROBS),
    "margin": lambda z: losses.margin(z, Y),
    "dlr": lambda z: losses.dlr(z, Y),
    "probability_margin": lambda z: losses.probability_margin(z, Y),
}
PROBABILITY_DOORS = {
    "cross_entropy": soft,
    "kl": lambda p: losses.kl(LOGITS, p),
    "negative_entropy": losses.negative_entropy,
}


def changed(array, place, value, dtype=None):
    array = array.astype(dtype or array.dtype)
    array[place] = value
    return array


def refused(call, value) -> str:
    """The message, one line that a terminal shows."""
    with pytest.raises(UserError) as caught:
        jax.block_until_ready(call(value))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500, text
    return text


def same_everywhere(doors, value, message):
    """One message at all doors, but for the argument's name and how many examples an axis is called."""
    found = set()
    for name, call in doors.items():
        argument, call = call if isinstance(call, tuple) else (None, call)
        text = refused(call, value)
        assert re.search(message, text), (name, text)
        text = re.sub(r"\b[NM](?=,|\]| =)", "B", text)
        found.add(re.sub(rf"\b{argument}\b", "z", text) if argument else text)
    return found
