"""Layers whose Lipschitz constant in l2 is 1, and what goes between them.

AOL (Prach & Lampert 2022) and SLL (Araujo et al. 2023) are so by construction, up to float32; CPL (Meunier
et al. 2022) divides by a running estimate of a norm, which comes from below. Weights are rescaled once
per forward pass of a batch. What the estimate and the rounding left open is what
`clustr_jax.lipschitz` bounds: a certificate never takes the 1 on trust.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from clustr_jax.models.convolution import conv2d

# Added to the sums that a kernel is divided by: a filter of zeros stays zeros, all others only shrink.
_TINY = 1e-12


def maxmin(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """Sorts neighbouring pairs of channels (an odd last channel is left alone): keeps every norm."""
    even = x.shape[-1] // 2 * 2
    a, b = x[..., :even:2], x[..., 1:even:2]
    return jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b), x[..., even:]], axis=-1)


def space_to_depth(x: Float[Array, "B H W C"], block: int = 2) -> Float[Array, "B H2 W2 C2"]:
    """Each block x block square of pixels becomes one pixel with block^2 times the channels: an isometry."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // block, block, width // block, block, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // block, width // block, -1)


def pad_channels(x: Float[Array, "... C"], channels: int) -> Float[Array, "... C2"]:
    """Channels of zeros up to `channels` (unchanged if there are as many): an isometry."""
    missing = max(channels - x.shape[-1], 0)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def correlation_sums(
    kernel: Float[Array, "k k C O"], weight: Float[Array, "O"] | None = None
) -> Float[Array, "O"]:
    """sum over filters j and shifts s of |<filter i, filter j shifted by s>| w_j / w_i.

    These are the row sums of |C C^T| for the convolution C on an infinite grid. By Schur's test C scaled by 1
    / sqrt(sums) has norm at most 1 there, and so has its zero-padded restriction to any image.
    """
    k = kernel.shape[0]
    filters = jnp.transpose(kernel, (3, 0, 1, 2))
    products = jnp.abs(conv2d(filters, kernel, 1, k - 1))  # [O, 2k-1, 2k-1, O]
    sums = jnp.sum(products, axis=(1, 2))
    return jnp.sum(sums if weight is None else sums * weight[None, :] / weight[:, None], axis=1)


