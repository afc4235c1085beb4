"""What attacks refuse: settings, labels, pixels and logits that would make every number meaningless.

Each text names what was given, what was expected and what to do. `gate.admit` asks for all of them.
"""

import warnings
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from clustr_jax.runtime.arrays import check_rows, native, readable
from clustr_jax.runtime.errors import UserError

# Pixels may be off the box by float rounding (of a division by 255, say), and by no more.
_ROUNDING = 1e-6
# Outputs that are never negative and never above this are bounded scores rather than logits: K = 2 of them
# in [0, 1] are added up in the paper.
_BOUNDED = 2.0 + 1e-4


def images_of(x: Any, bounds: tuple[float, float] | None = (0.0, 1.0)):
    """x as a float32 array, on the host or where it is; UserError for what holds no numbers, or levels."""
    readable(x, "x")
    if not isinstance(x, jax.Array):
        try:
            x = np.asarray(x)
        except Exception as error:  # of another library, on another device
            raise UserError(f"x must be an array [B, ...], got {type(x).__name__}") from error
        if x.dtype.kind not in "fiub" and not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(f"x must be an array of numbers [B, ...], got {x.dtype}")
    elif (
        not jnp.issubdtype(x.dtype, jnp.floating)
        and not jnp.issubdtype(x.dtype, jnp.integer)
        and x.dtype != bool
    ):
        raise UserError(f"x must be an array of numbers [B, ...], got {x.dtype}")
    if x.dtype == np.uint8 and bounds is not None and bounds[1] <= 2:
        raise UserError(
            f"x must lie in bounds={bounds}, got uint8 levels of 0..255; divide by 255: "
            f"x.astype(np.float32) / 255"
        )
    return x if x.dtype == np.float32 else x.astype(np.float32)


def labels_of(y: Any):
    """y as an array, whole numbers [B] or probabilities [B, Y]; UserError for one-hot labels."""
    readable(y, "y")
    y = y if isinstance(y, jax.Array) else native(np.asarray(y))
    whole = jnp.issubdtype(y.dtype, jnp.integer) or y.dtype == bool
    if y.ndim == 2 and y.shape[1] == 1:
        raise UserError(
            f"y must be labels [B] and y [B, 1] is a column; give y[:, 0]; got {y.dtype} {y.shape}"
        )
    if y.ndim == 2 and whole:
        raise UserError(f"y must be labels [B], got one-hot {y.dtype} {y.shape}; give y.argmax(axis=1)")
    if y.ndim < 2 and not jnp.issubdtype(y.dtype, jnp.integer):
        raise UserError(f"y must hold integer labels, got {y.dtype}; give y.astype(int) if they are whole")
    return y


def check_sizes(x: Array | np.ndarray, y: Array | np.ndarray) -> None:
    """UserError unless x is [B, ...] with an axis of its own for the images, and y has B rows."""
    if y.ndim == 0 and x.ndim:
        raise UserError(
            f"x must be [B, ...] and y [B] with the same B, got {x.shape} and one label; "
            f"for one image give x[None] and y[None]"
        )
    if x.ndim < 2 or y.ndim > 2 or len(y) != len(x):
        raise UserError(f"x must be [B, ...] and y [B] with the same B, got {x.shape} and {y.shape}")
    if not x.size and len(x):
        raise UserError(f"x has images without pixels: {x.shape}")


