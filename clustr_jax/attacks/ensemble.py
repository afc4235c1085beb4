"""AutoAttack (Croce & Hein 2020): APGD-CE, APGD-T, FAB-T and Square, each on what the others left.

    result = attacks.autoattack(key, clf.logits, x, y, eps=8/255)
    print(result.robust.mean(), result.broken_by)

`apgd`, `fab` and `square` are its parts. All run through `scheduler.run`: not inside jit, any number of
images, one compilation per attack and shapes. Where an image is not broken they return it unchanged.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from clustr_jax import losses
from clustr_jax.attacks import attack_losses, resuming, scheduler
from clustr_jax.attacks.apgd import APGD
from clustr_jax.attacks.fab import FAB
from clustr_jax.attacks.gate import Admitted, admit
from clustr_jax.attacks.input_checks import check_logits, concrete
from clustr_jax.attacks.options import bounds_of, check_radius, norm_of, whole
from clustr_jax.attacks.scheduled_attack import Attack
from clustr_jax.attacks.square import Square
from clustr_jax.attacks.watching import Interrupted, bar
from clustr_jax.runtime import mesh
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.promotion import promoting

# Of "standard": steps of the gradient attacks, queries of Square, targets of APGD-T and FAB-T.
STEPS, QUERIES, TARGETS = 100, 5000, 9
SLOTS = 64


@dataclasses.dataclass
class AutoAttackResult:
    """x_adv [B, ...] (x where nothing succeeded), robust [B], and the attack that broke each ("": none, or
    "clean": misclassified before). `notes`: what makes these numbers doubtful, for a model that was wrapped
    with steady=False."""

    x_adv: Float[np.ndarray, "B ..."]
    robust: Bool[np.ndarray, "B"]
    broken_by: np.ndarray
    notes: tuple[str, ...] = ()


def build(
    name: str,
    *,
    eps,
    norm="linf",
    bounds=(0.0, 1.0),
    steps=STEPS,
    queries=QUERIES,
    restarts=1,
    rescale_schedule=True,
) -> Attack:
    """An attack of the ensemble by name: apgd-ce, apgd-dlr, apgd-t, fab-t or square."""
    common: dict[str, Any] = dict(eps=jnp.float32(eps), norm=norm, bounds=bounds)
    if name == "square":
        return Square(steps=queries, rescale=rescale_schedule, **common)
    if name == "fab-t":
        return FAB(steps=steps, restarts=restarts, **common)
    return APGD(steps=steps, loss=attack_losses.one(_LOSSES[name]), **common)


_LOSSES = {
    "apgd-ce": attack_losses.cross_entropy,
    "apgd-dlr": attack_losses.dlr,
    "apgd-t": attack_losses.dlr_targeted,
}
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
TARGETED = ("apgd-t", "fab-t")
_ALL = (*_LOSSES, "fab-t", "square")


def likely_targets(logits, y, count: int = TARGETS) -> Int[np.ndarray, "T B"]:
    """For each image the `count` other classes with the largest clean logits, best first (at most Y - 1).

    >>> from clustr_jax.attacks import ensemble
    >>> z = np.array([[5.0, 1.0, 3.0], [0.0, 2.0, 1.0]])  # [B=2, Y=3]
    >>> print(ensemble.likely_targets(z, np.array([0, 1])))  # [T=2, B=2]
    [[2 2]
     [1 0]]
    """
    logits = np.array(logits, np.float32)
    logits[np.arange(len(y)), y] = -np.inf
    order = np.argsort(-logits, axis=1, kind="stable")
    return np.ascontiguousarray(order[:, : min(count, logits.shape[1] - 1)].T).astype(np.int32)


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
    if isinstance(attacks, str) or not attacks:
        raise UserError(
            f"attacks must name one or more of {', '.join(_ALL)}, got {attacks!r}; without any, nothing is "
            f"attacked and every image counts as robust"
        )
    unknown = [name for name in attacks if name not in _ALL]
    if unknown:
        raise UserError(f"attacks: unknown {unknown[0]!r}; known: {', '.join(_ALL)}")
    place = resuming.usable(folder)
    given, logits = _prepare(key, logits_fn, x, y, eps, norm, bounds, ids, slots)
    x, y = given.x, given.y
    if "apgd-dlr" in attacks and logits.shape[1] < 3:
        raise UserError("apgd-dlr needs at least 3 classes, got 2; leave it out")
    alive = logits.argmax(axis=1) == y
    common: dict[str, Any] = dict(eps=eps, norm=given.norm, bounds=given.bounds)
    common["rescale_schedule"] = bool(rescale_schedule)
    planned = [_planned(name, build(name, **common), given, logits, name in TARGETED) for name in attacks]
    kept = resuming.begin(place, given, logits, planned, slots, "autoattack")
    broken_by = np.where(alive, "", "clean").astype("U16")
    notes = (given.note,) if given.note else ()
    x_adv = x.copy()
    for number, plan in enumerate(planned):
        index = np.flatnonzero(alive)
        if not len(index):
            break
        own, record = jax.random.fold_in(given.key, number), f"{number}-{plan.name}"
        outcome, stopped = _run(own, plan, given, index, slots, progress, kept, record)
        x_adv[index] = outcome.x_adv
        broken_by[index[outcome.broken]] = plan.name
        alive[index] = ~outcome.broken
        if stopped is not None:
            found = AutoAttackResult(x_adv, alive, broken_by, (*notes, f"interrupted in {plan.name}"))
            raise Interrupted(found, _STOPPED + stopped)
    kept.clear()
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
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    ids: Int[np.ndarray, "B"] | None = None,
    slots: int = SLOTS,
    progress: bool | None = None,
    folder: str | os.PathLike | None = None,
) -> Float[np.ndarray, "B ..."]:
    """Auto-PGD on `loss_fn`; targeted=True is APGD-T: DLR towards the 9 likeliest classes, no `loss_fn`.

    `folder` as in `autoattack`: the same call goes on where it was interrupted.

    >>> def logits(x):  # class 0 for bright images, 1 for dark ones; [B, H, W, C] -> [B, Y]
    ...     z = 10 * (x.mean(axis=(1, 2, 3))[:, None] - 0.5)
    ...     return jnp.concatenate([z, -z], axis=1)
    >>> x = np.stack([np.full((4, 4, 1), 0.55), np.full((4, 4, 1), 0.9)]).astype(np.float32)
    >>> y = np.array([0, 0])
    >>> x_adv = attacks.apgd(jax.random.key(0), logits, x, y, eps=0.1, steps=10, slots=2)
    >>> print(logits(x_adv).argmax(axis=1) != y, bool((x_adv[1] == x[1]).all()))
    [ True False] True
    """
    loss = attack_losses.one(attack_losses.dlr_targeted if targeted else attack_losses.untargeted(loss_fn))
    attack = APGD(steps=whole("steps", steps, 1), loss=loss, **_common(eps, norm, bounds))
    return _attack(key, attack, logits_fn, x, y, targeted, ids, restarts, slots, progress, folder)


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
    attack = FAB(steps=whole("steps", steps, 1), restarts=restarts, **_common(eps, norm, bounds))
    return _attack(key, attack, logits_fn, x, y, True, ids, restarts, slots, progress, folder)


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
    attack = Square(steps=steps, rescale=bool(rescale_schedule), **_common(eps, norm, bounds))
    return _attack(key, attack, logits_fn, x, y, False, ids, restarts, slots, progress, folder)


def _common(eps, norm, bounds) -> dict[str, Any]:
    check_radius("eps", eps)
    return dict(eps=jnp.float32(eps), norm=norm_of(norm), bounds=bounds_of(bounds))


def _attack(key, attack, logits_fn, x, y, targeted, ids, restarts, slots, progress, folder):
    restarts, place = whole("restarts", restarts, 1), resuming.usable(folder)
    given, logits = _prepare(key, logits_fn, x, y, float(attack.eps), attack.norm, attack.bounds, ids, slots)
    plan = _planned(type(attack).__name__, attack, given, logits, targeted, restarts)
    x_adv, alive = given.x.copy(), np.flatnonzero(logits.argmax(axis=1) == given.y)
    if len(alive):
        kept = resuming.begin(place, given, logits, [plan], slots, "one attack")
        outcome, stopped = _run(given.key, plan, given, alive, slots, progress, kept, plan.name)
        x_adv[alive] = outcome.x_adv
        if stopped is not None:
            raise Interrupted(x_adv, _STOPPED + stopped)
        kept.clear()
    return x_adv


_STOPPED = "interrupted; .found has what was found, and other images were not attacked to the end"


def _planned(name, attack, given, logits, targeted, restarts=1) -> resuming.Planned:
    """UserError where it cannot attack these images."""
    if isinstance(attack, Square) and given.x.ndim != 4:
        raise UserError(f"square takes images [B, H, W, C], got {given.x.shape}; leave it out for points")
    targets = likely_targets(logits, given.y) if targeted else None
    return resuming.Planned(name, attack, targets, restarts)


def _run(key, plan, given, index, slots, progress, kept, record) -> tuple[scheduler.Outcome, str | None]:
    """(the outcome on the images of this index; where it was interrupted, what to say of its records)."""
    x, y, ids = given.x[index], given.y[index], given.ids[index]
    targets = None if plan.targets is None else plan.targets[:, index]
    outcome = kept.load(record, x, plan.restarts * (1 if targets is None else len(targets)))
    try:
        with bar(progress, plan.name) as report:
            scheduler.run(
                plan.attack, key, given.model, x, y, ids=ids, targets=targets, restarts=plan.restarts,
                slots=slots, outcome=outcome, report=kept.noting(record, report),
            )  # fmt: skip
        kept.note(record, outcome, now=True)
    except KeyboardInterrupt:
        said = kept.leave(record, outcome)
        outcome.x_adv[~outcome.broken] = x[~outcome.broken]  # of a call that was not noted to its end
        return outcome, said
    return outcome, None


def _prepare(key, logits_fn, x, y, eps, norm, bounds, ids, slots) -> tuple[Admitted, np.ndarray]:
    """(what the attack goes on with, in NumPy; clean logits), or UserError for what cannot be attacked."""
    slots = whole("slots", slots, 1)
    rows = -(-slots // mesh.devices())  # what one device sees
    given = admit(key, logits_fn, x, y, eps=eps, norm=norm, bounds=bounds, ids=ids, rows=rows)
    if not concrete(given.x, given.y, given.key):
        raise UserError("this attack cannot be inside jit: it schedules images from the host; pgd can")
    if given.y.ndim != 1:
        raise UserError(f"y must be labels [B], got probabilities {given.y.shape}; give y.argmax(axis=1)")
    x, y = np.asarray(given.x), np.asarray(given.y).astype(np.int32)
    x = x if given.bounds is None else np.clip(x, *given.bounds)
    logits = scheduler.forward(given.model, x, slots)
    check_logits(logits, y)
    return given._replace(x=x, y=y, ids=np.asarray(given.ids).astype(np.int32)), logits
