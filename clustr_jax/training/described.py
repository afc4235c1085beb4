"""What a finished stage says of its method, so that a process which does not know the method can go on.

A method of a user's own is a row of METHODS only where its file was imported. `loading.load` and the report
need a few facts of it and none of its code: these stand in done.json.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from clustr_jax.training.objectives import METHODS


@dataclasses.dataclass(frozen=True)
class Described:
    """A method without its functions; the fields are those of `objectives.Method`, and what it is called."""

    name: str
    what: str  # the first sentence of its objective
    head: str  # "linear" or "clusters"
    adversary: bool
    warmup: str | None
    source: bool


def of(name: str) -> Described:
    """From METHODS."""
    row = METHODS[name]
    what = first_sentence(row.objective)
    return Described(name, what, row.head, row.adversary is not None, row.warmup, row.source)


def told(name: str | None, done: Mapping[str, Any] | None) -> Described | None:
    """From METHODS where the name is known here, else from a stage's done.json; None where neither says it.

    Without a name it is whatever method done.json is about.
    """
    if name in METHODS:
        return of(name)
    found = (done or {}).get("method")
    names = [field.name for field in dataclasses.fields(Described)]
    if not isinstance(found, Mapping) or not set(names) <= set(found):
        return None  # trained before it was noted
    known = Described(**{field: found[field] for field in names})
    return known if name in (None, known.name) and known.head in ("linear", "clusters") else None


def first_sentence(function: Callable) -> str:
    """The first line of a docstring."""
    lines = (function.__doc__ or "").strip().splitlines()  # python -OO has none
    return lines[0] if lines else getattr(function, "__name__", "")
