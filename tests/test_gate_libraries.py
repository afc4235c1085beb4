"""Models of other libraries at the attacks' doors: current weights without a compilation, training modes.

They are given to an attack as their users have them: flax.nnx, linen, equinox, Keras 3 on JAX, haiku (where
it is installed), and what HuggingFace's Flax models return.
"""

import functools
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

from clustr_jax import attacks
from clustr_jax.runtime.errors import UserError

SHAPE, CLASSES, B = (8, 8, 3), 4, 8
KEY = jax.random.key(0)

DOORS = {
    "pgd": functools.partial(attacks.pgd, eps=0.1, step_size=0.05, steps=3),
    "apgd": functools.partial(attacks.apgd, eps=0.5, steps=3, slots=B),
}


@pytest.fixture(autouse=True)
def as_users_have_it():
    """The libraries promote ranks, and repeated calls use a key again."""
    with jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        yield


@functools.cache
def images():
    return np.random.default_rng(1).uniform(size=(B, *SHAPE)).astype(np.float32)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.conv(x))))
        return 10 * self.head(x.mean(axis=(1, 2)))

    def logits(self, x):
        return self(x)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x))
        return 10 * nn.Dense(CLASSES)(nn.relu(x).mean(axis=(1, 2)))


class Equinox(eqx.Module):
    conv: eqx.nn.Conv2d
    dropout: eqx.nn.Dropout
    head: eqx.nn.MLP

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(3, 8, 3, key=first)
        self.dropout = eqx.nn.Dropout(0.5, inference=True)
        self.head = eqx.nn.MLP(8, CLASSES, 16, 1, key=second)

    def __call__(self, x, key=None):
        x = jax.nn.relu(self.conv(x.transpose(2, 0, 1)))
        return 10 * self.head(self.dropout(x.mean(axis=(1, 2)), key=key))


class Batched(eqx.Module):
    """Takes a batch itself."""

    model: Equinox

    def __call__(self, x):
        return jax.vmap(self.model)(x)


@flax.struct.dataclass
class Output:
    """As transformers' FlaxSequenceClassifierOutput and its like: attributes, not a tuple."""

    logits: jax.Array
    hidden_states: tuple


class HuggingFace:
    """A model object that holds its parameters and is called without them."""

    def __init__(self, params):
        self.params = params

    def __call__(self, pixel_values):
        return Output(Linen().apply(self.params, pixel_values), (pixel_values,))


def moved(a, factor):
    """Other weights (of matrices and kernels)."""
    return a + factor * jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape) if a.ndim > 1 else a


def nnx_model():
    model = Nnx(nnx.Rngs(0))
    model.eval()

    def update(factor):
        nnx.update(model, jax.tree.map(lambda a: moved(a, factor), nnx.state(model, nnx.Param)))

    return model, update


def nnx_case(take):
    model, update = nnx_model()
    return update, lambda: take(model)


def keras_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.layers.Input(SHAPE),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(CLASSES),
            keras.layers.Rescaling(10.0),
        ]
    )


def keras_case(take):
    model = keras_model()

    def update(factor):
        for variable in model.trainable_variables:
            variable.assign(moved(variable.value, factor))

    return update, lambda: take(model)


def held_case(tree, take):
    held = {"tree": tree}

    def update(factor):
        held["tree"] = jax.tree.map(
            lambda a: moved(a, factor) if eqx.is_inexact_array(a) else a, held["tree"]
        )

    return update, lambda: take(held["tree"])


def haiku_case(take):
    """A pure function of parameters, captured: with haiku itself, or of the same shape by hand."""
    hk = pytest.importorskip("haiku")

    def forward(x, is_training):
        x = hk.BatchNorm(True, True, 0.9)(hk.Conv2D(8, 3)(x), is_training)
        return 10 * hk.Linear(CLASSES)(jax.nn.relu(x).mean(axis=(1, 2)))

    net = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = net.init(jax.random.key(0), images(), True)
    return held_case(params, lambda p: take(lambda x, **how: net.apply(p, state, x, **how)[0]))


def closure_case():
    weights = {"linear": {"w": jax.random.normal(jax.random.key(0), (8 * 8 * 3, CLASSES)), "b": jnp.ones(1)}}

    def apply(params, rng, x):
        assert rng is None
        return x.reshape(x.shape[0], -1) @ params["linear"]["w"] + params["linear"]["b"][None]

    return held_case(weights, lambda p: lambda x: apply(p, None, x))


def linen_variables():
    return Linen().init(jax.random.key(0), images())


