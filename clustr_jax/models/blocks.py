"""Functions of a batch of images, computed for some of them at a time: what they need stays in the cache."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

# Images of a block.
IMAGES = 8


def size(batch: int) -> int:
    """The divisor of the batch that is nearest to IMAGES, as a ratio."""
    divisors = (d for d in range(1, batch + 1) if batch % d == 0)
    return min(divisors, key=lambda d: abs(math.log(d / IMAGES)))


def each(f: Callable, x: Array) -> Array:
    """f(x), whose rows depend on their rows of x only."""
    if x.shape[0] <= IMAGES:
        return f(x)
    y = lax.map(f, x.reshape(-1, size(x.shape[0]), *x.shape[1:]))
    return y.reshape(x.shape[0], *y.shape[2:])


def total(f: Callable, x: Array, dy: Array) -> Array:
    """The sum of f(x, dy) over blocks of images."""
    count = size(x.shape[0])

    def add(i, before):
        # slices of the arrays as they are: given as blocks, the compiler makes them a second time
        return before + f(*(lax.dynamic_slice_in_dim(a, i * count, count) for a in (x, dy)))

    one = jax.eval_shape(f, x[:count], dy[:count])
    return lax.fori_loop(0, x.shape[0] // count, add, jnp.zeros(one.shape, one.dtype))
