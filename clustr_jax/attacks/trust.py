"""Whether a model's logits are a function of the image: a few cheap passes before every attack.

An accuracy is counted image by image. Where logits depend on chance (dropout, noise) or on the other images
of the batch (batch norm in training mode), the images that broke a model may not do so when looked at again.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from clustr_jax.attacks.attack_losses import logits_of
from clustr_jax.attacks.input_checks import diagnose
from clustr_jax.attacks.models import IN_EVALUATION, Opened
from clustr_jax.runtime import mesh
from clustr_jax.runtime.errors import UserError, first_line, warn_caller

# Images of a pass: some of them are looked at, the rest are their company. One pass has twice as many, and
# where there are few images one has half of them.
_ROWS = 8
# The same program on the same row may round otherwise in another place of the batch, or on several threads:
# by a few units in the last of float32's seven digits, 1e-5 of the largest logit. Batch norm and dropout
# change logits by about as much as they differ among each other. A ten-thousandth of those differences lies
# between the two.
_OF_SPREAD, _OF_SIZE = 1e-4, 1e-5
# Narrower types round by so many units in their last place, through all layers.
_UNITS = 8
# Sums are ordered otherwise in a program that is not compiled, or compiled for another number of rows; a
# rounding inside the model may then turn out another way. What branches on that number gives logits that have
# nothing to do with each other.
_COMPILED, _OTHER_SIZE = 10.0, 500.0
# However coarsely a model rounds: a change as large as the differences between its logits is no rounding.
_MOST_OF_SPREAD, _MOST_OF_SIZE = 0.5, 0.25
# What a product of float32s may go through by default.
_PRODUCTS = {"cpu": 0.0, "gpu": 2.0**-10, "tpu": 2.0**-7}  # TF32, bfloat16


class UnsteadyWarning(UserWarning):
    """Logits depend on chance or on the batch, and the user has said that this is meant."""


class Seen(NamedTuple):
    """What the gate saw: what is wrong with a model that may be unsteady ("": nothing), and how it answers.

    `logits` [b, Y] of the first images (None where they were not looked at), and how coarsely they round.
    """

    note: str = ""
    logits: Any = None
    rounding: float = 0.0
    steady: bool = True


@jax.jit
def _look(model, x):
    def rows(model, x):
        return logits_of(model(x))

    return mesh.by_rows(rows, model, x)


def check(opened: Opened, x: Float[Array | np.ndarray, "B ..."], bounds: tuple[float, float] | None) -> Seen:
    """UserError where the logits on these images [B, ...] cannot be attacked or trusted.

    Warns about a model that may be unsteady and is.
    """
    count = len(x)
    if not count or opened.classes is None:
        return Seen()
    first, others = _compositions(x, bounds)
    logits = _pass(opened, first, count)
    own = logits[: min(count, _ROWS)]
    problem, text = diagnose(own)
    if problem:
        raise UserError(text)
    _check_own_jit(opened, first, logits)
    text = _unsteady(opened, first, others, logits)
    if text:
        _refuse(text, opened.steady)
    seen = Seen(text, own, opened.rounding, opened.steady)
    for size in sizes(count)[1:]:
        if not seen.note:
            batch = np.concatenate([first, first])[:size]
            seen = seen._replace(note=check_size(seen, _pass(opened, batch, count), size))
    return seen


def sizes(count: int) -> tuple[int, ...]:
    """How many images the passes have, where there are so many: eight, sixteen, and half of few."""
    half = max(1, count // 2)
    return (_ROWS, 2 * _ROWS) + ((half,) if half < _ROWS else ())


def check_size(seen: Seen, logits: Float[Array | np.ndarray, "B Y"], rows: int) -> str:
    """UserError where logits [B, Y] of batches of another size, `rows`, are other ones for the first images.

    So what branches on the size is noticed. The gate looks at two sizes; the attack has its own, in the
    program that it runs in any case. Returns what is wrong with a model that may be unsteady.
    """
    if seen.logits is None or seen.note:
        return ""
    count = min(len(logits), len(seen.logits))
    found, expected = np.asarray(logits[:count]), seen.logits[:count]
    if not _differ(found, expected, _wider(seen.rounding), _OTHER_SIZE):
        return ""
    text = (
        f"logits_fn gives the same images other logits in a batch of another size: {rows} instead of "
        f"{_ROWS} ({_size(found, expected)}); let it treat every image alike, whatever the batch"
    )
    _refuse(text, seen.steady)
    return text


def _pass(opened, batch, count):
    """Logits of a batch [b, ...]; UserError where the model takes the `count` images only."""
    try:
        logits = np.asarray(_look(opened.model, batch))
        if logits.shape != (len(batch), opened.classes):
            raise ValueError(f"its outputs are of shape {logits.shape}")
        return logits
    except (TypeError, ValueError) as error:
        if "incompatible devices" in str(error):
            raise UserError(
                f"logits_fn's arrays lie on different devices ({first_line(error, 200)}); put all of them on "
                f"the same: jax.device_put(arrays, sharding)"
            ) from error
        raise UserError(
            f"logits_fn takes the {count} images of the batch, not {len(batch)} of them "
            f"({first_line(error)}); let it treat every image alike, whatever the batch"
        ) from error


def _refuse(text, steady):
    if steady:
        raise UserError(f"{text}; if it is meant: attacks.wrap(logits_fn, steady=False)")
    warn_caller(f"{text}: every number depends on it", UnsteadyWarning)


def _unsteady(opened, first, others, logits) -> str:
    remedy = IN_EVALUATION[opened.kind]
    if opened.fickle:
        return (
            "logits_fn is another function each time it is traced (NumPy's random numbers, a counter, a "
            "clock?); let it depend on its images and on arrays only"
        )
    again = np.asarray(_look(opened.model, first))
    if _differ(again, logits, opened.rounding):
        return (
            f"logits_fn gives other logits for the same images a second time ({_size(again, logits)}), as "
            f"with dropout or noise; {remedy}"
        )
    for batch, own, places in others:
        mixed = np.asarray(_look(opened.model, batch))[places]
        if _differ(mixed, logits[own], opened.rounding):
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
    if _differ(plain, logits, _wider(opened.rounding), _COMPILED):
        raise UserError(
            f"logits_fn has a jax.jit inside that holds arrays, and answers with old ones "
            f"({_size(plain, logits)}); pass them to that jit as arguments, or call "
            f"jax.clear_caches() after a change"
        )


def _wider(rounding: float) -> float:
    """That of a model whose products of float32s may go through a narrower type."""
    return max(rounding, _PRODUCTS.get(jax.default_backend(), max(_PRODUCTS.values())))


# Scores so far below the best one, in nats, decide nothing.
_RULED_OUT = 100.0


def _differ(a, b, rounding: float, times: float = 1.0) -> bool:
    """Whether logits [B, Y] differ by more than rounding; `rounding`: a unit in the layers' last place."""
    unit = _UNITS * max(rounding, float(jnp.finfo(b.dtype).eps))
    of_spread = min(times * max(_OF_SPREAD, unit), _MOST_OF_SPREAD)
    of_size = min(times * max(_OF_SIZE, unit), _MOST_OF_SIZE)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    # a class that is ruled out, at -1e9 say, would excuse any difference of the others
    best = np.sort(b, axis=1)[:, -2:]
    lowest = best[:, -1:] - max(_RULED_OUT, 10 * float(np.ptp(best, axis=1).max()))
    a, b = np.maximum(a, lowest), np.maximum(b, lowest)
    limit = of_spread * float(np.ptp(b, axis=1).max()) + of_size * float(np.abs(b).max())
    # a NaN on one side only is a difference
    return not np.all(np.abs(a - b) <= limit)


def _size(a, b) -> str:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return f"by {np.abs(a - b).max():.2g}, of {np.ptp(b, axis=1).max():.2g} between classes"
