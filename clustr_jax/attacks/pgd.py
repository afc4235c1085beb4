"""Projected gradient descent (Madry et al. 2018) and its one-step relative of the paper (QTRADES).

    from clustr_jax import attacks, losses
    x_adv = attacks.pgd(key, clf.logits, x, y, eps=8/255, step_size=2/255, steps=20, restarts=10)
    x_adv = attacks.pgd(key, clf.logits, x, y, eps=0.5, step_size=0.1, steps=20,
                        norm="l2", loss_fn=losses.margin)

`logits_fn` is any function `x -> [B, Y]`. A method of a pytree (`clf.logits`) or a
`jax.tree_util.Partial` is traced with its arrays as arguments, so new parameters of the same shapes
do not recompile; a new lambda or closure does. The attack owns no model state: batch norm behaves
as `logits_fn` says.

A call is one compiled program, all steps and restarts of it. So there is no `progress=`, and Ctrl-C is
answered when it ends, with nothing kept. For hours of work there are `apgd`, `autoattack`, or calls on parts
of the images: the outcome of an example does not depend on the others (`ids`).
"""

import functools
from collections.abc import Callable

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from clustr_jax import losses
from clustr_jax.attacks import trust, unattacked, user_losses
from clustr_jax.attacks.attack_losses import logits_of
from clustr_jax.attacks.gate import admit
from clustr_jax.attacks.geometry import over, projected_step, start_in_ball
from clustr_jax.attacks.input_checks import check_found, check_logits, check_shape, concrete
from clustr_jax.attacks.models import as_partial as as_partial
from clustr_jax.attacks.options import check_radius, norm_of, whole
from clustr_jax.runtime.errors import UserError

# Restarts run side by side as long as the batch stays below this many images (memory), then in turns.
_SIDE_BY_SIDE = 512
_STARTS, _SELECTS = ("uniform", "normal", "gaussian", "zero"), ("success", "loss", "last")


def pgd(
    key: Array,
    logits_fn: Callable,
    x: Float[Array | np.ndarray, "B ..."],
    y: Int[Array | np.ndarray, "B"] | Float[Array | np.ndarray, "B Y"],
    *,
    eps: float,
    step_size: float,
    steps: int,
    restarts: int = 1,
    loss_fn: Callable = losses.cross_entropy,
    start: str = "uniform",
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    select: str = "success",
    clip_start: bool = True,
    ids: Int[Array | np.ndarray, "B"] | None = None,
) -> Float[Array, "B ..."]:
    """Maximise `loss_fn(logits, y)` within `eps` of x (pixels in [0, 1] units) by `steps` steps.

    select="success": the first misclassified iterate of any restart (the start included); where
    there is none, the iterate with the largest loss. select="loss": the authors' rule, an example
    stops moving once it is fooled and the restart with the largest final loss is returned, fooled
    or not. select="last": the last iterate of that restart, without stopping (adversarial training).
    With probabilities for `y` there is no success: always "last". start="normal" is N(0, 0.001) as
    in TRADES. `bounds` None means no box; clip_start=False leaves the start outside it, as the
    authors' code does.

    The randomness of (example, restart) is fold_in(fold_in(key, id), restart) with `ids` (data set
    indices, default 0..B-1): it depends neither on the order nor on the other examples. `eps` and
    `step_size` are traced, everything else is compiled in. Raises UserError for bad settings and shapes,
    and (outside jit, where values can be looked at) for pixels outside the box, labels out of range,
    probabilities instead of logits and logits that are not finite; bounded scores are warned about, and what
    attacks nothing: a radius, a step or steps of 0, or a gradient that is 0 at every step for most images.

    One pixel, two classes: the first image can be fooled within 0.1, the second cannot.

    >>> def logits(x):  # class 0 above one half, class 1 below
    ...     return jnp.concatenate([x - 0.5, 0.5 - x], axis=1)
    >>> x, y = jnp.array([[0.55], [0.9]]), jnp.array([0, 0])
    >>> x_adv = attacks.pgd(jax.random.key(0), logits, x, y, eps=0.1, step_size=0.05, steps=5, restarts=2)
    >>> print(logits(x_adv).argmax(axis=1) != y)  # success is misclassification, nothing else
    [ True False]
    >>> print((jnp.abs(x_adv - x) <= 0.1 + 1e-6).all())
    True
    """
    x_adv = run_pgd(
        key, logits_fn, x, y, eps=eps, step_size=step_size, steps=steps, restarts=restarts, loss_fn=loss_fn,
        start=start, norm=norm, bounds=bounds, select=select, clip_start=clip_start, ids=ids, warned=True,
    )  # fmt: skip
    if concrete(x_adv) and len(x_adv):
        unattacked.warn_of_settings(start=start, eps=eps, steps=steps, step_size=step_size)
    return x_adv


