"""What is said of an attack that attacks nothing: a radius, a step or steps of 0, a model without a gradient.

Every image survives it, and what it leaves is taken for robustness. Attacks carry one bool an image along:
whether its gradient was exactly 0 at every step. It is judged here over all images that an attack looked at.
Black boxes have no gradient, and nothing to say.
"""

from typing import Any

import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from clustr_jax.runtime.errors import warn_caller

# From this share of the images on it is said. A softmax that saturates on a few of them is no news.
_MOST = 0.5


class UnattackedWarning(UserWarning):
    """Nothing was or could be attacked: what the attack leaves says nothing of robustness."""


def still_blind(blind: Bool[Array, "B"], gradient: Float[Array, "B ..."]):
    """[B] whether this gradient is exactly 0 as well; a NaN is not."""
    return blind & jnp.all(gradient == 0, axis=tuple(range(1, gradient.ndim)))


# Half of what float32 tells apart near 1: a smaller step changes no such pixel.
_UNSEEN = 2.0**-25


def of_settings(*, start: str = "zero", **settings: Any) -> str:
    """The sentence on the first setting that is 0, or that float32 cannot add to a pixel; "" where none is.

    Traced ones are not looked at.
    """
    for name, value in settings.items():
        if isinstance(value, jax.core.Tracer) or float(value) >= _UNSEEN:
            continue
        points = "" if name == "eps" or start == "zero" else " but random starts"
        little = f"{name}={float(value):g}" + (", which float32 cannot add to a pixel of 1" if value else "")
        return f"{little}: nothing{points} is tried, and what is left says nothing of robustness"
    return ""


def warn_of_settings(**settings: Any) -> None:
    """UnattackedWarning with that sentence."""
    warn(of_settings(**settings))


def told(blind: Bool[np.ndarray, "A"], who: str = "") -> str:
    """The sentence on the images [A] that an attack looked at, "" where it could. `who`: "apgd-ce: ".

    `blind`: the gradient was exactly 0 at every step of every restart.
    """
    count = int(np.sum(blind))
    if not count or count < _MOST * len(blind):
        return ""
    return (
        f"{who}nothing could be attacked on {count} of {len(blind)} images: the gradient of the loss by the "
        f"image was exactly 0 at every step (rounding, an argmax, a saturated softmax, half precision?). "
        f"Their survival says nothing; losses.margin does not saturate, attacks.square needs no gradient"
    )


def warn(text: str) -> None:
    """UnattackedWarning, if there is anything to say."""
    if text:
        warn_caller(text, UnattackedWarning)
