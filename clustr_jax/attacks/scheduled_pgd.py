"""PGD for the scheduler: one gradient and one step of fixed size per update."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from clustr_jax.attacks.attack_losses import AttackLoss
from clustr_jax.attacks.geometry import over, projected_step, start_in_ball
from clustr_jax.attacks.scheduled_attack import Attack, Work, climb
from clustr_jax.attacks.unattacked import still_blind
from clustr_jax.runtime import struct


class PGDState(struct.PyTreeNode):
    """The iterate that the next update evaluates."""

    candidate: Float[Array, "S ..."]
    fooled: Bool[Array, "S"]
    blind: Bool[Array, "S"]  # the gradient was exactly 0 at every update


class PGD(Attack):
    """Madry et al. 2018: `steps` steps of `step_size` up `loss`, which stop at the first success.

    The first `opening_steps` steps climb `opening` instead (two stages: where one loss has no gradient the
    other may). clip_start=False leaves the start outside the box, as the authors' code does.
    """

    step_size: ArrayLike
    loss: AttackLoss
    opening: AttackLoss | None = None
    opening_steps: ArrayLike = 0
    start: str = struct.field(pytree_node=False, default="uniform")
    clip_start: bool = struct.field(pytree_node=False, default=True)

    def init(self, work: Work):
        """A random point of the ball."""
        x_adv = start_in_ball(work.keys, work.x, start=self.start, clip=self.clip_start, **self.ball)
        return PGDState(x_adv, jnp.zeros(work.y.shape, bool), jnp.ones(work.y.shape, bool))

    def update(self, model: Callable, work: Work, state: PGDState, step: Int[Array, "S"]):
        """Evaluate the iterate; move it unless it is misclassified."""

        def loss(outputs, y, target):
            value = self.loss(outputs, y, target)
            if self.opening is None:
                return value
            return jnp.where(step < self.opening_steps, self.opening(outputs, y, target), value)

        x = state.candidate
        gradient, _, fooled = climb(model, loss, work, x)
        moved = projected_step(x, gradient, work.x, step_size=self.step_size, **self.ball)
        return PGDState(jnp.where(over(fooled, x), x, moved), fooled, still_blind(state.blind, gradient))
