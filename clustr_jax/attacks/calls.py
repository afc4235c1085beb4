"""What the public functions of all scheduled attacks share: one call, on the host."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from clustr_jax.attacks import resuming, scheduler, trust, unattacked, user_losses
from clustr_jax.attacks.gate import Admitted, admit
from clustr_jax.attacks.input_checks import check_logits, concrete
from clustr_jax.attacks.options import bounds_of, check_radius, norm_of, whole
from clustr_jax.attacks.scheduled_attack import Attack
from clustr_jax.attacks.targets import CHOOSERS, ranking_gradients
from clustr_jax.attacks.watching import Interrupted, bar
from clustr_jax.runtime import mesh
from clustr_jax.runtime.errors import UserError

# Images that the device works on at once.
SLOTS = 64
STOPPED = "interrupted; .found has what was found, and other images were not attacked to the end"


def common_of(eps: Any, norm: Any, bounds: Any) -> dict[str, Any]:
    """The settings that every attack has, checked."""
    check_radius("eps", eps)
    return dict(eps=jnp.float32(eps), norm=norm_of(norm), bounds=bounds_of(bounds))


def attack_alone(
    key: Any,
    attack: Attack,
    logits_fn: Callable,
    x: Any,
    y: Any,
    *,
    ranking: str | None = None,
    ids: Any = None,
    restarts: int = 1,
    slots: int = SLOTS,
    progress: bool | None = None,
    folder: Any = None,
) -> Float[np.ndarray, "B ..."]:
    """One attack at its door: x_adv [B, ...], x where nothing was broken. `ranking` of targets, or None.

    For attacks of your own as well (docs/own_attack.md).
    """
    restarts, place = whole("restarts", restarts, 1), resuming.usable(folder)
    given, logits = prepare(
        key,
        logits_fn,
        x,
        y,
        eps=float(attack.eps),  # pyright: ignore[reportArgumentType]  one number at a door
        norm=attack.norm,
        bounds=attack.bounds,
        ids=ids,
        slots=slots,
    )
    attack = user_losses.of_attack(attack, slots, logits.shape[1], given.y)
    plan = planned(type(attack).__name__, attack, given, logits, ranking, restarts, slots)
    x_adv, alive = given.x.copy(), np.flatnonzero(logits.argmax(axis=1) == given.y)
    if len(alive):
        kept = resuming.begin(place, given, logits, [plan], slots, "one attack")
        outcome, stopped = run_plan(
            given.key, plan, given, alive, slots=slots, progress=progress, kept=kept, record=plan.name
        )
        x_adv[alive] = outcome.x_adv
        if stopped is not None:
            raise Interrupted(x_adv, STOPPED + stopped)
        kept.clear()
        if np.any(attack.eps):
            unattacked.warn(unattacked.told(outcome.unattacked))
    if len(x_adv):
        unattacked.warn_of_settings(eps=attack.eps)
    return x_adv


def planned(
    name: str,
    attack: Attack,
    given: Admitted,
    logits: np.ndarray,
    ranking: str | None,
    restarts: int = 1,
    slots: int = SLOTS,
) -> resuming.Planned:
    """UserError where it cannot attack these images. `ranking`: of its targets, or None without targets."""
    if attack.images and given.x.ndim != 4:
        what = type(attack).__name__.lower()
        raise UserError(f"{what} takes images [B, H, W, C], got {given.x.shape}; leave it out for points")
    targets, spent = None, 0
    if ranking is not None:
        spent = len(given.x) * ranking_gradients(ranking, logits)
        targets = CHOOSERS[ranking](given.model, given.x, given.y, logits, attack.norm, slots=slots)
    if ranking == "malt" and "malt" not in name:
        name = f"{name}-malt"
    return resuming.Planned(name, attack, targets, restarts, spent)


def run_plan(
    key: Any,
    plan: resuming.Planned,
    given: Admitted,
    index: Int[np.ndarray, "A"],
    *,
    slots: int,
    progress: bool | None,
    kept: resuming.Kept,
    record: str,
) -> tuple[scheduler.Outcome, str | None]:
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


def prepare(
    key: Any, logits_fn: Callable, x: Any, y: Any, *, eps: Any, norm: Any, bounds: Any, ids: Any, slots: int
) -> tuple[Admitted, np.ndarray]:
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
    note = given.note or trust.check_size(given.seen, logits, rows)
    check_logits(logits, y)
    return given._replace(x=x, y=y, ids=np.asarray(given.ids).astype(np.int32), note=note), logits
