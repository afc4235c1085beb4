"""conv2d: value and both gradients against loops in float64 and against lax.

Tolerance 1e-5 of the largest entry: sums of at most 9 * 5 * 19 * 49 float32 products, whose
rounding errors (6e-8 each) grow like the square root of the count.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import reference
from clustr_jax.models.convolution import conv2d

# batch, height, width, channels in, channels out, kernel height, kernel width, stride, padding
CASES = [
    (2, 5, 5, 3, 4, 3, 3, 1, 1),
    (2, 6, 6, 3, 4, 3, 3, 2, 1),
    (2, 5, 5, 3, 4, 3, 3, 2, 1),
    (2, 6, 6, 3, 4, 1, 1, 2, 0),
    (2, 5, 7, 2, 1, 1, 1, 1, 0),
    (1, 4, 6, 1, 2, 3, 3, 1, 0),
    (3, 6, 4, 2, 3, 5, 5, 2, 2),
    (1, 7, 7, 1, 1, 3, 3, 3, 1),
]
IDS = ["-".join(map(str, case)) for case in CASES]


close = functools.partial(reference.close, rtol=1e-5)


def data(rng, case):
    n, h, w, c, o, kh, kw, stride, padding = case
    x = rng.normal(size=(n, h, w, c)).astype(np.float32)
    kernel = rng.normal(size=(kh, kw, c, o)).astype(np.float32)
    return x, kernel, stride, padding


def lax_conv(x, kernel, stride, padding):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_value_and_gradients_match_the_loops(case, rng):
    """Forward value, and the gradients of sum(weights * conv) by finite differences.

    The output is linear in x and in the kernel, so finite differences are exact up to 1e-9.
    """
    x, kernel, stride, padding = data(rng, case)
    expected = reference.conv2d(x, kernel, stride, padding)
    weights = rng.normal(size=expected.shape).astype(np.float32)

    def total(x, kernel):
        out = conv2d(x, kernel, stride=stride, padding=padding)
        return jnp.sum(weights * out), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(x, kernel)
    close(out, expected)

    def loops(x, kernel):
        return np.sum(weights * reference.conv2d(x, kernel, stride, padding))

    close(gradients[0], reference.finite_difference(lambda v: loops(v, kernel), x))
    close(gradients[1], reference.finite_difference(lambda v: loops(x, v), kernel))


@pytest.mark.parametrize("batch", [1, 8, 19])
@pytest.mark.parametrize("stride, size", [(1, 3), (2, 3), (2, 1)])
def test_gradients_equal_those_of_lax(batch, stride, size, rng):
    """The layers of a ResNet (3x3 stride 1 and 2, 1x1 stride 2) for batches that no block size divides."""
    case = (batch, 8, 8, 5, 6, size, size, stride, size // 2)
    x, kernel, stride, padding = data(rng, case)

    def gradients(function):
        def total(x, kernel):
            return jnp.sum(jnp.sin(function(x, kernel, stride, padding)))

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(x, kernel)

    value, (dx, dkernel) = gradients(conv2d)
    expected, (expected_dx, expected_dkernel) = gradients(lax_conv)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-3)  # a sum of ~1e3 sines
    close(dx, expected_dx)
    close(dkernel, expected_dkernel)


def test_defaults_are_stride_1_padding_1(rng):
    """conv2d(x, kernel) keeps the size of the image under a 3x3 kernel."""
    x, kernel, _, _ = data(rng, CASES[0])
    close(conv2d(x, kernel), reference.conv2d(x, kernel, 1, 1))


def test_vmap_over_examples_gives_the_gradient_of_each(rng):
    """Per-example kernel gradients under vmap sum to the gradient of the sum."""
    x, kernel, stride, padding = data(rng, CASES[1])

    def total(x, kernel):
        return jnp.sum(jnp.sin(conv2d(x, kernel, stride, padding)))

    each = jax.vmap(lambda row: jax.grad(total, argnums=1)(row[None], kernel))(jnp.asarray(x))
    close(each.sum(axis=0), jax.grad(total, argnums=1)(jnp.asarray(x), jnp.asarray(kernel)))
