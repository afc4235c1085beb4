"""2-d convolution whose gradients are fast on CPU.

XLA's CPU backend rewrites a convolution for its fast kernels only when the dimension numbers are the
canonical ones. Inside a loop (`lax.scan`, `while_loop`) it does not rewrite at all, and the gradients that
JAX derives are up to 20 times slower. Here the CPU gradients are written with canonical convolutions and
matrix products, so that a compiled epoch or attack loop costs what its passes cost. Other platforms keep the
derivatives of `lax.conv_general_dilated`. Training steps take Winograd's kernel gradient where it pays.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from clustr_jax.models import winograd

_NHWC = ("NHWC", "HWIO", "NHWC")
# Images of one block of the kernel gradient: small enough to stay in the cache.
_BLOCK = 8


def conv2d(
    x: Float[Array, "N H W C"],
    kernel: Float[Array, "k k C O"],
    stride: int = 1,
    padding: int = 1,
    *,
    tuned: bool = False,
) -> Float[Array, "N H2 W2 O"]:
    """Zero-padded convolution with a square kernel, the same stride and padding in both directions.

    Its gradients have the `jax.default_matmul_precision` of the call, not that of the moment in which JAX
    traces them, when a `with` around the call is over. `tuned`, for training steps: on a CPU, in float32 and
    without a precision asked for, the kernel's gradient is Winograd's where that is faster. Its rounding
    errors are some ten times larger.
    """
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if x.dtype != kernel.dtype:  # of images and weights one may be float64, where that is switched on
        kind = jnp.promote_types(x.dtype, kernel.dtype)
        x, kernel = x.astype(kind), kernel.astype(kind)
    tuned = tuned and precision is None and x.dtype == kernel.dtype == jnp.float32
    return _conv2d(
        x, kernel, stride, padding, precision, tuned and winograd.pays(kernel.shape, stride, padding)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _conv2d(x, kernel, stride, padding, precision, by_tiles):
    return _convolve(x, kernel, stride, padding, precision)


def _convolve(x, kernel, stride, padding, precision):
    pads = ((padding, padding), (padding, padding))
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=_NHWC, precision=precision
    )


def _forward(x, kernel, stride, padding, precision, by_tiles):
    return _convolve(x, kernel, stride, padding, precision), (x, kernel)


def _backward(stride, padding, precision, by_tiles, residuals, dy):
    x, kernel = residuals

    def default(x, kernel, dy):
        return jax.vjp(lambda a, b: _convolve(a, b, stride, padding, precision), x, kernel)[1](dy)

    def cpu(x, kernel, dy):
        return (
            _input_gradient(dy, kernel, x.shape[1:3], stride, padding, precision),
            _winograd_gradient(x, dy, padding)
            if by_tiles
            else _kernel_gradient(x, dy, kernel.shape[0], stride, padding, precision),
        )

    return lax.platform_dependent(x, kernel, dy, cpu=cpu, default=default)


_conv2d.defvjp(_forward, _backward)


def _input_gradient(dy, kernel, size, stride, padding, precision):
    """d loss / d x as an ordinary convolution of dy with the flipped kernel."""
    k = kernel.shape[0]
    if k == 1 and padding == 0:  # the product first, then the zeros between the pixels
        product = jnp.matmul(dy, kernel[0, 0].T, precision=precision)
        return _spread(product, size, stride, before=0, after=0)
    flipped = jnp.transpose(kernel[::-1, ::-1], (0, 1, 3, 2))
    # A convolution with dilated input, as JAX derives it, runs on the slow path: put the zeros in by hand.
    before, after = k - 1 - padding, padding
    return _convolve(_spread(dy, size, stride, before, after), flipped, 1, 0, precision)


def _spread(dy, size, stride, before, after):
    """`stride - 1` zeros between the pixels of dy, and borders, so that a VALID convolution gives `size`."""
    config = [(0, 0, 0)]
    for n_in, n_out in zip(size, dy.shape[1:3], strict=True):
        config.append((before, n_in + after - ((n_out - 1) * stride + 1), stride - 1))
    return lax.pad(dy, jnp.zeros((), dy.dtype), [*config, (0, 0, 0)])


def _kernel_gradient(x, dy, k, stride, padding, precision):
    """d loss / d kernel: x, its channels as batch, convolved with dy as the kernel; summed over blocks."""
    pointwise = k == 1 and padding == 0  # then it is a matrix product
    if pointwise:
        x, stride = x[:, ::stride, ::stride], 1
    precise = jnp.promote_types(x.dtype, jnp.float32)  # bfloat16 sums of many terms would be coarse
    # the last tap ends where the padded image ends, or before
    pads = [
        (padding, (m - 1) * stride + k - n - padding)
        for n, m in zip(x.shape[1:3], dy.shape[1:3], strict=True)
    ]

    def part(images, gradient):
        if pointwise:
            product = jnp.einsum(
                "nhwc,nhwo->co", images, gradient, precision=precision, preferred_element_type=precise
            )
            return product[:, None, None]
        return lax.conv_general_dilated(
            images.transpose(3, 1, 2, 0),
            gradient.transpose(1, 2, 0, 3),
            (1, 1),
            pads,
            rhs_dilation=(stride, stride),
            dimension_numbers=_NHWC,
            precision=precision,
            preferred_element_type=precise,
        )

    start = jnp.zeros((x.shape[-1], k, k, dy.shape[-1]), precise)
    return _summed(part, start, x, dy).transpose(1, 2, 0, 3).astype(x.dtype)


def _winograd_gradient(x, dy, padding):
    """`_kernel_gradient` of a 3 x 3 kernel and stride 1 by Winograd's tiles."""
    start = jnp.zeros((winograd.POINTS**2, x.shape[-1], dy.shape[-1]), x.dtype)
    return winograd.kernel(_summed(functools.partial(winograd.products, padding=padding), start, x, dy))


def _summed(part, start, x, dy):
    """start + the sum of part(images, gradient) over blocks of images."""
    block = min(_BLOCK, x.shape[0])
    blocks = -(-x.shape[0] // block)
    x, dy = (_filled(a, blocks * block) for a in (x, dy))

    def add(i, total):
        # slices of the arrays as they are: given as blocks, the compiler makes them a second time
        return total + part(*(lax.dynamic_slice_in_dim(a, i * block, block) for a in (x, dy)))

    return lax.fori_loop(0, blocks, add, start)


def _filled(a, size):
    """`size` images: those of zeros at the end add nothing."""
    return jnp.pad(a, ((0, size - a.shape[0]), (0, 0), (0, 0), (0, 0)))
