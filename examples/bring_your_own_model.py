# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Bring your own model
#
# `attacks.pgd` and `attacks.autoattack` take any function from images to logits. Here are three: a Flax linen
# network, a Flax nnx network, and plain arrays. What matters is the same for all of them:
#
# - **Logits**, not probabilities: `[B, Y]`, before the softmax. Probabilities are refused.
# - **Pixels in [0, 1]**: normalisation belongs into your function.
# - **Evaluation mode**: the attack owns no model state. Dropout off, running statistics for batch norm.
# - **Parameters as arguments**: `jax.tree_util.Partial(f, parameters)` is a function whose arrays are traced.
#   New parameters of the same shapes do not compile again. A new lambda or closure does, each time.

# %%
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.tree_util import Partial
from sklearn.linear_model import LogisticRegression

from clustr_jax import attacks, data

x_train, y_train = data.load("digits", "train")
x, y = data.load("digits", "test")
EPS = 0.1  # linf


def report(name, logits_fn):
    """AutoAttack on the first hundred test images; most of the time is compilation."""
    start = time.perf_counter()
    result = attacks.autoattack(jax.random.key(0), logits_fn, x[:100], y[:100], eps=EPS)
    clean = (result.broken_by != "clean").mean()
    seconds = time.perf_counter() - start
    print(f"{name}: clean {clean:.0%}, robust {result.robust.mean():.0%} at eps {EPS} ({seconds:.0f} s)")
    return result


# %% [markdown]
# ## linen


# %%
class Small(nn.Module):
    """Two convolutions with batch norm, and a linear layer."""

    @nn.compact
    def __call__(self, x, train):
        x = (x - 0.3) / 0.4  # pixels in [0, 1] come in
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), strides=2)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


model = Small()
optimiser = optax.adam(3e-3)


@jax.jit
def step(variables, state, x, y):
    def loss(params):
        z, updated = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean(), updated

    gradient, updated = jax.grad(loss, has_aux=True)(variables["params"])
    updates, state = optimiser.update(gradient, state)
    return {"params": optax.apply_updates(variables["params"], updates), **updated}, state


def batches(epochs, size=64):
    rng = np.random.default_rng(0)
    for _ in range(epochs):
        order = rng.permutation(len(y_train))
        for start in range(0, len(order) - size + 1, size):
            index = order[start : start + size]
            yield x_train[index], y_train[index]


variables = model.init(jax.random.key(0), x[:1], train=False)
state = optimiser.init(variables["params"])
early = None
for i, batch in enumerate(batches(epochs=6)):
    variables, state = step(variables, state, *batch)
    early = variables if i == 30 else early


# %% [markdown]
# The right way: a function of (parameters, images) at module level, and a `Partial` of it.


# %%
def linen_logits(variables, x):
    """Evaluation mode: running statistics, nothing mutable."""
    return model.apply(variables, x, train=False)


linen_result = report("linen", Partial(linen_logits, variables))

# %% [markdown]
# Other parameters, the same program: nothing is compiled. With a lambda the attack would work as well, but
# all of it would be compiled again for each new one. A sweep over checkpoints is then mostly compilation.


# %%
def seconds(logits_fn):
    start = time.perf_counter()
    attacks.pgd(
        jax.random.key(0), logits_fn, x[:100], y[:100], eps=EPS, step_size=EPS / 4, steps=10
    ).block_until_ready()
    return time.perf_counter() - start


print(f"Partial, first call          {seconds(Partial(linen_logits, variables)):.2f} s")
print(f"Partial, other parameters    {seconds(Partial(linen_logits, early)):.2f} s")
print(f"lambda                       {seconds(lambda x: linen_logits(variables, x)):.2f} s")
print(f"another lambda, same code    {seconds(lambda x: linen_logits(early, x)):.2f} s")

# %% [markdown]
# Keywords of `Partial` are traced as well, so `Partial(model.apply, variables, train=False)` would make
# `train` an array and fail. That is why `linen_logits` sets it inside.
#
# ## nnx
#
# An nnx model holds its own parameters. `nnx.split` takes it apart into a description, which is compiled in,
# and a state, which is traced.


# %%
class SmallNnx(nnx.Module):
    """The same with a dropout instead of the batch norm."""

    def __init__(self, rngs):
        self.first = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(2 * 2 * 32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first((x - 0.3) / 0.4))
        x = nnx.relu(self.second(x))
        return self.head(self.dropout(x.reshape(len(x), -1)))


network = SmallNnx(nnx.Rngs(0))
trainer = nnx.Optimizer(network, optax.adam(3e-3), wrt=nnx.Param)


@nnx.jit
def nnx_step(network, trainer, x, y):
    def loss(network):
        return optax.softmax_cross_entropy_with_integer_labels(network(x), y).mean()

    trainer.update(network, nnx.grad(loss)(network))


network.train()
for batch in batches(epochs=6):
    nnx_step(network, trainer, *batch)
network.eval()  # before the split: dropout off is a part of the description

description, parameters = nnx.split(network)


def nnx_logits(parameters, x):
    return nnx.merge(description, parameters)(x)


nnx_result = report("nnx", Partial(nnx_logits, parameters))

# %% [markdown]
# ## Plain arrays
#
# Anything that JAX can differentiate will do, here scikit-learn's logistic regression. A function that is
# defined once, like this one, can be given as it is: it compiles once.

# %%
regression = LogisticRegression(max_iter=500).fit(x_train.reshape(len(x_train), -1), y_train)
weights, bias = jnp.asarray(regression.coef_.T, jnp.float32), jnp.asarray(regression.intercept_, jnp.float32)


def linear_logits(x):
    return x.reshape(len(x), -1) @ weights + bias


linear_result = report("logistic regression", linear_logits)

# %% [markdown]
# ## Mistakes that are told
#
# Each of these would make every number meaningless, so it is an error of one line:

# %%
for name, attempt in {
    "probabilities": lambda: attacks.fgsm(
        jax.random.key(0), lambda x: jax.nn.softmax(linear_logits(x)), x, y, eps=EPS
    ),
    "pixels of 0..255": lambda: attacks.fgsm(jax.random.key(0), linear_logits, 255 * x, y, eps=EPS),
    "labels from 1": lambda: attacks.fgsm(jax.random.key(0), linear_logits, x, y + 1, eps=EPS),
}.items():
    try:
        attempt()
    except ValueError as error:
        print(f"{name}: {error}")

# %% [markdown]
# Transfer is free: the adversarial images of one model are inputs of another.

# %%
found = {
    "linen": (linen_result, Partial(linen_logits, variables)),
    "nnx": (nnx_result, Partial(nnx_logits, parameters)),
    "linear": (linear_result, linear_logits),
}
print("rows: made for; columns: accuracy of " + ", ".join(found))
for name, (result, _) in found.items():
    row = [float((f(result.x_adv).argmax(axis=1) == y[:100]).mean()) for _, f in found.values()]
    print(f"{name:8}" + "".join(f"{value:8.0%}" for value in row))
