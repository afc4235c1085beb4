"""The networks as flax modules: residual, convolutional, the toy in the plane, and 1-Lipschitz ones."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from clustr_jax.models import parts, unit
from clustr_jax.models.convolution import conv2d


class Conv(nn.Module):
    """k x k convolution without bias, zero padding k // 2."""

    features: int
    size: int = 3
    stride: int = 1
    tuned: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]):
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", parts.kernel_init, shape).astype(x.dtype)
        return conv2d(x, kernel, self.stride, self.size // 2, tuned=self.tuned)


class Block(nn.Module):
    """Basic residual block: two 3x3 convolutions, a 1x1 shortcut where the shape changes."""

    features: int
    stride: int
    tuned: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], norm: Callable):
        conv = functools.partial(Conv, self.features, tuned=self.tuned)
        y = nn.relu(norm()(conv(stride=self.stride)(x)))
        y = norm()(conv()(y))
        if x.shape[-1] != self.features or self.stride != 1:
            x = norm()(conv(size=1, stride=self.stride)(x))
        return nn.relu(x + y)


def _describe_block(params, stats, stride):
    """Description of a Block."""

    def conv(i, stride):
        kernel = params[f"Conv_{i}"]["kernel"]
        name = f"BatchNorm_{i}"
        return "conv", parts.folded(kernel, params[name], stats[name]), stride, kernel.shape[0] // 2

    shortcut = [conv(2, stride)] if "Conv_2" in params else []
    return "sum", shortcut, [conv(0, stride), conv(1, 1)]


class ResNet(nn.Module):
    """ResNet for 32x32 images: 3x3 stem, no stem pooling, global average pool after the last ReLU.

    `dtype` is that of the layers in training mode; embeddings, logits and eval mode are float32. `unbiased`:
    the running variances are those of PyTorch. `tuned`: convolutions as in `conv2d`.
    """

    num_classes: int
    stages: tuple[int, ...]
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str = "float32"
    unbiased: bool = False
    tuned: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool):
        x = parts.normalise(x, self.mean, self.std)
        x = parts.reduced(x, self.dtype, train)
        norm = parts.batch_norm(train, x.dtype, self.unbiased)
        x = nn.relu(norm()(Conv(self.width, tuned=self.tuned)(x)))
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                x = Block(self.width * 2**i, 2 if i > 0 and j == 0 else 1, self.tuned)(x, norm)
        embeddings = jnp.mean(parts.full(x), axis=(1, 2))
        return parts.Outputs(parts.head(self.num_classes)(embeddings), embeddings)

    def describe(self, variables: dict, input_shape: tuple[int, ...]):
        """See Net.describe."""
        params, stats = variables["params"], variables["batch_stats"]
        stem = parts.folded(params["Conv_0"]["kernel"], params["BatchNorm_0"], stats["BatchNorm_0"])
        strides = [
            2 if i > 0 and j == 0 else 1 for i, blocks in enumerate(self.stages) for j in range(blocks)
        ]
        names = [f"Block_{i}" for i in range(len(strides))]
        blocks = [_describe_block(params[n], stats[n], s) for n, s in zip(names, strides, strict=True)]
        return [parts.scale(self.std), ("conv", stem, 1, 1), *blocks, ("mean",)]


