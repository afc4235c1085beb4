"""The doors of minimum-norm attacks: the nearest adversarial image that was found, and how far it is.

    found = attacks.fmn(key, clf.logits, x, y, norm="l2")
    print(np.median(found.distance))

What the attack found is then brought in along its own line: the smallest ball in which its projection is
still misclassified, by bisection. Every image that is returned was misclassified in a forward pass that
judges, and not in the attack's own loop alone.
"""

import dataclasses
import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from clustr_jax.attacks import resuming, scheduler, unattacked
from clustr_jax.attacks.attack_losses import margin, margin_targeted, one
from clustr_jax.attacks.calls import SLOTS, STOPPED, planned, prepare, run_plan
from clustr_jax.attacks.fmn import DDN, FMN, Nearest, first_step
from clustr_jax.attacks.geometry import length, over, project
from clustr_jax.attacks.options import bounds_of, check_radius, norm_of, whole
from clustr_jax.attacks.targets import check_ranking
from clustr_jax.attacks.watching import Interrupted
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.promotion import promoting
from clustr_jax.runtime.rounding import lengths

STEPS = 100
# Halvings of the radius, and how far beyond the boundary an image is left for other programs' rounding.
_HALVINGS, _BEYOND = 12, 2e-4
# Where rounding made the found point no success when it was judged: so much farther along its line.
_FARTHER = (1e-5, 1e-4, 1e-3, 1e-2)


@dataclasses.dataclass
class NearestResult:
    """x_adv [B, ...], the nearest misclassified images that were found, and their distances [B] to x.

    Of an image that is misclassified itself the distance is 0; where nothing was found it is inf, and x_adv
    is x. Distances are upper bounds of the smallest one. `notes` as in AutoAttackResult.
    """

    x_adv: Float[np.ndarray, "B ..."]
    distance: Float[np.ndarray, "B"]
    notes: tuple[str, ...] = ()


@promoting
def fmn(
    key: Array,
    logits_fn: Callable,
    x: Float[np.ndarray, "B ..."],
    y: Int[np.ndarray, "B"],
    *,
    steps: int = STEPS,
    norm: str = "linf",
    step_size: float | None = None,
    targeted: bool = False,
    targets: str = "malt",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    ids: Int[np.ndarray, "B"] | None = None,
    slots: int = SLOTS,
    progress: bool | None = None,
    folder: str | os.PathLike | None = None,
) -> NearestResult:
    """Fast minimum norm (Pintor et al. 2021): the nearest misclassified image in `norm`, without a radius.

    `steps` gradients from the image itself, then some 12 forward passes. It follows the likeliest other
    class.

    Args:
        key: changes nothing, for it starts at x.
        logits_fn: any function of images [B, ...] -> logits [B, Y]; `wrap` says which models do.
        x: images [B, ...], pixels in `bounds`.
        y: labels [B].
        steps: gradients of each image (and target).
        norm: "linf" or "l2".
        step_size: length of the first step, in l2 for both norms (default: 1 for l2, 10 for linf, times the
            width of the box).
        targeted: True makes a run towards each of 9 classes and takes the nearest of what they find.
        targets: which ones, "malt" (by `malt_targets`) or "likely".
        bounds: box of the pixels, (low, high); None for no box.
        ids: numbers of the images in their data set [B], which randomness goes by; default 0 to B - 1.
        slots: images that the device works on at once: they decide the memory.
        progress: a bar; None draws one on a terminal or in a notebook.
        folder: keeps records here, so that the same call goes on where it was interrupted.

    Returns:
        a `NearestResult`.

    Raises:
        UserError: for bad settings, shapes, pixels and labels, and for models whose logits are no function of
            the image.
        Interrupted: on Ctrl-C; `.found` has what was found.

    Two pixels, class 0 where their sum is above 1: the boundary is 0.2 away in linf, 0.283 in l2.

    >>> def logits(x):
    ...     z = x.sum(axis=1, keepdims=True) - 1
    ...     return jnp.concatenate([z, -z], axis=1)
    >>> x, y = np.array([[0.7, 0.7], [0.2, 0.1]], np.float32), np.array([0, 0])
    >>> found = attacks.fmn(jax.random.key(0), logits, x, y, norm="l2", slots=2)
    >>> print(found.distance, logits(found.x_adv).argmax(axis=1) != y)  # the second is wrong already
    [0.283 0.   ] [ True  True]
    """
    check_ranking(targets)
    norm, bounds = norm_of(norm), bounds_of(bounds)
    attack = FMN(
        eps=jnp.float32(jnp.inf),
        steps=np.int32(whole("steps", steps, 1)),
        norm=norm,
        bounds=bounds,
        step_size=_first_step(step_size, FMN, norm, bounds),
        margin=one(margin_targeted if targeted else margin),
    )
    ranking = targets if targeted else None
    return _nearest(
        key, attack, logits_fn, x, y, ranking=ranking, ids=ids, slots=slots, progress=progress, folder=folder
    )


