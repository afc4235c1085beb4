"""Minimum-norm attacks: FMN (Pintor et al. 2021, linf and l2) and DDN (Rony et al. 2019, l2).

Both look for the nearest misclassified point instead of any within eps: a step up the loss, then back into a
ball whose radius shrinks where the point is misclassified and grows where it is not. With an infinite `eps`
they go on to their last step, for the minimum; with a finite one they end at the first point within it, as
FAB does. `nearest.py` has the doors.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from clustr_jax.attacks.attack_losses import AttackLoss, Outputs, label_odds
from clustr_jax.attacks.geometry import ascend, dual_length, length, over, project
from clustr_jax.attacks.scheduled_attack import Attack, Work, climb
from clustr_jax.attacks.unattacked import still_blind
from clustr_jax.runtime import struct

# FMN: the last step, as a share of the first one; how far a radius moves, at first and at last (section 3).
_LAST_STEP, _FIRST_GAMMA, _LAST_GAMMA = 0.01, 0.05, 0.001
# FMN's first step in units of the box's width, an l2 length in both norms (the authors tune it per model).
_FIRST_STEP = {"linf": 10.0, "l2": 1.0}
# DDN: the last step, as a share of the first one, and how far a radius moves (algorithm 1).
_DDN_LAST_STEP, _DDN_GAMMA = 0.01, 0.05


# What a step saw at its iterate: the gradient, the loss, and where it is misclassified.
Seen = tuple[Float[Array, "S ..."], Float[Array, "S"], Bool[Array, "S"]]


class NearestState(struct.PyTreeNode):
    """The nearest misclassified point within eps so far (x where there is none yet), and the iterate."""

    candidate: Float[Array, "S ..."]
    fooled: Bool[Array, "S"]  # where eps is infinite at the end only: there is no success before it
    distance: Float[Array, "S"]  # of the nearest misclassified point at all; inf where there is none yet
    x: Float[Array, "S ..."]
    radius: Float[Array, "S"]
    blind: Bool[Array, "S"]  # the gradient was exactly 0 at every update


class Nearest(Attack):
    """What both share. `step_size` is the first one, in l2 whatever the norm."""

    step_size: ArrayLike

    draws = False  # it starts at the image

    def start_radius(self, work: Work):
        """[S] before the first update."""
        raise NotImplementedError

    def loss(self, outputs: Outputs, y: Int[Array, "S"], target: Int[Array, "S"]):
        """[S], up towards the boundary."""
        raise NotImplementedError

    def move(self, work: Work, state: NearestState, seen: Seen, step: Int[Array, "S"]):
        """(the next iterate and radius); `seen`: gradient, value and misclassified at this one."""
        raise NotImplementedError

    def init(self, work: Work):
        """The image itself."""
        count = work.y.shape
        return NearestState(
            candidate=work.x,
            fooled=jnp.zeros(count, bool),
            distance=jnp.full(count, jnp.inf),
            x=work.x,
            radius=self.start_radius(work),
            blind=jnp.ones(count, bool),
        )

    def update(self, model: Callable, work: Work, state: NearestState, step: Int[Array, "S"]):
        """Evaluate the iterate, keep it if it is the nearest one, and move."""
        x = state.x
        gradient, value, fooled = climb(model, self.loss, work, x)
        size = length(x - work.x, self.norm)
        nearer = fooled & (size < state.distance)
        # a gradient that is none has made x none: the pass that judges then refuses the model, in words
        lost = jnp.isnan(size) & jnp.isinf(state.distance)
        state = state.replace(
            candidate=jnp.where(over((nearer & (size <= self.eps)) | lost, x), x, state.candidate),
            distance=jnp.where(nearer, size, state.distance),
        )
        moved, radius = self.move(work, state, (gradient, value, fooled), step)
        found = jnp.isfinite(state.distance) & (state.distance <= self.eps)
        enough = jnp.isfinite(self.eps) | (step + 1 >= self.steps)
        return state.replace(
            x=moved, radius=radius, fooled=found & enough, blind=still_blind(state.blind, gradient)
        )

    def _cosine(self, step):
        """From 1 before the first step to 0 after the last one."""
        return (1 + jnp.cos(jnp.pi * step / self.steps)) / 2

    def _farthest(self, work):
        """[S] the distance of the farthest point of the box."""
        if self.bounds is None:
            return jnp.full(work.y.shape, jnp.inf)
        low, high = self.bounds
        return length(jnp.maximum(work.x - low, high - work.x), self.norm)


def first_step(kind: type[Nearest], norm: str, bounds: tuple[float, float] | None) -> float:
    """The step size that a user does not give: a part of the box's width, or of 1 where there is no box."""
    width = 1.0 if bounds is None else bounds[1] - bounds[0]
    return width * (_FIRST_STEP[norm] if kind is FMN else 1.0)


