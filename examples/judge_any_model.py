# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Judge any model
#
# One call for a network of your own: how robust is it, and can the number be believed? Here it is a Flax nnx
# network; linen, equinox, haiku, Keras 3, HuggingFace Flax and plain functions go the same way.

# %%
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from IPython.display import display

import clustr_jax
from clustr_jax import data

x_train, y_train = data.load("digits", "train")
x, y = data.load("digits", "test")  # float32 [N, H, W, C] in [0, 1], and labels [N]

# %% [markdown]
# ## A network
#
# Trained for a moment, on images that a single gradient step has changed (fast adversarial training).


# %%
class Small(nnx.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, rngs):
        self.first = nnx.Conv(1, 12, (3, 3), strides=2, rngs=rngs)
        self.second = nnx.Conv(12, 24, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(2 * 2 * 24, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first((x - 0.3) / 0.4))  # pixels in [0, 1] come in: normalisation belongs here
        return self.head(nnx.relu(self.second(x)).reshape(len(x), -1))


def loss(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def step(model, trainer, x, y):
    slope = jax.grad(lambda moved: loss(model, moved, y))(x)
    moved = jnp.clip(x + TRAINED_AT * jnp.sign(slope), 0, 1)
    trainer.update(model, nnx.grad(loss)(model, moved, y))


TRAINED_AT = 0.1
model = Small(nnx.Rngs(0))
trainer = nnx.Optimizer(model, optax.adam(5e-3), wrt=nnx.Param)
rng = np.random.default_rng(0)
for _ in range(150):
    index = rng.integers(0, len(y_train), 128)
    step(model, trainer, x_train[index], y_train[index])
model.eval()

# %% [markdown]
# ## One call
#
# The model as it is, images, labels and a radius. Nothing is configured: the protocol attacks every image
# that is right, twenty-nine checks look for reasons to distrust it, and the verdict says both. Most of the
# time here is compilation. A folder would make it resumable.

# %%
j = clustr_jax.judge(model, x[:64], y[:64], eps=0.1, progress=False)
display(j)

# %% [markdown]
# The same in text, and its parts. `broken_by` names what broke each image first; `x_adv` has the images.

# %%
print(j)
print()
for name, found in j.attacks.items():
    print(f"{name:10} leaves {found['robust']:.1%}   {found['gradient_evaluations']:6,} gradients")

# %% [markdown]
# ## How far?
#
# The figure is of one radius. The nearest adversarial image that any attack has found gives the others: an
# upper bound at each.

# %%
print("radius    accuracy, at most")
for radius, accuracy in j.content["distances"]["curve"]:
    print(f"{radius:<9.3f} {accuracy:.1%}")
print(f"an image that is right breaks within {np.median(j.distances[j.distances > 0]):.3f} (median)")

# %% [markdown]
# ## What a check says
#
# Each has a number, what it looked at, and its limit; one that warns or fails says what to do. With 64 images
# the interval is wide, and a check says so.

# %%
for check in j.checks:
    if check["advice"]:
        print(f"{check['status']} {check['number']}: {check['name']} (limit {check['limit']})")
        print(f"  {check['advice']}")

# %% [markdown]
# ## A bundle that anyone can check
#
# The figure, the page and every adversarial image. `python -m clustr_jax.verify FOLDER` measures them again
# with NumPy alone; with the model it asks for its answers as well.

# %%
with tempfile.TemporaryDirectory() as folder:
    place = j.save(folder)
    print(*sorted(path.name for path in pathlib.Path(place).iterdir()))
    verified = clustr_jax.verify(place, model)
    print(f"{len(verified.lines)} lines; {'verified' if verified.ok else 'NOT verified'}")

# %% [markdown]
# ## A model that hides
#
# The same network behind pixels of nine levels: the rounding has no gradient. It gets no number:

# %%
hidden = clustr_jax.judge(lambda v: model(jnp.round(8 * v) / 8), x[:64], y[:64], eps=0.1, progress=False)
print(hidden)
