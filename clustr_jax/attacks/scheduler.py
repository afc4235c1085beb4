"""The scheduler under every evaluation: a fixed number of slots, each working on one (example, restart).

An attack is three pure functions over slots (`scheduled_attack`), and the loop that advances them is compiled
(`device_loop`). Memory on the device is that of `slots` images, whatever the size of the set. The host hands
over a queue of a few slots' worth and takes back what has ended, which it verifies in a fresh forward pass.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from clustr_jax.attacks import device_loop, placement
from clustr_jax.attacks.attack_losses import logits_of, misclassified
from clustr_jax.attacks.input_checks import check_found
from clustr_jax.attacks.options import key_of
from clustr_jax.attacks.scheduled_attack import Attack
from clustr_jax.runtime import mesh, rounding
from clustr_jax.runtime.errors import UserError

# Pairs that the device gets to work on before it asks for more, in slots.
_QUEUE = 2
# The device comes back after so many operations of forward passes, for progress, signals and records: some
# seconds of two CPU cores, half a second of an accelerator. Not after so many seconds: what is spent and
# where the slots shrink would then depend on the clock.
_OPERATIONS = {"cpu": 4e10}
_OPERATIONS_ELSEWHERE = 4e12
# When this share of the slots, or less, is still busy, the rest moves to a program of that size ...
_SMALL = 4
# ... if that saves more evaluations than a compilation costs.
_WORTH = 4096
# Rounding allowed for in checking the ball and the box.
TOLERANCE = 1e-6


@dataclasses.dataclass
class Outcome:
    """What came of one attack with R restarts on N examples (NumPy), and what it cost.

    `restart` and `step` are those of the first restart that succeeded (-1: none), `x_adv` its image
    (where none did, x). `step` counts the attack's own steps, so 0 is a success at the start.
    `spent` [R, N] are the evaluations of each restart that ended (0: not run). `evaluations` counts slots x
    iterations, idle slots included. `flight` is what the slots held when the device last came back.
    `unconfirmed`: an image was misclassified in the loop and not in the pass that judges. `blind`: of no
    restart that ended was any gradient other than 0 (see `unattacked`).
    """

    broken: Bool[np.ndarray, "N"]
    restart: Int[np.ndarray, "N"]
    step: Int[np.ndarray, "N"]
    spent: Int[np.ndarray, "R N"]
    x_adv: Float[np.ndarray, "N ..."]
    unconfirmed: Bool[np.ndarray, "N"]
    blind: Bool[np.ndarray, "N"]
    evaluations: int = 0
    flight: Any = None

    @classmethod
    def fresh(cls, x: Float[np.ndarray, "N ..."], restarts: int) -> "Outcome":
        """Nothing attacked yet."""
        nothing = np.full(len(x), -1, np.int32)
        spent = np.zeros((restarts, len(x)), np.int32)
        no = np.zeros(len(x), bool)
        return cls(no, nothing, nothing.copy(), spent, np.array(x, np.float32), no.copy(), ~no)

    def cost(self, attack: Attack) -> dict[str, int]:
        """Evaluations of the model: with a gradient, without, and those that no schedule could leave out."""
        return {
            "gradient_evaluations": attack.gradients * self.evaluations,
            "forward_evaluations": attack.forwards * self.evaluations,
            "evaluations_needed": self.needed,
        }

    def copied(self) -> "Outcome":
        """One of its own to note in, but for the images."""
        own = ("broken", "restart", "step", "spent", "unconfirmed", "blind")
        return dataclasses.replace(self, **{name: getattr(self, name).copy() for name in own})

    def become(self, other: "Outcome") -> None:
        """All of it at once: whoever is interrupted finds this outcome as it was before, or as it is now."""
        vars(self).update(vars(other))

    @property
    def unattacked(self) -> Bool[np.ndarray, "N"]:
        """The images with restarts that ended, none of which had a gradient."""
        return self.blind & np.any(self.spent > 0, axis=0)

    @property
    def needed(self) -> int:
        """Evaluations that no schedule could leave out: all restarts up to the first success."""
        last = np.where(self.broken, self.restart, len(self.spent))
        return int(np.sum(self.spent, where=np.arange(len(self.spent))[:, None] <= last[None, :]))


@jax.jit
def judge(model: Callable, x: Float[Array | np.ndarray, "B ..."], y: Int[Array | np.ndarray, "B"]):
    """(misclassified [B], logits finite [B]) of a fresh forward pass; see `misjudged`."""

    def rows(model, x, y):
        outputs = model(x)
        return misclassified(outputs, y), jnp.all(jnp.isfinite(logits_of(outputs)), axis=1)

    return mesh.by_rows(rows, model, x, y)


def misjudged(
    model: Callable, x: Float[np.ndarray, "N ..."], y: Int[np.ndarray, "N"], count: int | None = None
) -> Bool[np.ndarray, "B"]:
    """Whether each of the first `count` images is misclassified, in a fresh forward pass.

    UserError where logits are not finite: the argmax of a NaN is no prediction, and so no success.
    """
    count = len(x) if count is None else count
    wrong, finite = judge(model, x, y)
    if not np.all(finite):
        check_found(x[:count])
        raise UserError(
            "logits_fn returned non-finite logits for an image inside the ball; every image within eps "
            "and the box must have finite ones (layers that overflow, a logarithm of 0)"
        )
    return np.asarray(wrong)[:count]


def run(
    attack: Attack,
    key: Array,
    model: Partial,
    x: Float[np.ndarray, "N ..."],
    y: Int[np.ndarray, "N"],
    *,
    ids: Int[np.ndarray, "N"] | None = None,
    targets: Int[np.ndarray, "T N"] | None = None,
    restarts: int = 1,
    slots: int = 64,
    first: bool = True,
    outcome: Outcome | None = None,
    collect: Callable | None = None,
    report: Callable[[Outcome], None] | None = None,
) -> Outcome:
    """Every restart of every example, until it breaks (`first`), through a fixed number of slots.

    With `targets` each of the T targets has `restarts` restarts, target by target. The randomness of
    (example, restart) is fold_in(fold_in(key, id), restart). So with the same `slots` the outcome of an
    example depends neither on the order nor on what else is attacked. Float rounding is the exception, where
    the network's own rows depend on their place in the batch. first=False runs all restarts to their end.

    `outcome` goes on from an earlier, interrupted one, and has what was done where this one is interrupted.
    `collect(example, restart, x, fooled)` receives restarts as they end, `report(outcome)` is called between
    device calls. Every success is verified in a fresh forward pass and, with `first`, inside the ball and the
    box: an attack that leaves them raises AssertionError (the authors' starts do leave the box, so
    first=False lets them).
    """
    x, y = np.asarray(x, np.float32), np.asarray(y, np.int32)
    ids = np.arange(len(x), dtype=np.int32) if ids is None else np.asarray(ids, np.int32)
    key, leaves = key_of(key), jax.tree.leaves(model)
    target = np.full((1, len(x)), -1, np.int32) if targets is None else np.asarray(targets, np.int32)
    target = np.repeat(target, restarts, axis=0)
    devices = mesh.devices()
    slots = -(-slots // devices) * devices
    total, length = len(target), _QUEUE * slots // devices
    outcome = Outcome.fresh(x, total) if outcome is None else outcome
    best = np.full(-(-len(x) // 1024) * 1024, total, np.int32)  # few sizes, few compilations
    best[: len(x)] = np.where(outcome.broken, outcome.restart, total)
    flying = np.zeros((total, len(x)), bool)
    state, limit, small = None, _iterations(model, x, slots // devices), slots // devices // _SMALL
    if outcome.flight is not None and len(outcome.flight[0]) % devices == 0:
        state, flying = _board(attack, outcome.flight, x, total)
        small = small if len(state.active) == slots else 0

    while True:
        pending = (outcome.spent == 0) & ~flying
        if first:
            pending &= np.arange(total)[:, None] < best[None, : len(x)]
        if not pending.any() and not flying.any():
            return outcome
        if state is not None and not pending.any() and _busiest(state, devices) <= small:
            state, small = _shrink(attack, state, small, devices), 0
        e, r, waiting = _queues(pending, devices, length)
        work = device_loop.fill(key, e, ids[e], r, x[e], y[e], target[r, e])
        if state is None:
            state = device_loop.empty(attack, jax.tree.map(lambda a: a[:slots], work))
        # of several devices none comes back to shrink before the others
        early = small if devices == 1 else 0
        more = np.array([np.sum(pending[:, d::devices]) > length for d in range(devices)])
        orders = device_loop.Orders(np.int32(limit), np.int32(early), more)
        state, ended, iterations = device_loop.advance(
            attack, model, placement.settled(state, leaves), work, waiting, best, orders, first=first
        )
        after = outcome.copied()
        after.evaluations += state.step.shape[0] // devices * int(np.sum(iterations))
        _take(attack, model, ended, after, best, x, y, slots=slots, first=first, collect=collect)
        after.flight, flying = state, _flying(state, flying.shape)
        outcome.become(after)
        if report is not None:
            report(outcome)


def _queues(pending, devices: int, length: int):
    """(example, restart, whether there is one) of the next pairs, `length` for each device.

    All restarts of an example go to one device. First come the first restarts of all examples, then the
    second ones, and so on.
    """
    examples, restarts, waiting = [], [], []
    for d in range(devices):
        restart, example = np.nonzero(pending[:, d::devices])
        place = np.arange(length) % max(len(example), 1)
        none = np.zeros(length, np.int64)
        examples.append(example[place] * devices + d if len(example) else none)
        restarts.append(restart[place] if len(example) else none)
        waiting.append(np.arange(length) < len(example))
    e, r = (np.concatenate(parts).astype(np.int32) for parts in (examples, restarts))
    return e, r, np.concatenate(waiting)


def _busiest(state, devices: int) -> int:
    """Busy slots of the device that has most of them."""
    return int(np.max(np.sum(np.asarray(state.active).reshape(devices, -1), axis=1)))


def _iterations(model, x, slots: int) -> int:
    """How many iterations a call of the device may take, by the cost of the model's forward pass."""
    images = jax.ShapeDtypeStruct((slots, *x.shape[1:]), jnp.float32)
    cost = jax.jit(_call).lower(model, images).cost_analysis() or {}
    budget = _OPERATIONS.get(jax.default_backend(), _OPERATIONS_ELSEWHERE)
    return max(1, min(int(budget / max(cost.get("flops", 0.0), 1.0)), 1000))


