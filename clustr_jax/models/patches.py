"""Convolutions and their gradients as one matrix product: with the patches under the kernel as its rows."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from clustr_jax.models import blocks


def forward(
    x: Float[Array, "N H W C"], kernel: Float[Array, "k k C O"], stride: int, padding: int
) -> Float[Array, "N H2 W2 O"]:
    """The zero-padded convolution."""
    k, features = kernel.shape[0], kernel.shape[-1]
    return blocks.each(lambda x: _patches(x, k, stride, padding) @ kernel.reshape(-1, features), x)


def input_gradient(
    dy: Float[Array, "N H2 W2 O"],
    kernel: Float[Array, "k k C O"],
    size: tuple[int, ...],
    stride: int,
    padding: int,
) -> Float[Array, "N H W C"]:
    """d loss / d x: what each pixel of dy gives to its patch, added up. `size` is (H, W)."""
    k, channels = kernel.shape[0], kernel.shape[2]

    def part(dy):
        given = (dy @ kernel.reshape(-1, kernel.shape[-1]).T).reshape(*dy.shape[:3], k, k, channels)

        def placed(i, j):
            config = [(0, 0, 0)]
            for tap, n, m in zip((i, j), size, dy.shape[1:3], strict=True):
                low = tap - padding
                config.append((low, n - low - ((m - 1) * stride + 1), stride - 1))
            return lax.pad(given[:, :, :, i, j], jnp.zeros((), dy.dtype), [*config, (0, 0, 0)])

        return sum((placed(i, j) for i in range(k) for j in range(k)), jnp.zeros((), dy.dtype))

    return blocks.each(part, dy)


def kernel_gradient(
    x: Float[Array, "N H W C"], dy: Float[Array, "N H2 W2 O"], k: int, stride: int, padding: int
) -> Float[Array, "k k C O"]:
    """d loss / d kernel."""

    def part(x, dy):
        found = _patches(x, k, stride, padding)
        return jnp.einsum("nhwp,nhwo->po", found, dy)

    return blocks.total(part, x, dy).reshape(k, k, x.shape[-1], dy.shape[-1])


def _patches(x, k, stride, padding):
    """[N, H2, W2, k k C]"""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    x = lax.optimization_barrier(x)
    rows, columns = (_places(n, k, stride) for n in x.shape[1:3])
    return jnp.concatenate([x[:, row, column] for row in rows for column in columns], axis=-1)


def _places(n, k, stride):
    """The places of a padded side of n pixels that each tap meets."""
    last = (n - k) // stride * stride
    return [slice(tap, tap + last + 1, stride) for tap in range(k)]