class FMN(Nearest):
    """`margin` is the difference of logits to climb: untargeted, or towards the target."""

    margin: AttackLoss

    def start_radius(self, work: Work):
        """No ball before the boundary has been estimated."""
        return jnp.full(work.y.shape, jnp.inf)

    def loss(self, outputs: Outputs, y: Int[Array, "S"], target: Int[Array, "S"]):
        """z_c - z_y."""
        return self.margin(outputs, y, target)

    def move(self, work: Work, state: NearestState, seen: Seen, step: Int[Array, "S"]):
        """Until a point is found the radius is where the linearised boundary lies; then it moves by gamma.

        Unlike the paper's, the radius before that also grows by gamma and never shrinks. Otherwise the
        iterate would end on the boundary of a linear model, or stay where the box holds it back.
        """
        gradient, value, fooled = seen
        share = self._cosine(step)
        gamma = _LAST_GAMMA + (_FIRST_GAMMA - _LAST_GAMMA) * share
        step_size = self.step_size * (_LAST_STEP + (1 - _LAST_STEP) * share)
        boundary = length(state.x - work.x, self.norm)
        boundary += jnp.abs(value) / jnp.maximum(dual_length(gradient, self.norm), 1e-30)
        known = jnp.where(jnp.isfinite(state.radius), state.radius, 0.0)
        found = jnp.isfinite(state.distance)
        outside = (1 + gamma) * jnp.where(found, state.radius, jnp.maximum(boundary, known))
        inside = jnp.minimum(state.radius * (1 - gamma), state.distance)
        radius = jnp.minimum(jnp.where(fooled, inside, outside), self._farthest(work))
        moved = ascend(state.x, gradient, over(step_size, state.x), "l2")
        return project(moved, work.x, over(radius, moved), self.norm, self.bounds), radius


class DDN(Nearest):
    """Climbs cross entropy, in the form whose gradient does not vanish (`label_odds`). l2."""

    def start_radius(self, work: Work):
        """As long as the first step."""
        return jnp.full(work.y.shape, self.step_size)

    def loss(self, outputs: Outputs, y: Int[Array, "S"], target: Int[Array, "S"]):
        """log (1 - p_y) / p_y."""
        return label_odds(outputs, y, target)

    def move(self, work: Work, state: NearestState, seen: Seen, step: Int[Array, "S"]):
        """Onto the sphere, whose radius is multiplied by 1 - gamma or 1 + gamma."""
        gradient, _, fooled = seen
        step_size = self.step_size * (_DDN_LAST_STEP + (1 - _DDN_LAST_STEP) * self._cosine(step))
        radius = jnp.where(fooled, state.radius * (1 - _DDN_GAMMA), state.radius * (1 + _DDN_GAMMA))
        radius = jnp.minimum(radius, self._farthest(work))
        moved = ascend(state.x, gradient, over(step_size, state.x), "l2")
        delta = moved - work.x
        scale = radius / jnp.maximum(length(delta, "l2"), 1e-12)
        moved = work.x + over(scale, delta) * delta
        return (moved if self.bounds is None else jnp.clip(moved, *self.bounds)), radius
