"""How well float32 holds a model's gradients: beside those of the same model in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from clustr_jax import losses
from clustr_jax.attacks import attack_losses
from clustr_jax.attacks.geometry import l2_norm
from clustr_jax.data import Examples
from clustr_jax.evaluation.subject import Subject
from clustr_jax.runtime.errors import first_line

SLOPE = 0.01  # relative error of a derivative in float64, where differences of 1e-6 are good to about 1e-8


class Closed(Exception):
    """A model that cannot be computed in float64, and why."""


def precision(subject: Subject, examples: Examples) -> tuple[float, float | None]:
    """Of the margin: (share of gradient signs that float32 and float64 agree on, error of a derivative).

    The error is that of the float64 derivative along each image's own gradient against a central
    difference, relative to it: the median over the images, for some have a kink in between. None where the
    logits stand still, as those of a model do that rounds its pixels. Raises `Closed`.
    """
    if subject.opened is None:
        raise Closed("the model cannot be opened")

    def total(model, x, y):
        values = losses.margin(attack_losses.logits_of(model(x)), y)
        return jnp.sum(values), values

    compute = jax.jit(jax.value_and_grad(total, 1, has_aux=True))
    single = np.asarray(compute(subject.opened, examples.x, examples.y)[1], np.float64)
    with jax.enable_x64(True):
        wide = jax.tree.map(_float64, subject.opened)
        x, y = jnp.asarray(examples.x, jnp.float64), jnp.asarray(examples.y)
        try:
            kind = jax.eval_shape(total, wide, x, y)[1].dtype
        except Exception as error:  # whatever a model says of arrays that it was not made for
            raise Closed(f"the model cannot be computed in float64 ({first_line(error, 80)})") from error
        if kind != jnp.float64:
            raise Closed(f"the model computes in {kind}, whatever it is given")
        double = np.asarray(compute(wide, x, y)[1])
        norm = np.asarray(l2_norm(double))
        direction = double / np.maximum(norm, 1e-300)

        def slope_by(step):
            ahead, behind = (np.asarray(compute(wide, x + s * direction, y)[0][1]) for s in (step, -step))
            return (ahead - behind) / (2 * step)

        difference, finer = slope_by(1e-6), slope_by(3e-7)
    if _relative(finer, difference) > SLOPE:  # a derivative does not depend on the step
        raise Closed("differences of its logits are rounding: of float32 inside, or of its pixels")
    slope = norm.reshape(-1)
    seen = (double != 0) & np.isfinite(single)
    agreement = float(np.mean(np.sign(single[seen]) == np.sign(double[seen]))) if seen.any() else 0.0
    still = np.median(np.abs(difference)) == 0 and np.any(slope)
    return agreement, None if still else _relative(slope, difference)


def _relative(found, wanted) -> float:
    """The median error, relative to what is wanted."""
    return float(np.median(np.abs(found - wanted) / np.maximum(np.abs(wanted), 1e-12)))


def _float64(leaf):
    return jnp.asarray(leaf, jnp.float64) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf
