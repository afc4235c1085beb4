"""Restarts where they may still help: on the images that came nearest to breaking, until nothing new breaks.

The idea is A3's (Liu et al., CVPR 2022): most images that hold out against a strong attack are far from the
boundary, and restarts on them are lost. All images have one restart; then the unbroken ones with the largest
margins max_c z_c - z_y at the ends of their restarts have the next, round by round. Which images a round has
follows from what the rounds before it found, so that an interrupted call goes on to the same result.
"""

import dataclasses
import os
from collections.abc import Callable

import jax
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from clustr_jax.attacks import resuming, scheduler, unattacked
from clustr_jax.attacks.attack_losses import logits_of
from clustr_jax.attacks.calls import SLOTS, STOPPED, common_of, planned, prepare
from clustr_jax.attacks.options import whole
from clustr_jax.attacks.registry import ATTACKS, PARAMETER_FREE, STEPS, Budget
from clustr_jax.attacks.scheduled_attack import Attack
from clustr_jax.attacks.watching import Interrupted, bar
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.promotion import promoting


@dataclasses.dataclass
class Progress:
    """What the rounds so far found: the outcome of all restarts, and margins where they ended.

    `outcome` has a row for each target and restart, target by target; `margins` as well, NaN where none
    ended. `attacked` and `broken` count images by round.
    """

    outcome: scheduler.Outcome
    margins: Float[np.ndarray, "R N"]
    most: int
    attacked: list[int] = dataclasses.field(default_factory=list)
    broken: list[int] = dataclasses.field(default_factory=list)

    @classmethod
    def fresh(cls, x: Float[np.ndarray, "N ..."], most: int, targets: int = 1) -> "Progress":
        """Nothing attacked yet."""
        outcome = scheduler.Outcome.fresh(x, targets * most)
        return cls(outcome, np.full(outcome.spent.shape, np.nan, np.float32), most)

    @property
    def rounds_of_rows(self) -> Int[np.ndarray, "R"]:
        """The round of each row: the number of its restart."""
        return np.arange(len(self.margins)) % self.most

    def alive(self, number: int) -> Bool[np.ndarray, "N"]:
        """What the rounds before this one left."""
        return ~self.outcome.broken | (self.outcome.restart % self.most >= number)

    def nearest(self, number: int, share: float) -> Bool[np.ndarray, "N"]:
        """The images of a round: of those left the share with the largest margins so far; all in round 0."""
        alive = self.alive(number)
        if number == 0:
            return alive
        earlier = self.margins[self.rounds_of_rows < number]
        best = np.max(np.where(np.isnan(earlier), -np.inf, earlier), axis=0)
        order = np.argsort(np.where(alive, -best, np.inf), kind="stable")
        chosen = np.zeros(len(alive), bool)
        chosen[order[: int(np.ceil(share * alive.sum()))]] = True
        return chosen

    def gained(self, number: int) -> int:
        """Images that a round broke."""
        return int(np.sum(self.outcome.broken & (self.outcome.restart % self.most == number)))


def run(
    attack: Attack,
    key: Array,
    model: Partial,
    x: Float[np.ndarray, "N ..."],
    y: Int[np.ndarray, "N"],
    *,
    ids: Int[np.ndarray, "N"] | None = None,
    targets: Int[np.ndarray, "T N"] | None = None,
    most: int = 20,
    share: float = 0.25,
    patience: int = 2,
    slots: int = SLOTS,
    progress: Progress | None = None,
    report: Callable[[Progress, scheduler.Outcome], None] | None = None,
) -> Progress:
    """`scheduler.run` with at most `most` restarts (of each target), round by round as said above.

    It ends when `patience` rounds in a row broke nothing, when nothing is left, or after `most` rounds.
    Restart r of an example is the one that `scheduler.run(..., restarts=most)` gives it, with its randomness.
    `progress` goes on from an earlier one, in which everything is noted as it ends, also where this call is
    interrupted; `report(progress, outcome of the round)` is called between device calls.
    """
    count = 1 if targets is None else len(targets)
    progress = Progress.fresh(x, most, count) if progress is None else progress
    progress.attacked, progress.broken = [], []

    def collect(example, restart, found, fooled):
        logits = logits_of(scheduler.forward(model, found, slots))
        own = logits[np.arange(len(found)), y[example]]
        others = np.where(np.arange(logits.shape[1])[None, :] == y[example][:, None], -np.inf, logits)
        progress.margins[restart, example] = others.max(axis=1) - own

    for number in range(most):
        chosen = progress.nearest(number, share)
        if not chosen.any() or (number >= patience and not any(progress.broken[-patience:])):
            break
        pairs = (progress.rounds_of_rows == number)[:, None] & chosen[None, :]
        _run_pairs(
            pairs, progress, report, attack, key, model, x, y, ids=ids, targets=targets, restarts=most,
            slots=slots, collect=collect,
        )  # fmt: skip
        progress.attacked.append(int(chosen.sum()))
        progress.broken.append(progress.gained(number))
    return progress


