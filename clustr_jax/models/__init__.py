"""Networks. Pixels in [0, 1] go in, `Outputs(logits, embeddings)` come out; normalisation is the first line.

The only package that imports flax.linen: everything else sees `net.train`, `net.eval`, and for
Lipschitz bounds `net.describe`, the layers as plain arrays (`clustr_jax.lipschitz` has their kinds).
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from clustr_jax.models.fast import FastNet
from clustr_jax.models.networks import CNN, MLP, UNIT_STAGES, ResNet, UnitNet
from clustr_jax.models.orthogonal import OrthogonalNet
from clustr_jax.models.parts import HEAD, Outputs
from clustr_jax.runtime.errors import UserError, nearest

__all__ = [
    "CNN",
    "DEFAULT_WIDTH",
    "HEAD",
    "MLP",
    "UNIT",
    "FastNet",
    "Net",
    "OrthogonalNet",
    "Outputs",
    "ResNet",
    "UnitNet",
    "build",
    "name_of",
]


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

    @property
    def tuned(self) -> "Net":
        """The same network for training steps: by faster forms, with other rounding (docs/performance.md).

        Evaluation never sees it: an attack's figure must not hang on these digits.
        """
        if not hasattr(self.module, "tuned"):
            return self
        return dataclasses.replace(self, module=self.module.clone(tuned=True))

    def fitted(self, variables: dict, images: Float[np.ndarray, "N ..."]) -> dict:
        """Fresh variables with what a network takes from training images (pixels in [0, 1]), if anything."""
        fit = getattr(self.module, "fitted", None)
        return variables if fit is None else fit(variables, images)

    def describe(self, variables: dict) -> list[tuple]:
        """The layers from pixels to embeddings in eval mode, batch norm folded in, for `lipschitz.bound`."""
        return self.module.describe(variables, self.input_shape)  # pyright: ignore[reportAttributeAccessIssue]


_MODULES = {
    "resnet18": functools.partial(ResNet, stages=(2, 2, 2, 2)),
    "resnet8": functools.partial(ResNet, stages=(1, 1, 1)),
    "fast": functools.partial(FastNet, whitened=True),
    "fast_plain": functools.partial(FastNet, whitened=False),
    "cnn": CNN,
    "mlp": MLP,
    "lip_sll": functools.partial(UnitNet, layer="sll"),
    "lip_aol": functools.partial(UnitNet, layer="aol"),
    "lip_cpl": functools.partial(UnitNet, layer="cpl"),
    "lip_orthogonal": OrthogonalNet,
}
# Networks that are 1-Lipschitz by construction (times 1 / min(std)): their certificates are not vacuous.
UNIT = ("lip_sll", "lip_aol", "lip_cpl", "lip_orthogonal")
# Of networks that cannot take any image: the smallest side.
LEAST_SIDE = {"fast": 9, "fast_plain": 8}
# Networks that can compute in bfloat16, and all that have batch norm. bfloat16 spoils the gradients of the
# fast ones: a max pool passes on one value, and which one it is depends on digits that bfloat16 lacks.
_MIXED = ("resnet18", "resnet8", "cnn")
_NORMED = (*_MIXED, "fast", "fast_plain")
# `width` 0 in a config means the usual one.
DEFAULT_WIDTH = {
    "resnet18": 64,
    "resnet8": 16,
    "fast": 64,
    "fast_plain": 64,
    "cnn": 32,
    "mlp": 20,
    "lip_sll": 32,
    "lip_aol": 32,
    "lip_cpl": 32,
    "lip_orthogonal": 64,
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
    least = LEAST_SIDE.get(name, 1)
    if len(input_shape) == 3 and min(input_shape[:2]) < least:
        raise UserError(
            f"model {name} halves the image three times: its sides must be {least} or more, got {input_shape}"
        )
    if name in UNIT and len(input_shape) == 3 and any(side % 2**UNIT_STAGES for side in input_shape[:2]):
        raise UserError(
            f"model {name} halves the image {UNIT_STAGES} times: its sides must be multiples of "
            f"{2**UNIT_STAGES}, got {input_shape}"
        )
    channels = input_shape[-1]
    if (
        len(mean) not in (1, channels)
        or len(std) not in (1, channels)
        or not all(0 < s < math.inf for s in std)
    ):
        raise UserError(
            f"model.mean and model.std must have 1 or {channels} values for inputs of shape {input_shape}, "
            f"and std positive ones; got {tuple(mean)} and {tuple(std)}"
        )
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"model.dtype must be float32 or bfloat16, got {dtype!r}")
    if dtype != "float32" and name not in _MIXED:
        raise UserError(f"model {name} computes in float32 only; choose one of {', '.join(_MIXED)}")
    module = _MODULES[name](
        **({"dtype": dtype} if name in _MIXED else {}),
        **({"unbiased": running_variance == "unbiased"} if name in _NORMED else {}),
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