CASES = {
    "nnx": lambda: nnx_case(lambda m: m),
    "nnx method": lambda: nnx_case(lambda m: m.logits),
    "nnx in a lambda": lambda: nnx_case(lambda m: lambda x: m(x)),
    "equinox, vmap": lambda: held_case(Equinox(jax.random.key(0)), jax.vmap),
    "equinox": lambda: held_case(Batched(Equinox(jax.random.key(0))), lambda m: m),
    "equinox, filter_jit": lambda: held_case(Batched(Equinox(jax.random.key(0))), eqx.filter_jit),
    "Keras": lambda: keras_case(lambda m: m),
    "Keras in a lambda": lambda: keras_case(lambda m: lambda x: m(x, training=False)),
    "linen, bound": lambda: held_case(linen_variables(), Linen().bind),
    "linen, partial": lambda: held_case(linen_variables(), lambda v: functools.partial(Linen().apply, v)),
    "linen, Partial": lambda: held_case(linen_variables(), lambda v: jax.tree_util.Partial(Linen().apply, v)),
    "HuggingFace": lambda: held_case(linen_variables(), HuggingFace),
    "haiku": lambda: haiku_case(lambda f: lambda x: f(x, is_training=False)),
    "haiku, partial": lambda: haiku_case(lambda f: functools.partial(f, is_training=False)),
    "a closure over parameters": closure_case,
}


@pytest.mark.more
@pytest.mark.parametrize("door", list(DOORS))
@pytest.mark.filterwarnings("ignore:logits_fn returned bounded scores")  # by chance
@pytest.mark.parametrize("name", list(CASES))
def test_current_weights_without_a_compilation(name, door, compilations):
    """Each attack raises the loss of the model as it is now, to what a function that is new finds."""
    update, model = CASES[name]()
    x, counts, some = images(), [], False
    for factor in (0.1, 0.4, -0.3, 0.2, -0.1):
        update(factor)
        f = model()
        logits = np.asarray(getattr(f(x), "logits", f(x)))
        y = logits.argmax(axis=1)
        with compilations() as found:
            attacked = np.asarray(DOORS[door](KEY, f, x, y))
        counts.append(len(found))
        now = model()
        expected = DOORS[door](KEY, lambda x, f=now: getattr(f(x), "logits", f(x)), x, y)
        np.testing.assert_allclose(attacked, expected, atol=2e-6)
        some |= np.abs(attacked - x).max() > 0.01
    assert some or door == "apgd"  # which gives back what it cannot break
    assert counts[1:] == [0] * 4, counts


# Training modes


def training():
    nnx_training, _ = nnx_model()
    nnx_training.train()
    nnx_norm, _ = nnx_model()
    nnx_norm.norm.use_running_average = False
    dropout = eqx.tree_at(lambda m: m.dropout.inference, Equinox(jax.random.key(0)), False)
    in_training = keras_model()
    variables = linen_variables()
    return {
        "nnx": (nnx_training, "model.eval()"),
        "nnx batch norm": (nnx_norm, "model.eval()"),
        "nnx in a lambda": (lambda x: nnx_training(x), "model.eval()"),
        "equinox": (Batched(dropout), "inference_mode"),
        "equinox, one key": (
            lambda x: jax.vmap(dropout)(x, jax.random.split(jax.random.key(1), len(x))),
            "inference_mode",
        ),
        "Keras": (lambda x: in_training(x, training=True), "training=False"),
        "linen": (
            lambda x: Linen().apply(variables, x, train=True, mutable=["batch_stats"])[0],
            "use_running_average",
        ),
        "single images": (Equinox(jax.random.key(0)), "jax.vmap"),
    }


def test_haiku_in_training_mode_is_refused_with_the_way_out():
    _, model = haiku_case(lambda f: lambda x: f(x, is_training=True))
    for door in DOORS.values():
        with pytest.raises(UserError, match="haiku: is_training=False") as refused:
            door(KEY, model(), images(), np.zeros(B, np.int32))
        assert len(str(refused.value)) <= 500


@pytest.mark.parametrize("name", ["nnx", "nnx batch norm", "nnx in a lambda", "equinox", "equinox, one key",
                                  "Keras", "linen", "single images"])  # fmt: skip
def test_training_mode_is_refused_with_the_way_out(name):
    """In one line, the same at each door; and the model is as it was."""
    model, text = training()[name]
    y = np.zeros(B, np.int32)
    found = set()
    for door in DOORS.values():
        with pytest.raises(UserError) as refused:
            door(KEY, model, images(), y)
        found.add(str(refused.value))
    assert len(found) == 1 and text in str(found) and len(next(iter(found))) <= 500


def test_a_module_compiled_by_nnx_is_refused():
    """flax cannot trace it inside of another program."""
    model, _ = nnx_model()
    with pytest.raises(UserError, match=r"model.eval\(\).*without nnx.jit"):
        f = nnx.jit(lambda m, x: m(x))
        DOORS["pgd"](KEY, lambda x: f(model, x), images(), np.zeros(B, np.int32))


def test_a_keras_model_is_left_as_it_was():
    """Its moving averages are not what is traced."""
    model = keras_model()
    before = [np.asarray(w.value) for w in model.weights]
    with pytest.raises(UserError):
        DOORS["pgd"](KEY, lambda x: model(x, training=True), images(), np.zeros(B, np.int32))
    for a, b in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(a.value, b)


def test_none_of_these_is_imported_for_an_attack():
    """An attack needs JAX and NumPy."""
    import subprocess
    import sys

    code = (
        "import sys, jax, numpy as np\n"
        "from clustr_jax import attacks\n"
        "x = np.full((2, 3), .5, np.float32)\n"
        "attacks.fgsm(jax.random.key(0), lambda x: x, x, np.zeros(2, int), eps=.1)\n"
        "assert not {'equinox', 'keras', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
