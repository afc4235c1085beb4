"""What attacks maximise: losses (outputs, y, target) -> [B]; and what counts as misclassified.

Attacks work on a *model*, a function of images that returns logits [B, Y] or a `View` of a classifier
with clusters. `untargeted` turns a loss (logits, y) into a function (outputs, y, target), and `one` or
`among` make of it the `AttackLoss` that an attack takes. The functions are compared by identity, so they
are module-level or cached: a fresh lambda would compile again.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from clustr_jax import losses
from clustr_jax.runtime import struct
from clustr_jax.runtime.errors import UserError, first_line

# What JAX says of a function without a derivative (a callback, a while_loop, integers).
_WITHOUT = re.compile("differentiat|JVP|transpose rule", re.IGNORECASE)


@contextlib.contextmanager
def differentiated():
    """A block that takes a gradient: UserError where the model has none."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        if isinstance(error, UserError) or not _WITHOUT.search(str(error)):
            raise
        raise UserError(
            f"logits_fn or the loss has no gradient by the image ({first_line(error, 160)}); mend that, give "
            f"it a jax.custom_vjp, or take attacks.square, which needs none"
        ) from error


class AttackLoss(struct.PyTreeNode):
    """One of several losses (outputs, y, target) -> [B], chosen at run time: one program for all."""

    which: ArrayLike
    options: tuple[Callable, ...] = struct.field(pytree_node=False)

    def __call__(self, outputs: "Outputs", y: Array, target: Array | None) -> Float[Array, "B"]:
        """The chosen one's value."""
        if len(self.options) == 1:
            return self.options[0](outputs, y, target)
        return jax.lax.switch(self.which, self.options, outputs, y, target)


class View(struct.PyTreeNode):
    """A classifier's outputs: log-domain logits, what the deployed rule compares, and each cluster's score.

    `exponents` are -|f - mu|^2 / 2 sigma^2, -inf where a class has fewer clusters; None for a linear head.
    """

    logits: Float[Array, "B Y"]
    deployed: Float[Array, "B Y"]
    exponents: Float[Array, "B Y K"] | None = None


# What a model returns.
Outputs = Array | View


def logits_of(outputs: Outputs) -> Float[Array, "B Y"]:
    """The logits of a model's outputs."""
    return outputs.logits if isinstance(outputs, View) else outputs


def misclassified(outputs: Outputs, y: Int[Array, "B"]) -> Bool[Array, "B"]:
    """Where the logits, or the deployed rule, prefer another class than y (ties go to the first class)."""
    wrong = jnp.argmax(logits_of(outputs), axis=1) != y
    if isinstance(outputs, View):
        wrong |= jnp.argmax(outputs.deployed, axis=1) != y
    return wrong


@dataclasses.dataclass(frozen=True)
class Untargeted:
    """`loss_fn(logits, y)` as a function (outputs, y, target)."""

    loss_fn: Callable

    def __call__(self, outputs: Outputs, y: Array, target: Array | None) -> Float[Array, "B"]:
        """The loss of each example."""
        return self.loss_fn(logits_of(outputs), y)


def untargeted(loss_fn: Callable) -> Untargeted:
    """`loss_fn(logits, y)` as a function (outputs, y, target)."""
    return Untargeted(loss_fn)


def _at(values, index):
    return jnp.take_along_axis(values, index[:, None], axis=1)[:, 0]


def margin_targeted(outputs: Outputs, y: Int[Array, "B"], target: Int[Array, "B"]) -> Float[Array, "B"]:
    """z_t - z_y."""
    logits = _in_float32(outputs)
    return _at(logits, target) - _at(logits, y)


def dlr_targeted(outputs: Outputs, y: Int[Array, "B"], target: Int[Array, "B"]) -> Float[Array, "B"]:
    """(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2): Croce & Hein 2020, eq. 7; below 4 classes the margin."""
    logits = _in_float32(outputs)
    difference = margin_targeted(logits, y, target)
    if logits.shape[1] < 4:
        return difference
    top = jax.lax.top_k(logits, 4)[0]
    return difference / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def label_odds(outputs: Outputs, y: Int[Array, "B"], target: Int[Array, "B"] | None) -> Float[Array, "B"]:
    """log (1 - p_y) / p_y, p = softmax(logits): up as p_y falls.

    The gradient has the direction of cross entropy's, which is 0 in float32 where p_y rounds to 1.
    """
    logits = _in_float32(outputs)
    return jax.nn.logsumexp(_without(logits, y), axis=1) - _at(logits, y)


