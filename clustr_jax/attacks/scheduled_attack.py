"""What the scheduler runs: an attack is three pure functions over slots, `init`, `update` and `finished`.

A slot holds one (example, restart), and a batch of S slots is advanced at once. To add an attack, subclass
`Attack` and enter it in `registry`; `scheduler.run` does the rest.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from clustr_jax.attacks.attack_losses import differentiated, misclassified
from clustr_jax.attacks.options import GENERATOR
from clustr_jax.runtime import struct


class Work(struct.PyTreeNode):
    """One (example, restart) in each slot: its randomness, image, label and target (-1: none)."""

    example: Int[Array, "S"]
    restart: Int[Array, "S"]
    random: Array  # key data: a slot keeps it, so it is a stream rather than a key that is used up
    x: Float[Array, "S ..."]
    y: Int[Array, "S"]
    target: Int[Array, "S"]

    @property
    def keys(self):
        """The slots' keys; fold the step in where there is more than one draw."""
        return jax.random.wrap_key_data(self.random, impl=GENERATOR)


class Attack(struct.PyTreeNode):
    """Settings and three pure functions. Numbers are traced unless a subclass needs them to be static.

    A state has at least `fooled` [S] (success within the ball, at the latest update) and `candidate`
    [S, ...] (the image to return if the restart ended now). One that follows gradients has `blind` [S] as
    well (`unattacked.still_blind`). An update spends one evaluation per slot.
    """

    eps: ArrayLike
    steps: ArrayLike
    norm: str = struct.field(pytree_node=False)
    bounds: tuple[float, float] | None = struct.field(pytree_node=False)

    gradients = 1  # of the model, per slot and update
    forwards = 0  # forward passes without a gradient, likewise
    images = False  # takes [B, H, W, C] only
    draws = True  # another restart is another attempt

    @property
    def ball(self) -> dict[str, Any]:
        """What `geometry` projects into: eps, norm, bounds."""
        return {"eps": self.eps, "norm": self.norm, "bounds": self.bounds}

    def init(self, work: Work) -> Any:
        """The state before the first update; looks at no network."""
        raise NotImplementedError

    def update(self, model: Callable, work: Work, state: Any, step: Int[Array, "S"]) -> Any:
        """One evaluation of the model in every slot."""
        raise NotImplementedError

    def finished(self, state: Any, step: Int[Array, "S"]) -> Bool[Array, "S"]:
        """Which slots have nothing left to do."""
        return state.fooled | (step >= self.steps)


def climb(model: Callable, loss: Callable, work: Work, x: Float[Array, "S ..."]):
    """(gradient of the loss [S, ...], its value [S], misclassified [S]) at x."""

    def total(x):
        outputs = model(x)
        value = loss(outputs, work.y, work.target)
        return jnp.sum(value), (value, misclassified(outputs, work.y))

    with differentiated():
        gradient, (value, fooled) = jax.grad(total, has_aux=True)(x)
    return gradient, value, fooled
