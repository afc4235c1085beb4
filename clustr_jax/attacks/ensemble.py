"""AutoAttack (Croce & Hein 2020): APGD-CE, APGD-T, FAB-T and Square, each on what the others left.

    result = attacks.autoattack(key, clf.logits, x, y, eps=8/255)
    print(result.robust.mean(), result.broken_by)

`apgd`, `fab` and `square` are its parts. All run through `scheduler.run`: not inside jit, any number of
images, one compilation per attack and shapes. Where an image is not broken they return it unchanged.
"""

import dataclasses
import os
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from clustr_jax import losses
from clustr_jax.attacks import attack_losses, resuming, unattacked, user_losses
from clustr_jax.attacks.apgd import APGD
from clustr_jax.attacks.calls import SLOTS, STOPPED, attack_alone, common_of, planned, prepare, run_plan
from clustr_jax.attacks.fab import FAB
from clustr_jax.attacks.options import whole
from clustr_jax.attacks.registry import ATTACKS, PARAMETER_FREE, QUERIES, STANDARD, STEPS, Budget, Entry
from clustr_jax.attacks.square import Square
from clustr_jax.attacks.targets import check_ranking
from clustr_jax.attacks.watching import Interrupted
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.promotion import promoting


@dataclasses.dataclass
class AutoAttackResult:
    """x_adv [B, ...] (x where nothing succeeded), robust [B], and the attack that broke each ("": none, or
    "clean": misclassified before). `notes`: what makes these numbers doubtful, of a model that was wrapped
    with steady=False, and of attacks that had no gradient to follow. `cost`: what each attack spent
    (`scheduler.Outcome.cost`)."""

    x_adv: Float[np.ndarray, "B ..."]
    robust: Bool[np.ndarray, "B"]
    broken_by: np.ndarray
    notes: tuple[str, ...] = ()
    cost: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)


