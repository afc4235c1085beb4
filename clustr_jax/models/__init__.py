"""Networks. Pixels in [0, 1] go in, `Outputs(logits, embeddings)` come out; normalisation is the first line.

The only package that imports flax.linen: everything else sees `net.train`, `net.eval`, and for
Lipschitz bounds `net.describe`, the layers as plain arrays (`clustr_jax.lipschitz` has their kinds).
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from clustr_jax.models import unit
from clustr_jax.models.batch_norm import BatchNorm
from clustr_jax.models.convolution import conv2d
from clustr_jax.runtime import mesh
from clustr_jax.runtime.errors import UserError, nearest


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

    def describe(self, variables: dict) -> list[tuple]:
        """The layers from pixels to embeddings in eval mode, batch norm folded in, for `lipschitz.bound`."""
        return self.module.describe(variables, self.input_shape)  # pyright: ignore[reportAttributeAccessIssue]


# He et al. 2015, fan-out: what PyTorch ResNets start from.
_kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _linear_init(key, shape, dtype=jnp.float32):
    """Uniform(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for linear layers."""
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


_BATCH_NORM_EPSILON = 1e-5  # flax's default, which the modules here keep


def _batch_norm(train, dtype=None, unbiased=False):
    """Statistics are those of the whole batch, also where a device has a part of it; never in bfloat16."""
    return functools.partial(
        BatchNorm if unbiased else nn.BatchNorm,
        use_running_average=not train,
        momentum=0.9,
        dtype=dtype,
        axis_name=mesh.axis(),
    )


def _reduced(x, dtype, train):
    """x as bfloat16 where the layers compute so; else as it is (float64 in some checks)."""
    return x.astype(dtype) if train and dtype == "bfloat16" else x


def _full(x):
    """x with at least float32's digits."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# The parameters of the linear head: what is replaced when the classes change.
HEAD = "head"


def _head(num_classes):
    return nn.Dense(num_classes, kernel_init=_linear_init, name=HEAD)


def _normalise(x, mean, std):
    """(x - mean) / std with one value per channel (the last axis), or one for all."""
    shape = (1,) * (x.ndim - 1) + (-1,)
    return (x - jnp.reshape(jnp.asarray(mean), shape)) / jnp.reshape(jnp.asarray(std), shape)


def _scale(std):
    """Description of the normalisation."""
    return "scale", 1 / np.asarray(std, np.float64)


def _dense(params):
    """Description of a dense layer (the bias moves nothing)."""
    return "dense", np.asarray(params["kernel"])


def _folded(matrix, params, stats):
    """The kernel or matrix (outputs last) followed by this batch norm, as one: in float64."""
    factor = np.asarray(params["scale"], np.float64)
    factor = factor / np.sqrt(np.asarray(stats["var"], np.float64) + _BATCH_NORM_EPSILON)
    return np.asarray(matrix, np.float64) * factor


class Conv(nn.Module):
    """k x k convolution without bias, zero padding k // 2."""

    features: int
    size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", _kernel_init, shape).astype(x.dtype)
        return conv2d(x, kernel, self.stride, self.size // 2)


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


def _describe_block(params, stats, stride):
    """Description of a Block."""

    def conv(i, stride):
        kernel = params[f"Conv_{i}"]["kernel"]
        name = f"BatchNorm_{i}"
        return "conv", _folded(kernel, params[name], stats[name]), stride, kernel.shape[0] // 2

    shortcut = [conv(2, stride)] if "Conv_2" in params else []
    return "sum", shortcut, [conv(0, stride), conv(1, 1)]


class ResNet(nn.Module):
    """ResNet for 32x32 images: 3x3 stem, no stem pooling, global average pool after the last ReLU.

    `dtype` is that of the layers in training mode; embeddings, logits and eval mode are float32. `unbiased`:
    the running variances are those of PyTorch.
    """

    num_classes: int
    stages: tuple[int, ...]
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str = "float32"
    unbiased: bool = False

    @nn.compact
    def __call__(self, x, *, train):
        x = _normalise(x, self.mean, self.std)
        x = _reduced(x, self.dtype, train)
        norm = _batch_norm(train, x.dtype, self.unbiased)
        x = nn.relu(norm()(Conv(self.width)(x)))
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                x = Block(self.width * 2**i, 2 if i > 0 and j == 0 else 1)(x, norm)
        embeddings = jnp.mean(_full(x), axis=(1, 2))
        return Outputs(_head(self.num_classes)(embeddings), embeddings)

    def describe(self, variables, input_shape):
        """See Net.describe."""
        params, stats = variables["params"], variables["batch_stats"]
        stem = _folded(params["Conv_0"]["kernel"], params["BatchNorm_0"], stats["BatchNorm_0"])
        strides = [
            2 if i > 0 and j == 0 else 1 for i, blocks in enumerate(self.stages) for j in range(blocks)
        ]
        names = [f"Block_{i}" for i in range(len(strides))]
        blocks = [_describe_block(params[n], stats[n], s) for n, s in zip(names, strides, strict=True)]
        return [_scale(self.std), ("conv", stem, 1, 1), *blocks, ("mean",)]


class CNN(nn.Module):
    """Two convolutions and a hidden layer, for the 8x8 digits; `dtype` and `unbiased` as in ResNet."""

    num_classes: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str = "float32"
    unbiased: bool = False

    @nn.compact
    def __call__(self, x, *, train):
        x = _normalise(x, self.mean, self.std)
        x = _reduced(x, self.dtype, train)
        norm = _batch_norm(train, x.dtype, self.unbiased)
        x = nn.relu(norm()(Conv(self.width)(x)))
        x = nn.relu(norm()(Conv(2 * self.width, stride=2)(x)))
        x = nn.Dense(4 * self.width, kernel_init=_linear_init, dtype=x.dtype)(x.reshape(x.shape[0], -1))
        embeddings = _full(nn.relu(norm()(x)))
        return Outputs(_head(self.num_classes)(embeddings), embeddings)

    def describe(self, variables, input_shape):
        """See Net.describe."""
        params, stats = variables["params"], variables["batch_stats"]

        def folded(layer, norm):
            return _folded(params[layer]["kernel"], params[norm], stats[norm])

        return [
            _scale(self.std),
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
    def __call__(self, x, *, train):
        x = _normalise(x, self.mean, self.std)
        x = nn.relu(nn.Dense(self.width, kernel_init=_linear_init)(x))
        embeddings = nn.Dense(self.width, kernel_init=_linear_init)(x)
        return Outputs(_head(self.num_classes)(nn.relu(embeddings)), embeddings)

    def describe(self, variables, input_shape):
        """See Net.describe."""
        params = variables["params"]
        return [_scale(self.std), _dense(params["Dense_0"]), _dense(params["Dense_1"])]


# Times that the sides of an image are halved: they must be multiples of 2^3.
_UNIT_STAGES = 3


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
    def __call__(self, x, *, train):
        x = _normalise(x, self.mean, self.std)
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
        return Outputs(_head(self.num_classes)(embeddings), embeddings)

    def plan(self, shape):
        """(kind, features, kernel size) of each step; "reduce" is an AOL convolution without MaxMin."""
        steps, channels, cells = [], shape[-1], math.prod(shape[:-1])
        for i in range(_UNIT_STAGES if len(shape) == 3 else 0):
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

    def describe(self, variables, input_shape):
        """See Net.describe."""
        params = variables["params"]
        layers: list[tuple] = [_scale(self.std)]
        for i, (kind, _, _) in enumerate(self.plan(input_shape)):
            if kind in ("space_to_depth", "flatten"):
                layers.append((kind,))
            elif kind != "pad":
                name = f"layer_{i}"
                layers.append(unit.describe(params[name], variables["batch_stats"].get(name, {})))
        return layers


_MODULES = {
    "resnet18": functools.partial(ResNet, stages=(2, 2, 2, 2)),
    "resnet8": functools.partial(ResNet, stages=(1, 1, 1)),
    "cnn": CNN,
    "mlp": MLP,
    "lip_sll": functools.partial(UnitNet, layer="sll"),
    "lip_aol": functools.partial(UnitNet, layer="aol"),
    "lip_cpl": functools.partial(UnitNet, layer="cpl"),
}
# Networks that are 1-Lipschitz by construction (times 1 / min(std)): their certificates are not vacuous.
UNIT = ("lip_sll", "lip_aol", "lip_cpl")
# Networks that can compute in bfloat16, and have batch norm.
_MIXED = ("resnet18", "resnet8", "cnn")
# `width` 0 in a config means the usual one.
DEFAULT_WIDTH = {
    "resnet18": 64,
    "resnet8": 16,
    "cnn": 32,
    "mlp": 20,
    "lip_sll": 32,
    "lip_aol": 32,
    "lip_cpl": 32,
}


def build(
    name: str,
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    width: int = 0,
    dtype: str = "float32",
    running_variance: str = "biased",
) -> Net:
    """The network called `name` for inputs of this shape; mean and std are per channel, in [0, 1] units.

    `dtype` "bfloat16" computes the layers so in training mode (resnet18, resnet8, cnn), for accelerators.
    `running_variance` "unbiased" averages the variances that PyTorch does (`fidelity.running_variance`).
    """
    if name not in _MODULES:
        raise UserError(f"unknown model {name!r}{nearest(name, _MODULES)}; known: {', '.join(_MODULES)}")
    if width < 0:
        raise UserError(f"model.width must be positive (or 0 for the usual one), got {width}")
    if name == "mlp" and len(input_shape) != 1:
        raise UserError(
            f"model mlp takes points, got images of shape {input_shape}; use resnet18, resnet8 or cnn"
        )
    if name not in ("mlp", *UNIT) and len(input_shape) != 3:
        raise UserError(f"model {name} takes images [H, W, C], got inputs of shape {input_shape}; use mlp")
    if name in UNIT and len(input_shape) == 3 and any(side % 2**_UNIT_STAGES for side in input_shape[:2]):
        raise UserError(
            f"model {name} halves the image {_UNIT_STAGES} times: its sides must be multiples of "
            f"{2**_UNIT_STAGES}, got {input_shape}"
        )
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"model.dtype must be float32 or bfloat16, got {dtype!r}")
    if dtype != "float32" and name not in _MIXED:
        raise UserError(f"model {name} computes in float32 only; choose one of {', '.join(_MIXED)}")
    module = _MODULES[name](
        **({"dtype": dtype, "unbiased": running_variance == "unbiased"} if name in _MIXED else {}),
        num_classes=num_classes,
        width=width or DEFAULT_WIDTH[name],
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
    )
    return Net(module, tuple(input_shape), num_classes)


def name_of(net: Net) -> str:
    """The name that `build` knows this network by."""
    for name, make in _MODULES.items():
        kind, fixed = (make.func, make.keywords) if isinstance(make, functools.partial) else (make, {})
        if type(net.module) is kind and all(getattr(net.module, k) == v for k, v in fixed.items()):
            return name
    raise UserError(f"{type(net.module).__name__} is not one of the networks {', '.join(_MODULES)}")