def _flying(state, shape):
    """Bool [R, N]: the pairs in the slots."""
    active, flying = np.asarray(state.active), np.zeros(shape, bool)
    flying[np.asarray(state.work.restart)[active], np.asarray(state.work.example)[active]] = True
    return flying


def _board(attack, leaves, x, total):
    """(slots, pairs in them) from the leaves that an interrupted run left, in the order of the tree."""
    size = len(leaves[0])
    nothing = np.zeros(size, np.int32)
    work = jax.eval_shape(
        device_loop.fill,
        key_of(jax.random.key(0)),
        nothing,
        nothing,
        nothing,
        x[:1].repeat(size, 0),
        nothing,
        nothing,
    )
    state = jax.tree.unflatten(jax.tree.structure(jax.eval_shape(device_loop.empty, attack, work)), leaves)
    return state, _flying(state, (total, len(x)))


def _shrink(attack, state, small, devices):
    """The busy slots alone, in a smaller program, where that pays; decided by the work that is left."""
    active = np.asarray(state.active).reshape(devices, -1)
    size = active.shape[1]
    step = np.asarray(state.step)[active.reshape(-1)]
    left = (int(attack.steps) - int(np.min(step))) * (size - small) * devices
    if left < _WORTH:
        return state
    kept = np.argsort(~active, axis=1, kind="stable")[:, :small] + size * np.arange(devices)[:, None]
    return jax.tree.map(lambda a: a[kept.reshape(-1)], state)


