"""A small network that learns CIFAR-10 in minutes, after cifar10-airbench (Jordan 2024, arXiv 2404.00498).

Whitened first convolution, three groups of two 3 x 3 convolutions that each halve the image, GELU, batch
norm without a scale. Its recipe is that of `configs.common.fast`.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from clustr_jax.models import parts
from clustr_jax.models.batch_norm import BatchNorm
from clustr_jax.models.convolution import conv2d
from clustr_jax.runtime import mesh

# Side of the patches that the first convolution whitens, and what keeps its weakest directions finite.
PATCH = 2
_RIDGE = 5e-4
# The embedding is divided by this, so that the head starts with small logits.
_SHRINK = 9.0
# Sup of |GELU'|, taken at x = sqrt(2): Phi(sqrt 2) + sqrt(2) phi(sqrt 2), rounded up.
GELU_LIPSCHITZ = 1.12891


def whitening(patches: Float[np.ndarray, "N F"]) -> Float[np.ndarray, "F F2"]:
    """Columns w and -w, one pair per principal direction of the patches, of variance 1 where it is not tiny.

    In float64: the eigenvectors of the second moments, each divided by sqrt(eigenvalue + 5e-4).
    """
    patches = np.asarray(patches, np.float64)
    values, vectors = np.linalg.eigh(patches.T @ patches / len(patches))
    columns = vectors[:, ::-1] / np.sqrt(np.maximum(values[::-1], 0.0) + _RIDGE)
    return np.concatenate([columns, -columns], axis=1)


def patches_of(images: Float[np.ndarray, "N H W C"]) -> Float[np.ndarray, "M F"]:
    """All PATCH x PATCH patches, flattened as a kernel [k, k, C] is."""
    height, width = images.shape[1] - PATCH + 1, images.shape[2] - PATCH + 1
    rows = [images[:, i : i + height, j : j + width] for i in range(PATCH) for j in range(PATCH)]
    return np.stack(rows, axis=3).reshape(-1, PATCH * PATCH * images.shape[3])


class Whitening(nn.Module):
    """2 x 2 convolution without padding. Its bias is trained, its kernel is not: `FastNet.fitted` sets it."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]):
        channels = x.shape[-1]
        features = 2 * PATCH * PATCH * channels

        def unfitted():  # what whitens white noise
            eye = np.eye(features // 2)
            columns = np.concatenate([eye, -eye], axis=1, dtype=np.float32)
            return jnp.asarray(columns.reshape(PATCH, PATCH, channels, features))

        kernel = self.variable("batch_stats", "kernel", unfitted).value
        bias = self.param("bias", nn.initializers.zeros, (features,))
        x = conv2d(x, jax.lax.stop_gradient(kernel).astype(x.dtype), 1, 0)
        return x + bias.astype(x.dtype)[None, None, None, :]


def _dirac_init(key, shape, dtype=jnp.float32):
    """Uniform(-1/sqrt(fan_in), 1/sqrt(fan_in)), and the first filters pass their channel on unchanged."""
    size, _, channels, features = shape
    limit = 1 / math.sqrt(size * size * channels)
    kernel = jax.random.uniform(key, shape, dtype, -limit, limit)
    same = min(channels, features)
    identity = jnp.zeros((size, size, channels, same), dtype)
    identity = identity.at[size // 2, size // 2, jnp.arange(same), jnp.arange(same)].set(1.0)
    return kernel.at[..., :same].set(identity)


class DiracConv(nn.Module):
    """3 x 3 convolution without bias, zero padding 1, that starts near the identity."""

    features: int
    tuned: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]):
        kernel = self.param("kernel", _dirac_init, (3, 3, x.shape[-1], self.features))
        return conv2d(x, kernel.astype(x.dtype), 1, 1, tuned=self.tuned)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: Float[Array, "B H W C"], window: int) -> Float[Array, "B H2 W2 C"]:
    """Maxima of the window x window squares; rows and columns that fill none are left out.

    The gradient goes to the first of equal maxima, as in PyTorch. XLA's own gradient of a pooling window is
    about fifty times slower on CPU than these slices.
    """
    return functools.reduce(jnp.maximum, _places(x, window))


