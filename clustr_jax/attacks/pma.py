"""The probability margin attack (Xie et al., CVPR 2025, "Towards Million-Scale Adversarial Robustness
Evaluation With Stronger Individual Attacks"), linf and l2.

Steps up p_c - p_y, the margin of the softmax's probabilities. Each restart begins at a uniform point and
takes one step towards the label. It then runs half of its steps away from it (first, third ... restart) or
towards the likeliest other class (second, fourth ...), and the rest up the margin. The steps of each half
shrink from 2 eps to 0 along half a cosine. What is climbed are logarithms of the same odds, whose gradients
have the same directions and do not underflow.
"""

import os
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from clustr_jax.attacks.attack_losses import label_odds, probability_margin, rival_odds
from clustr_jax.attacks.calls import SLOTS, attack_alone, common_of
from clustr_jax.attacks.geometry import over, projected_step, start_in_ball
from clustr_jax.attacks.options import whole
from clustr_jax.attacks.scheduled_attack import Attack, Work, climb
from clustr_jax.attacks.scheduled_pgd import PGDState
from clustr_jax.attacks.unattacked import still_blind
from clustr_jax.runtime.promotion import promoting

# The kinds of restarts that take turns: away from the label, towards the likeliest other class.
ROUNDS, STEPS = 2, 100


class PMA(Attack):
    """Restarts alternate between the two openings. One gradient per update."""

    def init(self, work: Work):
        """A uniform point of the ball."""
        x = start_in_ball(work.keys, work.x, start="uniform", **self.ball)
        return PGDState(x, jnp.zeros(work.y.shape, bool), jnp.ones(work.y.shape, bool))

    def update(self, model: Callable, work: Work, state: PGDState, step: Int[Array, "S"]):
        """Evaluate the iterate; move it unless it is misclassified."""
        opening = step < self.opening_steps

        def loss(outputs, y, target):
            odds = label_odds(outputs, y, target)
            towards_rival = (work.restart % ROUNDS == 1) & (step > 0)
            first_half = jnp.where(towards_rival, rival_odds(outputs, y, target), odds)
            first_half = jnp.where(step == 0, -odds, first_half)
            return jnp.where(opening, first_half, probability_margin(outputs, y, target))

        x = state.candidate
        gradient, _, fooled = climb(model, loss, work, x)
        step_size = over(self.step_size(step), x)
        moved = projected_step(x, gradient, work.x, step_size=step_size, **self.ball)
        return PGDState(jnp.where(over(fooled, x), x, moved), fooled, still_blind(state.blind, gradient))

    @property
    def opening_steps(self):
        """Steps before the margin: the larger half."""
        return jnp.floor_divide(self.steps + 1, 2)

    def step_size(self, step: Int[Array, "S"]):
        """2 eps (1 + cos) / 2, from 2 eps in both halves; of the first, the first two steps have it.

        The authors' code takes the first step up the margin with the last, vanishing size of the opening;
        here it has the size that begins its half.
        """
        first = self.opening_steps
        opening = jnp.maximum(step - 1, 0) / first
        margin = (step - first) / jnp.maximum(self.steps - first, 1)
        return self.eps * (1 + jnp.cos(jnp.pi * jnp.where(step < first, opening, margin)))


@promoting
def pma(
    key: Array,
    logits_fn: Callable,
    x: Float[np.ndarray, "B ..."],
    y: Int[np.ndarray, "B"],
    *,
    eps: float,
    steps: int = STEPS,
    restarts: int = ROUNDS,
    norm: str = "linf",
    bounds: tuple[float, float] | None = (0.0, 1.0),
    ids: Int[np.ndarray, "B"] | None = None,
    slots: int = SLOTS,
    progress: bool | None = None,
    folder: str | os.PathLike | None = None,
) -> Float[np.ndarray, "B ..."]:
    """PMA, the probability margin attack (Xie et al. 2025): no step size to tune.

    Args:
        key: of `jax.random.key`. An image's draws depend on it, on the image's id and on the restart alone.
        logits_fn: any function of images [B, ...] -> logits [B, Y]; `wrap` says which models do.
        x: images [B, ...], pixels in `bounds`.
        y: labels [B].
        eps: radius of the ball, in the units of the pixels: 8/255, not 8.
        steps: gradients of each restart.
        restarts: of two kinds that take turns. The authors' budget is 50 steps in each of two.
        norm: "linf" or "l2".
        bounds: box of the pixels, (low, high); None for no box.
        ids: numbers of the images in their data set [B], which randomness goes by; default 0 to B - 1.
        slots: images that the device works on at once: they decide the memory.
        progress: a bar; None draws one on a terminal or in a notebook.
        folder: keeps records here, so that the same call goes on where it was interrupted.

    Returns:
        x_adv [B, ...], inside ball and box; x where nothing was broken.

    Raises:
        UserError: for bad settings, shapes, pixels and labels, and for models whose logits are no function of
            the image.
        Interrupted: on Ctrl-C; `.found` has what was found.

    >>> def logits(x):  # class 0 for bright images, 1 for dark ones; [B, H, W, C] -> [B, Y]
    ...     z = 10 * (x.mean(axis=(1, 2, 3))[:, None] - 0.5)
    ...     return jnp.concatenate([z, -z], axis=1)
    >>> x = np.stack([np.full((4, 4, 1), 0.55), np.full((4, 4, 1), 0.9)]).astype(np.float32)
    >>> y = np.array([0, 0])
    >>> x_adv = attacks.pma(jax.random.key(0), logits, x, y, eps=0.1, steps=10, slots=2)
    >>> print(logits(x_adv).argmax(axis=1) != y, bool((x_adv[1] == x[1]).all()))
    [ True False] True
    """
    attack = PMA(steps=np.int32(whole("steps", steps, 1)), **common_of(eps, norm, bounds))
    return attack_alone(
        key,
        attack,
        logits_fn,
        x,
        y,
        ranking=None,
        ids=ids,
        restarts=restarts,
        slots=slots,
        progress=progress,
        folder=folder,
    )
