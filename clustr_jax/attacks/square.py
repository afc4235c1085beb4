"""Square attack (Andriushchenko et al. 2020): random search with squares, no gradients; linf and l2.

Each query paints one square of the best image so far (linf: +-eps per channel; l2: moves norm from one
window to another) and keeps it if the margin falls. Scale free: only comparisons of margins count.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from clustr_jax import losses
from clustr_jax.attacks.attack_losses import logits_of, misclassified
from clustr_jax.attacks.geometry import l2_norm, over
from clustr_jax.attacks.scheduled_attack import Attack, Work
from clustr_jax.runtime import struct

# Share of the pixels of the first squares, halved after these proposals (of 10,000: see `sides`).
_FIRST_SHARE, _HALVINGS = 0.8, (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class SquareState(struct.PyTreeNode):
    """The image to query next, the best one so far and its margin."""

    candidate: Float[Array, "S ..."]
    fooled: Bool[Array, "S"]
    best: Float[Array, "S ..."]
    best_value: Float[Array, "S"]


@functools.cache
def sides(queries: int, shape: tuple[int, ...], smallest: int, odd: bool, rescale: bool = True) -> np.ndarray:
    """[queries] int: the side of the square of each query (section 3.1), for images [H, W, C].

    `rescale` stretches the schedule for 10,000 queries over the budget, as the authors of Square do. Without
    it the schedule is AutoAttack's: halved after proposals 10, 50, ... whatever the budget, and at the first
    share again after 10,000.
    """
    if rescale:
        at = np.arange(queries) * 10_000 // queries
    else:
        at = np.arange(queries)
        at = np.where(at > 10_000, 0, at)
    share = _FIRST_SHARE / 2.0 ** np.searchsorted(_HALVINGS, at, side="left")
    side = np.maximum(np.round(np.sqrt(share * shape[0] * shape[1])).astype(np.int32), smallest)
    if odd:
        side += side % 2 == 0
    most = min(shape[:2]) - (1 if not odd else 0)
    return np.minimum(side, max(most, 1)).astype(np.int32)  # of images one pixel high, too


class Square(Attack):
    """One forward pass per update; `steps` is the number of queries. Images [H, W, C] only.

    `rescale`: see `sides`. Without it squares lie where AutoAttack's do as well: never in the last row or
    column.
    """

    steps: int = struct.field(pytree_node=False)
    rescale: bool = struct.field(pytree_node=False, default=True)

    gradients, forwards, images = 0, 1, True

    def init(self, work: Work):
        """linf: vertical stripes of +-eps; l2: bumps on a grid of 5 x 5, scaled to eps."""
        shape = work.x.shape[1:]

        def stripes(key):
            return self.eps * jax.random.rademacher(key, (1, *shape[1:]), jnp.float32) * jnp.ones(shape)

        draw = stripes if self.norm == "linf" else functools.partial(_tiles, shape=shape)
        delta = jax.vmap(draw)(_fold(work.keys, -1))
        if self.norm == "l2":
            delta = self.eps * delta / jnp.maximum(l2_norm(delta), 1e-12)
        x = work.x + delta
        x = x if self.bounds is None else jnp.clip(x, *self.bounds)
        nothing = jnp.full(work.y.shape, -jnp.inf)
        return SquareState(x, jnp.zeros(work.y.shape, bool), x, nothing)

    def update(self, model: Callable, work: Work, state: SquareState, step: Int[Array, "S"]):
        """Query the candidate, keep the better image, propose another."""
        outputs = model(state.candidate)
        value, fooled = losses.margin(logits_of(outputs), work.y), misclassified(outputs, work.y)
        better = value > state.best_value
        best = jnp.where(over(better, work.x), state.candidate, state.best)
        propose = self._square if self.norm == "linf" else self._windows
        proposed = jax.vmap(propose)(_fold(work.keys, step), best, work.x, step)
        if self.bounds is not None:
            proposed = jnp.clip(proposed, *self.bounds)
        candidate = jnp.where(over(fooled, work.x), state.candidate, proposed)
        return SquareState(candidate, fooled, best, jnp.where(better, value, state.best_value))

    def _corner(self, key, side, height, width):
        """(row, column) where a square of this side begins."""
        row_key, column_key = jax.random.split(key)
        rows, columns = height - side + 1, width - side + 1  # places where it fits
        if not self.rescale:
            rows, columns = jnp.maximum(rows - 1, 1), jnp.maximum(columns - 1, 1)
        return jax.random.randint(row_key, (), 0, rows), jax.random.randint(column_key, (), 0, columns)

    def _square(self, key, best, x, step):
        """One square at +-eps per channel, whatever stood there."""
        height, width, channels = x.shape
        place_key, sign_key = jax.random.split(key)
        side = jnp.asarray(sides(self.steps, x.shape, 1, False, self.rescale))[
            jnp.minimum(step, self.steps - 1)
        ]
        window = _box(*self._corner(place_key, side, height, width), side, height, width)
        signs = jax.random.rademacher(sign_key, (1, 1, channels), jnp.float32)
        delta = jnp.where(window, best - x + 2 * self.eps * signs, best - x)
        return x + jnp.clip(delta, -jnp.asarray(self.eps), self.eps)

    def _windows(self, key, best, x, step):
        """Norm moves from a second window into the first, in the shape of a bump (algorithm 3)."""
        height, width, channels = x.shape
        first_key, second_key, sign_key, turn_key = jax.random.split(key, 4)
        table = sides(self.steps, x.shape, 3, True, self.rescale)
        kinds, which = np.unique(table, return_inverse=True)
        step = jnp.minimum(step, self.steps - 1)
        side = jnp.asarray(table)[step]
        row, column = self._corner(first_key, side, height, width)
        first = _box(row, column, side, height, width)
        second = _box(*self._corner(second_key, side, height, width), side, height, width)
        bump = jnp.asarray(np.stack([_bump(s, height, width) for s in kinds]))[jnp.asarray(which)[step]]
        bump = jnp.where(jax.random.bernoulli(turn_key), bump, _turned(bump, height, width))
        bump = jnp.roll(jnp.roll(bump, row, 0), column, 1)[:, :, None]

        def norm(d):  # per channel
            return jnp.sqrt(jnp.sum(jnp.square(d), axis=(0, 1), keepdims=True))

        delta = best - x
        inside = jnp.where(first, delta, 0.0)
        new = bump * jax.random.rademacher(sign_key, (1, 1, channels), jnp.float32)
        new = jnp.where(first, new + inside / jnp.maximum(norm(inside), 1e-12), 0.0)
        spare = jnp.maximum(self.eps**2 - jnp.sum(jnp.square(delta)), 0.0) / channels
        available = jnp.sqrt(spare + jnp.square(norm(jnp.where(first | second, delta, 0.0))))
        new = new / jnp.maximum(norm(new), 1e-12) * available
        delta = jnp.where(first, new, jnp.where(second, 0.0, delta))
        return x + self.eps * delta / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(delta))), 1e-12)


def _fold(keys, step):
    """The keys of query `step` + 1 (0 is the start's)."""
    step = jnp.broadcast_to(jnp.asarray(step, jnp.int32) + 1, keys.shape)
    return jax.vmap(jax.random.fold_in)(keys, step)


def _box(row, column, side, height, width):
    """Bool [H, W, 1]."""
    rows, columns = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
    return (rows >= row) & (rows < row + side) & (columns >= column) & (columns < column + side)


def _pyramid(rows: int, columns: int) -> np.ndarray:
    """Nested rectangles around the middle, the i-th adding 1 / i^2; norm 1."""
    bump = np.zeros((rows, columns))
    top, left = rows // 2, columns // 2
    for i in range(max(top, left) + 1):
        size = 2 * i + 1
        bump[max(top - i, 0) : top - i + size, max(left - i, 0) : left - i + size] += 1.0 / (i + 1) ** 2
    return bump / np.linalg.norm(bump)


@functools.cache
def _bump(side: int, height: int, width: int) -> np.ndarray:
    """float32 [H, W] with a side x side bump in its corner: one half up, the other down; norm 1."""
    bump = np.zeros((side, side))
    bump[: side // 2] = _pyramid(side // 2, side)
    bump[side // 2 :] = -_pyramid(side - side // 2, side)
    full = np.zeros((height, width), np.float32)
    full[:side, :side] = bump / np.linalg.norm(bump)
    return full


def _turned(bump, height, width):
    """The transposed bump, back in the [H, W] frame (bumps lie in a corner square)."""
    square = min(height, width)
    return jnp.zeros_like(bump).at[:square, :square].set(bump[:square, :square].T)


def _tiles(key, shape):
    """[H, W, C]: a bump in each tile of a 5 x 5 grid, with a random sign per tile and channel."""
    height, width, channels = shape
    side = min(height, width) // 5
    if side < 2:  # too small for a grid: one bump
        side, count = min(height, width), 1
    else:
        count = 5
    sign_key, turn_key = jax.random.split(key)
    signs = jax.random.rademacher(sign_key, (count, count, channels), jnp.float32)
    turns = jax.random.bernoulli(turn_key, shape=(count, count))
    bump = jnp.asarray(_bump(side, side, side))
    tiles = jnp.where(turns[:, :, None, None], bump[None, None], bump.T[None, None])
    tiles = tiles[..., None] * signs[:, :, None, None, :]  # [5, 5, side, side, C]
    grid = jnp.transpose(tiles, (0, 2, 1, 3, 4)).reshape(count * side, count * side, channels)
    top, left = (height - count * side) // 2, (width - count * side) // 2
    return jnp.zeros(shape).at[top : top + count * side, left : left + count * side].set(grid)
