"""AutoAttack (Croce & Hein 2020): APGD-CE, APGD-T, FAB-T and Square, each on what the others left.

    result = attacks.autoattack(key, clf.logits, x, y, eps=8/255)
    print(result.robust.mean(), result.broken_by)

`apgd`, `fab` and `square` are its parts. All run through `slots.run`: not inside jit, any number of images,
one compilation per attack and shapes. Where an image is not broken they return it unchanged.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from clustr_jax import losses
from clustr_jax.attacks import aims, slots
from clustr_jax.attacks.apgd import APGD
from clustr_jax.attacks.fab import FAB
from clustr_jax.attacks.inputs import check_ids, check_images, check_logits
from clustr_jax.attacks.pgd import as_partial, check_settings
from clustr_jax.attacks.square import Square
from clustr_jax.errors import UserError
from clustr_jax.promotion import promoting

# Of "standard": steps of the gradient attacks, queries of Square, targets of APGD-T and FAB-T.
STEPS, QUERIES, TARGETS = 100, 5000, 9
SLOTS = 64


@dataclasses.dataclass
class AutoAttackResult:
    """x_adv [B, ...] (x where nothing succeeded), robust [B], and the attack that broke each ("": none, or
    "clean": misclassified before)."""

    x_adv: Float[np.ndarray, "B ..."]
    robust: Bool[np.ndarray, "B"]
    broken_by: np.ndarray


def build(
    name: str, *, eps, norm="linf", bounds=(0.0, 1.0), steps=STEPS, queries=QUERIES, restarts=1
) -> slots.Attack:
    """An attack of the ensemble by name: apgd-ce, apgd-dlr, apgd-t, fab-t or square."""
    common = dict(eps=jnp.float32(eps), norm=norm, bounds=bounds)
    if name == "square":
        return Square(steps=queries, **common)
    if name == "fab-t":
        return FAB(steps=steps, restarts=restarts, **common)
    return APGD(steps=steps, aim=aims.one(_AIMS[name]), **common)


_AIMS = {"apgd-ce": aims.cross_entropy, "apgd-dlr": aims.dlr, "apgd-t": aims.dlr_targeted}
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
TARGETED = ("apgd-t", "fab-t")


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
    ids: Int[np.ndarray, "B"] | None = None,
    slots: int = SLOTS,
) -> AutoAttackResult:
    """The standard ensemble: 100 steps, 9 targets, 5,000 queries; the union of what succeeds, per image.

    Two and three classes are handled: targets are all other classes, and the targeted loss is the plain
    margin where DLR has too few logits. `logits_fn` as in `pgd`. Raises UserError for bad input.

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
    unknown = [name for name in attacks if name not in (*_AIMS, "fab-t", "square")]
    if unknown:
        raise UserError(f"attacks: unknown {unknown[0]!r}; known: {', '.join((*_AIMS, 'fab-t', 'square'))}")
    model, x, y, logits = _prepare(logits_fn, x, y, eps, norm, bounds, slots)
    if "apgd-dlr" in attacks and logits.shape[1] < 3:
        raise UserError("apgd-dlr needs at least 3 classes, got 2; leave it out")
    alive = logits.argmax(axis=1) == y
    broken_by = np.where(alive, "", "clean").astype("U16")
    x_adv = x.copy()
    ids = _ids(ids, len(x))
    for number, name in enumerate(attacks):
        index = np.flatnonzero(alive)
        if not len(index):
            break
        outcome = _run(
            jax.random.fold_in(key, number), build(name, eps=eps, norm=norm, bounds=bounds), model,
            x[index], y[index], logits[index], name in TARGETED, ids[index], 1, slots,
        )  # fmt: skip
        x_adv[index] = outcome.x_adv
        broken_by[index[outcome.broken]] = name
        alive[index] = ~outcome.broken
    return AutoAttackResult(x_adv, alive, broken_by)


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
) -> Float[np.ndarray, "B ..."]:
    """Auto-PGD on `loss_fn`; targeted=True is APGD-T: DLR towards the 9 likeliest classes, no `loss_fn`.

    >>> def logits(x):  # class 0 for bright images, 1 for dark ones; [B, H, W, C] -> [B, Y]
    ...     z = 10 * (x.mean(axis=(1, 2, 3))[:, None] - 0.5)
    ...     return jnp.concatenate([z, -z], axis=1)
    >>> x = np.stack([np.full((4, 4, 1), 0.55), np.full((4, 4, 1), 0.9)]).astype(np.float32)
    >>> y = np.array([0, 0])
    >>> x_adv = attacks.apgd(jax.random.key(0), logits, x, y, eps=0.1, steps=10, slots=2)
    >>> print(logits(x_adv).argmax(axis=1) != y, bool((x_adv[1] == x[1]).all()))
    [ True False] True
    """
    aim = aims.one(aims.dlr_targeted if targeted else aims.untargeted(loss_fn))
    attack = APGD(eps=jnp.float32(eps), steps=steps, norm=norm, bounds=bounds, aim=aim)
    return _attack(key, attack, logits_fn, x, y, targeted, ids, restarts, slots)


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
) -> Float[np.ndarray, "B ..."]:
    """FAB-T: looks for the nearest adversarial point towards the 9 likeliest classes; ends within eps.

    What is returned is the first one found within eps, and not always the nearest: no measure of distance.

    >>> def logits(x):  # class 0 for bright images, 1 for dark ones; [B, H, W, C] -> [B, Y]
    ...     z = 10 * (x.mean(axis=(1, 2, 3))[:, None] - 0.5)
    ...     return jnp.concatenate([z, -z], axis=1)
    >>> x = np.stack([np.full((4, 4, 1), 0.55), np.full((4, 4, 1), 0.9)]).astype(np.float32)
    >>> y = np.array([0, 0])
    >>> x_adv = attacks.fab(jax.random.key(0), logits, x, y, eps=0.1, steps=10, slots=2)
    >>> print(logits(x_adv).argmax(axis=1) != y, bool((x_adv[1] == x[1]).all()))
    [ True False] True
    """
    attack = FAB(eps=jnp.float32(eps), steps=steps, norm=norm, bounds=bounds, restarts=restarts)
    return _attack(key, attack, logits_fn, x, y, True, ids, restarts, slots)


