"""An attack's settings: what is taken for a norm, a box, a radius, a count and a key, and what is refused."""

import operator
import warnings
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from clustr_jax.runtime.errors import UserError

# What every random draw of an attack is made with: under vmap other generators draw for the
# whole batch, so that an example's numbers would depend on its place.
GENERATOR = "threefry2x32"
# Names that other libraries have for the norms.
_NORMS = {
    "linf": "linf", "l_inf": "linf", "l-inf": "linf", "inf": "linf", "infinity": "linf", "l∞": "linf",
    "l2": "l2", "l_2": "l2", "l-2": "l2", "2": "l2", "2.0": "l2", "euclidean": "l2",
}  # fmt: skip
# A box of so many is one of 8-bit levels.
_LEVELS = 200
# Of such pixels: the least radius that can be meant, in words, and one that is.
_LEAST = {"linf": (0.5, "half a level", 8), "l2": (4.0, "a few levels of one pixel", 128)}


class UnitWarning(UserWarning):
    """A radius or a step that is wider than the box of the pixels: probably in units of 0..255."""


def norm_of(norm: Any) -> str:
    """ "linf" or "l2", of any common spelling (Linf, np.inf, L2, 2); UserError for another norm."""
    found = _NORMS.get(str(norm).strip().lower())
    if found is None:
        raise UserError(f"norm must be one of linf, l2, got {norm!r}")
    return found


def bounds_of(bounds: Any) -> tuple[float, float] | None:
    """(low, high) as floats, or None for no box; UserError for anything else."""
    if bounds is None:
        return None
    if isinstance(bounds, str):
        raise UserError(f"bounds must be (low, high) or None for no box, got {bounds!r}")
    try:
        low, high = (float(b) for b in bounds)
    except (TypeError, ValueError):
        raise UserError(f"bounds must be (low, high) or None for no box, got {bounds!r}") from None
    if not low < high:
        raise UserError(f"bounds must be (low, high) with low < high, got ({low:g}, {high:g})")
    if np.isinf(low) and np.isinf(high):
        return None
    if np.isinf(low) or np.isinf(high):
        raise UserError(
            f"bounds must be two finite numbers, or None for no box, got ({low:g}, {high:g}); give a number "
            f"that no pixel is beyond"
        )
    return low, high


def check_radius(name: str, value: Any) -> None:
    """UserError unless it is one number >= 0 (a traced one is not looked at)."""
    if isinstance(value, jax.core.Tracer):
        if value.ndim:
            raise UserError(f"{name} must be one number, got shape {value.shape}")
        return
    if isinstance(value, str) or value is None:
        raise UserError(f"{name} must be a number, got {value!r}; in Python 8 / 255 without quotes")
    kind = np.asarray(value).dtype.kind
    if kind not in "iufV":  # V: of bfloat16 and its like
        remedy = f"; give float({name})" if hasattr(value, "__float__") and kind == "O" else ""
        raise UserError(f"{name} must be a number, got {value!r}{remedy}")
    if np.ndim(value):
        raise UserError(
            f"{name} must be one number for all images, got shape {np.shape(value)}; "
            f"attack the images of each radius in a call of their own"
        )
    if not (0 <= float(value) < np.inf):
        raise UserError(f"{name} must be >= 0 in units of [0, 1] pixels, got {value}")


def too_wide(radii: dict[str, float], norm: str, bounds: Any, shape: tuple[int, ...]) -> list[str]:
    """What to say of radii and steps that are larger than the box: any image is in reach of any other."""
    if bounds is None:
        return []
    width = bounds[1] - bounds[0]
    reach = width if norm == "linf" else width * float(np.sqrt(np.prod(shape)))
    return [
        f"{name}={float(value):g} is more than the box is wide ({reach:.4g} in {norm}, pixels in "
        f"[{bounds[0]:g}, {bounds[1]:g}]): every image is in reach; for 255 levels give "
        f"{float(value):g} / 255"
        for name, value in radii.items()
        if value > reach * (1 + 1e-6)
    ]


def warn_of_units(eps: Any, step_size: Any, norm: str, bounds: Any, shape: tuple[int, ...]) -> None:
    """UnitWarning for a radius or a step in other units than the pixels (traced ones are not looked at)."""
    if isinstance(eps, jax.core.Tracer) or isinstance(step_size, jax.core.Tracer):
        return
    radii = {"eps": float(eps), "step_size": float(step_size)}
    least, what, right = _LEAST[norm]
    if bounds is not None and bounds[1] - bounds[0] >= _LEVELS and 0 < radii["eps"] < least:
        warnings.warn(
            f"eps={radii['eps']:g} is less than {what}, with pixels in [{bounds[0]:g}, {bounds[1]:g}]: "
            f"give it in their units, {right} rather than {right} / 255",
            UnitWarning,
            stacklevel=4,
        )
    if radii["step_size"] <= 4 * radii["eps"]:  # a long step is no mistake where the ball is as large
        del radii["step_size"]
    for text in too_wide(radii, norm, bounds, shape):
        warnings.warn(text, UnitWarning, stacklevel=4)


def key_of(key: Any) -> Any:
    """A key of the generator that attacks draw with; of another kind its seed is taken."""
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        raise UserError(f"key must be a JAX key, got {key!r}; give jax.random.key({int(key)})")
    if not isinstance(key, (jax.Array, np.ndarray)):
        raise UserError(f"key must be a JAX key, jax.random.key(0), got {type(key).__name__}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != np.uint32 or key.ndim != 1:
            raise UserError(
                f"key must be a JAX key, jax.random.key(0), got an array of {key.dtype} {key.shape}"
            )
        if key.shape != (2,):
            raise UserError(
                f"key must be a JAX key, jax.random.key(0), got {key.shape[0]} words, which are of another "
                f"generator: give jax.random.wrap_key_data(words, impl='rbg'), say"
            )
        key = jax.random.wrap_key_data(jnp.asarray(key))
    if key.shape:
        raise UserError(f"key must be one key, got {key.shape}; jax.random.split makes several: use key[0]")
    if str(jax.random.key_impl(key)) != GENERATOR:
        return jax.random.key(jax.random.bits(key), impl=GENERATOR)
    return key


def whole(name: str, value: Any, least: int) -> int:
    """A whole number of at least so much; UserError for 5.9, "5" and None."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} must be a whole number, got {value!r}") from None
    if number < least:
        raise UserError(f"{name} must be at least {least}, got {number}")
    return number