@promoting
def ddn(
    key: Array,
    logits_fn: Callable,
    x: Float[np.ndarray, "B ..."],
    y: Int[np.ndarray, "B"],
    *,
    steps: int = STEPS,
    step_size: float | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    ids: Int[np.ndarray, "B"] | None = None,
    slots: int = SLOTS,
    progress: bool | None = None,
    folder: str | os.PathLike | None = None,
) -> NearestResult:
    """Decoupled direction and norm (Rony et al. 2019): the nearest misclassified image in l2.

    Steps up cross entropy, each onto a sphere about x that shrinks by 5 % where the point is misclassified
    and grows by 5 % where it is not.

    Args:
        key: changes nothing, for it starts at x.
        logits_fn: any function of images [B, ...] -> logits [B, Y]; `wrap` says which models do.
        x: images [B, ...], pixels in `bounds`.
        y: labels [B].
        steps: gradients of each image.
        step_size: length of the first step and the first radius (default: the width of the box).
        bounds: box of the pixels, (low, high); None for no box.
        ids: numbers of the images in their data set [B], which randomness goes by; default 0 to B - 1.
        slots: images that the device works on at once: they decide the memory.
        progress: a bar; None draws one on a terminal or in a notebook.
        folder: keeps records here, so that the same call goes on where it was interrupted.

    Returns:
        a `NearestResult`.

    Raises:
        UserError: for bad settings, shapes, pixels and labels, and for models whose logits are no function of
            the image.
        Interrupted: on Ctrl-C; `.found` has what was found.

    >>> def logits(x):  # class 0 where the sum of two pixels is above 1
    ...     z = x.sum(axis=1, keepdims=True) - 1
    ...     return jnp.concatenate([z, -z], axis=1)
    >>> x, y = np.array([[0.7, 0.7], [0.2, 0.1]], np.float32), np.array([0, 0])
    >>> print(attacks.ddn(jax.random.key(0), logits, x, y, slots=2).distance)
    [0.283 0.   ]
    """
    bounds = bounds_of(bounds)
    attack = DDN(
        eps=jnp.float32(jnp.inf),
        steps=np.int32(whole("steps", steps, 1)),
        norm="l2",
        bounds=bounds,
        step_size=_first_step(step_size, DDN, "l2", bounds),
    )
    return _nearest(
        key, attack, logits_fn, x, y, ranking=None, ids=ids, slots=slots, progress=progress, folder=folder
    )


def _first_step(step_size, kind, norm, bounds):
    if step_size is None:
        return jnp.float32(first_step(kind, norm, bounds))
    check_radius("step_size", step_size)
    if not step_size > 0:
        raise UserError(f"step_size must be above 0, got {step_size}")
    return jnp.float32(step_size)


def _nearest(key, attack, logits_fn, x, y, *, ranking, ids, slots, progress, folder) -> NearestResult:
    """The nearest of one run without targets, or of one towards each."""
    place = resuming.usable(folder)
    given, logits = prepare(
        key, logits_fn, x, y, eps=0.0, norm=attack.norm, bounds=attack.bounds, ids=ids, slots=slots
    )
    x, y, name = given.x, given.y, type(attack).__name__
    right = np.flatnonzero(logits.argmax(axis=1) == y)
    notes = (given.note,) if given.note else ()
    found = NearestResult(x.copy(), np.where(logits.argmax(axis=1) == y, np.inf, 0.0), notes)
    if not len(right):
        return found
    plan = planned(name, attack, given, logits, ranking, 1, slots)
    towards = [None] if plan.targets is None else [plan.targets[i : i + 1] for i in range(len(plan.targets))]
    plans = [plan._replace(targets=target) for target in towards]
    kept = resuming.begin(place, given, logits, plans, slots, "nearest")
    blind = np.ones(len(right), bool)
    for number, one_plan in enumerate(plans):
        record = f"{number}-{name}"
        earlier, done = kept.load_with(record, x[right], 1)
        if "distance" in done:  # a call that was interrupted had come as far
            found.x_adv[right], found.distance[right] = done["x_adv"], done["distance"]
            blind &= earlier.unattacked
            continue
        outcome, stopped = run_plan(
            given.key, one_plan, given, right, slots=slots, progress=progress, kept=kept, record=record
        )
        try:
            if stopped is None:
                place, candidates = images_found(
                    attack, given.key, given.model, x[right], y[right], outcome, ids=given.ids[right],
                    targets=None if one_plan.targets is None else one_plan.targets[:, right], slots=slots,
                )  # fmt: skip
                index = right[place]
                brought = bring_in(
                    given.model, candidates, x[index], y[index], attack.norm, attack.bounds, slots
                )
                _keep_nearer(found, index, *brought)
                so_far = {"x_adv": found.x_adv[right], "distance": found.distance[right]}
                kept.note(record, outcome, so_far, now=True)
        except KeyboardInterrupt:
            stopped = kept.leave(record, outcome)
        if stopped is not None:
            index, candidates = right[outcome.broken], outcome.x_adv[outcome.broken]
            _keep_nearer(found, index, candidates, lengths(candidates, x[index], attack.norm))
            found.notes = (*notes, f"interrupted in run {number + 1} of {len(plans)}")
            raise Interrupted(found, STOPPED + stopped)
        blind &= outcome.unattacked
    kept.clear()
    told = unattacked.told(blind)
    unattacked.warn(told)
    found.notes = (*notes, *([told] if told else []))
    return found


