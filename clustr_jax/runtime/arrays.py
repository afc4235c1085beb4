"""The gate for arrays: what k-means, the cluster head, losses and certificates refuse, and in which words.

Every public function passes its arrays through here, so that equal input gives an equal message at every
door. Shapes and types are checked always; values only outside jit, for a traced array has none yet. What is
right comes back as it is (the same object), but for types that are widened: float16, bfloat16 and whole
numbers to float32, labels to int32. Concrete arrays are read once, without a copy where they are on the CPU.
"""

import hashlib
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from clustr_jax.runtime.errors import UserError

# Of probabilities that a float16 network made: rows add up to 1 within this.
_SUM = 1e-2
# What to do about a missing axis, by the shape that is asked for.
_REMEDIES = {
    **dict.fromkeys(
        [("N E", 1), ("M E", 1), ("B E", 1)],
        "one feature each wants {name}[:, None], one example {name}[None]",
    ),
    ("B Y", 1): "one example wants {name}[None]",
    ("Y K E", 2): "one centroid per class wants {name}[:, None]",
    ("", 1): "one number for all wants {name}[0]",
}


def concrete(*arrays: Any) -> bool:
    """Whether all are values, not being traced."""
    return not any(isinstance(a, jax.core.Tracer) for a in arrays)


def is_array(value: Any) -> bool:
    """Whether a pytree's leaf is an array or a number, not what stands in for one (a shape, a spec)."""
    return isinstance(value, (np.ndarray, np.generic, jax.Array, float, int, list)) and value is not None


def readable(value: Any, name: str) -> None:
    """UserError for an array without values: one that was given away to a jit, or has masked entries."""
    if isinstance(value, jax.Array) and concrete(value) and value.is_deleted():
        raise UserError(
            f"{name} was given away, to a jit with donate_argnums, or deleted: give a copy of it there"
        )
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise UserError(
            f"{name} is a NumPy array with {int(np.ma.count_masked(value)):,} masked entries, which hold "
            f"something all the same; leave their rows out, or fill them ({name}.filled(...))"
        )


def native(array: Any) -> Any:
    """A NumPy array in this machine's order of bytes, which is the only one that JAX takes."""
    if isinstance(array, np.ndarray) and not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    return array


def as_array(value: Any, name: str) -> Any:
    """`value` itself if it is an array, else as one; UserError for what is none."""
    readable(value, name)
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        found = value
    else:
        try:
            found = np.asarray(value)
        except (ValueError, TypeError, RuntimeError) as error:  # ragged lists, foreign objects
            raise UserError(f"{name} must be an array of numbers, got {_word(value)}") from error
    if found.dtype.kind not in "biufV" or (found.dtype.kind == "V" and not _is_float(found.dtype)):
        raise UserError(
            f"{name} must be an array of numbers, got {_word(value)}"
            + (f" of {found.dtype}" if found is value else "")
        )
    return native(found)


def floats(
    value: Any,
    name: str,
    shape: str,
    sizes: dict[str, int] | None = None,
    *,
    where: Array | np.ndarray | None = None,
    infinite: bool = False,
    empty: bool = False,
    squares: str = "",
    double: bool = False,
) -> Any:
    """`value` as float32 (or float64, if it is) of this shape, all finite.

    `shape` names the axes ("N E"); `sizes` holds those that are known and takes up the others. `where`
    [first axis, or all but the last] says which entries count. `infinite` lets -inf pass, `empty` an array
    without examples. `squares` says of what the squared distances are taken, whose sum must be a float.
    `double`: what follows is float64 whatever JAX is set to.
    """
    sizes = {} if sizes is None else sizes
    array = as_array(value, name)
    check_shape(array, name, shape, sizes, empty=empty)
    widened = _widened(array)
    if not concrete(widened, where) or not array.size:
        return widened
    low, high = (float(v) for v in extent(widened, where))
    wide = double or jax.config.jax_enable_x64
    limits = np.finfo(np.float64 if wide and widened.dtype == np.float64 else np.float32)
    fits = low >= -float(limits.max) or (infinite and low == -np.inf)
    if not (fits and high <= float(limits.max)):  # NaN fails both comparisons
        raise UserError(_not_finite(array, name, limits, infinite))
    if squares:
        _check_squares(low, high, widened.size, limits, name, squares)
    return widened


def unit(value: Any) -> float:
    """The last place of 1 in the type of these floats; 0 for whole numbers."""
    dtype = getattr(value, "dtype", None)
    return float(jnp.finfo(dtype).eps) if dtype is not None and jnp.issubdtype(dtype, jnp.floating) else 0.0


def probabilities(value: Any, name: str, shape: str, sizes: dict[str, int]) -> Any:
    """As `floats`, with rows that lie in [0, 1] and add up to 1."""
    found = floats(value, name, shape, sizes, empty=True)
    if concrete(found):
        check_rows(found, name)
    return found


