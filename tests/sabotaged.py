"""Models that would get a number that nobody should believe, and honest ones that should get theirs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from clustr_jax import losses
from clustr_jax.clusters import Clusters

SHAPE, CLASSES, N, EPS = (6, 6, 1), 4, 64, 0.1


@functools.cache
def problem():
    """(x_train, y_train, x, y): four patterns, noise, and a few that are hard."""
    rng = np.random.default_rng(0)
    patterns = rng.uniform(0.2, 0.8, (CLASSES, *SHAPE))

    def draw(count):
        y = rng.integers(0, CLASSES, count)
        x = patterns[y] + 0.25 * rng.normal(size=(count, *SHAPE))
        return np.clip(x, 0, 1).astype(np.float32), y.astype(np.int32)

    return *draw(512), *draw(N)


def mlp(params, x):
    a, b, c, d = params
    return jax.nn.relu((x.reshape(len(x), -1) - 0.5) @ a + b[None]) @ c + d[None]


def features(params, x):
    a, b, *_ = params
    return jnp.tanh((x.reshape(len(x), -1) - 0.5) @ a + b[None])


@functools.cache
def trained(kind):
    """Parameters after 200 steps: nominal, fast_at (one step of FGSM) or trades."""
    x, y, *_ = problem()
    rng = np.random.default_rng(1)
    size = int(np.prod(SHAPE))
    first, second = 0.3 * rng.normal(size=(size, 32)), 0.3 * rng.normal(size=(32, CLASSES))
    params = first, np.zeros(32), second, np.zeros(CLASSES)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)

    def loss(params, key):
        start = x + EPS * jax.random.uniform(key, x.shape, minval=-1.0, maxval=1.0)
        z = mlp(params, x)
        if kind == "nominal":
            return jnp.mean(losses.cross_entropy(z, y))
        if kind == "fast_at":
            gradient = jax.grad(lambda v: jnp.sum(losses.cross_entropy(mlp(params, v), y)))(start)
            moved = start + 1.25 * EPS * jnp.sign(gradient)
            moved = jax.lax.stop_gradient(jnp.clip(jnp.clip(moved, x - EPS, x + EPS), 0, 1))
            return jnp.mean(losses.cross_entropy(mlp(params, moved), y))
        p = jax.nn.log_softmax(z)

        def divergence(v):
            return jnp.sum(jnp.exp(p) * (p - jax.nn.log_softmax(mlp(params, v))), axis=1)

        gradient = jax.grad(lambda v: jnp.sum(divergence(v)))(start)
        moved = jnp.clip(jnp.clip(start + EPS * jnp.sign(gradient), x - EPS, x + EPS), 0, 1)
        return jnp.mean(losses.cross_entropy(z, y) + 2 * divergence(jax.lax.stop_gradient(moved)))

    @jax.jit
    def step(params, key):
        return jax.tree.map(lambda p, g: p - 0.2 * g, params, jax.grad(loss)(params, key))

    for i in range(200):
        params = step(params, jax.random.fold_in(jax.random.key(0), i))
    return params


def honest(kind):
    """A model of each kind: logits [B, Y]."""
    if kind in ("nominal", "fast_at", "trades"):
        return functools.partial(mlp, trained(kind))
    x, y, *_ = problem()
    if kind == "clusters":
        params = trained("trades")
        z = np.asarray(features(params, x))
        means = np.stack([z[y == c].mean(axis=0) for c in range(CLASSES)])[:, None]
        head = Clusters(jnp.asarray(means), jnp.float32(1.0))
        return lambda v: head.log_scores(features(params, v))
    assert kind == "lipschitz"  # rows of length at most 1, and differences that sort (Anil et al. 2019)
    means = np.stack([x[y == c].mean(axis=0).ravel() for c in range(CLASSES)])
    w = means - means.mean(axis=0)
    w = jnp.asarray(w / np.linalg.norm(w, axis=1, keepdims=True).max(), jnp.float32)
    b = jnp.asarray(-(w * means).sum(axis=1) + 0.5 * (w**2).sum(axis=1), jnp.float32)
    return lambda v: v.reshape(len(v), -1) @ w.T + b[None]


HONEST = ("nominal", "fast_at", "trades", "clusters", "lipschitz")


def _exp_scores():
    """exp(-d^2 / 2 sigma^2) of a cluster head with a small variance: most underflow."""
    log_scores = honest("clusters")
    return lambda x: jnp.exp(40 * log_scores(x))


def _times(factor):
    model = honest("trades")
    return lambda x: factor * model(x)


def _quantised():
    """Pixels of 5 levels; the gradient is zero wherever there is one."""
    model = honest("nominal")
    return lambda x: model(jnp.round(4 * x) / 4)


def _batch_norm_in_training():
    model = honest("nominal")

    def logits(x):
        return model((x - x.mean(axis=0, keepdims=True)) / jnp.sqrt(x.var(axis=0, keepdims=True) + 1e-3))

    return logits


def _noise():
    model, generator = honest("nominal"), np.random.default_rng(0)
    return lambda x: model(x + 0.1 * generator.normal(size=x.shape))


def _callback_noise():
    model, generator = honest("nominal"), np.random.default_rng(0)

    def noise(x):
        return (0.1 * generator.normal(size=x.shape)).astype(np.float32)

    @jax.custom_jvp
    def noisy(x):
        return x + jax.pure_callback(noise, jax.ShapeDtypeStruct(x.shape, jnp.float32), x)

    noisy.defjvp(lambda primals, tangents: (noisy(*primals), *tangents))
    return lambda x: model(noisy(x))


def _bounded():
    """A sigmoid at the end, long saturated."""
    model = honest("nominal")
    return lambda x: jax.nn.sigmoid(20 * model(x))


def _table():
    """The test images by their exact pixels; for all others a poor model."""
    _, _, x, y = problem()
    known, labels, model = jnp.asarray(x.reshape(N, -1)), jnp.asarray(y), honest("nominal")

    def logits(v):
        same = jnp.all(v.reshape(len(v), 1, -1) == known[None], axis=2)
        told = 9.0 * (same.astype(jnp.float32) @ jax.nn.one_hot(labels, CLASSES))
        return told + jnp.roll(model(v), 1, axis=1)

    return logits


def _nearest_in_table():
    """The label of the nearest test image, and no gradient."""
    _, _, x, y = problem()
    known, labels = jnp.asarray(x.reshape(N, -1)), jnp.asarray(y)

    def logits(v):
        far = jnp.sum(jnp.square(v.reshape(len(v), 1, -1) - known[None]), axis=2)
        return 9.0 * jax.nn.one_hot(labels[jnp.argmin(far, axis=1)], CLASSES)

    return logits


def _constant_beyond():
    """An honest model close to the test images; further away the label of the nearest one, flat."""
    _, _, x, y = problem()
    known, labels, model = jnp.asarray(x.reshape(N, -1)), jnp.asarray(y), honest("nominal")

    def logits(v):
        far = jnp.max(jnp.abs(v.reshape(len(v), 1, -1) - known[None]), axis=2)
        flat = 9.0 * jax.nn.one_hot(labels[jnp.argmin(far, axis=1)], CLASSES)
        return jnp.where((far.min(axis=1) > EPS / 4)[:, None], flat, model(v))

    return logits


class Stale:
    """Its jit has kept the weights of its first call."""

    def __init__(self):
        self.weights = trained("nominal")
        self.logits = jax.jit(lambda x: mlp(self.weights, x))

    def __call__(self, x):
        return self.logits(x)


def _stale():
    model = Stale()
    model(jnp.zeros((8, *SHAPE)))  # the batch that the gate looks at
    model.weights = jax.tree.map(lambda a: 1.5 * a, model.weights)
    return model


def _detached(*, casts=False):
    """The attack sees three tenths of a robust model, and the scores are mostly those of another one."""
    seen, hidden = honest("trades"), honest("nominal")

    def logits(x):
        if casts:  # to float32, whatever it is given
            x = x.astype(jnp.float32)
        return 0.3 * seen(x) + jax.lax.stop_gradient(hidden(x))

    return logits


def _ripple():
    """A wave that no image shows in its scores, and every gradient."""
    model = honest("trades")

    def logits(x):
        wave = jnp.sum(jnp.sin(2000 * x.reshape(len(x), -1)), axis=1)
        return model(x) + 0.01 * wave[:, None] * jnp.arange(CLASSES)[None]

    return logits


def _another_when_traced():
    """What a program compiles is not what a call answers."""
    called, traced = honest("nominal"), honest("trades")
    return lambda x: (traced if isinstance(x, jax.core.Tracer) else called)(x)


def straight_through():
    """Honest: pixels of 8 bits, whose gradient is passed on as if they were not rounded."""
    model = honest("trades")
    return lambda x: model(x + jax.lax.stop_gradient(jnp.round(255 * x) / 255 - x))


SABOTAGES = {
    "exp scores": _exp_scores, "logits x 1e4": functools.partial(_times, 1e4),
    "logits x 1e-4": functools.partial(_times, 1e-4), "quantised": _quantised,
    "batch norm in training mode": _batch_norm_in_training, "noise when traced": _noise,
    "noise when run": _callback_noise, "bounded": _bounded, "table": _table,
    "nearest in a table": _nearest_in_table, "constant beyond a radius": _constant_beyond,
    "stale weights": _stale, "detached": _detached, "ripple": _ripple,
    "detached, casts": functools.partial(_detached, casts=True), "another when traced": _another_when_traced,
}  # fmt: skip
