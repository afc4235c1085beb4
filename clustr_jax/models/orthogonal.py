"""An orthogonal network: its layers keep every l2 norm, so that nothing is lost on the way through them.

A layer is an orthogonal convolution on the torus, y = Q^T S x + b. S moves each channel by at most one pixel
around the image, a permutation of its numbers. Q mixes the channels of a pixel by a matrix of orthonormal
columns. Its symbol at a frequency w is Q^T diag(exp(-i w s_c)), unitary at every w. Li et al. (2019, BCOP)
compose orthogonal convolutions of blocks that are Q1 S Q2; shifts between orthogonal matrices are those of
LipNeXt. On a CPU a layer costs one matrix product, and no transform of an image.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from clustr_jax.models import parts, unit

# Images are halved while they can be, so many times at the most: to 2 x 2 pixels from 32 x 32.
_HALVINGS = 4
# Channels grow with each halving up to so many times the width.
_WIDEST = 4
# (rows, columns) that an eighth of the channels each is moved by; the others stay.
_MOVES = ((1, 0), (-1, 0), (0, 1), (0, -1))


def spread_out(key: Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32) -> Float[Array, "N M"]:
    """Start of `unit.cayley`: angles all over the circle, and columns that read all rows alike."""
    n, m = shape
    free = jax.random.normal(key, shape, dtype)
    lower = 1 / math.sqrt(max(n - m, 1))
    return free * jnp.where(jnp.arange(n) < m, 1 / math.sqrt(m), lower)[:, None].astype(free.dtype)


def shifted(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Four eighths of the channels moved by one pixel in four directions around the image: a permutation."""
    part = max(x.shape[-1] // 8, 1)
    pieces = [jnp.roll(x[..., i * part : (i + 1) * part], move, axis=(1, 2)) for i, move in enumerate(_MOVES)]
    return jnp.concatenate([*pieces, x[..., len(_MOVES) * part :]], axis=-1)


def fold(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """|x| on the first half of the channels: gradients keep their norm.

    MaxMin in other coordinates: max and min of (a, b) are (s + |d|) / sqrt(2) and (s - |d|) / sqrt(2) for
    s, d = (a +- b) / sqrt(2), a rotation that the matrices before and after can do.
    """
    channels = x.shape[-1]
    first = (jnp.arange(channels) < channels // 2).reshape((1,) * (x.ndim - 1) + (-1,))
    return jnp.where(first, jnp.abs(x), x)


class Orthogonal(nn.Module):
    """Q^T S x + b (the module's head says why its norm is 1), to at most as many channels."""

    features: int
    shift: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]):
        free = self.param("free", spread_out, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = shifted(x) if self.shift else x
        return jnp.matmul(x, unit.cayley(free)) + bias[None, None, None, :]


class OrthogonalNet(nn.Module):
    """Moves its embedding by at most |x - x'| / min(std) in l2: layers that keep norms, and reductions.

    Images are halved by space-to-depth as often as they can be (at most four times), each time followed by a
    reduction to width, 2 width, 4 width, ... channels (zeros are added where there are fewer) and `depth`
    layers with `fold`; then a reduction to an embedding of 4 width. Points have two layers of 4 width.
    """

    num_classes: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    depth: int = 4

    @nn.compact
    def __call__(self, x: Float[Array, "B ..."], *, train: bool):
        x = parts.normalise(x, self.mean, self.std)
        for i, (kind, features, _) in enumerate(self.plan(x.shape[1:])):
            if kind == "space_to_depth":
                x = unit.space_to_depth(x)
            elif kind == "flatten":
                x = unit.as_image(x.reshape(x.shape[0], -1))
            elif kind == "pad":
                x = unit.pad_channels(x, features)
            else:
                x = Orthogonal(features, shift=kind == "orthogonal", name=f"layer_{i}")(x)
                x = fold(x) if kind == "orthogonal" else x
        embeddings = x.reshape(x.shape[0], -1)
        return parts.Outputs(parts.head(self.num_classes)(embeddings), embeddings)

    def plan(self, shape: tuple[int, ...]) -> list[tuple[str, int, int]]:
        """(kind, features, kernel size) of each step, as UnitNet has them; "reduce" moves no channels."""
        steps, (*size, channels) = [], shape
        for i in range(_HALVINGS if len(shape) == 3 else 0):
            if any(side % 2 for side in size):
                break
            size, features = [side // 2 for side in size], self.width * min(2**i, _WIDEST)
            steps += [("space_to_depth", 0, 0), *_fitted(4 * channels, features)]
            steps += [("orthogonal", features, 1)] * self.depth
            channels = features
        features = _WIDEST * self.width
        steps += [("flatten", 0, 0), *_fitted(math.prod(size) * channels, features)]
        return steps if len(shape) == 3 else [*steps, *[("orthogonal", features, 1)] * 2]

    def describe(self, variables: dict, input_shape: tuple[int, ...]):
        """See Net.describe."""
        layers: list[tuple] = [parts.scale(self.std)]
        for i, (kind, *_) in enumerate(self.plan(input_shape)):
            if kind in ("space_to_depth", "flatten"):
                layers.append((kind,))
            elif kind != "pad":
                layers.append(unit.describe(variables["params"][f"layer_{i}"], {}))
        return layers


def _fitted(channels, features):
    if channels == features:
        return []
    return [("pad" if channels < features else "reduce", features, 1)]
