"""What the networks are made of: heads, normalisation, batch norm, and how each is described."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from clustr_jax.models.batch_norm import BatchNorm
from clustr_jax.runtime import mesh


class Outputs(NamedTuple):
    """What a network returns: logits of the linear head, and the embeddings it stands on."""

    logits: Float[Array, "B Y"]
    embeddings: Float[Array, "B E"]


# He et al. 2015, fan-out: what PyTorch ResNets start from.
kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def linear_init(key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32):
    """Uniform(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for linear layers."""
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


EPSILON = 1e-5  # flax's default, which the modules here keep


def batch_norm(train: bool, dtype: DTypeLike | None = None, unbiased: bool = False):
    """Statistics are those of the whole batch, also where a device has a part of it; never in bfloat16."""
    return functools.partial(
        BatchNorm if unbiased else nn.BatchNorm,
        use_running_average=not train,
        momentum=0.9,
        dtype=dtype,
        axis_name=mesh.axis(),
    )


def reduced(x: Float[Array, "B ..."], dtype: str, train: bool):
    """x as bfloat16 where the layers compute so; else as it is (float64 in some checks)."""
    return x.astype(dtype) if train and dtype == "bfloat16" else x


def full(x: Float[Array, "B ..."]):
    """x with at least float32's digits."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# The parameters of the linear head: what is replaced when the classes change.
HEAD = "head"


def head(num_classes: int):
    """The linear head, under the name HEAD."""
    return nn.Dense(num_classes, kernel_init=linear_init, name=HEAD)


def normalise(x: Float[Array, "B ..."], mean: Sequence[float], std: Sequence[float]):
    """(x - mean) / std with one value per channel (the last axis), or one for all."""
    shape = (1,) * (x.ndim - 1) + (-1,)
    return (x - jnp.reshape(jnp.asarray(mean), shape)) / jnp.reshape(jnp.asarray(std), shape)


def scale(std: Sequence[float]):
    """Description of the normalisation."""
    return "scale", 1 / np.asarray(std, np.float64)


def dense(params: dict):
    """Description of a dense layer (the bias moves nothing)."""
    return "dense", np.asarray(params["kernel"])


def folded(matrix: Float[Array | np.ndarray, "... O"], params: dict, stats: dict):
    """The kernel or matrix (outputs last) followed by this batch norm, as one: in float64."""
    factor = np.asarray(params.get("scale", 1.0), np.float64)  # a batch norm may have none
    factor = factor / np.sqrt(np.asarray(stats["var"], np.float64) + EPSILON)
    return np.asarray(matrix, np.float64) * factor