class CNN(nn.Module):
    """Two convolutions and a hidden layer, for the 8x8 digits; `dtype` and `unbiased` as in ResNet."""

    num_classes: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str = "float32"
    unbiased: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool):
        x = parts.normalise(x, self.mean, self.std)
        x = parts.reduced(x, self.dtype, train)
        norm = parts.batch_norm(train, x.dtype, self.unbiased)
        x = nn.relu(norm()(Conv(self.width)(x)))
        x = nn.relu(norm()(Conv(2 * self.width, stride=2)(x)))
        x = nn.Dense(4 * self.width, kernel_init=parts.linear_init, dtype=x.dtype)(x.reshape(x.shape[0], -1))
        embeddings = parts.full(nn.relu(norm()(x)))
        return parts.Outputs(parts.head(self.num_classes)(embeddings), embeddings)

    def describe(self, variables: dict, input_shape: tuple[int, ...]):
        """See Net.describe."""
        params, stats = variables["params"], variables["batch_stats"]

        def folded(layer, norm):
            return parts.folded(params[layer]["kernel"], params[norm], stats[norm])

        return [
            parts.scale(self.std),
            ("conv", folded("Conv_0", "BatchNorm_0"), 1, 1),
            ("conv", folded("Conv_1", "BatchNorm_1"), 2, 1),
            ("dense", folded("Dense_0", "BatchNorm_2")),
        ]


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
    def __call__(self, x: Float[Array, "B D"], *, train: bool):
        x = parts.normalise(x, self.mean, self.std)
        x = nn.relu(nn.Dense(self.width, kernel_init=parts.linear_init)(x))
        embeddings = nn.Dense(self.width, kernel_init=parts.linear_init)(x)
        return parts.Outputs(parts.head(self.num_classes)(nn.relu(embeddings)), embeddings)

    def describe(self, variables: dict, input_shape: tuple[int, ...]):
        """See Net.describe."""
        params = variables["params"]
        return [parts.scale(self.std), parts.dense(params["Dense_0"]), parts.dense(params["Dense_1"])]


# Times that the sides of an image are halved: they must be multiples of 2^3.
UNIT_STAGES = 3


class UnitNet(nn.Module):
    """A network that moves its embedding by at most |x - x'| / min(std) in l2, by construction.

    Images: three times space-to-depth and `depth` layers with width, 2 width and 4 width channels;
    then dense layers to an embedding of 8 width. `layer` "sll" and "cpl" add to their input (channels
    are padded with zeros, or reduced by a 1 x 1 AOL convolution), "aol" alternates with MaxMin. Points
    go through the dense layers alone. No batch norm; std should be 1.
    """

    num_classes: int
    layer: str
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    depth: int = 2

    @nn.compact
    def __call__(self, x: Float[Array, "B ..."], *, train: bool):
        x = parts.normalise(x, self.mean, self.std)
        for i, (kind, features, size) in enumerate(self.plan(x.shape[1:])):
            name = f"layer_{i}"
            if kind == "space_to_depth":
                x = unit.space_to_depth(x)
            elif kind == "flatten":
                x = unit.as_image(x.reshape(x.shape[0], -1))
            elif kind == "pad":
                x = unit.pad_channels(x, features)
            elif kind == "sll":
                x = unit.SLLConv(features, size, name=name)(x)
            elif kind == "cpl":
                x = unit.CPLConv(features, size, name=name)(x, train)
            else:
                x = unit.AOLConv(features, size, name=name)(x)
                x = unit.maxmin(x) if kind == "aol" else x
        embeddings = x.reshape(x.shape[0], -1)
        return parts.Outputs(parts.head(self.num_classes)(embeddings), embeddings)

    def plan(self, shape: tuple[int, ...]):
        """(kind, features, kernel size) of each step; "reduce" is an AOL convolution without MaxMin."""
        steps, channels, cells = [], shape[-1], math.prod(shape[:-1])
        for i in range(UNIT_STAGES if len(shape) == 3 else 0):
            steps.append(("space_to_depth", 0, 0))
            channels, cells = 4 * channels, cells // 4
            steps += self._layers(channels, self.width * 2**i, self.depth, 3)
            channels = self.width * 2**i
        return [*steps, ("flatten", 0, 0), *self._layers(channels * cells, 8 * self.width, 2, 1)]

    def _layers(self, channels, features, depth, size):
        first = []
        if self.layer != "aol" and channels != features:
            first = [("pad" if channels < features else "reduce", features, 1)]
        return [*first, *[(self.layer, features, size)] * depth]

    def describe(self, variables: dict, input_shape: tuple[int, ...]):
        """See Net.describe."""
        params = variables["params"]
        layers: list[tuple] = [parts.scale(self.std)]
        for i, (kind, _, _) in enumerate(self.plan(input_shape)):
            if kind in ("space_to_depth", "flatten"):
                layers.append((kind,))
            elif kind != "pad":
                name = f"layer_{i}"
                layers.append(unit.describe(params[name], variables["batch_stats"].get(name, {})))
        return layers
