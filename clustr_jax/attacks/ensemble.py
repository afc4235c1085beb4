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
from clustr_jax.attacks import attack_losses, resuming, unattacked
from clustr_jax.attacks.apgd import APGD
from clustr_jax.attacks.calls import SLOTS, STOPPED, attack_alone, common_of, planned, prepare, run_plan
from clustr_jax.attacks.fab import FAB
from clustr_jax.attacks.options import whole
from clustr_jax.attacks.registry import ATTACKS, PARAMETER_FREE, QUERIES, STANDARD, STEPS, Budget
from clustr_jax.attacks.square import Square
from clustr_jax.attacks.targets import check_ranking
from clustr_jax.attacks.watching import Interrupted
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.promotion import promoting


@dataclasses.dataclass
class AutoAttackResult:
    """x_adv [B, ...] (x where nothing succeeded), robust [B], and the attack that broke each ("": none, or
    "clean": misclassified before). `notes`: what makes these numbers doubtful, of a model that was wrapped
    with steady=False, and of attacks that had no gradient to follow."""

    x_adv: Float[np.ndarray, "B ..."]
    robust: Bool[np.ndarray, "B"]
    broken_by: np.ndarray
    notes: tuple[str, ...] = ()


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
    attacks: tuple[str, ...] = STANDARD,
    rescale_schedule: bool = False,
    ids: Int[np.ndarray, "B"] | None = None,
    slots: int = SLOTS,
    progress: bool | None = None,
    folder: str | os.PathLike | None = None,
) -> AutoAttackResult:
    """The standard ensemble: 100 steps, 9 targets, 5,000 queries; the union of what succeeds, per image.

    `rescale_schedule` is of Square, as in `square`; False is AutoAttack's "standard" (`resc_schedule`).
    Two and three classes are handled: targets are all other classes, and the targeted loss is the plain
    margin where DLR has too few logits. `logits_fn` as in `pgd`. `progress` None draws a bar on a
    terminal or in a notebook. Raises UserError for bad input, and on Ctrl-C Interrupted with what was found.

    With a `folder` the same call goes on where it was interrupted or killed, and its result is bit for bit
    that of an uninterrupted one. Its records lie in `folder`/partial: of the moment itself after Ctrl-C,
    every 20 seconds otherwise. They go when the attack ends. Records of other images, labels, ids, keys,
    settings, versions, devices or models are left alone, with a RecordWarning.

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
    unknown = [name for name in attacks if name not in PARAMETER_FREE]
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
    plans = []
    for entry in (ATTACKS[name] for name in attacks):
        entry.check(shape=x.shape, classes=logits.shape[1], norm=given.norm)
        attack = entry.make(budget, None)
        plans.append(planned(entry.name, attack, given, logits, entry.targets, entry.restarts, slots))
    kept = resuming.begin(place, given, logits, plans, slots, "autoattack")
    broken_by = np.where(alive, "", "clean").astype("U16")
    notes = (given.note,) if given.note else ()
    followed = []  # of each attack that follows gradients: "", or that it had none
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
        broken_by[index[outcome.broken]] = plan.name
        alive[index] = ~outcome.broken
        if stopped is not None:
            found = AutoAttackResult(x_adv, alive, broken_by, (*notes, f"interrupted in {plan.name}"))
            raise Interrupted(found, STOPPED + stopped)
        if plan.attack.gradients and float(eps):
            followed.append(unattacked.told(outcome.unattacked, f"{plan.name}: "))
    kept.clear()
    if len(x):
        unattacked.warn_of_settings(eps=eps)
    notes = (*notes, *filter(None, followed))
    if followed and all(followed):  # what one of them cannot see another one may
        unattacked.warn(followed[0])
    return AutoAttackResult(x_adv, alive, broken_by, notes)


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
    """Auto-PGD on `loss_fn`; targeted=True is APGD-T: DLR towards 9 other classes, no `loss_fn`.

    These are the likeliest ones, or with targets="malt" the nearest by `malt_targets` (one gradient per
    class before the attack, 100 at most). `folder` as in `autoattack`: the same call goes on where it was
    interrupted.

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
    """FAB-T: looks for the nearest adversarial point towards the 9 likeliest classes; ends within eps.

    What is returned is the first one found within eps, and not always the nearest: no measure of distance.
    `folder` as in `autoattack`: the same call goes on where it was interrupted.

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
    """Square: random search without gradients; `queries` forward passes per image and restart at most.

    The squares shrink by a schedule for 10,000 queries. `rescale_schedule` stretches it over `queries`, as
    the authors of Square and the `sound` protocol do; without it 5,000 queries end at squares of 3 x 3
    pixels on 32 x 32 images, not of one, and none reaches the last row or column: AutoAttack's "standard"
    (its `resc_schedule=False`), which breaks a little less. `folder` as in `autoattack`:
    the same call goes on where it was interrupted.

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