def orthogonal_centre(key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32):
    """Orthonormal rows or columns at the centre of the kernel, zeros around it: what AOL leaves as it is."""
    k = shape[0]
    matrix = nn.initializers.orthogonal()(key, shape[2:], dtype)
    return jnp.zeros(shape, dtype).at[k // 2, k // 2].set(matrix)


class AOLConv(nn.Module):
    """k x k convolution of norm at most 1, zero padding k // 2, and a bias.

    The kernel is scaled by 1 / sqrt(correlation sums) on its smaller side, channels in or out: only
    there can the scaled kernel become an isometry (or the transpose of one).
    """

    features: int
    size: int = 3

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]):
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = aol(self.param("kernel", orthogonal_centre, shape))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return jnp.add(conv2d(x, kernel, 1, self.size // 2), bias[None, None, None, :])


def aol(kernel: Float[Array, "k k C O"]) -> Float[Array, "k k C O"]:
    """The kernel with its smaller side scaled so that the convolution's norm is at most 1."""
    swap = kernel.shape[2] < kernel.shape[3]
    if swap:  # the adjoint: same norm
        kernel = jnp.transpose(kernel, (0, 1, 3, 2))
    kernel = kernel / jnp.sqrt(correlation_sums(kernel) + _TINY)[None, None, None, :]
    return jnp.transpose(kernel, (0, 1, 3, 2)) if swap else kernel


class SLLConv(nn.Module):
    """x - 2 W^T T^-1 relu(W x + b) with T = diag(sum_j |W W^T|_ij q_j / q_i), q = exp(a): norm at most 1.

    W is a k x k convolution to `features` hidden channels with zero padding k // 2, k odd.
    """

    features: int
    size: int = 3

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]):
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.xavier_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        scale = sll_scale(kernel, self.param("log_q", nn.initializers.zeros, (self.features,)))
        hidden = nn.relu(jnp.add(conv2d(x, kernel, 1, self.size // 2), bias[None, None, None, :]))
        adjoint = jnp.transpose(kernel[::-1, ::-1], (0, 1, 3, 2))
        # on the adjoint's few weights rather than on every pixel
        return x - conv2d(hidden, 2 * scale[None, None, :, None] * adjoint, 1, self.size // 2)


def sll_scale(kernel: Float[Array, "k k C O"], log_q: Float[Array, "O"]) -> Float[Array, "O"]:
    """The diagonal of T^-1."""
    return 1 / (correlation_sums(kernel, jnp.exp(log_q)) + _TINY)


class CPLConv(nn.Module):
    """x - 2 W^T relu(W x + b) / |W|^2: norm 1 where |W| is not underestimated.

    |W| is that of the circular convolution on a torus of image + padding, as in
    `clustr_jax.lipschitz.conv`, by power iteration; its vector is kept with the batch statistics and
    improved by `_ITERATIONS` per training step. Far less conservative than SLL's T, so that a short
    training gets beyond nearly linear layers.
    """

    features: int
    size: int = 3

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool):
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.orthogonal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        torus = (1, x.shape[1] + self.size // 2, x.shape[2] + self.size // 2, x.shape[3])
        top = self.variable("batch_stats", "top", lambda: jax.random.normal(jax.random.key(0), torus))
        if train:
            top.value = jax.lax.stop_gradient(power_iteration(kernel, top.value))
        hidden = nn.relu(jnp.add(conv2d(x, kernel, 1, self.size // 2), bias[None, None, None, :]))
        adjoint = jnp.transpose(kernel[::-1, ::-1], (0, 1, 3, 2))
        return x - conv2d(hidden, 2 * cpl_scale(kernel, top.value) * adjoint, 1, self.size // 2)


# Power iterations per training step; the kernels move little in one.
_ITERATIONS = 2


def _circular(x, kernel):
    """Convolution on the torus."""
    pad = kernel.shape[0] // 2
    return conv2d(jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="wrap"), kernel, 1, 0)


def _unit_vector(x):
    return x / (jnp.sqrt(jnp.sum(jnp.square(x))) + _TINY)


def power_iteration(kernel: Float[Array, "k k C O"], x: Float[Array, "1 H W C"]) -> Float[Array, "1 H W C"]:
    """`_ITERATIONS` steps towards the direction that the circular convolution stretches most."""
    adjoint = jnp.transpose(kernel[::-1, ::-1], (0, 1, 3, 2))
    for _ in range(_ITERATIONS):
        x = _unit_vector(_circular(_circular(x, kernel), adjoint))
    return x


def cpl_scale(kernel: Float[Array, "k k C O"], top: Float[Array, "1 H W C"]) -> Float[Array, ""]:
    """1 / |W v|^2 for the unit vector v along `top`."""
    return 1 / (jnp.sum(jnp.square(_circular(_unit_vector(top), kernel))) + _TINY)


def cayley(free: Float[Array, "N M"]) -> Float[Array, "N M"]:
    """A matrix with orthonormal columns, N >= M, from any matrix (Trockman & Kolter 2021, section 4).

    free = [U; V], A = U - U^T + V^T V, Z = (I + A)^-1: [2 Z - I; -2 V Z].
    """
    m = free.shape[1]
    upper, lower = free[:m], free[m:]
    skew = upper - upper.T
    z = inverse(jnp.eye(m, dtype=free.dtype) + skew + lower.T @ lower)
    return jnp.concatenate([2 * z - jnp.eye(m, dtype=free.dtype), -2 * lower @ z])


@jax.custom_vjp
def inverse(matrix: Float[Array, "M M"]) -> Float[Array, "M M"]:
    """Its gradient is two products, where JAX would solve once more."""
    return jnp.linalg.inv(matrix)


def _inverse_forward(matrix):
    z = jnp.linalg.inv(matrix)
    return z, z


inverse.defvjp(_inverse_forward, lambda z, dz: (-(z.T @ dz @ z.T),))


def as_image(x: Float[Array, "B C"]) -> Float[Array, "B 1 1 C"]:
    """Vectors as images of one pixel, so that a dense layer is a 1 x 1 convolution."""
    return x[:, None, None, :]


def describe(params: dict, stats: dict) -> tuple:
    """What `clustr_jax.lipschitz` needs to know of a layer with these parameters and statistics.

    Computed in float32 as a Classifier's forward pass does (also on devices whose default is less), so that
    the bound is that of the network as it runs.
    """
    if "free" in params:
        with jax.default_matmul_precision("highest"):
            return "pointwise", np.asarray(cayley(jnp.asarray(params["free"])))
    kernel = jnp.asarray(params["kernel"])
    size = kernel.shape[0]
    with jax.default_matmul_precision("highest"):
        if "log_q" in params:
            return "sll", np.asarray(kernel), np.asarray(sll_scale(kernel, params["log_q"])), size // 2
        if "top" in stats:
            scale = jnp.full(kernel.shape[3], cpl_scale(kernel, stats["top"]))
            return "sll", np.asarray(kernel), np.asarray(scale), size // 2
        return "conv", np.asarray(aol(kernel)), 1, size // 2