def _places(x, window):
    """x at each place of its squares: window^2 of [B, H2, W2, C]."""
    height, width = (n // window * window for n in x.shape[1:3])
    return [x[:, i:height:window, j:width:window] for i in range(window) for j in range(window)]


def _max_pool_forward(x, window):
    y, places = max_pool(x, window), _places(x, window)
    # kept for the gradient, in place of x: the place of the first maximum, or none (of NaN)
    first = jnp.full(y.shape, len(places), jnp.uint8 if len(places) < 256 else jnp.int32)
    for number, part in reversed(list(enumerate(places))):
        first = jnp.where(part == y, jnp.asarray(number, first.dtype), first)
    return y, (first, jnp.zeros((0, *x.shape[1:3])))


def _max_pool_backward(window, residuals, dy):
    first, like = residuals

    def squares(a):
        """Each pixel as a square of window^2 equal ones."""
        batch, height, width, channels = a.shape
        a = jnp.broadcast_to(a[:, :, None, :, None], (batch, height, window, width, window, channels))
        return a.reshape(batch, height * window, width * window, channels)

    big = squares(dy)
    # counted in 32 bits: in 8 a side of more than 256 would begin again in the middle of a square
    row, column = (jax.lax.broadcasted_iota(jnp.int32, big.shape, axis) % window for axis in (1, 2))
    place = (row * window + column).astype(first.dtype)
    dx = jnp.where(squares(first) == place, big, 0)
    missing = [(0, n - m) for n, m in zip(like.shape[1:], dx.shape[1:3], strict=True)]
    return (jnp.pad(dx, ((0, 0), *missing, (0, 0))),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


@jax.custom_vjp
def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x Phi(x), with Phi the normal distribution, for training steps: two passes in place of about ten.

    It keeps x alone for its gradient, Phi(x) + x phi(x), and computes Phi from erf, in both: for x far below
    zero the rounding error is that of 1, not that of Phi.
    """
    return x * _normal(x)


def _normal(x):
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_backward(x, dy):
    x = jax.lax.optimization_barrier(x)  # else the compiler keeps Phi(x) from the forward pass as well
    density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return ((_normal(x) + x * density) * dy,)


quick_gelu.defvjp(lambda x: (quick_gelu(x), x), _gelu_backward)


class FastNet(nn.Module):
    """Square images [H, H, C] -> an embedding of 2 width features, what the last pool leaves.

    `whitened` False: an ordinary 3 x 3 convolution comes first, for adversarial training (whitening
    amplifies the directions that images hardly vary in). `unbiased` and `tuned` as in ResNet.
    """

    num_classes: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    unbiased: bool = False
    whitened: bool = True
    tuned: bool = False

    @property
    def groups(self) -> tuple[int, ...]:
        """Channels of the three groups."""
        return self.width, 2 * self.width, 2 * self.width

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool):
        x = parts.normalise(x, self.mean, self.std)
        norm = functools.partial(
            BatchNorm if self.unbiased else nn.BatchNorm,
            use_running_average=not train,
            momentum=0.6,
            use_scale=False,
            epsilon=parts.EPSILON,
            dtype=x.dtype,
            axis_name=mesh.axis(),
        )
        gelu = quick_gelu if self.tuned else functools.partial(nn.gelu, approximate=False)
        conv = functools.partial(DiracConv, tuned=self.tuned)
        if self.whitened:
            x = gelu(Whitening(name="first")(x))
        else:
            x = gelu(norm(name="first_norm")(conv(2 * PATCH * PATCH * x.shape[-1], name="first")(x)))
        for i, features in enumerate(self.groups):
            x = max_pool(conv(features, name=f"conv_{i}_0")(x), 2)
            x = gelu(norm(name=f"norm_{i}_0")(x))
            x = gelu(norm(name=f"norm_{i}_1")(conv(features, name=f"conv_{i}_1")(x)))
        x = max_pool(x, min(x.shape[1:3]))
        embeddings = parts.full(x).reshape(x.shape[0], -1) / _SHRINK
        return parts.Outputs(parts.head(self.num_classes)(embeddings), embeddings)

    def fitted(self, variables: dict, images: Float[np.ndarray, "N H W C"]):
        """The variables with the first kernel that whitens these images (pixels in [0, 1])."""
        if not self.whitened:
            return variables
        pixels: Any = np.asarray(images, np.float64)
        x = np.asarray(parts.normalise(pixels, self.mean, self.std))
        stats = variables["batch_stats"]
        kernel = whitening(patches_of(x)).reshape(stats["first"]["kernel"].shape)
        first = {**stats["first"], "kernel": jnp.asarray(kernel, jnp.float32)}
        return {**variables, "batch_stats": {**stats, "first": first}}

    def describe(self, variables: dict, input_shape: tuple[int, ...]):
        """See Net.describe."""
        params, stats = variables["params"], variables["batch_stats"]
        gelu, layers = ("scale", np.array([GELU_LIPSCHITZ])), [parts.scale(self.std)]

        def conv(name, norm):
            return "conv", parts.folded(params[name]["kernel"], params[norm], stats[norm]), 1, 1

        if self.whitened:
            layers += [("conv", np.asarray(stats["first"]["kernel"]), 1, 0), gelu]
            side = min(input_shape[:2]) - PATCH + 1
        else:
            layers += [conv("first", "first_norm"), gelu]
            side = min(input_shape[:2])
        for i in range(len(self.groups)):
            # the norm's factor is positive: it can go before the pool
            layers += [conv(f"conv_{i}_0", f"norm_{i}_0"), ("max_pool", 2, 2), gelu]
            layers += [conv(f"conv_{i}_1", f"norm_{i}_1"), gelu]
            side //= 2
        return [*layers, ("max_pool", side, side), ("flatten",), ("scale", np.array([1 / _SHRINK]))]
