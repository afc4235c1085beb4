"""Auto-PGD (Croce & Hein 2020, "Reliable evaluation of adversarial robustness", algorithm 1), linf and l2.

Momentum, and a step that starts at 2 eps and is halved, from the best point so far, where the loss has
stopped to rise. Nothing to tune but the number of steps.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from clustr_jax.attacks.attack_losses import AttackLoss
from clustr_jax.attacks.geometry import ascend, on_sphere, over, project
from clustr_jax.attacks.scheduled_attack import Attack, Work, climb
from clustr_jax.attacks.unattacked import still_blind
from clustr_jax.runtime import struct

# Share of the previous move that is carried on, share of rising steps that a window needs, first step / eps.
_MOMENTUM, _RISING, _FIRST_STEP = 0.25, 0.75, 2.0


class APGDState(struct.PyTreeNode):
    """The iterate to evaluate next, the one before, the best one, and the bookkeeping of the step size."""

    candidate: Float[Array, "S ..."]
    fooled: Bool[Array, "S"]
    blind: Bool[Array, "S"]  # the gradient was exactly 0 at every update
    previous: Float[Array, "S ..."]
    best: Float[Array, "S ..."]
    best_gradient: Float[Array, "S ..."]
    best_value: Float[Array, "S"]
    last_value: Float[Array, "S"]
    step_size: Float[Array, "S"]
    rises: Int[Array, "S"]  # of the loss, since the step size was last looked at
    checked_value: Float[Array, "S"]  # the best value at the last checkpoint
    halved: Bool[Array, "S"]  # at the last checkpoint


@functools.cache
def windows(steps: int) -> np.ndarray:
    """[steps] int: at a checkpoint, the steps since the one before; 0 elsewhere.

    Checkpoints w_j = p_j N with p_1 = 0.22 and gaps that shrink by 0.03 to 0.06 (section 3.1), counted in
    whole steps.
    """
    found = np.zeros(max(steps, 1), np.int32)
    gap, smallest, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    at = gap
    while at < steps:
        found[at] = gap
        gap = max(gap - shrink, smallest)
        at += gap
    return found


class APGD(Attack):
    """`loss` decides between APGD-CE, APGD-DLR and, with targets, APGD-T."""

    steps: int = struct.field(pytree_node=False)
    loss: AttackLoss

    def init(self, work: Work):
        """eps from x: along a uniform draw, scaled by its largest entry (linf), or a Gaussian (l2)."""
        x = work.x + self.eps * on_sphere(work.keys, work.x, self.norm)
        x = project(x, work.x, self.eps, self.norm, self.bounds)
        nothing = jnp.full(work.y.shape, -jnp.inf)
        return APGDState(
            candidate=x,
            fooled=jnp.zeros(work.y.shape, bool),
            blind=jnp.ones(work.y.shape, bool),
            previous=x,
            best=x,
            best_gradient=jnp.zeros_like(x),
            best_value=nothing,
            last_value=nothing,
            step_size=jnp.full(work.y.shape, _FIRST_STEP) * self.eps,
            rises=jnp.zeros(work.y.shape, jnp.int32),
            checked_value=nothing,
            halved=jnp.zeros(work.y.shape, bool),
        )

    def update(self, model: Callable, work: Work, state: APGDState, step: Int[Array, "S"]):
        """Evaluate the iterate, halve the step where it is time to, and move."""
        x = state.candidate
        gradient, value, fooled = climb(model, self.loss, work, x)
        blind = still_blind(state.blind, gradient)
        better = value > state.best_value
        best = jnp.where(over(better, x), x, state.best)
        best_gradient = jnp.where(over(better, x), gradient, state.best_gradient)
        best_value = jnp.where(better, value, state.best_value)
        rises = state.rises + ((step > 0) & (value > state.last_value))
        checked_value = jnp.where(step == 0, value, state.checked_value)

        window = jnp.asarray(windows(self.steps))[jnp.minimum(step, self.steps - 1)]
        check = window > 0
        oscillating = rises <= _RISING * window
        stuck = ~state.halved & (checked_value >= best_value)
        halve = check & (oscillating | stuck)
        step_size = jnp.where(halve, state.step_size / 2, state.step_size)
        origin = jnp.where(over(halve, x), best, x)
        gradient = jnp.where(over(halve, x), best_gradient, gradient)

        def inside(z):
            return project(z, work.x, self.eps, self.norm, self.bounds)

        ahead = inside(ascend(origin, gradient, over(step_size, x), self.norm))
        share = over(jnp.where(step == 0, 0.0, _MOMENTUM), x)
        moved = inside(origin + (1 - share) * (ahead - origin) + share * (origin - state.previous))
        return APGDState(
            candidate=jnp.where(over(fooled, x), x, moved),
            fooled=fooled,
            blind=blind,
            previous=origin,
            best=best,
            best_gradient=best_gradient,
            best_value=best_value,
            last_value=value,
            step_size=step_size,
            rises=jnp.where(check, 0, rises),
            checked_value=jnp.where(check, best_value, checked_value),
            halved=jnp.where(check, halve, state.halved),
        )
