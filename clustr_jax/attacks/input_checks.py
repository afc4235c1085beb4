"""What attacks refuse: labels, pixels and logits that would make every number meaningless."""

import warnings

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from clustr_jax.runtime.errors import UserError

# Pixels may be off the box by float rounding (of a division by 255, say), and by no more.
_ROUNDING = 1e-6
# Outputs that are never negative and never above this are bounded scores rather than logits: K = 2 of them
# in [0, 1] are added up in the paper.
_BOUNDED = 2.0 + 1e-4


def check_images(x, y, bounds) -> None:
    """UserError for pixels outside the box or not finite, labels that are no class, sizes that differ."""
    if x.ndim < 2 or y.shape != x.shape[:1]:
        raise UserError(f"x must be [B, ...] and y [B] with the same B, got {x.shape} and {y.shape}")
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise UserError(f"y must hold integer labels, got {y.dtype}")
    check_pixels(x, bounds)


def check_pixels(x, bounds) -> None:
    """UserError for pixels outside the box or not finite."""
    low, high = float(np.min(x, initial=np.inf)), float(np.max(x, initial=-np.inf))
    if len(x) and not (np.isfinite(low) and np.isfinite(high)):
        raise UserError("x has values that are not finite")
    if bounds is not None and (low < bounds[0] - _ROUNDING or high > bounds[1] + _ROUNDING):
        raise UserError(
            f"x must lie in bounds={bounds}, got values from {low:.4g} to {high:.4g}; "
            f"give pixels before normalisation, or set bounds"
        )


def check_ids(ids, count: int) -> None:
    """UserError unless they are one whole number for each image."""
    if ids.shape != (count,) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise UserError(
            f"ids must be one whole number for each of the {count} images, got {ids.dtype} {ids.shape}"
        )


def check_logits(logits, y) -> None:
    """UserError for outputs that cannot be attacked as logits; a warning where they are bounded scores.

    `y`: labels [B], or probabilities of the shape of the logits.
    """
    check_shape(logits, y)
    logits = np.asarray(logits)
    if y.ndim == 1 and len(y) and not 0 <= int(np.min(y)) <= int(np.max(y)) < logits.shape[1]:
        raise UserError(
            f"y must lie in 0..{logits.shape[1] - 1}, the classes of logits_fn, "
            f"got {np.min(y)} to {np.max(y)}"
        )
    problem, text = diagnose(logits)
    if problem:
        raise UserError(text)
    if text:
        warnings.warn(text, stacklevel=3)


def check_found(x_adv) -> None:
    """UserError where an attack met values that are no number: a NaN is misclassified, and no success."""
    # where the images are: only the count leaves the device
    bad = int(jnp.sum(~jnp.all(jnp.isfinite(x_adv), axis=tuple(range(1, x_adv.ndim)))))
    if bad:
        raise UserError(
            f"logits_fn, or the gradient of the loss by its input, is NaN for {bad} of {len(x_adv)} images "
            f"inside the ball; mend it there (a square root at 0, a logarithm of 0, 0 / 0)"
        )


def check_shape(logits, y) -> None:
    """UserError unless they are [B, Y] for labels [B], or for probabilities of the same shape."""
    if logits.ndim != 2 or logits.shape[0] != len(y):
        raise UserError(f"logits_fn must return [B, Y] for B = {len(y)} images, got shape {logits.shape}")
    if y.ndim != 1 and y.shape != logits.shape:
        raise UserError(
            f"y must be labels [B] or probabilities [B, Y], here {logits.shape}, got {y.shape}; "
            f"labels of shape [B, 1] want y[:, 0]"
        )


def diagnose(logits) -> tuple[bool, str]:
    """(an error?, what is wrong or "") of a batch of clean outputs [B, Y]."""
    logits = np.asarray(logits)
    if not np.all(np.isfinite(logits)):
        return True, "logits_fn returned values that are not finite"
    if not logits.size:
        return False, ""
    sums = logits.sum(axis=1)
    if logits.min() >= 0 and logits.max() <= 1 and np.allclose(sums, 1, atol=1e-4):
        return True, "logits_fn returned probabilities; give logits (before the softmax), or their logarithm"
    if logits.min() >= 0 and logits.max() <= _BOUNDED:
        return False, (
            f"logits_fn returned bounded scores (from {logits.min():.3g} to {logits.max():.3g}), as "
            f"exp(-d^2) scores are: gradients may vanish and the attack be blind; give log-domain logits"
        )
    return False, ""


def concrete(*arrays) -> bool:
    """Whether all are values, not being traced."""
    return not any(isinstance(a, jax.core.Tracer) for a in arrays)