def _take(attack, model, ended, outcome, best, x, y, *, slots, first, collect):
    """Verify what ended, note it, and hand it on. The images are noted in place: none but verified ones."""
    counts = np.asarray(ended.count)
    room, count = len(ended.example) // len(counts), int(np.sum(counts))
    if not count:
        return
    filled = np.flatnonzero((np.arange(room) < counts[:, None]).reshape(-1))
    example, restart, step, early = (
        np.asarray(a)[filled] for a in (ended.example, ended.restart, ended.step, ended.fooled)
    )
    found, fooled = np.asarray(ended.x)[filled], np.zeros(count, bool)
    for start in range(0, count, slots):
        part = np.arange(start, min(start + slots, count))
        index = np.resize(part, slots)
        fooled[part] = misjudged(model, found[index], y[example[index]], len(part))
    if first:
        verify_inside(found, x[example], attack.eps, attack.norm, attack.bounds)
    outcome.spent[restart, example] = step
    outcome.unconfirmed[example[early & ~fooled]] = True
    outcome.blind[example[~np.asarray(ended.blind)[filled]]] = False
    if collect is not None:
        collect(example, restart, found, fooled)
    for i in np.flatnonzero(fooled):
        e = example[i]
        if restart[i] < best[e]:
            best[e], outcome.broken[e], outcome.restart[e] = restart[i], True, restart[i]
            outcome.x_adv[e], outcome.step[e] = found[i], step[i] - early[i]


def verify_inside(
    x_adv: Float[np.ndarray, "N ..."],
    x: Float[np.ndarray, "N ..."],
    eps: float | Array,
    norm: str,
    bounds: tuple[float, float] | None,
) -> None:
    """Raise AssertionError if an adversarial image left the ball or the box: the number would be wrong."""
    beyond = rounding.outside(x_adv, x, float(eps), norm)
    if not np.all(beyond <= 0):
        raise AssertionError(f"attack left the {norm} ball by {beyond.max()}: eps = {float(eps)}")
    if bounds is not None and (np.min(x_adv) < bounds[0] or np.max(x_adv) > bounds[1]):
        raise AssertionError(f"attack left the box {bounds}")


def _call(model, x):
    return model(x)


@jax.jit
def _outputs(model, x):
    return mesh.by_rows(_call, model, x)


def forward(model: Partial, x: Float[np.ndarray, "N ..."], slots: int):
    """The model's outputs on any number of images, `slots` at a time (NumPy)."""
    count = len(x)
    if not count:
        x = np.zeros((1, *x.shape[1:]), np.float32)
    places = [np.arange(start, start + slots) % len(x) for start in range(0, len(x), slots)]
    pieces = [jax.tree.map(np.asarray, _outputs(model, x[place])) for place in places]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *pieces)
