"""Whether a model's logits are a function of the image: a few cheap passes before every attack.

An accuracy is counted image by image. Where logits depend on chance (dropout, noise) or on the other images
of the batch (batch norm in training mode), the images that broke a model may not do so when looked at again.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from clustr_jax.attacks.attack_losses import logits_of
from clustr_jax.attacks.input_checks import diagnose
from clustr_jax.attacks.models import IN_EVALUATION, Opened
from clustr_jax.runtime import mesh
from clustr_jax.runtime.errors import UserError, first_line

# Images of a pass: some of them are looked at, the rest are their company.
_ROWS = 8
# The same program on the same row rounds alike, or (another place in the batch, several threads) by a few
# units in the last of float32's seven digits: 1e-5 of the largest logit. What batch norm and dropout do is of
# the size of the differences between logits; a ten-thousandth of them is far below and far above either.
_OF_SPREAD, _OF_SIZE = 1e-4, 1e-5
# Between a compiled program and one that is run operation by operation, sums are ordered otherwise.
_COMPILED = 10.0


class UnsteadyWarning(UserWarning):
    """Logits depend on chance or on the batch, and the user has said that this is meant."""


@jax.jit
def _look(model, x):
    def rows(model, x):
        return logits_of(model(x))

    return mesh.by_rows(rows, model, x)


def check(opened: Opened, x: Float[Array | np.ndarray, "B ..."], bounds: tuple[float, float] | None) -> str:
    """UserError where the logits on these images [B, ...] cannot be attacked or trusted.

    Returns what is wrong with a model that may be unsteady ("" otherwise), and warns about it.
    """
    count = len(x)
    if not count or opened.classes is None:
        return ""
    first, others = _compositions(x, bounds)
    try:
        logits = np.asarray(_look(opened.model, first))
    except (TypeError, ValueError) as error:  # it took all of them
        if "incompatible devices" in str(error):
            raise UserError(
                f"logits_fn's arrays lie on different devices ({first_line(error, 200)}); put all of them on "
                f"the same: jax.device_put(arrays, sharding)"
            ) from error
        raise UserError(
            f"logits_fn takes the {count} images of the batch, not {_ROWS} of them ({first_line(error)}); "
            f"let it treat every image alike, whatever the batch"
        ) from error
    problem, text = diagnose(logits[: min(count, _ROWS)])
    if problem:
        raise UserError(text)
    _check_own_jit(opened, first, logits)
    text = _unsteady(opened, first, others, logits)
    if not text:
        return ""
    if opened.steady:
        raise UserError(f"{text}; if it is meant: attacks.wrap(logits_fn, steady=False)")
    warnings.warn(f"{text}: every number depends on it", UnsteadyWarning, stacklevel=4)
    return text


def _unsteady(opened, first, others, logits) -> str:
    remedy = IN_EVALUATION[opened.kind]
    if opened.fickle:
        return (
            "logits_fn is another function each time it is traced (NumPy's random numbers, a counter, a "
            "clock?); let it depend on its images and on arrays only"
        )
    again = np.asarray(_look(opened.model, first))
    if _differ(again, logits):
        return (
            f"logits_fn gives other logits for the same images a second time ({_size(again, logits)}), as "
            f"with dropout or noise; {remedy}"
        )
    for batch, own, places in others:
        mixed = np.asarray(_look(opened.model, batch))[places]
        if _differ(mixed, logits[own]):
            return (
                f"logits_fn gives an image other logits when it is in another batch "
                f"({_size(mixed, logits[own])}), as batch norm does in training mode, or noise; {remedy}"
            )
    return ""


def _compositions(x, bounds):
    """(a batch, [(another one, rows of the batch, their places in that)]): a quarter of the rows in common.

    The company in the others is darker and mirrored, for there may be no other images. Two others, with other
    rows: where one image decides (the largest of the batch, the first) it is not in both.
    """
    count = min(len(x), _ROWS // 2)
    rows = np.resize(np.arange(min(len(x), _ROWS)), _ROWS)
    few = np.asarray(x[: min(len(x), _ROWS)], np.float32)
    first = few[rows]
    low = 0.0 if bounds is None else bounds[0]
    others = low + (first.reshape(_ROWS, -1)[:, ::-1].reshape(first.shape) - low) / 2
    found = []
    for own in filter(len, (np.arange(0, count, 2), np.arange(1, count, 2))):
        batch, places = others.copy(), _ROWS - 1 - own
        batch[places] = first[own]
        found.append((batch, own, places))
    return first, found


def _check_own_jit(opened, x, logits):
    """A jit inside of logits_fn keeps the arrays of its first call: the answer without it shows which."""
    if opened.eager is None:
        return
    try:
        plain = np.asarray(logits_of(opened.eager(x)))
    except Exception:  # what cannot be run without jit cannot be compared
        return
    if _differ(plain, logits, _COMPILED):
        raise UserError(
            f"logits_fn has a jax.jit inside that holds arrays, and answers with old ones "
            f"({_size(plain, logits)}); pass them to that jit as arguments, or call "
            f"jax.clear_caches() after a change"
        )


def _differ(a, b, times=1.0) -> bool:
    """Whether logits [B, Y] differ by more than rounding."""
    coarse = max(1.0, 8 * float(jnp.finfo(b.dtype).eps) / _OF_SPREAD)  # above 1 for bfloat16 and float16
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    limit = _OF_SPREAD * float(np.ptp(b, axis=1).max()) + _OF_SIZE * float(np.abs(b).max())
    # a NaN on one side only is a difference
    return not np.all(np.abs(a - b) <= times * coarse * limit)


def _size(a, b) -> str:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return f"by {np.abs(a - b).max():.2g}, of {np.ptp(b, axis=1).max():.2g} between classes"