def check_pixels(x: Array | np.ndarray, bounds: tuple[float, float] | None) -> None:
    """UserError for pixels outside the box or not finite; says what they look like."""
    if not x.size:
        return
    low, high = float(x.min()), float(x.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UserError("x has values that are not finite")
    if bounds is None or (low >= bounds[0] - _ROUNDING and high <= bounds[1] + _ROUNDING):
        return
    text = f"x must lie in bounds={bounds}, got values from {low:.4g} to {high:.4g}; "
    if low >= 0 and 2 < high <= 255 and bounds[1] <= 2:
        raise UserError(f"{text}divide by 255")
    if low >= 0 and 255 < high <= 65535 and bounds[1] <= 2:
        raise UserError(f"{text}of 16-bit levels divide by 65535")
    if low >= -1.01 and high <= 1.01 and low < -0.5:
        raise UserError(
            f"{text}of pixels in [-1, 1] give (x + 1) / 2, or set bounds=(-1, 1) and double eps, which is in "
            f"units of x"
        )
    raise UserError(f"{text}give pixels before normalisation, or set bounds")


def check_input(x: Any, shape: tuple[int, ...] | None, bounds: tuple[float, float] | None):
    """x as float32 [B, *shape] (None: any), or UserError; inside jit only its shape is looked at."""
    traced = isinstance(x, jax.core.Tracer)
    if not traced:
        # while something else is traced, operations of JAX give no values
        x = images_of(np.asarray(x) if isinstance(jnp.zeros(()), jax.core.Tracer) else x, bounds)
    if shape is not None and x.shape[1:] != tuple(shape):
        raise UserError(wrong_shape(x.shape, tuple(shape)))
    if x.ndim < 2:
        raise UserError(f"x must be [B, ...], got {x.shape}; for one image give x[None]")
    if not traced:
        check_pixels(x, bounds)
    return x


def wrong_shape(got: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """What is said of images [B, ...] that are not of this shape."""
    wanted = ", ".join(map(str, ("B", *shape)))
    text = f"x must be [{wanted}], got {got}"
    if got == shape:
        return f"{text}; for one image give x[None]"
    if len(shape) == 3 and got[1:] == (shape[2], shape[0], shape[1]):
        return f"{text}: NCHW; give x.transpose(0, 2, 3, 1)"
    if len(shape) == 3 and shape[2] == 1 and got[1:] == shape[:2]:
        return f"{text}; give x[..., None]"
    if len(got) == 2 and got[1] == int(np.prod(shape)):
        return f"{text}; give x.reshape(-1, {', '.join(map(str, shape))})"
    return text


def check_labels(y: Array | np.ndarray, classes: int) -> None:
    """UserError unless they are labels in 0..Y-1, or probabilities [B, Y] that are finite."""
    if y.ndim == 2:
        if y.shape[1] != classes:
            raise UserError(
                f"y must be labels [B] or probabilities [B, Y] with the Y = {classes} classes of logits_fn, "
                f"got {y.shape}"
            )
        if not bool(np.all(np.isfinite(np.asarray(y, np.float32)))):
            raise UserError("y has probabilities that are not finite")
        check_rows(np.asarray(y, np.float32), "y")
        return
    low, high = int(y.min()), int(y.max())
    if not 0 <= low <= high < classes:
        text = f"y must lie in 0..{classes - 1}, the classes of logits_fn, got {low} to {high}"
        raise UserError(f"{text}; labels from 1 want y - 1" if (low, high) == (1, classes) else text)


def check_ids(ids: Array | np.ndarray, count: int) -> None:
    """UserError unless they are one whole number for each image, of 32 bits: a key takes no more."""
    if ids.shape != (count,) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise UserError(
            f"ids must be one whole number for each of the {count} images, got {ids.dtype} {ids.shape}"
        )
    if count and ids.dtype.itemsize > 4 and concrete(ids):
        low, high = int(ids.min()), int(ids.max())
        if low < -(2**31) or high >= 2**32:
            raise UserError(
                f"ids must fit in 32 bits, got {low} to {high}: two images would share random numbers; "
                f"number the images: ids=np.arange({count})"
            )


def check_logits(logits: Array | np.ndarray, y: Array | np.ndarray, *, warned: bool = True) -> None:
    """UserError for outputs that cannot be attacked as logits; a warning where they are bounded scores.

    `y`: labels [B], or probabilities of the shape of the logits. `warned`: False where somebody else says it.
    """
    check_shape(logits, y)
    logits = np.asarray(logits)
    if y.ndim == 1 and len(y):
        check_labels(y, logits.shape[1])
    problem, text = diagnose(logits)
    if problem:
        raise UserError(text)
    if text and warned:
        warnings.warn(text, stacklevel=3)


def check_found(x_adv: Float[Array | np.ndarray, "B ..."]) -> None:
    """UserError where an attack met values that are no number: a NaN is misclassified, and no success."""
    # where the images are: only the count leaves the device
    bad = int(jnp.sum(~jnp.all(jnp.isfinite(x_adv), axis=tuple(range(1, x_adv.ndim)))))
    if bad:
        raise UserError(
            f"logits_fn, or the gradient of the loss by its input, is NaN for {bad} of {len(x_adv)} images "
            f"inside the ball; mend it there (a square root at 0, a logarithm of 0, 0 / 0)"
        )


def check_shape(logits: Array | np.ndarray, y: Array | np.ndarray) -> None:
    """UserError unless they are [B, Y] for labels [B], or for probabilities of the same shape."""
    if logits.ndim != 2 or logits.shape[0] != len(y):
        raise UserError(f"logits_fn must return [B, Y] for B = {len(y)} images, got shape {logits.shape}")
    if y.ndim != 1 and y.shape != logits.shape:
        raise UserError(
            f"y must be labels [B] or probabilities [B, Y], here {logits.shape}, got {y.shape}; "
            f"labels of shape [B, 1] want y[:, 0]"
        )


def diagnose(logits: Array | np.ndarray) -> tuple[bool, str]:
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


def concrete(*arrays: Any) -> bool:
    """Whether all are values, not being traced."""
    return not any(isinstance(a, jax.core.Tracer) for a in arrays)
