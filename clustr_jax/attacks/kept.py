"""What JAX keeps from one trace of a model to the next, and whether that is what the model holds by now.

jax.jit, jax.checkpoint, lax.scan, while_loop and cond know a function again by its identity: traced a second
time they answer with what it captured at the first.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clustr_jax.attacks.names import ClosedJaxpr, name_of
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.retracing import traced_anew

OLD = (
    "captured at an earlier call, and answers with old ones; pass arrays and numbers to it as arguments, or "
    "call jax.clear_caches() after a change"
)


def trace(call: Callable, values: Any, images: jax.ShapeDtypeStruct) -> ClosedJaxpr:
    """The trace of `call(values, x)`."""
    # a new function each time: JAX would otherwise give the trace of the last time
    return jax.make_jaxpr(lambda values, x: call(values, x))(values, images)


def is_fickle(name: bytes, call: Callable, values: Any, images: jax.ShapeDtypeStruct) -> bool:
    """Whether it is another function when it is traced again."""
    return name_of(trace(call, values, images), values, images).digest != name


def check(
    closed: ClosedJaxpr, name: bytes, call: Callable, values: Any, images: jax.ShapeDtypeStruct
) -> bool:
    """UserError where JAX has answered with a part that it kept, and that is another one by now.

    So does the model outside of an attack: whoever changed what it captures does not know. True where the
    function is fickle instead.
    """
    with traced_anew():
        fresh = trace(call, values, images)
        same = name_of(fresh, values, images).digest == name
    if same and all(map(_is_same, closed.consts, fresh.consts)):
        return False
    if not same and is_fickle(name, call, values, images):
        return True
    raise UserError(
        f"logits_fn has a jax.jit inside (or a jax.checkpoint, lax.scan, lax.cond) that keeps what it {OLD}"
    )


def _is_same(a, b) -> bool:
    if a is b:
        return True
    keys = [hasattr(v, "dtype") and jnp.issubdtype(v.dtype, jax.dtypes.prng_key) for v in (a, b)]
    if any(keys):
        return all(keys) and bool(np.array_equal(jax.random.key_data(a), jax.random.key_data(b)))
    return bool(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=np.asarray(a).dtype.kind in "fc"))
