"""Whether a model's gradient is that of the function it computes, along directions that it does not choose.

A branch behind `stop_gradient` moves the scores and not the gradient. Along the gradient itself that cannot
be seen, for there the model has shown all that it shows; along random signs it can. Everything is computed
in the model's own precision, with differences over a part of the radius, so a model that casts to float32,
or rounds its pixels and passes the gradient on, is looked at as well.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from clustr_jax import losses
from clustr_jax.attacks import attack_losses
from clustr_jax.evaluation.check import FAIL, SKIP, WARN, Check, Measure, decided

# Steps of the differences: parts of the radius, and the most that each may be in levels of 8-bit pixels. A
# network bends within the radius, and one that rounds its pixels stands still below a level.
STEPS = ((1 / 16, 0.5), (1 / 8, 1.0), (1 / 4, 4.0))
_DIRECTIONS = 6
# From here on a gradient is not that of the function; honest networks, also in bfloat16, and those that round
# their pixels to 8 bits stay below for nine images of ten (tests/sabotaged.py).
_WRONG = 0.6
_LIMITS = ((0.25, FAIL), (0.1, WARN))
# Differences below so many roundings of the largest score say nothing.
_ROUNDINGS = 64


def errors(
    key: Array,
    model: Partial,
    x: Float[np.ndarray, "B ..."],
    y: np.ndarray,
    *,
    eps: float,
    norm: str,
    bounds: tuple[float, float] | None,
) -> Float[np.ndarray, "B"]:
    """Relative error of the margin's derivatives by its gradient, for the step that agrees best; [B].

    0 is agreement, 1 a gradient that has nothing to do with the function. NaN where the differences are
    rounding for every step.
    """
    width = 1.0 if bounds is None else bounds[1] - bounds[0]
    per_pixel = eps if norm == "linf" else eps / np.sqrt(np.prod(x.shape[1:]))
    found = []
    for own, (part, levels) in zip(jax.random.split(key, len(STEPS)), STEPS, strict=True):
        step = jnp.float32(min(part * per_pixel, levels * width / 255))
        found.append(np.asarray(_errors(own, model, x, y, step, bounds)))
    return np.fmin.reduce(found)


def check(errors: Float[np.ndarray, "B"] | None) -> Check:
    """What they come to; None of a model whose logits depend on chance."""
    name = "the gradient is that of the function, along random signs"
    if errors is None:
        return Check(30, name, SKIP, None, "", "differences of such logits are chance")
    known = errors[np.isfinite(errors)]
    if not len(known):
        return Check(30, name, SKIP, None, "", "all differences are rounding")
    wrong = float(np.mean(known > _WRONG))
    return decided(
        30,
        name,
        *(Measure(wrong, wrong <= at, f"<= {100 * at:g} % of images", "", what) for at, what in _LIMITS),
        note=f"where it is not; median relative error {np.median(known):.2g}",
    )


@functools.partial(jax.jit, static_argnames="bounds")
def _errors(key, model, x, y, step, bounds):
    def margin(x):
        logits = attack_losses.logits_of(model(x))
        return losses.margin(logits, y), jnp.max(jnp.abs(logits), axis=1)

    # away from the border, where a step to both sides has room
    x = x if bounds is None else jnp.clip(x, bounds[0] + step, bounds[1] - step)
    gradient, size = jax.grad(lambda x: (jnp.sum(margin(x)[0]), margin(x)[1]), has_aux=True)(x)

    def along(key):
        direction = jax.random.rademacher(key, x.shape, x.dtype)
        ahead, behind = x + step * direction, x - step * direction
        seen = jnp.sum(((ahead - behind) * gradient).reshape(len(x), -1), axis=1)
        return margin(ahead)[0] - margin(behind)[0], seen

    true, seen = jax.lax.map(along, jax.random.split(key, _DIRECTIONS))
    largest = jnp.maximum(jnp.linalg.norm(true, axis=0), jnp.linalg.norm(seen, axis=0))
    rounding = _ROUNDINGS * jnp.finfo(x.dtype).eps * size
    return jnp.where(largest > rounding, jnp.linalg.norm(true - seen, axis=0) / largest, jnp.nan)