@promoting
def autoattack(
    key: Array,
    logits_fn: Callable,
    x: Float[np.ndarray, "B ..."],
    y: Int[np.ndarray, "B"],
    *,
    eps: float,
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    attacks: tuple[str | Entry, ...] = STANDARD,
    rescale_schedule: bool = False,
    ids: Int[np.ndarray, "B"] | None = None,
    slots: int = SLOTS,
    progress: bool | None = None,
    folder: str | os.PathLike | None = None,
) -> AutoAttackResult:
    """The standard ensemble (Croce & Hein 2020): each attack on what the ones before left.

    100 steps, 9 targets, 5,000 queries. Two and three classes are handled: targets are all other classes, and
    the targeted loss is the plain margin where DLR has too few logits.

    With a `folder` the result is bit for bit that of an uninterrupted call. Its records lie in
    `folder`/partial: of the moment itself after Ctrl-C, every 20 seconds otherwise. They go when the attack
    ends. Records of other images, labels, ids, keys, settings, versions, devices or models are left alone,
    with a RecordWarning.

    Args:
        key: of `jax.random.key`. An image's draws depend on it, on the image's id and on the restart alone.
        logits_fn: any function of images [B, ...] -> logits [B, Y]; `wrap` says which models do.
        x: images [B, ...], pixels in `bounds`.
        y: labels [B].
        eps: radius of the ball, in the units of the pixels: 8/255, not 8.
        norm: "linf" or "l2".
        bounds: box of the pixels, (low, high); None for no box.
        attacks: names in order, of `registry.PARAMETER_FREE`; a `registry.Entry` is an attack of your own.
        rescale_schedule: of Square, as in `square`; False is AutoAttack's "standard" (`resc_schedule`).
        ids: numbers of the images in their data set [B], which randomness goes by; default 0 to B - 1.
        slots: images that the device works on at once: they decide the memory.
        progress: a bar; None draws one on a terminal or in a notebook.
        folder: keeps records here, so that the same call goes on where it was interrupted.

    Returns:
        an `AutoAttackResult`.

    Raises:
        UserError: for bad settings, shapes, pixels and labels, and for models whose logits are no function of
            the image.
        Interrupted: on Ctrl-C; `.found` has what was found.

    >>> def logits(x):  # class 0 for bright images, 1 for dark ones; [B, H, W, C] -> [B, Y]
    ...     z = 10 * (x.mean(axis=(1, 2, 3))[:, None] - 0.5)
    ...     return jnp.concatenate([z, -z], axis=1)
    >>> x = np.stack([np.full((4, 4, 1), 0.55), np.full((4, 4, 1), 0.9)]).astype(np.float32)
    >>> y = np.array([0, 0])
    >>> result = attacks.autoattack(jax.random.key(0), logits, x, y, eps=0.1, slots=2)
    >>> print(result.robust, result.broken_by.tolist())
    [False  True] ['apgd-ce', '']
    >>> print(np.abs(result.x_adv - x).max() <= 0.1 + 1e-6, bool((result.x_adv[1] == x[1]).all()))
    True True
    """
    known = ", ".join(PARAMETER_FREE)
    if isinstance(attacks, str) or not attacks:
        raise UserError(
            f"attacks must name one or more of {known}, got {attacks!r}; without any, nothing is "
            f"attacked and every image counts as robust"
        )
    unknown = [name for name in attacks if not isinstance(name, Entry) and name not in PARAMETER_FREE]
    if unknown:
        raise UserError(f"attacks: unknown {unknown[0]!r}; known: {known}")
    place = resuming.usable(folder)
    given, logits = prepare(key, logits_fn, x, y, eps=eps, norm=norm, bounds=bounds, ids=ids, slots=slots)
    x, y = given.x, given.y
    alive = logits.argmax(axis=1) == y
    budget = Budget(
        eps=eps,
        norm=given.norm,
        bounds=given.bounds,
        steps=STEPS,
        queries=QUERIES,
        rescale_schedule=bool(rescale_schedule),
    )
    plans, entries = [], [ATTACKS[a] if isinstance(a, str) else a for a in attacks]
    again: dict[str, int] = {}
    for entry in entries:
        entry.check(shape=x.shape, classes=logits.shape[1], norm=given.norm)
        attack = user_losses.of_attack(_made(entry, budget), slots, logits.shape[1], y)
        plan = planned(entry.name, attack, given, logits, entry.targets, entry.restarts, slots)
        again[plan.name] = times = again.get(plan.name, 0) + 1
        plans.append(plan._replace(name=f"{plan.name}-{times}") if times > 1 else plan)
    kept = resuming.begin(place, given, logits, plans, slots, "autoattack")
    broken_by = np.where(alive, "", "clean").astype(f"U{max(16, *(len(plan.name) for plan in plans))}")
    notes = (given.note,) if given.note else ()
    cost, followed = {}, []  # of each attack that follows gradients: "", or that it had none
    x_adv = x.copy()
    for number, plan in enumerate(plans):
        index = np.flatnonzero(alive)
        if not len(index):
            break
        own, record = jax.random.fold_in(given.key, number), f"{number}-{plan.name}"
        outcome, stopped = run_plan(
            own, plan, given, index, slots=slots, progress=progress, kept=kept, record=record
        )
        x_adv[index] = outcome.x_adv
        cost[plan.name] = outcome.cost(plan.attack)
        cost[plan.name]["gradient_evaluations"] += plan.ranking
        broken_by[index[outcome.broken]] = plan.name
        alive[index] = ~outcome.broken
        if stopped is not None:
            found = AutoAttackResult(x_adv, alive, broken_by, (*notes, f"interrupted in {plan.name}"), cost)
            raise Interrupted(found, STOPPED + stopped)
        if plan.attack.gradients and float(eps):
            followed.append(unattacked.told(outcome.unattacked, f"{plan.name}: "))
    kept.clear()
    if len(x):
        unattacked.warn_of_settings(eps=eps)
    notes = (*notes, *filter(None, followed))
    if followed and all(followed):  # what one of them cannot see another one may
        unattacked.warn(followed[0])
    return AutoAttackResult(x_adv, alive, broken_by, notes, cost)


def _made(entry, budget):
    if "step_size" in entry.settings:
        raise UserError(
            f"attack {entry.name!r} reads a step size, and autoattack has none to give; choose it in the "
            f"entry's `make`, by the budget's eps, and leave it out of `settings`"
        )
    return entry.make(budget, None)


