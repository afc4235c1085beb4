"""2-d convolution whose gradients are fast on CPU.

XLA's CPU backend rewrites a convolution for its fast kernels only when the dimension numbers are
the canonical ones, and inside a loop (`lax.scan`, `while_loop`) it does not rewrite at all: the
gradients that JAX derives are then up to 20 times slower. Here the CPU gradients are written with
canonical convolutions and matrix products, so that a compiled epoch or attack loop costs what its
passes cost. Other platforms keep the derivatives of `lax.conv_general_dilated`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_NHWC = ("NHWC", "HWIO", "NHWC")
# Images of one im2col block of the kernel gradient: small enough to stay in the cache.
_BLOCK = 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv2d(
    x: Float[Array, "N H W C"], kernel: Float[Array, "k k C O"], stride: int = 1, padding: int = 1
) -> Float[Array, "N H2 W2 O"]:
    """Zero-padded convolution with a square kernel, the same stride and padding in both directions."""
    return _convolve(x, kernel, stride, padding)


def _convolve(x, kernel, stride, padding):
    pads = ((padding, padding), (padding, padding))
    return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=_NHWC)


def _forward(x, kernel, stride, padding):
    return _convolve(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, residuals, dy):
    x, kernel = residuals

    def default(x, kernel, dy):
        return jax.vjp(lambda a, b: _convolve(a, b, stride, padding), x, kernel)[1](dy)

    def cpu(x, kernel, dy):
        return (
            _input_gradient(dy, kernel, x.shape[1:3], stride, padding),
            _kernel_gradient(x, dy, kernel.shape[0], stride, padding),
        )

    return lax.platform_dependent(x, kernel, dy, cpu=cpu, default=default)


conv2d.defvjp(_forward, _backward)


def _input_gradient(dy, kernel, size, stride, padding):
    """d loss / d x as an ordinary convolution of dy with the flipped kernel."""
    k = kernel.shape[0]
    flipped = jnp.transpose(kernel[::-1, ::-1], (0, 1, 3, 2))
    if k == 1 and padding == 0:  # the product first, then the zeros between the pixels
        return _spread(_convolve(dy, flipped, 1, 0), size, stride, before=0, after=0)
    # A convolution with dilated input runs on the slow path: put the zeros in by hand.
    before, after = k - 1 - padding, padding
    return _convolve(_spread(dy, size, stride, before, after), flipped, 1, 0)


def _spread(dy, size, stride, before, after):
    """`stride - 1` zeros between the pixels of dy, and borders, so that a VALID convolution gives `size`."""
    config = [(0, 0, 0)]
    for n_in, n_out in zip(size, dy.shape[1:3], strict=True):
        config.append((before, n_in + after - ((n_out - 1) * stride + 1), stride - 1))
    return lax.pad(dy, jnp.zeros((), dy.dtype), [*config, (0, 0, 0)])


def _kernel_gradient(x, dy, k, stride, padding):
    """d loss / d kernel: im2col of a block of images times dy, summed over blocks."""
    batch, channels = x.shape[0], x.shape[-1]
    rows, columns, features = dy.shape[1:]
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    precise = jnp.promote_types(x.dtype, jnp.float32)  # bfloat16 sums of many terms would be coarse
    block = next(b for b in range(min(_BLOCK, batch), 0, -1) if batch % b == 0)

    def add(total, xy):
        image, gradient = xy
        height, width = (rows - 1) * stride + 1, (columns - 1) * stride + 1
        patches = [
            image[:, i : i + height : stride, j : j + width : stride] for i in range(k) for j in range(k)
        ]
        patches = jnp.concatenate(patches, axis=-1).reshape(-1, k * k * channels)
        product = lax.dot_general(
            patches, gradient.reshape(-1, features), (((0,), (0,)), ((), ())),
            preferred_element_type=precise,
        )  # fmt: skip
        return total + product, None

    blocks = (x.reshape(-1, block, *x.shape[1:]), dy.reshape(-1, block, *dy.shape[1:]))
    total, _ = lax.scan(add, jnp.zeros((k * k * channels, features), precise), blocks)
    return total.reshape(k, k, channels, features).astype(x.dtype)
