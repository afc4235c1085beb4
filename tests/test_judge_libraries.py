"""Models as users of other libraries have them: judged, opened for float64 where they can be, verified."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before it is imported

import equinox as eqx
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax import nnx

import clustr_jax
from clustr_jax import attacks
from clustr_jax.attacks import calls
from clustr_jax.data import Examples
from clustr_jax.evaluation import subject
from clustr_jax.evaluation.probes import Probe
from clustr_jax.runtime.promotion import promoting
from judged import small

SHAPE, CLASSES, N, EPS = (6, 6, 1), 4, 16, 0.02


@pytest.fixture(autouse=True)
def as_users_have_it():
    """The libraries promote ranks, and repeated calls use a key again."""
    with jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        yield


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(36, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, CLASSES, rngs=rngs)

    def __call__(self, x):
        return 5 * self.head(jnp.tanh(self.norm(self.hidden(x.reshape(len(x), -1)))))


class Dropping(nnx.Module):
    """It holds a key and a counter, which evaluation does not use."""

    def __init__(self, rngs):
        self.hidden, self.head = nnx.Linear(36, 16, rngs=rngs), nnx.Linear(16, CLASSES, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return 5 * self.head(self.drop(jnp.tanh(self.hidden(x.reshape(len(x), -1)))))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return 5 * nn.Dense(CLASSES)(jnp.tanh(nn.Dense(16)(x.reshape(len(x), -1))))


@flax.struct.dataclass
class Output:
    """As transformers' Flax models return."""

    logits: jax.Array


class HuggingFace:
    def __init__(self, params):
        self.params = params

    def __call__(self, pixel_values):
        return Output(Linen().apply(self.params, pixel_values))


def of_nnx():
    model = Nnx(nnx.Rngs(0))
    model.eval()
    return model


def of_dropping():
    model = Dropping(nnx.Rngs(0))
    model.eval()
    return model


def of_equinox_dropping():
    first, second = jax.random.split(jax.random.key(0))
    layers = [eqx.nn.Linear(36, 16, key=first), eqx.nn.Dropout(0.5), eqx.nn.Linear(16, CLASSES, key=second)]
    model = eqx.nn.inference_mode(eqx.nn.Sequential(layers))
    return jax.vmap(lambda x: 5 * model(x.reshape(-1)))


def of_fixed_noise():
    """A function that holds a key, and draws the same weights with it each time, of a type that it names."""
    key = jax.random.key(3)

    def model(x):
        return x.reshape(len(x), -1) @ jax.random.normal(jax.random.clone(key), (36, CLASSES), jnp.float32)

    return model


def params():
    return Linen().init(jax.random.key(0), jnp.zeros((1, *SHAPE)))


def of_equinox():
    model = eqx.nn.MLP(36, CLASSES, 16, 1, activation=jnp.tanh, key=jax.random.key(0))
    return jax.vmap(lambda x: 5 * model(x.reshape(-1)))


def of_keras():
    layers = [keras.layers.Flatten(), keras.layers.Dense(16, "tanh"), keras.layers.Dense(CLASSES)]
    model = keras.Sequential([keras.Input(SHAPE), *layers])
    return lambda x: 5 * model(x, training=False)


def of_channels_first():
    """In its own order of the pixels."""
    model = Linen().bind(params())
    return attacks.wrap(lambda x: model(x), layout="NCHW")


MODELS = {
    "nnx": of_nnx,
    "nnx dropout": of_dropping,
    "equinox dropout": of_equinox_dropping,
    "a key": of_fixed_noise,
    "linen": lambda: Linen().bind(params()),
    "equinox": of_equinox,
    "keras": of_keras,
    "huggingface": lambda: HuggingFace(params()),
    "channels first": of_channels_first,
}


def logits_of(model, x):
    found = model(jnp.asarray(x))
    return np.asarray(getattr(found, "logits", found))


def problem(model):
    x = np.random.default_rng(0).uniform(size=(N, *SHAPE)).astype(np.float32)
    return x, logits_of(model, x).argmax(axis=1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.one_in(3)
def test_it_is_looked_at_from_inside(name):
    """The same logits in its program and outside, and (but for Keras, which casts) gradients in float64."""
    model = MODELS[name]()
    x, y = problem(model)
    given, logits = promoting(calls.prepare)(
        jax.random.key(0), model, x, y, eps=EPS, norm="linf", bounds=(0.0, 1.0), ids=None, slots=N
    )
    np.testing.assert_allclose(logits, logits_of(model, x), atol=1e-4)
    this = subject.of_model(model, given, N)
    probe = Probe(
        jax.random.key(1), this, Examples(given.x, given.y, given.ids), small(EPS), np.zeros(N, bool)
    )
    statuses = {c.number: (c.status, c.note) for part in (probe.outputs, probe.precision) for c in part()}
    assert statuses[2][0] == "PASS"
    assert statuses[5][0] in (("SKIP", "PASS") if name == "keras" else ("PASS",)), statuses[5]
    assert this.digest() == this.digest()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_it_is_judged_and_verified(name, tmp_path):
    model = MODELS[name]()
    x, y = problem(model)
    j = clustr_jax.judge(model, x, y, eps=EPS, slots=N, settings=small(EPS), folder=tmp_path, progress=False)
    assert j.believable and 0 < j.robust <= j.clean == 1.0
    assert clustr_jax.verify(tmp_path, lambda v: logits_of(model, v)).ok
