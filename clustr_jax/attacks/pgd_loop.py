"""The compiled part of `pgd`: all steps and restarts of a call are one program."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from clustr_jax import losses
from clustr_jax.attacks import unattacked
from clustr_jax.attacks.attack_losses import differentiated, logits_of
from clustr_jax.attacks.geometry import over, projected_step, start_in_ball
from clustr_jax.attacks.input_checks import check_shape

# Restarts run side by side as long as the batch stays below this many images (memory), then in turns.
_SIDE_BY_SIDE = 512
_STATIC = ("steps", "restarts", "loss_fn", "start", "norm", "bounds", "select", "clip_start", "watched")


@functools.partial(jax.jit, static_argnames=_STATIC)
def restarts_of(
    key: Array,
    logits_fn: Callable,
    x: Float[Array, "B ..."],
    y: Int[Array, "B"] | Float[Array, "B Y"],
    ids: Int[Array, "B"],
    eps: ArrayLike,
    step_size: ArrayLike,
    *,
    restarts: int,
    **settings: Any,
):
    """The restart of each image that counts -> (x_adv, logits of x [B, Y], blind [B])."""

    def one(restart):
        numbers = jnp.full(x.shape[0], restart)
        return pgd_restart(key, logits_fn, x, y, ids, numbers, eps, step_size, **settings)

    logits = logits_of(logits_fn(x))  # for the caller to look at; dropped by the compiler where nobody does
    check_shape(logits, y)
    if restarts == 1:  # the loss of the result is not needed, and is not computed
        found, _, _, blind = one(0)
        return found, logits, blind
    side_by_side = max(1, min(restarts, _SIDE_BY_SIDE // max(x.shape[0], 1)))
    found, loss, fooled, blind = lax.map(one, jnp.arange(restarts), batch_size=side_by_side)
    if y.ndim == 1 and settings["select"] == "success":  # any fooled restart beats any loss
        best = jnp.argmax(jnp.where(fooled, jnp.inf, loss), axis=0)
    else:  # the authors keep the later restart of equal losses (>=)
        best = restarts - 1 - jnp.argmax(loss[::-1], axis=0)
    return found[best, jnp.arange(x.shape[0])], logits, None if blind is None else jnp.all(blind, axis=0)


@functools.partial(jax.jit, static_argnames=tuple(name for name in _STATIC if name != "restarts"))
def pgd_restart(
    key: Array,
    logits_fn: Callable,
    x: Float[Array, "B ..."],
    y: Int[Array, "B"] | Float[Array, "B Y"],
    ids: Int[Array, "B"],
    restarts: Int[Array, "B"],
    eps: ArrayLike,
    step_size: ArrayLike,
    *,
    steps: int,
    loss_fn: Callable = losses.cross_entropy,
    start: str = "uniform",
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    select: str = "success",
    clip_start: bool = True,
    watched: bool = False,
):
    """One restart of each image -> (x_adv, its loss [B], fooled [B], blind [B]).

    `blind`: its gradient was exactly 0 at every step; None unless `watched`.

    Image i is example `ids[i]`, and runs its restart number `restarts[i]`. `logits_fn` is a Partial, settings
    are not checked. It ends as soon as every image is fooled.
    """
    stops = y.ndim == 1 and select != "last"
    keys = jax.vmap(lambda i, r: jax.random.fold_in(jax.random.fold_in(key, i), r))(ids, restarts)
    ball = {"eps": eps, "norm": norm, "bounds": bounds}

    def evaluate(x_adv):
        logits = logits_of(logits_fn(x_adv))
        loss = loss_fn(logits, y)
        fooled = jnp.argmax(logits, axis=1) != y if stops else jnp.zeros(x.shape[0], bool)
        undefined = jnp.any(jnp.isnan(logits), axis=1)
        return jnp.sum(loss), (jnp.where(undefined, jnp.nan, loss), fooled | undefined if stops else fooled)

    def keep(best, x_adv, loss, fooled):
        """The iterate to return: the first fooled one, else the best loss; or (authors) the latest.

        One whose logits are NaN is no success: its image ends as NaN, for `check_found` to see.
        """
        best_x, best_loss, done = best
        x_adv = jnp.where(over(jnp.isnan(loss), x), jnp.nan, x_adv)
        better = ~done & (fooled | (loss > best_loss)) if select == "success" else ~done
        best_x = jnp.where(over(better, x), x_adv, best_x)
        return best_x, jnp.where(better, loss, best_loss), done | fooled

    def unfinished(carry):
        i, _, (_, _, done), _ = carry
        return (i < steps) & ~jnp.all(done)

    def step(carry):
        i, x_adv, best, blind = carry
        with differentiated():
            gradient, (loss, fooled) = jax.grad(evaluate, has_aux=True)(x_adv)
        best = keep(best, x_adv, loss, fooled)
        x_adv = jnp.where(over(best[2], x), x_adv, move(x_adv, gradient))
        return i + 1, x_adv, best, watch(blind, gradient)

    def move(x_adv, gradient):
        return projected_step(x_adv, gradient, x, step_size=step_size, **ball)

    def watch(blind, gradient):
        return None if blind is None else unattacked.still_blind(blind, gradient)

    def step_on(_, carry):  # where nothing stops
        x_adv, blind = carry
        with differentiated():
            gradient, _ = jax.grad(evaluate, has_aux=True)(x_adv)
        return move(x_adv, gradient), watch(blind, gradient)

    x_adv = start_in_ball(keys, x, start=start, clip=clip_start, **ball)
    blind = jnp.ones(x.shape[0], bool) if watched else None
    if not stops:
        x_adv, blind = lax.fori_loop(0, steps, step_on, (x_adv, blind))
        _, (loss, fooled) = evaluate(x_adv)
        return x_adv, loss, fooled, blind
    nothing = (x_adv, jnp.full(x.shape[0], -jnp.inf), jnp.zeros(x.shape[0], bool))
    _, x_adv, best, blind = lax.while_loop(unfinished, step, (0, x_adv, nothing, blind))
    _, (loss, fooled) = evaluate(x_adv)
    return *keep(best, x_adv, loss, fooled), blind