def rival_odds(outputs: Outputs, y: Int[Array, "B"], target: Int[Array, "B"] | None) -> Float[Array, "B"]:
    """log p_c / (1 - p_c) of the likeliest class c other than y: up with p_c."""
    logits = _in_float32(outputs)
    rival = jnp.argmax(_without(logits, y), axis=1)
    return _at(logits, rival) - jax.nn.logsumexp(_without(logits, rival), axis=1)


def _in_float32(outputs):
    """The logits, not rounded to float16 or bfloat16 in what is computed of them."""
    logits = logits_of(outputs)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _without(logits, index):
    """The logits with that class at -inf."""
    return jnp.where(jnp.arange(logits.shape[1])[None, :] == index[:, None], -jnp.inf, logits)


# Cluster heads. A target is a cluster, numbered class * K + j.


def _clustered(view: View) -> Float[Array, "B Y K"]:
    if view.exponents is None:
        raise ValueError("this loss looks at clusters, and the model has a linear head")
    return view.exponents


def _own(view: View, y):
    """Scores [B, K] of the label's clusters."""
    return jnp.take_along_axis(_clustered(view), y[:, None, None], axis=1)[:, 0]


def _cluster(view: View, target):
    exponents = _clustered(view)
    return _at(exponents.reshape(exponents.shape[0], -1), target)


def centroid(view: View, y: Int[Array, "B"], target: Int[Array, "B"]) -> Float[Array, "B"]:
    """u_t - max_j u_yj: towards cluster t, from the nearest own one. |f|^2 cancels: linear in f."""
    return _cluster(view, target) - jnp.max(_own(view, y), axis=1)


def feature(view: View, y: Int[Array, "B"], target: Int[Array, "B"]) -> Float[Array, "B"]:
    """-|f - mu_t|^2 / 2 sigma^2: the distance to cluster t in feature space alone."""
    return _cluster(view, target)


def magnet(view: View, y: Int[Array, "B"], target: Int[Array, "B"] | None) -> Float[Array, "B"]:
    """The Magnet loss (Eq. 3) about the fixed centroids, without its hinge and its margin alpha."""
    exponents = _clustered(view)
    others = jnp.arange(exponents.shape[1])[None, :] != y[:, None]
    attraction = jnp.where(others[:, :, None], exponents, -jnp.inf)
    repulsion = jax.nn.logsumexp(attraction.reshape(attraction.shape[0], -1), axis=1)
    return repulsion - jnp.max(_own(view, y), axis=1)


@functools.cache
def magnet_hinged(alpha: float) -> Callable:
    """The paper's adaptive attack, literally: {alpha + magnet}_+, flat where the margin exceeds alpha."""

    def loss(view, y, target):
        return jax.nn.relu(alpha + magnet(view, y, target))

    return loss


def away(view: View, y: Int[Array, "B"], target: Int[Array, "B"] | None) -> Float[Array, "B"]:
    """|f - mu_y|^2 / 2 sigma^2 of the nearest own cluster: what cross entropy on exp scores climbs."""
    return -jnp.max(_own(view, y), axis=1)


cross_entropy = untargeted(losses.cross_entropy)
margin = untargeted(losses.margin)
dlr = untargeted(losses.dlr)
probability_margin = untargeted(losses.probability_margin)

# What the sound protocols choose from; the last four look at clusters.
LINEAR = (cross_entropy, margin, dlr_targeted)
CLUSTERED = (*LINEAR, centroid, feature, magnet, away)


def one(loss: Callable) -> AttackLoss:
    """`loss` alone, as an attack takes it."""
    return AttackLoss(np.int32(0), (loss,))


def among(loss: Callable, options: tuple[Callable, ...]) -> AttackLoss:
    """`loss`, which is one of `options`: attacks that differ in it alone share a compilation."""
    return AttackLoss(np.int32(options.index(loss)), options)
