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

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from clustr_jax import losses
from clustr_jax.attacks import pgd_loop, trust, unattacked, user_losses
from clustr_jax.attacks.gate import admit
from clustr_jax.attacks.input_checks import check_found, check_logits, concrete
from clustr_jax.attacks.models import as_partial as as_partial
from clustr_jax.attacks.options import check_radius, norm_of, whole
from clustr_jax.runtime.errors import UserError

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
    """Maximise `loss_fn(logits, y)` within `eps` of x by projected gradient steps (Madry et al. 2018).

    `eps` and `step_size` are traced, so that a sweep compiles once; everything else is compiled in. With
    probabilities for `y` there is no success, and `select` is "last".

    Args:
        key: of `jax.random.key`. An image's draws depend on it, on the image's id and on the restart alone.
        logits_fn: any function of images [B, ...] -> logits [B, Y]; `wrap` says which models do.
        x: images [B, ...], pixels in `bounds`.
        y: labels [B], or probabilities [B, Y].
        eps: radius of the ball, in the units of the pixels: 8/255, not 8.
        step_size: length of a step, in the same units and norm.
        steps: gradients of each restart.
        restarts: random starts of each image.
        loss_fn: (logits [B, Y], y) -> [B]; see `clustr_jax.losses`.
        start: "uniform" in the ball; "normal", N(0, 0.001), as in TRADES; "gaussian", N(0, (eps / 2)^2); or
            "zero", x itself.
        norm: "linf" or "l2".
        bounds: box of the pixels, (low, high); None for no box.
        select: what is returned. "success": the first misclassified iterate of any restart, the start
            included, or else the one with the largest loss. "loss", the authors' rule: an example stops once
            it is fooled, and the restart with the largest final loss is returned, fooled or not. "last": the
            last iterate of that restart, without stopping (adversarial training).
        clip_start: False leaves the start outside the box, as the authors' code does.
        ids: numbers of the images in their data set [B], which randomness goes by; default 0 to B - 1.

    Returns:
        x_adv [B, ...], inside ball and box.

    Raises:
        UserError: for bad settings and shapes, and (outside jit, where values can be looked at) for pixels
            outside the box, labels out of range, probabilities instead of logits and logits that are not
            finite. Bounded scores are warned about, and what attacks nothing: a radius, a step or steps of 0,
            or a gradient that is 0 at every step for most images.

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
    x_adv, logits, blind = pgd_loop.restarts_of(
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

    Args:
        key: of `jax.random.key`. An image's draws depend on it, on the image's id and on the restart alone.
        logits_fn: any function of images [B, ...] -> logits [B, Y]; `wrap` says which models do.
        x: images [B, ...], pixels in `bounds`.
        probs: the clean predictions [B, Y], which the step leads away from.
        eps: radius of the ball, in the units of the pixels: 8/255, not 8.
        step_size: length of the step; the paper's is 1.25 eps.
        bounds: box of the pixels, (low, high); None for no box.
        ids: numbers of the images in their data set [B], which randomness goes by; default 0 to B - 1.

    Returns:
        x_adv [B, ...], inside ball and box.

    Raises:
        UserError: as in `pgd`.

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
    """One step of length eps from x (Goodfellow et al. 2015).

    Args:
        key: changes nothing.
        logits_fn: any function of images [B, ...] -> logits [B, Y]; `wrap` says which models do.
        x: images [B, ...], pixels in `bounds`.
        y: labels [B].
        eps: radius of the ball, in the units of the pixels: 8/255, not 8.
        loss_fn: (logits [B, Y], y) -> [B].
        norm: "linf" or "l2".
        bounds: box of the pixels, (low, high); None for no box.

    Returns:
        of x and that point the misclassified one, or else the one with the larger loss [B, ...].

    Raises:
        UserError: as in `pgd`.

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
    """Random points of the ball: no gradients.

    Args:
        key: of `jax.random.key`. An image's draws depend on it, on the image's id and on the restart alone.
        logits_fn: any function of images [B, ...] -> logits [B, Y]; `wrap` says which models do.
        x: images [B, ...], pixels in `bounds`.
        y: labels [B].
        eps: radius of the ball, in the units of the pixels: 8/255, not 8.
        draws: points of each image.
        kind: "uniform" in the ball, or "gaussian": N(0, (eps / 2)^2) projected onto it.
        norm: "linf" or "l2".
        bounds: box of the pixels, (low, high); None for no box.
        ids: numbers of the images in their data set [B], which randomness goes by; default 0 to B - 1.

    Returns:
        the first point that is misclassified, else the one with the largest cross entropy [B, ...].

    Raises:
        UserError: as in `pgd`.

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