@promoting
def apgd(
    key: Array,
    logits_fn: Callable,
    x: Float[np.ndarray, "B ..."],
    y: Int[np.ndarray, "B"],
    *,
    eps: float,
    steps: int = STEPS,
    restarts: int = 1,
    loss_fn: Callable = losses.cross_entropy,
    targeted: bool = False,
    targets: str = "likely",
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    ids: Int[np.ndarray, "B"] | None = None,
    slots: int = SLOTS,
    progress: bool | None = None,
    folder: str | os.PathLike | None = None,
) -> Float[np.ndarray, "B ..."]:
    """Auto-PGD on `loss_fn` (Croce & Hein 2020): momentum, and a step that halves where it stops to help.

    Args:
        key: of `jax.random.key`. An image's draws depend on it, on the image's id and on the restart alone.
        logits_fn: any function of images [B, ...] -> logits [B, Y]; `wrap` says which models do.
        x: images [B, ...], pixels in `bounds`.
        y: labels [B].
        eps: radius of the ball, in the units of the pixels: 8/255, not 8.
        steps: gradients of each restart (and target).
        restarts: random starts of each image (and target).
        loss_fn: (logits [B, Y], y) -> [B].
        targeted: True is APGD-T: DLR towards 9 other classes, and `loss_fn` is not used.
        targets: which ones. "likely", or "malt": the nearest by `malt_targets` (one gradient per class before
            the attack, 100 at most).
        norm: "linf" or "l2".
        bounds: box of the pixels, (low, high); None for no box.
        ids: numbers of the images in their data set [B], which randomness goes by; default 0 to B - 1.
        slots: images that the device works on at once: they decide the memory.
        progress: a bar; None draws one on a terminal or in a notebook.
        folder: keeps records here, so that the same call goes on where it was interrupted.

    Returns:
        x_adv [B, ...], inside ball and box; x where nothing was broken.

    Raises:
        UserError: for bad settings, shapes, pixels and labels, and for models whose logits are no function of
            the image.
        Interrupted: on Ctrl-C; `.found` has what was found.

    >>> def logits(x):  # class 0 for bright images, 1 for dark ones; [B, H, W, C] -> [B, Y]
    ...     z = 10 * (x.mean(axis=(1, 2, 3))[:, None] - 0.5)
    ...     return jnp.concatenate([z, -z], axis=1)
    >>> x = np.stack([np.full((4, 4, 1), 0.55), np.full((4, 4, 1), 0.9)]).astype(np.float32)
    >>> y = np.array([0, 0])
    >>> x_adv = attacks.apgd(jax.random.key(0), logits, x, y, eps=0.1, steps=10, slots=2)
    >>> print(logits(x_adv).argmax(axis=1) != y, bool((x_adv[1] == x[1]).all()))
    [ True False] True
    """
    check_ranking(targets)
    loss = attack_losses.one(attack_losses.dlr_targeted if targeted else attack_losses.untargeted(loss_fn))
    attack = APGD(steps=whole("steps", steps, 1), loss=loss, **common_of(eps, norm, bounds))
    ranking = targets if targeted else None
    return attack_alone(
        key,
        attack,
        logits_fn,
        x,
        y,
        ranking=ranking,
        ids=ids,
        restarts=restarts,
        slots=slots,
        progress=progress,
        folder=folder,
    )


@promoting
def fab(
    key: Array,
    logits_fn: Callable,
    x: Float[np.ndarray, "B ..."],
    y: Int[np.ndarray, "B"],
    *,
    eps: float,
    steps: int = STEPS,
    restarts: int = 1,
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    ids: Int[np.ndarray, "B"] | None = None,
    slots: int = SLOTS,
    progress: bool | None = None,
    folder: str | os.PathLike | None = None,
) -> Float[np.ndarray, "B ..."]:
    """FAB-T (Croce & Hein 2020): looks for the nearest adversarial point towards the 9 likeliest classes.

    It ends at the first one within eps, which is not always the nearest: no measure of distance (`fmn` is).

    Args:
        key: of `jax.random.key`. An image's draws depend on it, on the image's id and on the restart alone.
        logits_fn: any function of images [B, ...] -> logits [B, Y]; `wrap` says which models do.
        x: images [B, ...], pixels in `bounds`.
        y: labels [B].
        eps: radius of the ball, in the units of the pixels: 8/255, not 8.
        steps: gradients of each restart and target.
        restarts: starts of each image and target.
        norm: "linf" or "l2".
        bounds: box of the pixels, (low, high); None for no box.
        ids: numbers of the images in their data set [B], which randomness goes by; default 0 to B - 1.
        slots: images that the device works on at once: they decide the memory.
        progress: a bar; None draws one on a terminal or in a notebook.
        folder: keeps records here, so that the same call goes on where it was interrupted.

    Returns:
        x_adv [B, ...], inside ball and box; x where nothing was broken.

    Raises:
        UserError: for bad settings, shapes, pixels and labels, and for models whose logits are no function of
            the image.
        Interrupted: on Ctrl-C; `.found` has what was found.

    >>> def logits(x):  # class 0 for bright images, 1 for dark ones; [B, H, W, C] -> [B, Y]
    ...     z = 10 * (x.mean(axis=(1, 2, 3))[:, None] - 0.5)
    ...     return jnp.concatenate([z, -z], axis=1)
    >>> x = np.stack([np.full((4, 4, 1), 0.55), np.full((4, 4, 1), 0.9)]).astype(np.float32)
    >>> y = np.array([0, 0])
    >>> x_adv = attacks.fab(jax.random.key(0), logits, x, y, eps=0.1, steps=10, slots=2)
    >>> print(logits(x_adv).argmax(axis=1) != y, bool((x_adv[1] == x[1]).all()))
    [ True False] True
    """
    restarts = whole("restarts", restarts, 1)
    attack = FAB(steps=whole("steps", steps, 1), restarts=restarts, **common_of(eps, norm, bounds))
    return attack_alone(
        key,
        attack,
        logits_fn,
        x,
        y,
        ranking="likely",
        ids=ids,
        restarts=restarts,
        slots=slots,
        progress=progress,
        folder=folder,
    )


