"""The promotion of types that the code was written for, whatever JAX is set to."""

import functools
from collections.abc import Callable

import jax


def promoting[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """The function with the promotion that it was written for, even where JAX is told "strict"."""

    @functools.wraps(function)
    def promoted(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return promoted
