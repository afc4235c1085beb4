"""While tests run, every array annotation of clustr_jax is checked: dtype, rank, and sizes that share a name.

beartype checks the annotations that jaxtyping made; others (float, Callable, ...) are documentation, for a
traced number is no float. Arrays of NumPy and of JAX pass for each other. Tests that hand over wrong
arrays on purpose are marked wrong_arrays. Nothing of this happens to users. To be imported before clustr_jax.
"""

import types
import typing

import jax
import jaxtyping
import numpy as np
from beartype import beartype


def _of_arrays(annotation):
    """The annotation for arrays of NumPy and of JAX alike; None if it is not of arrays at all."""
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return annotation.dtype[jax.Array | np.ndarray | np.generic, annotation.dim_str]
    parts = typing.get_args(annotation)
    found = [_of_arrays(part) for part in parts]
    if not any(part is not None for part in found):
        return None
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        # None, a string, ...: what is no array has to be accepted whatever it is
        kept = [part if part is not None else other for part, other in zip(found, parts, strict=True)]
        return typing.Union[tuple(kept)]  # noqa: UP007
    if typing.get_origin(annotation) is tuple and Ellipsis not in parts:
        return tuple[tuple(typing.Any if part is None else part for part in found)]
    return None


def arrays_only(what):
    """beartype for a function, as far as its annotations are of arrays.

    Not for a constructor: a pytree is also made of other leaves than arrays (specs, shapes, None).
    """
    if isinstance(what, type) or what.__name__ == "__init__":
        return what
    kept = {name: _of_arrays(a) for name, a in getattr(what, "__annotations__", {}).items()}
    what.__annotations__ = {name: a for name, a in kept.items() if a is not None}
    return beartype(what) if what.__annotations__ else what


jaxtyping.install_import_hook("clustr_jax", "shapes.arrays_only")
