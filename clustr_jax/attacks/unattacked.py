"""What is said of an attack that attacks nothing: a radius or a step of 0, a model without a gradient.

Every image survives it, and what it leaves is taken for robustness. Where restarts ended is compared with
where they began, which asks nothing of the model. Only if (nearly) all that fooled nothing stayed there the
gradient itself is looked at, on these images alone.
"""

import functools
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from clustr_jax.attacks import device_loop, resuming
from clustr_jax.attacks.attack_losses import logits_of
from clustr_jax.attacks.gate import Admitted
from clustr_jax.attacks.geometry import start_in_ball

# Images that are looked at, and the share of them that an attack has to leave where it began.
_LOOKED_AT, _NEARLY_ALL = 64, 0.95
# Rounding of a projection, of the largest pixel (or 1).
_ROUNDING = 1e-6
_PACKAGE = str(pathlib.Path(__file__).parents[1])


class UnattackedWarning(UserWarning):
    """Nothing was or could be attacked: what the attack leaves says nothing of robustness."""


def warn_of_settings(*, start: str = "zero", **settings: Any) -> None:
    """UnattackedWarning for the first setting that is 0 (traced ones are not looked at)."""
    for name, value in settings.items():
        if isinstance(value, jax.core.Tracer) or float(value) != 0:
            continue
        points = "" if name == "eps" or start == "zero" else " but random starts"
        warn(f"{name}=0: nothing{points} is tried, and what is left says nothing of robustness")
        return


def warn(text: str) -> None:
    """Where the user's own code called an attack."""
    warnings.warn(text, UnattackedWarning, stacklevel=2, skip_file_prefixes=(_PACKAGE,))


def told(still: Bool[np.ndarray, "S"], fooled: Bool[np.ndarray, "S"], who: str = "") -> str:
    """The sentence on images [S] that no step moves, "" where enough of them move. `who`: "apgd-ce: "."""
    left, stuck = int(np.sum(~fooled)), int(np.sum(still & ~fooled))
    if not left or stuck < _NEARLY_ALL * left:
        return ""
    return (
        f"{who}nothing could be attacked: the gradient of the loss by the input is exactly 0 for {stuck} of "
        f"the {left} unbroken images that were looked at, and no step moves them (rounding, an argmax, a "
        f"saturated softmax?); attacks.square needs no gradient"
    )


# attacks.pgd, which has the images of a call in one program


def of_pgd(
    key: Array,
    model: Callable,
    x: Float[Array, "B ..."],
    y: Int[Array, "B"] | Float[Array, "B Y"],
    ids: Int[Array, "B"],
    x_adv: Float[Array, "B ..."],
    *,
    loss_fn: Callable,
    **settings: Any,
) -> str:
    """The sentence on a call of `pgd`, "" where its images moved. `settings`: of its starts, and restarts."""
    index = np.unique(np.linspace(0, len(x) - 1, _LOOKED_AT).astype(np.int32))
    stayed = np.asarray(_at_a_start(key, x, ids, x_adv, index, **settings))
    if np.mean(stayed) < _NEARLY_ALL:
        return ""
    zero, fooled = (np.asarray(a) for a in _gradients(model, x_adv, y, index, loss_fn=loss_fn))
    return told(zero & stayed, fooled)


@functools.partial(jax.jit, static_argnames=("restarts", "start", "norm", "bounds", "clip"))
def _at_a_start(key, x, ids, x_adv, index, *, eps, restarts, start, norm, bounds, clip):
    """Bool [S]: whether x_adv[index] is where one of the restarts began."""
    x, ids, x_adv = x[index], ids[index], x_adv[index]

    def one(restart):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), restart))(ids)
        return _together(
            start_in_ball(keys, x, eps=eps, start=start, norm=norm, bounds=bounds, clip=clip), x_adv
        )

    return jnp.any(lax.map(one, jnp.arange(restarts)), axis=0)


@functools.partial(jax.jit, static_argnames="loss_fn")
def _gradients(model, x, y, index, *, loss_fn):
    """Bool [S], [S]: whether the gradient of the loss is 0, and the image misclassified."""
    x, y = x[index], y[index]

    def total(x):
        logits = logits_of(model(x))
        return jnp.sum(loss_fn(logits, y)), logits

    gradient, logits = jax.grad(total, has_aux=True)(x)
    fooled = jnp.argmax(logits, axis=1) != y if y.ndim == 1 else jnp.zeros(len(x), bool)
    return jnp.all(gradient == 0, axis=tuple(range(1, x.ndim))), fooled


# attacks that the scheduler runs


class Ends:
    """Where the first restarts ended that fooled nothing; `scheduler.run`'s `collect`."""

    def __init__(self, rows: int):
        self.rows, self.example, self.restart, self.x = rows, [], [], []

    def __call__(
        self,
        example: Int[np.ndarray, "Q"],
        restart: Int[np.ndarray, "Q"],
        x: Float[np.ndarray, "Q ..."],
        fooled: Bool[np.ndarray, "Q"],
    ) -> None:
        """Note as many as there is room for."""
        for i in np.flatnonzero(~np.asarray(fooled))[: self.rows - len(self.example)]:
            self.example.append(int(example[i]))
            self.restart.append(int(restart[i]))
            self.x.append(x[i])


def of_ends(
    ends: Ends,
    plan: resuming.Planned,
    key: Array,
    given: Admitted,
    index: Int[np.ndarray, "A"],
    broken: Bool[np.ndarray, "A"],
    who: str = "",
) -> str:
    """The sentence on a scheduled attack on the images of this index, "" where they moved; warns with it.

    No step moves an image whose first update leaves it where it was; that is one gradient. `broken` [A]: by
    any restart.
    """
    count, attack = len(ends.example), plan.attack
    if not count or not np.any(attack.eps):
        return ""
    place = np.resize(np.arange(count), ends.rows)
    e, r = (np.asarray(a, np.int32)[place] for a in (ends.example, ends.restart))
    target = np.full(len(e), -1, np.int32)
    if plan.targets is not None:
        target = np.repeat(np.asarray(plan.targets[:, index], np.int32), plan.restarts, axis=0)[r, e]
    x, y, ids = (np.asarray(a)[index[e]] for a in (given.x, given.y, given.ids))
    work = device_loop.fill(key, e, ids, r, x, y, target)
    begun = _begun(attack, work)
    still = _together(np.stack(ends.x)[place], np.asarray(begun.candidate), np)
    if np.mean(still[:count]) < _NEARLY_ALL:
        return ""
    pairs = zip(
        jax.tree.leaves(begun), jax.tree.leaves(resuming.first_step(attack, given.model, work)), strict=True
    )
    for before, after in pairs:
        if before.shape == x.shape:
            still = still & _together(np.asarray(before), np.asarray(after), np)
    # several restarts and targets of an image count as one
    images, moved = np.unique(e), np.unique(e[~still])
    text = told(~np.isin(images, moved), broken[images], who)
    if text:
        warn(text)
    return text


@jax.jit
def _begun(attack, work):
    return attack.init(work)


def _together(a, b, xp: Any = jnp):
    """Bool [S]: whether two points are one, but for rounding. `xp`: np on the host."""
    size = xp.maximum(1.0, xp.max(xp.abs(a)))
    return xp.max(xp.abs(a - b), axis=tuple(range(1, a.ndim))) <= _ROUNDING * size
