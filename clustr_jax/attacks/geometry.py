"""Balls and boxes: projections, steps and random starts for batches of images, linf and l2."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

# Standard deviation of start="normal" (TRADES).
_NORMAL_START = 1e-3


def project(
    x_adv: Float[Array, "B ..."],
    x: Float[Array, "B ..."],
    eps: ArrayLike,
    norm: str,
    bounds: tuple[float, float] | None,
):
    """Into the ball around x, then into the box (which keeps it in the ball when x is in the box)."""
    delta = x_adv - x
    if norm == "linf":
        delta = jnp.clip(delta, jnp.negative(eps), eps)
    else:
        delta = delta * jnp.minimum(1.0, eps / jnp.maximum(l2_norm(delta), 1e-12))
    x_adv = x + delta
    return x_adv if bounds is None else jnp.clip(x_adv, *bounds)


def l2_norm(delta: Float[Array | np.ndarray, "B ..."]):
    """[B, 1, ...] norms of [B, ...]."""
    return jnp.sqrt(jnp.sum(jnp.square(delta), axis=_inner(delta), keepdims=True))


def length(delta: Float[Array | np.ndarray, "B ..."], norm: str):
    """[B] norms of [B, ...]."""
    if norm == "linf":
        return jnp.max(jnp.abs(delta), axis=_inner(delta))
    return jnp.sqrt(jnp.sum(jnp.square(delta), axis=_inner(delta)))


def dual_length(gradient: Float[Array, "B ..."], norm: str):
    """[B] norms of [B, ...] in which a step of length 1 in `norm` raises a linear function the most."""
    if norm == "linf":
        return jnp.sum(jnp.abs(gradient), axis=_inner(gradient))
    largest = jnp.max(jnp.abs(gradient), axis=_inner(gradient))  # squares of 1e-25 are 0
    return largest * length(gradient / over(jnp.where(largest > 0, largest, 1.0), gradient), norm)


def over(values: Array | np.ndarray, x: Array | np.ndarray) -> Any:
    """[B] values as [B, 1, ...], to go with x [B, ...]."""
    return values.reshape(-1, *(1,) * (x.ndim - 1))


def ascend(x_adv: Float[Array, "B ..."], gradient: Float[Array, "B ..."], step_size: ArrayLike, norm: str):
    """One steepest-ascent step of length `step_size`."""
    if norm == "linf":
        return x_adv + step_size * jnp.sign(gradient)
    # by the largest entry first: squares of a gradient of 1e-25, as a confident softmax has, are 0
    largest = jnp.max(jnp.abs(gradient), axis=_inner(gradient), keepdims=True)
    direction = gradient / jnp.where(largest > 0, largest, 1.0)
    return x_adv + step_size * direction / jnp.maximum(l2_norm(direction), 1e-12)


def random_start(keys: Array, x: Float[Array, "B ..."], eps: ArrayLike, start: str, norm: str):
    """x plus one draw per example; `keys` has one key per example."""
    if start == "zero":
        return x

    def draw(key, shape):
        if start == "normal":
            return _NORMAL_START * jax.random.normal(key, shape)
        if start == "gaussian":
            return eps / 2 * jax.random.normal(key, shape)
        if norm == "linf":
            return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) * eps
        direction_key, radius_key = jax.random.split(key)
        direction = jax.random.normal(direction_key, shape)
        radius = eps * jax.random.uniform(radius_key) ** (1.0 / np.prod(shape))
        return radius * direction / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(direction))), 1e-12)

    return x + jax.vmap(lambda key: draw(key, x.shape[1:]))(keys)


def start_in_ball(
    keys: Array,
    x: Float[Array, "B ..."],
    *,
    eps: ArrayLike,
    start: str,
    norm: str,
    bounds: tuple[float, float] | None,
    clip: bool = True,
):
    """Where PGD begins: `random_start`, projected unless `clip` is False (then it may leave the box)."""
    x_adv = random_start(keys, x, eps, start, norm)
    return project(x_adv, x, eps, norm, bounds) if clip else x_adv


def projected_step(
    x_adv: Float[Array, "B ..."],
    gradient: Float[Array, "B ..."],
    x: Float[Array, "B ..."],
    *,
    eps: ArrayLike,
    step_size: ArrayLike,
    norm: str,
    bounds: tuple[float, float] | None,
):
    """PGD's step (Madry et al. 2018): along the steepest ascent, then back into ball and box."""
    return project(ascend(x_adv, gradient, step_size, norm), x, eps, norm, bounds)


def on_sphere(keys: Array, x: Float[Array, "B ..."], norm: str):
    """[B, ...] of length 1: a uniform draw by its largest entry (linf), or a Gaussian by its norm (l2)."""

    def draw(key):
        if norm == "linf":
            return jax.random.uniform(key, x.shape[1:], minval=-1.0, maxval=1.0)
        return jax.random.normal(key, x.shape[1:])

    direction = jax.vmap(draw)(keys)
    return direction / over(jnp.maximum(length(direction, norm), 1e-12), x)


def _inner(x):
    return tuple(range(1, x.ndim))