def check_rows(found: Array | np.ndarray, name: str) -> None:
    """UserError unless the rows of a concrete array [B, Y] lie in [0, 1] and add up to 1."""
    if not found.size:
        return
    low, high = extent(found)
    with jax.ensure_compile_time_eval():
        sums = extent(found.sum(axis=-1))
    if not (low >= 0 and max(abs(s - 1) for s in sums) <= _SUM):
        raise UserError(
            f"{name} must hold probabilities, rows in [0, 1] that add up to 1, got values from {low:.4g} "
            f"to {high:.4g} and sums from {sums[0]:.4g} to {sums[1]:.4g}; of logits take jax.nn.softmax"
        )


def labels(
    value: Any,
    num_classes: int | None,
    sizes: dict[str, int],
    name: str = "y",
    axis: str = "B",
    top: str = "",
) -> Any:
    """`value` as int32 labels [B] in 0..num_classes - 1 (any >= 0 where that is None).

    The range is looked at before the type is narrowed: 2**32 is no class 0. `top` says of what the classes
    are.
    """
    array = as_array(value, name)
    if array.ndim != 1:
        remedy = ""
        if array.ndim == 2:
            one = array.shape[1] == 1
            remedy = (
                f"; {name}[:, 0] has that shape" if one else f"; of one-hot rows take {name}.argmax(axis=1)"
            )
        raise UserError(f"{name} must be one label per example, [{axis}], got shape {array.shape}{remedy}")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise UserError(f"{name} must hold integer labels, got {_of_kind(array)}")
    check_shape(array, name, axis, sizes, empty=True)
    if concrete(array) and array.size:
        low, high = (int(v) for v in extent(array))
        most = (2**31 if num_classes is None else num_classes) - 1
        if low < 0 or high > most:
            raise UserError(f"{name} must lie in 0..{most}{top}, got {low} to {high}")
    return array if array.dtype == jnp.int32 else array.astype(jnp.int32)


def mask(value: Any, name: str, shape: str, sizes: dict[str, int], *, some: str = "") -> Any:
    """`value` as bools of this shape; whole numbers may be 0 and 1. `some`: of what it must leave any."""
    array = as_array(value, name)
    check_shape(array, name, shape, sizes, empty=True)
    if array.dtype != bool:
        whole = jnp.issubdtype(array.dtype, jnp.integer)
        if not whole or (concrete(array) and array.size and not set(np.unique(np.asarray(array))) <= {0, 1}):
            raise UserError(
                f"{name} must hold True and False, got {_of_kind(array)}; a threshold makes it so"
            )
    if some and concrete(array) and array.size and not extent(array)[1]:
        raise UserError(f"{name} is False everywhere, and leaves no {some}; True is for what counts")
    return array if array.dtype == bool else array != 0


def check_shape(
    array: Array | np.ndarray, name: str, shape: str, sizes: dict[str, int], *, empty: bool = False
) -> None:
    """UserError unless the array has these axes; sizes that were not known are noted in `sizes`.

    Axes may not be empty, but for the first one if `empty`.
    """
    axes = shape.split()
    known = [f"{a} = {sizes[a]}" for a in dict.fromkeys(axes) if a in sizes]
    fits = array.ndim == len(axes) and all(
        sizes.get(a, n) == n for a, n in zip(axes, array.shape, strict=True)
    )
    if not fits:
        wanted = f"[{', '.join(axes)}]" + (f" with {' and '.join(known)}" if known else "")
        remedy = _REMEDIES.get((shape, array.ndim), "")
        raise UserError(
            f"{name} must be {wanted}, got shape {array.shape}"
            + (f"; {remedy.format(name=name)}" if remedy else "")
        )
    for place, (axis, size) in enumerate(zip(axes, array.shape, strict=True)):
        if size == 0 and not (empty and place == 0):
            raise UserError(f"{name} [{', '.join(axes)}] is empty: got shape {array.shape}")
        sizes[axis] = size


def whole(value: Any, name: str, *, low: int = 1) -> int:
    """An int of any type (Python's, NumPy's, a 0-d array), at least `low`; no bool, no 2.0."""
    try:
        if isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) == np.dtype(bool):
            raise TypeError
        found = operator.index(value)
    except TypeError as error:
        traced = "; inside jit it must be static (jax.jit's static_argnames)" if not concrete(value) else ""
        raise UserError(
            f"{name} must be a whole number of at least {low}, got {_word(value)}{traced}"
        ) from error
    if found < low:
        raise UserError(f"{name} must be a whole number of at least {low}, got {found}")
    return found


def number(value: Any, name: str, what: str, fits: Callable[[float], bool]) -> Any:
    """A number for which `fits` holds, `what` in words; a traced one is let through."""
    if not concrete(value):
        return value
    try:
        good = not isinstance(value, (bool, np.bool_, str)) and np.ndim(value) == 0 and fits(float(value))
    except (TypeError, ValueError):
        good = False
    if not good:
        raise UserError(f"{name} must be {what}, got {_word(value)}")
    return value


def positive(value: Any, name: str, what: str = "a positive, finite number") -> Any:
    """A number above 0 that is finite; a traced one is let through."""
    return number(value, name, what, lambda v: 0 < v < np.inf)


