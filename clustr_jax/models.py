"""Networks. Pixels in [0, 1] go in, `Outputs(logits, embeddings)` come out; normalisation is the first line.

The only file that imports flax.linen: everything else sees `net.train` and `net.eval`.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clustr_jax.convolution import conv2d
from clustr_jax.errors import UserError


class Outputs(NamedTuple):
    """What a network returns: logits of the linear head, and the embeddings it stands on."""

    logits: Float[Array, "B Y"]
    embeddings: Float[Array, "B E"]


@dataclasses.dataclass(frozen=True)
class Net:
    """An architecture without its parameters: hashable, so that it can be compiled in."""

    module: nn.Module
    input_shape: tuple[int, ...]
    num_classes: int

    def init(self, key: Array) -> dict:
        """Fresh variables {"params", "batch_stats"}."""
        variables = self.module.init(key, jnp.zeros((1, *self.input_shape)), train=False)
        return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

    def train(self, variables: dict, x: Float[Array, "B ..."]) -> tuple[Outputs, dict]:
        """Forward pass with the statistics of this batch; also returns the updated running statistics."""
        outputs, updated = self.module.apply(variables, x, train=True, mutable=["batch_stats"])
        # plain dicts unless flax is configured otherwise
        return outputs, updated.get("batch_stats", {})  # pyright: ignore[reportReturnType]

    def eval(self, variables: dict, x: Float[Array, "B ..."]) -> Outputs:
        """Forward pass with the running statistics: each example on its own."""
        # a pair only where something is mutable
        return self.module.apply(variables, x, train=False)  # pyright: ignore[reportReturnType]


# He et al. 2015, fan-out: what PyTorch ResNets start from.
_kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _linear_init(key, shape, dtype=jnp.float32):
    """Uniform(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for linear layers."""
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


# The parameters of the linear head: what is replaced when the classes change.
HEAD = "head"


def _head(num_classes):
    return nn.Dense(num_classes, kernel_init=_linear_init, name=HEAD)


def _normalise(x, mean, std):
    """(x - mean) / std with one value per channel (the last axis), or one for all."""
    shape = (1,) * (x.ndim - 1) + (-1,)
    return (x - jnp.reshape(jnp.asarray(mean), shape)) / jnp.reshape(jnp.asarray(std), shape)


class Conv(nn.Module):
    """k x k convolution without bias, zero padding k // 2."""

    features: int
    size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, x.shape[-1], self.features)
        return conv2d(x, self.param("kernel", _kernel_init, shape), self.stride, self.size // 2)


class Block(nn.Module):
    """Basic residual block: two 3x3 convolutions, a 1x1 shortcut where the shape changes."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x, norm):
        y = nn.relu(norm()(Conv(self.features, stride=self.stride)(x)))
        y = norm()(Conv(self.features)(y))
        if x.shape[-1] != self.features or self.stride != 1:
            x = norm()(Conv(self.features, size=1, stride=self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet for 32x32 images: 3x3 stem, no stem pooling, global average pool after the last ReLU."""

    num_classes: int
    stages: tuple[int, ...]
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @nn.compact
    def __call__(self, x, *, train):
        x = _normalise(x, self.mean, self.std)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm()(Conv(self.width)(x)))
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                x = Block(self.width * 2**i, 2 if i > 0 and j == 0 else 1)(x, norm)
        embeddings = jnp.mean(x, axis=(1, 2))
        return Outputs(_head(self.num_classes)(embeddings), embeddings)


class CNN(nn.Module):
    """Two convolutions and a hidden layer, for the 8x8 digits."""

    num_classes: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @nn.compact
    def __call__(self, x, *, train):
        x = _normalise(x, self.mean, self.std)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm()(Conv(self.width)(x)))
        x = nn.relu(norm()(Conv(2 * self.width, stride=2)(x)))
        x = nn.Dense(4 * self.width, kernel_init=_linear_init)(x.reshape(x.shape[0], -1))
        embeddings = nn.relu(norm()(x))
        return Outputs(_head(self.num_classes)(embeddings), embeddings)


class MLP(nn.Module):
    """The paper's toy network (section 4.1): 3 layers, `width` hidden units (20 there), no batch norm.

    The embedding is the second hidden layer before any non-linearity, so that features can lie on
    both sides of the origin.
    """

    num_classes: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @nn.compact
    def __call__(self, x, *, train):
        x = _normalise(x, self.mean, self.std)
        x = nn.relu(nn.Dense(self.width, kernel_init=_linear_init)(x))
        embeddings = nn.Dense(self.width, kernel_init=_linear_init)(x)
        return Outputs(_head(self.num_classes)(nn.relu(embeddings)), embeddings)


_MODULES = {
    "resnet18": functools.partial(ResNet, stages=(2, 2, 2, 2)),
    "resnet8": functools.partial(ResNet, stages=(1, 1, 1)),
    "cnn": CNN,
    "mlp": MLP,
}
# `width` 0 in a config means the usual one.
DEFAULT_WIDTH = {"resnet18": 64, "resnet8": 16, "cnn": 32, "mlp": 20}


def build(
    name: str,
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    width: int = 0,
) -> Net:
    """The network called `name` for inputs of this shape; mean and std are per channel, in [0, 1] units."""
    if name not in _MODULES:
        raise UserError(f"unknown model {name!r}; known: {', '.join(_MODULES)}")
    if width < 0:
        raise UserError(f"model.width must be positive (or 0 for the usual one), got {width}")
    if name == "mlp" and len(input_shape) != 1:
        raise UserError(
            f"model mlp takes points, got images of shape {input_shape}; use resnet18, resnet8 or cnn"
        )
    if name != "mlp" and len(input_shape) != 3:
        raise UserError(f"model {name} takes images [H, W, C], got inputs of shape {input_shape}; use mlp")
    module = _MODULES[name](
        num_classes=num_classes,
        width=width or DEFAULT_WIDTH[name],
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
    )
    return Net(module, tuple(input_shape), num_classes)
