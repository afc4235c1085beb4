"""The one gate of all attacks: key, settings, images, labels and model, in one order, with one text each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from clustr_jax.attacks import input_checks, models, options, placement, trust
from clustr_jax.runtime.arrays import native, readable
from clustr_jax.runtime.errors import UserError


class Admitted(NamedTuple):
    """What an attack goes on with; x [B, ...] float32 and y as they came, NumPy or JAX."""

    key: Any
    model: Partial
    x: Any
    y: Any
    ids: Any
    norm: str
    bounds: tuple[float, float] | None
    note: str  # what is wrong with a model that may be unsteady
    classes: int | None = None  # None: it was not looked at
    seen: trust.Seen = trust.Seen()  # how it answers, for the attack to compare with its own pass


def admit(
    key: Any,
    logits_fn: Callable,
    x: Any,
    y: Any,
    *,
    eps: ArrayLike,
    step_size: ArrayLike = 0.0,
    norm: Any = "linf",
    bounds: Any = (0.0, 1.0),
    ids: Any = None,
    rows: int | None = None,
) -> Admitted:
    """UserError for anything that would make a number meaningless; see `input_checks`, `models` and `trust`.

    `y`: labels [B], or probabilities [B, Y]. `rows`: how many images the model will see at once (default B).
    Inside jit only what can be seen there is looked at: shapes, types and settings.
    """
    norm, bounds = options.norm_of(norm), options.bounds_of(bounds)
    options.check_radius("eps", eps)
    options.check_radius("step_size", step_size)
    for name, array in (("key", key), ("x", x), ("y", y), ("ids", ids)):
        readable(array, name)
    key, x, y, ids = (placement.beside(placement.home(()), a) for a in (key, x, y, ids))
    key = options.key_of(key)
    traced = isinstance(jnp.zeros(()), jax.core.Tracer) or not input_checks.concrete(x, y)
    x, y = input_checks.images_of(x, bounds), input_checks.labels_of(y)
    input_checks.check_sizes(x, y)
    count = x.shape[0]
    ids = np.arange(count, dtype=np.int32) if ids is None else ids
    ids = ids if isinstance(ids, jax.Array) else native(np.asarray(ids))
    input_checks.check_ids(ids, count)
    if input_checks.concrete(x):
        # while something else is traced, operations of JAX give no values
        input_checks.check_pixels(np.asarray(x) if traced else x, bounds)
    options.warn_of_units(eps, step_size, norm, bounds, x.shape[1:])
    if traced or not count:
        return Admitted(key, models.as_partial(logits_fn), x, y, ids, norm, bounds, "")
    opened = _open(logits_fn, rows or count, x.shape)
    if opened.classes is not None:
        input_checks.check_labels(y, opened.classes)
    seen = trust.check(opened, x, bounds)
    home = placement.home(jax.tree.leaves(opened.model)) or placement.home((x,))
    key, x, y, ids = (placement.beside(home, a) for a in (key, x, y, ids))
    return Admitted(key, opened.model, x, y, ids, norm, bounds, seen.note, opened.classes, seen)


def _open(logits_fn, rows, shape):
    """Open it for so many rows; where that fails, the text is about the images as they were given."""
    try:
        return models.open_model(logits_fn, (rows, *shape[1:]), trust.sizes(shape[0]))
    except UserError:
        if rows != shape[0]:
            models.open_model(logits_fn, shape)
        raise