def _run_pairs(pairs, progress, report, *given, **settings) -> None:
    """`scheduler.run` on these (restart, example) pairs alone: the others are marked as if they had ended."""
    before, working = progress.outcome, progress.outcome.copied()
    rows = np.arange(len(pairs))[:, None]
    wanted = rows < np.where(before.broken, before.restart, len(pairs))[None, :]
    if not (pairs & (before.spent == 0) & wanted).any():
        return  # an earlier call ended this round: what is in flight is of a later one
    working.spent[~pairs] = 1
    flying = [np.asarray(leaf) for leaf in jax.tree.leaves(working.flight)]
    working.flight = flying if flying and flying[-1].any() else None  # the last leaf: slots in use

    def note():
        """What is true of all pairs."""
        progress.outcome = dataclasses.replace(working, spent=np.where(pairs, working.spent, before.spent))

    def reported(outcome):
        note()
        if report is not None:
            report(progress, outcome)

    try:
        scheduler.run(*given, **settings, outcome=working, report=reported)
    finally:
        note()


@promoting
def adaptive_restarts(
    key: Array,
    logits_fn: Callable,
    x: Float[np.ndarray, "B ..."],
    y: Int[np.ndarray, "B"],
    *,
    eps: float,
    attack: str = "pma",
    steps: int = STEPS,
    most: int = 20,
    share: float = 0.25,
    patience: int = 2,
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    ids: Int[np.ndarray, "B"] | None = None,
    slots: int = SLOTS,
    progress: bool | None = None,
    folder: str | os.PathLike | None = None,
) -> Float[np.ndarray, "B ..."]:
    """Restarts of one attack, on the images that came nearest to breaking, until nothing new breaks.

    Every image has one restart. Of those left the `share` with the largest margins has another one, and so
    on, until `patience` rounds in a row break nothing, or `most` restarts are through (after Liu et al.
    2022).

    Args:
        key: of `jax.random.key`. An image's draws depend on it, on the image's id and on the restart alone.
        logits_fn: any function of images [B, ...] -> logits [B, Y]; `wrap` says which models do.
        x: images [B, ...], pixels in `bounds`.
        y: labels [B].
        eps: radius of the ball, in the units of the pixels: 8/255, not 8.
        attack: one of `registry.PARAMETER_FREE`: pma, apgd-ce, apgd-t (a restart is one towards each target),
            square and others.
        steps: gradients of each restart; of square its queries.
        most: restarts of an image, at most.
        share: of the unbroken images, above 0 and at most 1.
        patience: rounds in a row that may break nothing.
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
    >>> x_adv = attacks.adaptive_restarts(jax.random.key(0), logits, x, y, eps=0.1, steps=10, slots=2)
    >>> print(logits(x_adv).argmax(axis=1) != y, bool((x_adv[1] == x[1]).all()))
    [ True False] True
    """
    steps, most, patience = whole("steps", steps, 1), whole("most", most, 1), whole("patience", patience, 1)
    if isinstance(share, str) or not 0 < share <= 1:
        raise UserError(f"share must be above 0 and at most 1, got {share!r}")
    if attack not in PARAMETER_FREE:
        raise UserError(f"attack must be one of {', '.join(PARAMETER_FREE)}, got {attack!r}")
    if not ATTACKS[attack].kind.draws:
        raise UserError(f"attack={attack} draws nothing, so that all its restarts are one; take another")
    common_of(eps, norm, bounds)
    place = resuming.usable(folder)
    given, logits = prepare(
        key, logits_fn, x, y, eps=float(eps), norm=norm, bounds=bounds, ids=ids, slots=slots
    )
    entry = ATTACKS[attack]
    entry.check(shape=given.x.shape, classes=logits.shape[1], norm=given.norm)
    budget = Budget(eps=eps, norm=given.norm, bounds=given.bounds, steps=steps, queries=steps, restarts=most)
    made = entry.make(budget, None)
    rule = [f"{name}={value}" for name, value in (("share", share), ("patience", patience))]
    plan = planned(f"adaptive {attack} {' '.join(rule)}", made, given, logits, entry.targets, most, slots)
    x_adv, right = given.x.copy(), np.flatnonzero(logits.argmax(axis=1) == given.y)
    if len(x_adv):
        unattacked.warn_of_settings(eps=eps)
    if not len(right):
        return x_adv
    kept = resuming.begin(place, given, logits, [plan], slots, "adaptive restarts")
    so_far = _loaded(kept, given.x[right], most, 1 if plan.targets is None else len(plan.targets))
    try:
        with bar(progress, attack) as draw:

            def report(so_far, outcome):
                kept.note(_RECORD, so_far.outcome, {"margins": so_far.margins})
                if draw is not None:
                    draw(outcome)

            run(
                made, given.key, given.model, given.x[right], given.y[right], ids=given.ids[right],
                targets=None if plan.targets is None else plan.targets[:, right], most=most, share=share,
                patience=patience, slots=slots, progress=so_far, report=report,
            )  # fmt: skip
    except KeyboardInterrupt:
        said = kept.leave(_RECORD, so_far.outcome, {"margins": so_far.margins})
        broken = so_far.outcome.broken
        x_adv[right[broken]] = so_far.outcome.x_adv[broken]
        raise Interrupted(x_adv, STOPPED + said) from None
    broken = so_far.outcome.broken
    x_adv[right[broken]] = so_far.outcome.x_adv[broken]
    kept.clear()
    if float(eps):
        unattacked.warn(unattacked.told(so_far.outcome.unattacked))
    return x_adv


_RECORD = "adaptive"


def _loaded(kept, x, most, targets) -> Progress:
    """What an interrupted call had done, or nothing."""
    so_far = Progress.fresh(x, most, targets)
    outcome, extra = kept.load_with(_RECORD, x, most * targets)
    if extra.get("margins", so_far.margins).shape != so_far.margins.shape:
        return so_far
    so_far.outcome, so_far.margins = outcome, np.array(extra.get("margins", so_far.margins))
    return so_far