def run_pgd(
    key: Array,
    logits_fn: Callable,
    x: Float[Array | np.ndarray, "B ..."],
    y: Int[Array | np.ndarray, "B"] | Float[Array | np.ndarray, "B Y"],
    *,
    eps: ArrayLike,
    step_size: ArrayLike,
    steps: int,
    restarts: int = 1,
    loss_fn: Callable = losses.cross_entropy,
    start: str = "uniform",
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    select: str = "success",
    clip_start: bool = True,
    ids: Int[Array | np.ndarray, "B"] | None = None,
    warned: bool = False,
) -> Float[Array, "B ..."]:
    """`pgd`, and unless `warned` no word on bounded scores and blind gradients: protocols have checks."""
    check_words(start=start, select=select)
    steps, restarts = whole("steps", steps, 0), whole("restarts", restarts, 1)
    given = admit(key, logits_fn, x, y, eps=eps, step_size=step_size, norm=norm, bounds=bounds, ids=ids)
    looked_at = concrete(given.x, given.y)
    x, y = jnp.asarray(given.x), jnp.asarray(given.y)
    if not x.shape[0]:
        return x
    loss_fn = user_losses.current(loss_fn, x.shape[0], given.classes, y)
    x_adv, logits, blind = _pgd(
        given.key,
        given.model,
        x,
        y,
        jnp.asarray(given.ids),
        jnp.float32(eps),
        jnp.float32(step_size),
        steps=steps,
        restarts=restarts,
        loss_fn=loss_fn,
        start=start,
        norm=given.norm,
        bounds=given.bounds,
        select=select,
        clip_start=clip_start,
        watched=warned and looked_at,
    )
    if looked_at and concrete(logits):
        trust.check_size(given.seen, logits, x.shape[0])
        check_logits(logits, y, warned=warned)
    if concrete(x_adv):
        check_found(x_adv)
    if blind is not None and concrete(blind) and steps and np.any(eps) and np.any(step_size):
        right = np.argmax(logits, axis=1) == y if y.ndim == 1 else np.ones(len(x), bool)
        unattacked.warn(unattacked.told(np.asarray(blind)[np.asarray(right)]))
    return x_adv


def qtrades(
    key: Array,
    logits_fn: Callable,
    x: Float[Array | np.ndarray, "B ..."],
    probs: Float[Array | np.ndarray, "B Y"],
    *,
    eps: float,
    step_size: float,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    ids: Int[Array | np.ndarray, "B"] | None = None,
) -> Float[Array, "B ..."]:
    """The adversary of paper Eq. 5: uniform start, one sign step on the cross entropy to `probs`.

    >>> def logits(x):
    ...     return 8 * jnp.concatenate([x - 0.5, 0.5 - x], axis=1)
    >>> x = jnp.array([[0.55], [0.9]])
    >>> x_adv = attacks.qtrades(
    ...     jax.random.key(0), logits, x, jax.nn.softmax(logits(x)), eps=0.1, step_size=0.125
    ... )
    >>> print(jnp.abs(x_adv - x)[:, 0])  # away from probs, whichever side it started on, to the border
    [0.1 0.1]
    """
    return pgd(key, logits_fn, x, probs, eps=eps, step_size=step_size, steps=1, bounds=bounds, ids=ids)


def fgsm(
    key: Array,
    logits_fn: Callable,
    x: Float[Array | np.ndarray, "B ..."],
    y: Int[Array | np.ndarray, "B"],
    *,
    eps: float,
    loss_fn: Callable = losses.cross_entropy,
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Float[Array, "B ..."]:
    """One step of length eps from x (Goodfellow et al. 2015); the key changes nothing.

    Of x and that point the misclassified one, or else the one with the larger loss.

    >>> def logits(x):  # class 0 above one half, class 1 below
    ...     return jnp.concatenate([x - 0.5, 0.5 - x], axis=1)
    >>> x, y = jnp.array([[0.55], [0.9]]), jnp.array([0, 0])
    >>> print(attacks.fgsm(jax.random.key(0), logits, x, y, eps=0.1)[:, 0])
    [0.45 0.8 ]
    """
    return pgd(
        key,
        logits_fn,
        x,
        y,
        eps=eps,
        step_size=eps,
        steps=1,
        loss_fn=loss_fn,
        start="zero",
        norm=norm,
        bounds=bounds,
    )


def noise(
    key: Array,
    logits_fn: Callable,
    x: Float[Array | np.ndarray, "B ..."],
    y: Int[Array | np.ndarray, "B"],
    *,
    eps: float,
    draws: int = 100,
    kind: str = "uniform",
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    ids: Int[Array | np.ndarray, "B"] | None = None,
) -> Float[Array, "B ..."]:
    """The first of `draws` random points that is misclassified, else the one with the largest cross entropy.

    kind "uniform" is uniform in the ball, "gaussian" is N(0, (eps / 2)^2) projected onto it.

    >>> def logits(x):  # class 0 above one half, class 1 below
    ...     return jnp.concatenate([x - 0.5, 0.5 - x], axis=1)
    >>> x, y = jnp.array([[0.55], [0.9]]), jnp.array([0, 0])
    >>> x_adv = attacks.noise(jax.random.key(0), logits, x, y, eps=0.1, draws=50)
    >>> print(logits(x_adv).argmax(axis=1) != y)
    [ True False]
    """
    if kind not in ("uniform", "gaussian"):
        raise UserError(f"kind must be uniform or gaussian, got {kind!r}")
    draws = whole("draws", draws, 1)
    x_adv = run_pgd(
        key,
        logits_fn,
        x,
        y,
        eps=eps,
        step_size=0.0,
        steps=0,
        restarts=draws,
        start=kind,
        norm=norm,
        bounds=bounds,
        ids=ids,
        warned=True,
    )
    if concrete(x_adv) and len(x_adv):
        unattacked.warn_of_settings(eps=eps)
    return x_adv


def check_settings(
    *,
    eps: ArrayLike,
    step_size: ArrayLike,
    start: str = "uniform",
    norm: str = "linf",
    select: str = "success",
) -> None:
    """UserError for an unknown word, or a negative radius or step (traced values are not looked at)."""
    check_words(start=start, select=select)
    norm_of(norm)
    check_radius("eps", eps)
    check_radius("step_size", step_size)


def check_words(*, start: str, select: str) -> None:
    """UserError for an unknown word."""
    for name, value, known in (("start", start, _STARTS), ("select", select, _SELECTS)):
        if value not in known:
            raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}")


_STATIC = ("steps", "restarts", "loss_fn", "start", "norm", "bounds", "select", "clip_start", "watched")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _pgd(key, logits_fn, x, y, ids, eps, step_size, *, restarts, **settings):
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
