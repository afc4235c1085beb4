"""The scheduler's half on the device: a compiled loop over a fixed number of slots.

A slot whose example breaks, or whose restart ends, takes the next (example, restart) from the queue at once,
inside the loop.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from clustr_jax.attacks.scheduled_attack import Attack, Work
from clustr_jax.runtime import mesh, struct


class Slots(struct.PyTreeNode):
    """What each slot works on, the attack's state there, steps done, and whether it is in use."""

    work: Work
    state: Any
    step: Int[Array, "S"]
    active: Bool[Array, "S"]


class Ended(struct.PyTreeNode):
    """Restarts that ended in this call, in order; `count` of them are filled."""

    example: Int[Array, "Q"]
    restart: Int[Array, "Q"]
    step: Int[Array, "Q"]
    fooled: Bool[Array, "Q"]
    blind: Bool[Array, "Q"]
    x: Float[Array, "Q ..."]
    count: Int[Array, "devices"]


class Orders(struct.PyTreeNode):
    """What the host says for one call: when to come back, and whether it has pairs beyond this queue."""

    limit: ArrayLike  # iterations until the device comes back
    small: ArrayLike  # come back when nothing waits and no more slots than this are busy
    more: ArrayLike  # [devices]


@functools.partial(jax.jit, static_argnames="first")
def advance(
    attack: Attack,
    model: Callable,
    slots: Slots,
    queue: Work,
    waiting: Bool[Array, "Q"],
    best: Int[Array, "N"],
    orders: Orders,
    *,
    first: bool,
):
    """Iterate until an idle slot waits for the host, or as `orders` say.

    `best` [capacity] is the smallest restart that broke each example so far: with `first`, later ones are
    given up; smaller ones go on, so that which restart counts does not depend on the schedule.
    On a mesh each device works through its own slots and queue, at its own pace, and has the same results.
    """
    run = functools.partial(_advance_here, first=first)
    inputs = (mesh.SAME, mesh.SAME, mesh.ROWS, mesh.ROWS, mesh.ROWS, mesh.SAME)
    orders_specs = Orders(mesh.SAME, mesh.SAME, mesh.ROWS)  # pyright: ignore[reportArgumentType]
    return mesh.spread(run, (*inputs, orders_specs), mesh.SAME)(
        attack, model, slots, queue, waiting, best, orders
    )


def _advance_here(attack, model, slots, queue, waiting, best, orders, *, first):
    """`advance` on one device."""
    more = orders.more[0]
    count, length = slots.step.shape[0], waiting.shape[0]
    capacity, room = best.shape[0], count + length
    ended = Ended(
        example=jnp.zeros(room, jnp.int32),
        restart=jnp.zeros(room, jnp.int32),
        step=jnp.zeros(room, jnp.int32),
        fooled=jnp.zeros(room, bool),
        blind=jnp.zeros(room, bool),
        x=jnp.zeros((room, *queue.x.shape[1:]), queue.x.dtype),
        count=jnp.zeros((), jnp.int32),
    )

    def wanted(work, best):
        return work.restart <= best[work.example] if first else jnp.ones(work.restart.shape, bool)

    def refill(carry):
        slots, waiting, best = carry
        waiting = waiting & wanted(queue, best)
        following = jnp.flatnonzero(waiting, size=count, fill_value=length)  # the next pairs, in order
        rank = jnp.cumsum(~slots.active) - 1
        place = jnp.where(slots.active, length, following[jnp.clip(rank, 0, count - 1)])
        take = place < length
        new = jax.tree.map(lambda a: a[jnp.minimum(place, length - 1)], queue)
        work = _where(take, new, slots.work)
        state = _where(take, attack.init(work), slots.state)
        slots = Slots(work, state, jnp.where(take, 0, slots.step), slots.active | take)
        return slots, waiting.at[place].set(False, mode="drop"), best

    def iterate(carry):
        slots, waiting, best, ended, i = carry
        slots, waiting, best = lax.cond(
            jnp.any(~slots.active) & jnp.any(waiting), refill, lambda c: c, (slots, waiting, best)
        )
        work = slots.work
        state = _typed_as(slots.state, attack.update(model, work, slots.state, slots.step))
        step = slots.step + 1
        success = slots.active & state.fooled
        blind = getattr(state, "blind", jnp.zeros(count, bool))  # of a black box nothing is said
        best = best.at[jnp.where(success, work.example, capacity)].min(work.restart, mode="drop")
        alive = slots.active & wanted(work, best)
        over = alive & attack.finished(state, step)
        place = jnp.where(over, ended.count + jnp.cumsum(over) - 1, room)
        ended = Ended(
            example=ended.example.at[place].set(work.example, mode="drop"),
            restart=ended.restart.at[place].set(work.restart, mode="drop"),
            step=ended.step.at[place].set(step, mode="drop"),
            fooled=ended.fooled.at[place].set(state.fooled, mode="drop"),
            blind=ended.blind.at[place].set(blind, mode="drop"),
            x=ended.x.at[place].set(state.candidate.astype(ended.x.dtype), mode="drop"),
            count=ended.count + jnp.sum(over, dtype=jnp.int32),
        )
        return Slots(work, state, step, alive & ~over), waiting, best, ended, i + 1

    def going(carry):
        slots, waiting, best, _, i = carry
        left = jnp.any(waiting & wanted(queue, best))
        busy = jnp.sum(slots.active)
        starved = more & ~left & (busy < count)
        return (i < orders.limit) & (left | (busy > jnp.where(more, 0, orders.small))) & ~starved

    zero = jnp.zeros((), jnp.int32)
    slots, _, _, ended, i = lax.while_loop(going, iterate, (slots, waiting, best, ended, zero))
    ended = ended.replace(count=ended.count[None])
    return jax.tree.map(mesh.gather, (slots, ended, i[None]))


def _typed_as(old, new):
    """`new` in the types of `old`: a model of float64, where JAX has that, makes wider ones."""

    def cast(a, b):
        return b if a.dtype == b.dtype else b.astype(a.dtype)

    return jax.tree.map(cast, old, new)


def _where(take, new, old):
    """Slot by slot."""

    def choose(a, b):
        return jnp.where(take.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)


@jax.jit
def fill(
    key: Array,
    example: Int[Array, "S"],
    ids: Int[Array, "S"],
    restart: Int[Array, "S"],
    x: Float[Array, "S ..."],
    y: Int[Array, "S"],
    target: Int[Array, "S"],
) -> Work:
    """These (example, restart) pairs with their streams: fold_in(fold_in(key, id), restart)."""
    keys = jax.vmap(lambda i, r: jax.random.fold_in(jax.random.fold_in(key, i), r))(ids, restart)
    return Work(example, restart, jax.random.key_data(keys), x, y, target)


@jax.jit
def empty(attack: Attack, work: Work):
    """Slots that hold nothing yet; what `work` says is never used."""
    count = work.y.shape[0]
    # types as the state comes back with: weak ones would be another program at the second call
    state = jax.tree.map(lambda a: lax.convert_element_type(a, a.dtype), attack.init(work))
    return Slots(work, state, jnp.zeros(count, jnp.int32), jnp.zeros(count, bool))
