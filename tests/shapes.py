"""While tests run, every array annotation of clustr_jax is checked: dtype, rank, and sizes that share a name.

beartype checks the annotations that jaxtyping made; others (float, Callable, ...) are documentation, for a
traced number is no float. Nothing of this happens to users.
"""

import typing

import jaxtyping
from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def _of_arrays(annotation) -> bool:
    if isinstance(annotation, str):
        return False
    parts = typing.get_args(annotation)
    if parts:
        return any(_of_arrays(part) for part in parts)
    return isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray)


def arrays_only(what):
    """beartype for a function, as far as its annotations are of arrays."""
    if isinstance(what, type):
        return what
    kept = {name: a for name, a in getattr(what, "__annotations__", {}).items() if _of_arrays(a)}
    if not kept:
        return what
    what.__annotations__ = kept
    return _check(what)