def _keep_nearer(found: NearestResult, index, x_adv, distance) -> None:
    """Put images of these places into `found` where they are nearer than what is there."""
    nearer = distance < found.distance[index]
    found.x_adv[index[nearer]], found.distance[index[nearer]] = x_adv[nearer], distance[nearer]


def images_found(
    attack: Nearest,
    key: Array,
    model: Partial,
    x: Float[np.ndarray, "N ..."],
    y: Int[np.ndarray, "N"],
    outcome: scheduler.Outcome,
    *,
    ids: Int[np.ndarray, "N"],
    targets: Int[np.ndarray, "T N"] | None = None,
    slots: int = SLOTS,
) -> tuple[Int[np.ndarray, "M"], Float[np.ndarray, "M ..."]]:
    """(places in x, images) of what a run found, judged to be a success or not; its `outcome` is on x.

    A nearest point lies on the boundary, where rounding can make it none in another program. An outcome has
    no image of these, so they are attacked once more, alone.
    """
    images = {int(i): outcome.x_adv[i] for i in np.flatnonzero(outcome.broken)}
    unsure = np.flatnonzero(outcome.unconfirmed & ~outcome.broken)

    def collect(example, restart, found, fooled):
        images.update({int(unsure[e]): image for e, image in zip(example, found, strict=True)})

    if len(unsure):
        scheduler.run(
            attack, key, model, x[unsure], y[unsure], ids=ids[unsure],
            targets=None if targets is None else targets[:, unsure], slots=slots, collect=collect,
        )  # fmt: skip
    index = np.array(sorted(images), np.int64)
    return index, np.array([images[i] for i in index], np.float32).reshape(-1, *x.shape[1:])


def bring_in(
    model: Callable,
    x_adv: Float[np.ndarray, "N ..."],
    x: Float[np.ndarray, "N ..."],
    y: Int[np.ndarray, "N"],
    norm: str,
    bounds: tuple[float, float] | None,
    slots: int,
) -> tuple[Float[np.ndarray, "B ..."], Float[np.ndarray, "B"]]:
    """(the nearest misclassified point on the way from x_adv to x, its distance; x and inf if there is none).

    The way: projections onto ever smaller balls about x, in the box.
    """
    found, distance = np.array(x, np.float32), np.full(len(x), np.inf)
    for start in range(0, len(x), slots):
        place = np.arange(start, start + slots) % len(x)
        kept = place[: min(slots, len(x) - start)]
        part, confirmed = _bring_in(model, x_adv[place], x[place], y[place], norm, bounds)
        part, confirmed = part[: len(kept)], confirmed[: len(kept)]
        size = lengths(part, x[kept], norm)
        found[kept[confirmed]], distance[kept[confirmed]] = part[confirmed], size[confirmed]
    return found, distance


def _bring_in(model, x_adv, x, y, norm, bounds):
    """(points, confirmed) of one batch. Every point is judged before it counts."""

    def wrong(points):
        return scheduler.misjudged(model, points, y)

    def choose(take, a, b):
        return np.where(take.reshape(-1, *(1,) * (x.ndim - 1)), a, b)

    outer, confirmed = np.asarray(x_adv), wrong(x_adv)
    for more in _FARTHER:
        if confirmed.all():
            break
        farther = x + (1 + more) * (x_adv - x)
        farther = farther if bounds is None else np.clip(farther, *bounds)
        better = ~confirmed & wrong(farther)
        outer, confirmed = choose(better, farther, outer), confirmed | better
    size = np.asarray(length(outer - x, norm))
    low, high = np.zeros_like(size), size
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        inside = wrong(_projected(outer, x, middle, norm, bounds))
        low, high = np.where(inside, low, middle), np.where(inside, middle, high)
    nearer = choose(high < size, _projected(outer, x, high, norm, bounds), outer)
    beyond = _projected(outer, x, np.minimum(high * (1 + _BEYOND), size), norm, bounds)
    return choose(wrong(beyond) & (high < size), beyond, nearer), confirmed


@functools.partial(jax.jit, static_argnames=("norm", "bounds"))
def _projected(x_adv, x, radius, norm, bounds):
    return project(x_adv, x, over(radius, x), norm, bounds)
