"""Targeted FAB (Croce & Hein 2020, "Minimally distorted adversarial examples ..."), linf and l2.

Looks for the nearest point of the target class. The boundary z_y = z_t is linearised; the iterate and the
original image are projected onto that hyperplane within the box; the next iterate is a mixture of the two,
overshot a little. Beyond the boundary it steps back towards the image. What counts here is an adversarial
point within eps; the first one ends the restart.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clustr_jax.attacks.attack_losses import margin_targeted, misclassified
from clustr_jax.attacks.geometry import length, on_sphere, over, project
from clustr_jax.attacks.scheduled_attack import Attack, Work, climb
from clustr_jax.attacks.unattacked import still_blind
from clustr_jax.runtime import struct

# Largest weight of the original image, overshoot, and the step back (section 3 of the paper).
_ALPHA_MAX, _ETA, _BETA = 0.1, 1.05, 0.9
# Newton steps of the projection: each is exact on one linear piece, and few pieces are passed.
_NEWTON = 20
# A distance to a hyperplane that no box reaches, in units of its weights.
_FAR = 1e30


class FABState(struct.PyTreeNode):
    """The iterate, which may lie outside the ball, and what to return of it."""

    x: Float[Array, "S ..."]
    candidate: Float[Array, "S ..."]
    fooled: Bool[Array, "S"]
    blind: Bool[Array, "S"]  # the gradient was exactly 0 at every update


class FAB(Attack):
    """FAB-T: targets are classes. Restarts of a target after the first begin at a random point."""

    restarts: int = struct.field(pytree_node=False, default=1)

    forwards = 1

    def init(self, work: Work):
        """The image itself; for later restarts a random point half a radius from it."""
        away = jnp.where(work.restart % self.restarts > 0, self.eps / 2, 0.0)
        x = work.x + over(away, work.x) * on_sphere(work.keys, work.x, self.norm)
        x = project(x, work.x, self.eps, self.norm, self.bounds)
        return FABState(x, x, jnp.zeros(work.y.shape, bool), jnp.ones(work.y.shape, bool))

    def update(self, model: Callable, work: Work, state: FABState, step: Int[Array, "S"]):
        """One gradient at the iterate, and a forward pass at the next one."""
        x, origin = state.x, work.x
        w, value, _ = climb(
            model, margin_targeted, work, x
        )  # z_t - z_y = value + w.(z - x): 0 on the boundary
        offset = value - jnp.sum(w * x, axis=tuple(range(1, x.ndim)))
        from_x = onto_hyperplane(x, w, offset, self.norm, self.bounds)
        from_origin = onto_hyperplane(origin, w, offset, self.norm, self.bounds)
        near, far = length(from_x, self.norm), length(from_origin, self.norm)
        share = over(jnp.clip(near / jnp.maximum(near + far, 1e-12), 0.0, _ALPHA_MAX), x)
        moved = (1 - share) * (x + _ETA * from_x) + share * (origin + _ETA * from_origin)
        if self.bounds is not None:
            moved = jnp.clip(moved, *self.bounds)
        adversarial = misclassified(model(moved), work.y)
        within = length(moved - origin, self.norm) <= self.eps
        back = origin + _BETA * (moved - origin)
        success = adversarial & within
        projected = project(moved, origin, self.eps, self.norm, self.bounds)
        return FABState(
            x=jnp.where(over(adversarial & ~within, x), back, moved),
            candidate=jnp.where(over(success, x), moved, projected),
            fooled=success,
            blind=still_blind(state.blind, w),
        )


def onto_hyperplane(
    x: Float[Array, "B ..."],
    w: Float[Array, "B ..."],
    offset: Float[Array, "B"],
    norm: str,
    bounds: tuple[float, float] | None,
):
    """The smallest move from x to {z in the box: w.z + offset = 0}; as far as it goes if there is none.

    Each coordinate moves along z(t) = x - sign t r (r = 1 for linf, |w| for l2) and stops at the box. Then
    w.z is concave and piecewise linear in t, so Newton's method from t = 0 ends exactly. A step costs
    O(coordinates); sorting would do too.
    """
    inner = tuple(range(1, x.ndim))
    # the same hyperplane, by a power of two: squares of small weights would be none
    power = -jnp.frexp(jnp.max(jnp.abs(w), axis=inner))[1]
    w, offset = jnp.ldexp(w, over(power, w)), jnp.clip(jnp.ldexp(offset, power), -_FAR, _FAR)
    distance = jnp.sum(w * x, axis=inner) + offset
    down = over(jnp.sign(distance), x) * jnp.sign(w)  # moving against this lowers |distance|
    size = jnp.abs(w)
    rate = jnp.where(size > 0, 1.0, 0.0) if norm == "linf" else size
    room = jnp.full_like(x, jnp.inf)
    if bounds is not None:
        room = jnp.where(down > 0, x - bounds[0], bounds[1] - x)
    goal = jnp.abs(distance)

    def newton(_, t):
        move = jnp.minimum(over(t, x) * rate, room)
        gained = jnp.sum(size * move, axis=inner)
        slope = jnp.sum(jnp.where(over(t, x) * rate < room, size * rate, 0.0), axis=inner)
        return jnp.where(slope > 0, t + jnp.maximum(goal - gained, 0.0) / jnp.maximum(slope, 1e-30), t)

    t = jax.lax.fori_loop(0, _NEWTON, newton, jnp.zeros_like(goal))
    return -down * jnp.minimum(over(t, x) * rate, room)