@promoting
def square(
    key: Array,
    logits_fn: Callable,
    x: Float[np.ndarray, "B H W C"],
    y: Int[np.ndarray, "B"],
    *,
    eps: float,
    queries: int = QUERIES,
    restarts: int = 1,
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    ids: Int[np.ndarray, "B"] | None = None,
    slots: int = SLOTS,
) -> Float[np.ndarray, "B H W C"]:
    """Square: random search without gradients; `queries` forward passes per image and restart at most.

    >>> def logits(x):  # class 0 for bright images, 1 for dark ones; [B, H, W, C] -> [B, Y]
    ...     z = 10 * (x.mean(axis=(1, 2, 3))[:, None] - 0.5)
    ...     return jnp.concatenate([z, -z], axis=1)
    >>> x = np.stack([np.full((4, 4, 1), 0.55), np.full((4, 4, 1), 0.9)]).astype(np.float32)
    >>> y = np.array([0, 0])
    >>> x_adv = attacks.square(jax.random.key(0), logits, x, y, eps=0.1, queries=100, slots=2)
    >>> print(logits(x_adv).argmax(axis=1) != y, bool((x_adv[1] == x[1]).all()))
    [ True False] True
    """
    attack = Square(eps=jnp.float32(eps), steps=queries, norm=norm, bounds=bounds)
    return _attack(key, attack, logits_fn, x, y, False, ids, restarts, slots)


def _attack(key, attack, logits_fn, x, y, targeted, ids, restarts, slots):
    if attack.steps < 1 or restarts < 1:
        raise UserError(f"steps and restarts must be at least 1, got {attack.steps} and {restarts}")
    model, x, y, logits = _prepare(logits_fn, x, y, attack.eps, attack.norm, attack.bounds, slots)
    x_adv, alive = x.copy(), np.flatnonzero(logits.argmax(axis=1) == y)
    ids = _ids(ids, len(x))
    if len(alive):
        outcome = _run(
            key, attack, model, x[alive], y[alive], logits[alive], targeted, ids[alive], restarts, slots
        )
        x_adv[alive] = outcome.x_adv
    return x_adv


def _ids(ids, count):
    ids = np.arange(count) if ids is None else np.asarray(ids)
    check_ids(ids, count)
    return ids.astype(np.int32)


def _run(key, attack, model, x, y, logits, targeted, ids, restarts, lanes):
    targets = likely_targets(logits, y) if targeted else None
    if isinstance(attack, Square) and x.ndim != 4:
        raise UserError(f"square takes images [B, H, W, C], got {x.shape}; leave it out for points")
    return slots.run(attack, key, model, x, y, ids=ids, targets=targets, restarts=restarts, slots=lanes)


def _prepare(logits_fn, x, y, eps, norm, bounds, lanes) -> tuple[Partial, np.ndarray, np.ndarray, np.ndarray]:
    """(model, x, y, clean logits), or UserError for what cannot be attacked."""
    check_settings(eps=eps, step_size=0.0, norm=norm)
    if lanes < 1:
        raise UserError(f"slots must be at least 1, got {lanes}")
    x, y = np.asarray(x, np.float32), np.asarray(y)
    check_images(x, y, bounds)
    x = x if bounds is None else np.clip(x, *bounds)
    model = as_partial(logits_fn)
    logits = slots.forward(model, x, lanes)
    check_logits(logits, y)
    return model, x, y.astype(np.int32), logits