def not_negative(value: Any, name: str, what: str = "a finite number, 0 or more") -> Any:
    """A number of at least 0 that is finite; a traced one is let through."""
    return number(value, name, what, lambda v: 0 <= v < np.inf)


def key(value: Any) -> None:
    """UserError unless `value` is one PRNG key."""
    typed = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    raw = getattr(value, "dtype", None) == jnp.uint32 and np.ndim(value) == 1
    if not (typed and value.ndim == 0) and not raw:
        many = f"; one of these {value.shape} keys" if typed else "; a seed makes one: jax.random.key(seed)"
        raise UserError(f"key must be a key of jax.random, got {_word(value)}{many}")


def plain(leaf: Any) -> np.ndarray:
    """A pytree's leaf in NumPy; a PRNG key is its data, as models hold one for dropout."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def digest(tree: Any) -> str:
    """Short SHA-256 of all arrays in a tree, in their order."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(plain(leaf).tobytes())
    return found.hexdigest()[:16]


def extent(array: Array | np.ndarray, where: Array | np.ndarray | None = None) -> tuple[Any, Any]:
    """(smallest, largest) of the entries of a concrete array that count, 0 where none does; NaN if one is.

    `where` has the first axes of the array. Where the array is the reduction runs, so that only two numbers
    leave a device.
    """
    if _on_host(array) and _on_host(where):
        array = np.asarray(array)
        if where is None:
            return array.min(), array.max()
        kept = array[np.asarray(where)]
        return (kept.min(), kept.max()) if kept.size else (0, 0)
    with jax.ensure_compile_time_eval():  # also where a trace goes on around it
        low, high = _extent(array, where)
        return np.asarray(low)[()], np.asarray(high)[()]


@jax.jit
def _extent(array, where):
    if where is None:
        return jnp.min(array), jnp.max(array)
    where = where.reshape(where.shape + (1,) * (array.ndim - where.ndim))
    kept = jnp.where(where, array, jnp.zeros_like(array))
    return jnp.min(kept), jnp.max(kept)


def _on_host(array) -> bool:
    """Whether NumPy reads the values without a copy between devices."""
    if not isinstance(array, jax.Array):
        return True
    return len(array.devices()) == 1 and all(d.platform == "cpu" for d in array.devices())


def _is_float(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _widened(array):
    """float32 for what is narrower or whole; whole numbers straight from their own type."""
    if array.dtype in (np.float32, np.float64):
        return array
    return array.astype(np.float32)


def _check_squares(low, high, count, limits, name, of):
    """UserError where the sum of all squared distances is no float, or that of the farthest two is 0."""
    spread = high - low
    if spread**2 * count > float(limits.max):
        what = "overflow"
    elif spread and spread**2 < float(limits.tiny):
        what = "vanish in"
    else:
        return
    raise UserError(
        f"{name} has values from {low:.4g} to {high:.4g}: squared distances {of} {what} {limits.dtype}; "
        f"give {name} in other units (divided by its standard deviation, say)"
    )


def _not_finite(array, name, limits, infinite):
    text = "values that are NaN or +inf" if infinite else "values that are not finite"
    if _on_host(array):
        values = np.asarray(array).astype(np.float64).reshape(len(array) if array.ndim else 1, -1)
        most = float(limits.max)
        bad = ~((values >= -most) & (values <= most)) & ~(infinite & (values == -np.inf))
        rows = np.flatnonzero(bad.any(axis=1))
        if array.ndim and len(rows):
            text += f" in {len(rows)} of {len(values)} rows, the first {name}[{rows[0]}]"
        if np.isfinite(values).all():
            text += f" as {limits.dtype}"
    return f"{name} has {text}"


def _of_kind(array) -> str:
    """The type of the array, with what makes labels of it."""
    if not concrete(array) or not array.size:
        return f"{array.dtype}; .astype(int) makes them so"
    if array.dtype == bool:
        return "bool; .astype(int) makes them so"
    values = np.asarray(array).astype(np.float64).reshape(-1)
    odd = values[values != np.round(values)]
    return f"{array.dtype}" + (f" with {odd[0]:.4g} in it" if len(odd) else "; .astype(int) makes them so")


def _word(value) -> str:
    """A short name for any value."""
    if not concrete(value):
        return f"a traced {getattr(value, 'dtype', 'value')}{list(np.shape(value))}"
    shape = getattr(value, "shape", None)
    if shape:
        return f"an array of shape {shape}"
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:50]}..."


def check_members(mask: Any, y: Any) -> None:
    """UserError where an example's class has no cluster: its distance to the nearest would be infinite."""
    if mask is None or not concrete(mask, y):
        return
    without = ~np.asarray(mask).any(axis=1)[np.asarray(y)]
    if without.any():
        first = int(np.asarray(y)[without][0])
        raise UserError(
            f"mask leaves no cluster of class {first}, and y has {int(without.sum())} examples of such "
            f"classes; leave them out, or give the class a cluster"
        )