@promoting
def square(
    key: Array,
    logits_fn: Callable,
    x: Float[np.ndarray, "B H W C"],
    y: Int[np.ndarray, "B"],
    *,
    eps: float,
    queries: int = QUERIES,
    rescale_schedule: bool = True,
    restarts: int = 1,
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    ids: Int[np.ndarray, "B"] | None = None,
    slots: int = SLOTS,
    progress: bool | None = None,
    folder: str | os.PathLike | None = None,
) -> Float[np.ndarray, "B H W C"]:
    """Square (Andriushchenko et al. 2020): random search without gradients.

    The squares shrink by a schedule for 10,000 queries. The authors of Square, and the `sound` protocol,
    stretch it over `queries`, which breaks a little more. AutoAttack's "standard" does not
    (`resc_schedule=False`): its 5,000 queries end at squares of 3 x 3 pixels on 32 x 32 images instead of
    one, and none reaches the last row or column.

    Args:
        key: of `jax.random.key`. An image's draws depend on it, on the image's id and on the restart alone.
        logits_fn: any function of images [B, ...] -> logits [B, Y]; `wrap` says which models do.
        x: images [B, H, W, C], pixels in `bounds`.
        y: labels [B].
        eps: radius of the ball, in the units of the pixels: 8/255, not 8.
        queries: forward passes per image and restart, at most.
        rescale_schedule: whether the schedule is stretched over `queries`.
        restarts: of each image.
        norm: "linf" or "l2".
        bounds: box of the pixels, (low, high); None for no box.
        ids: numbers of the images in their data set [B], which randomness goes by; default 0 to B - 1.
        slots: images that the device works on at once: they decide the memory.
        progress: a bar; None draws one on a terminal or in a notebook.
        folder: keeps records here, so that the same call goes on where it was interrupted.

    Returns:
        x_adv [B, ...], inside ball and box; x where nothing was broken.

    Raises:
        UserError: for bad settings, shapes, pixels and labels, and for models whose logits are no function of
            the image.
        Interrupted: on Ctrl-C; `.found` has what was found.

    >>> def logits(x):  # class 0 for bright images, 1 for dark ones; [B, H, W, C] -> [B, Y]
    ...     z = 10 * (x.mean(axis=(1, 2, 3))[:, None] - 0.5)
    ...     return jnp.concatenate([z, -z], axis=1)
    >>> x = np.stack([np.full((4, 4, 1), 0.55), np.full((4, 4, 1), 0.9)]).astype(np.float32)
    >>> y = np.array([0, 0])
    >>> x_adv = attacks.square(jax.random.key(0), logits, x, y, eps=0.1, queries=100, slots=2)
    >>> print(logits(x_adv).argmax(axis=1) != y, bool((x_adv[1] == x[1]).all()))
    [ True False] True
    """
    steps = whole("queries", queries, 1)
    attack = Square(steps=steps, rescale=bool(rescale_schedule), **common_of(eps, norm, bounds))
    return attack_alone(
        key,
        attack,
        logits_fn,
        x,
        y,
        ranking=None,
        ids=ids,
        restarts=restarts,
        slots=slots,
        progress=progress,
        folder=folder,
    )
