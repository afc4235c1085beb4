"""A block in which JAX traces everything anew."""

import contextlib
import itertools
from typing import Any

import jax

# JAX's caches of traces go by its settings, too: within another value of this one, all is traced anew.
_EPOCH: Any = jax.make_user_context(None)
_EPOCHS = itertools.count()


def traced_anew() -> contextlib.AbstractContextManager:
    """A block in which nothing is taken from JAX's caches of traces: jit, checkpoint, scan and cond keep what
    the functions that they were given captured at their first call."""
    return _EPOCH(next(_EPOCHS))
