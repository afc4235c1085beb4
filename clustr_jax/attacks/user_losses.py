"""A user's loss function as a compiled-in setting: under the name of what it computes at this call.

JAX would know it by its identity, and keep the arrays and numbers that it captured at its first call.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from clustr_jax.attacks import kept
from clustr_jax.attacks.attack_losses import AttackLoss, Untargeted
from clustr_jax.attacks.names import Writer
from clustr_jax.attacks.scheduled_attack import Attack
from clustr_jax.runtime.errors import UserError, first_line
from clustr_jax.runtime.retracing import traced_anew

_OWN = "clustr_jax."


@dataclasses.dataclass(frozen=True)
class Named:
    """`call` is compared by its name: two of the same name compute the same."""

    name: bytes
    call: Callable = dataclasses.field(compare=False, repr=False)

    def __call__(self, logits: Float[Array, "B Y"], y: Array):
        """The loss of each example [B]."""
        return self.call(logits, y)


def current(loss_fn: Callable, rows: int, classes: int | None, y: Array | np.ndarray) -> Callable:
    """`loss_fn` as it is now, for logits [rows, classes] and these labels [B] or probabilities [B, Y].

    Where it captures something else than at an earlier call it is another setting, and compiled anew.
    UserError where it is no function of these, does not return [B], or has a jit inside with old arrays.
    """
    if not callable(loss_fn):
        raise UserError(f"loss_fn must be a function (logits [B, Y], y) -> [B], got {loss_fn!r}")
    if classes is None or (getattr(loss_fn, "__module__", None) or "").startswith(_OWN):
        return loss_fn
    logits = jax.ShapeDtypeStruct((rows, classes), jnp.float32)
    labels = jax.ShapeDtypeStruct((rows, *np.shape(y)[1:]), y.dtype)
    try:
        # a new function each time: JAX would otherwise give the trace of the last time
        closed = jax.make_jaxpr(lambda logits, y: loss_fn(logits, y))(logits, labels)
    except Exception as error:
        raise UserError(
            f"loss_fn fails on logits of shape {logits.shape} and y of {labels.shape}: "
            f"{first_line(error, 200)}"
        ) from error
    shapes = [getattr(a, "shape", None) for a in closed.out_avals]
    if shapes != [(rows,)]:
        told = ", ".join(map(str, shapes))
        hint = "; leave out the mean or the sum" if shapes == [()] else ""
        raise UserError(f"loss_fn must return the loss of each image, [B], here ({rows},), got {told}{hint}")
    if any(isinstance(c, jax.core.Tracer) for c in closed.consts):
        return loss_fn
    writer = _written(closed, loss_fn, logits, labels)
    if writer.cached:
        with traced_anew():
            fresh = jax.make_jaxpr(lambda logits, y: loss_fn(logits, y))(logits, labels)
            same = _written(fresh, loss_fn, logits, labels).hash.digest() == writer.hash.digest()
        if not same:
            raise UserError(f"loss_fn has a jax.jit inside (or a scan, a cond) that keeps what it {kept.OLD}")
    if writer.jitted:
        _check_own_jit(loss_fn, logits, np.resize(np.asarray(y), labels.shape))
    return Named(writer.hash.digest(), loss_fn)


def _written(closed, loss_fn, logits, labels) -> Writer:
    """Its name; what a derivative of its own captures is a part of it."""
    writer = Writer()
    writer.closed(closed, arguments=set())
    if writer.ruled:
        with contextlib.suppress(Exception):  # told when it is differentiated
            backward = jax.make_jaxpr(lambda z, y: jax.grad(lambda z: jnp.sum(loss_fn(z, y)))(z))
            writer.closed(backward(logits, labels), arguments=set())
    return writer


def of_attack(attack: Attack, rows: int, classes: int, y: Array | np.ndarray):
    """An attack whose user's losses, if it has any, are those of now."""
    loss = getattr(attack, "loss", None)
    if not isinstance(loss, AttackLoss):
        return attack
    options = tuple(
        Untargeted(current(option.loss_fn, rows, classes, y)) if isinstance(option, Untargeted) else option
        for option in loss.options
    )
    return attack.replace(loss=loss.replace(options=options))


def _check_own_jit(loss_fn, logits, y):
    z = np.random.default_rng(0).normal(size=logits.shape).astype(np.float32)
    found = np.asarray(loss_fn(z, y), np.float64)
    try:
        with jax.disable_jit():
            plain = np.asarray(loss_fn(z, y), np.float64)
    except Exception:  # what cannot be run without jit cannot be compared
        return
    if not np.allclose(found, plain, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise UserError(
            "loss_fn has a jax.jit inside that holds arrays, and answers with old ones; leave that jit out, "
            "or call jax.clear_caches() after a change"
        )
