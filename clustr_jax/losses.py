"""Losses: arrays in, one value per example out.

Shape legend: B batch, Y classes, M x S Magnet batch (M clusters of S samples), E embedding. All of them work
on logits in the log domain; none of them knows a network. float16 and bfloat16 are computed in float32. All
raise UserError for shapes that do not fit and labels of another type. Outside jit they also do so for labels
that are no classes and values that are not finite (a logit may be -inf: a class ruled out).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from clustr_jax.runtime import arrays
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.promotion import promoting

# Below this share of the means' squared length a variance is a rounding artefact: all embeddings coincide.
_MIN_VARIANCE = 1e-12


def least_variance(means: Float[Array, "... E"]) -> Float[Array, ""]:
    """What a variance is at least, so that losses stay finite where all embeddings coincide.

    Of embeddings shorter than 1 it goes with their length: Eq. 3 and Eq. 4 do not depend on the unit.

    Args:
        means: of clusters, or centroids [..., E].

    >>> long, short = jnp.array([[3.0], [0.0]]), jnp.array([[0.5], [0.0]])
    >>> print(losses.least_variance(long), losses.least_variance(short))
    1e-12 2.5e-13
    """
    longest = jnp.max(jnp.sum(jnp.square(jax.lax.stop_gradient(means)), axis=-1), initial=0.0)
    return jnp.maximum(_MIN_VARIANCE * jnp.minimum(longest, 1.0), np.finfo(np.float32).tiny)


def cross_entropy(logits: Float[Array, "B Y"], y: Int[Array, "B"] | Float[Array, "B Y"]) -> Float[Array, "B"]:
    """Cross entropy in nats.

    Args:
        logits: [B, Y].
        y: labels [B], or target probabilities [B, Y].

    Returns:
        the loss of each example [B].

    >>> z = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])  # [B=2, Y=3]
    >>> print(losses.cross_entropy(z, jnp.array([0, 1])))  # one value per example
    [0.24  1.099]
    >>> print(losses.cross_entropy(z, jnp.full((2, 3), 1 / 3)))  # the same with soft targets
    [1.573 1.099]
    """
    logits, sizes = _logits(logits, infinite=True)
    y = arrays.as_array(y, "y")
    if y.ndim != 2 or (y.shape[1] == 1 and sizes["Y"] > 1):
        y = _labels(y, sizes)
    else:
        y = arrays.probabilities(y, "y", "B Y", sizes)
    log_probs = jax.nn.log_softmax(logits)
    if y.ndim == 1:
        return -jnp.take_along_axis(log_probs, y[:, None], axis=1)[:, 0]
    return -jnp.sum(jnp.where(y > 0, y * log_probs, 0.0), axis=1)


def smoothed_cross_entropy(
    logits: Float[Array, "B Y"], y: Int[Array, "B"], smoothing: float
) -> Float[Array, "B"]:
    """Cross entropy to labels of which a share is spread evenly over all classes (Szegedy et al. 2016).

    (1 - smoothing) times the cross entropy to the label, plus smoothing times the mean over the classes.

    Args:
        logits: [B, Y].
        y: labels [B].
        smoothing: the share, in [0, 1].

    Returns:
        the loss of each example [B], in nats.

    >>> z = jnp.array([[2.0, 0.0, 0.0]])
    >>> print(losses.smoothed_cross_entropy(z, jnp.array([0]), 0.3))  # 0.7 x 0.24 + 0.3 x 1.573
    [0.64]
    """
    arrays.number(smoothing, "smoothing", "a share in [0, 1]", lambda v: 0 <= v <= 1)
    if isinstance(smoothing, (int, float)) and not smoothing:  # of a logit of -inf the mean is infinite
        return cross_entropy(logits, y)
    even = -jnp.mean(jax.nn.log_softmax(logits), axis=1)
    return (1 - smoothing) * cross_entropy(logits, y) + smoothing * even


def kl(logits: Float[Array, "B Y"], probs: Float[Array, "B Y"]) -> Float[Array, "B"]:
    """KL(probs || softmax(logits)) in nats, with 0 log 0 = 0.

    Args:
        logits: [B, Y].
        probs: [B, Y].

    Returns:
        the divergence of each example [B].

    >>> z = jnp.log(jnp.array([[0.25, 0.75]]))  # log probabilities are logits as well
    >>> print(losses.kl(z, jnp.array([[0.5, 0.5]])))
    [0.144]
    """
    probs = arrays.probabilities(probs, "probs", "B Y", _logits(logits, infinite=True)[1])
    return cross_entropy(logits, probs) + negative_entropy(probs)


def negative_entropy(probs: Float[Array, "B Y"]) -> Float[Array, "B"]:
    """sum_c p_c log p_c in nats, with 0 log 0 = 0 and gradient 0 there.

    Args:
        probs: [B, Y].

    Returns:
        of each example [B].

    >>> print(losses.negative_entropy(jnp.array([[0.5, 0.5], [1.0, 0.0]])))
    [-0.693  0.   ]
    """
    probs = arrays.probabilities(probs, "probs", "B Y", {})
    positive = probs > 0
    # the logarithm of an underflowed probability would put a NaN into the gradient
    return jnp.sum(jnp.where(positive, probs * jnp.log(jnp.where(positive, probs, 1.0)), 0.0), axis=1)


def margin(logits: Float[Array, "B Y"], y: Int[Array, "B"]) -> Float[Array, "B"]:
    """max_{c != y} z_c - z_y: positive where the example is misclassified, but for ties (CW loss).

    For a nearest-centroid head its gradient has no factor that vanishes for confident examples, which cross
    entropy has (docs/fidelity.md, "why the paper's attack is blind").

    Args:
        logits: [B, Y].
        y: labels [B].

    Returns:
        the margin of each example [B].

    >>> z = jnp.array([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    >>> print(losses.margin(z, jnp.array([0, 0])))  # the first is right by 1, the second wrong by 3
    [-1.  3.]
    """
    logits, sizes = _logits(logits, classes=2, infinite=True)
    y = _labels(y, sizes)
    own = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
    return jnp.max(_without(logits, y), axis=1) - own


def dlr(logits: Float[Array, "B Y"], y: Int[Array, "B"]) -> Float[Array, "B"]:
    """Difference of logits ratio (Croce & Hein 2020, eq. 6): a margin without a scale.

    Args:
        logits: [B, Y], of three classes or more.
        y: labels [B].

    Returns:
        of each example [B].

    >>> z = jnp.array([[4.0, 3.0, 0.0]])
    >>> print(losses.dlr(z, jnp.array([0])), losses.dlr(100 * z, jnp.array([0])))  # no scale
    [-0.25] [-0.25]
    """
    logits, sizes = _logits(logits, classes=3)
    y = _labels(y, sizes)
    top = jax.lax.top_k(logits, 3)[0]
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def probability_margin(logits: Float[Array, "B Y"], y: Int[Array, "B"]) -> Float[Array, "B"]:
    """2 artanh(p_c - p_y), p = softmax(logits), c the likeliest other class: the margin of probabilities.

    What the probability margin attack (Xie et al. 2025) climbs: positive where `margin` is, and with the
    direction of the gradient of p_c - p_y. That difference itself is -1 in float32, with gradient 0, beyond a
    logit margin of 17. This is log(1 + p_c - p_y) - log(1 - p_c + p_y), each a logsumexp in which nothing
    cancels. Of two classes it is `margin`; dividing p_c - p_y by p_c + p_y would make it so for all.

    Args:
        logits: [B, Y].
        y: labels [B].

    Returns:
        of each example [B].

    >>> z = jnp.array([[2.0, 0.0, 1.0], [300.0, 0.0, 0.0]])
    >>> print(losses.probability_margin(z, jnp.array([0, 0])))
    [  -0.897 -299.595]
    """
    logits, sizes = _logits(logits, classes=2, infinite=True)
    y = _labels(y, sizes)
    possible = jnp.any(_without(logits, y) > -jnp.inf, axis=1)  # another class than y
    logits = jnp.where(possible[:, None], logits, 0.0)
    rival = jnp.argmax(_without(logits, y), axis=1)

    def one_plus(winner, loser):
        """log((1 + p_winner - p_loser) / 2), but for a term that both sides have."""
        twice = jnp.arange(logits.shape[1])[None, :] == winner[:, None]
        return jax.nn.logsumexp(_without(logits, loser) + jnp.where(twice, math.log(2.0), 0.0), axis=1)

    return jnp.where(possible, one_plus(rival, y) - one_plus(y, rival), -jnp.inf)


def _logits(logits, *, classes: int = 1, infinite: bool = False):
    """(the logits with the type that is computed with, sizes of their axes), or UserError."""
    sizes: dict[str, int] = {}
    logits = arrays.floats(logits, "logits", "B Y", sizes, infinite=infinite, empty=True)
    if sizes["Y"] < classes:
        more = "; use losses.margin" if classes > 2 else ", for it compares them"
        raise UserError(f"this loss needs at least {classes} classes, got logits of {sizes['Y']}{more}")
    return logits, sizes


def _labels(y, sizes):
    return arrays.labels(y, sizes["Y"], sizes, top=", the classes of the logits")


def _without(logits, y):
    """The logits with the own class at -inf."""
    own = jnp.arange(logits.shape[1])[None, :] == y[:, None]
    return jnp.where(own, -jnp.inf, logits)


def distances(a: Float[Array, "N E"], b: Float[Array, "M E"]) -> Float[Array, "N M"]:
    """Euclidean distances of all pairs, with gradient 0 instead of NaN where two points coincide.

    Args:
        a: [N, E].
        b: [M, E].

    Returns:
        [N, M].

    >>> print(losses.distances(jnp.zeros((1, 2)), jnp.array([[3.0, 4.0], [0.0, 0.0]])))
    [[5. 0.]]
    """
    sizes: dict[str, int] = {}
    a = arrays.floats(a, "a", "N E", sizes, empty=True, squares="between them")
    b = arrays.floats(b, "b", "M E", sizes, empty=True, squares="between them")
    squared = jnp.sum(jnp.square(a[:, None, :] - b[None, :, :]), axis=-1)
    apart = squared > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)


@promoting
def magnet_loss(
    z: Float[Array, "M S E"],
    classes: Int[Array, "M"],
    *,
    alpha: float = 12.5,
    mask: Bool[Array, "M S"] | None = None,
    eps: float = 0.0,
    surplus: int = 0,
    radius: float = 0.0,
    sharpness: float = 1.0,
) -> tuple[Float[Array, "M S"], Float[Array, ""]]:
    """Magnet loss (paper Eq. 3) of a batch of M clusters x S samples, in the log domain.

    Means and variance are those of the batch (Rippel et al. 2016), and gradients flow through both:

        loss = relu(alpha + d_own^2 / 2 sigma^2 + log sum_{clusters of other classes} exp(-d^2 / 2 sigma^2))
        sigma^2 = sum d_own^2 / (count - 1), the trace of the within-cluster covariance

    Without a cluster of another class the loss is 0.

    Args:
        z: embeddings [M, S, E].
        classes: of the clusters [M].
        alpha: the margin, in nats.
        mask: [M, S]; entries where it is False have loss 0 and take no part in means and variance, and a row
            without members takes none at all.
        eps: above 0 the authors' form relu(-log(numerator / (denominator + eps) + eps)), whose gradient dies
            for hard examples (docs/fidelity.md, hinge).
        surplus: adds so many terms exp(0) to the sum; what the authors log has both.
        radius: (of the features, l2) adds radius |mu - mu_own| / sigma^2 to each exponent: a bound of the
            loss over all shifts of z within it, means and variance held (docs/certificates.md).
        sharpness: divides the variance of the loss. sigma^2 is a trace over E dimensions, so that the
            features of a 1-Lipschitz network would hardly tell clusters apart at 1.

    Returns:
        the loss of each example [M, S], and sigma^2 [].

    Two clusters of two samples with one feature: what is 12.5 nats nearer to its own mean costs nothing.

    >>> z = jnp.array([[[0.0], [2.0]], [[5.0], [7.0]]])  # [M=2, S=2, E=1], means 1 and 6
    >>> loss, variance = losses.magnet_loss(z, jnp.array([0, 1]))
    >>> print(loss, f"{variance:.3f}")
    [[0.    6.875]
     [6.875 0.   ]] 1.333
    >>> print(losses.magnet_loss(z, jnp.array([3, 3]))[0].max())  # of one class: nothing to keep away from
    0.0
    """
    sizes: dict[str, int] = {}
    z = arrays.floats(z, "z", "M S E", sizes)
    num_rows, num_samples, size = z.shape
    classes = arrays.labels(classes, None, sizes, "classes", axis="M")
    given = jnp.ones((num_rows, num_samples), bool) if mask is None else mask
    given = arrays.mask(given, "mask", "M S", sizes, some="example")
    loss, variance = magnet_loss_of_rows(
        z.reshape(-1, size),
        jnp.arange(num_rows * num_samples) // num_samples,
        classes,
        given.reshape(-1),
        alpha=alpha,
        eps=eps,
        surplus=surplus,
        radius=radius,
        sharpness=sharpness,
    )
    return loss.reshape(num_rows, num_samples), variance


@promoting
def magnet_loss_of_rows(
    z: Float[Array, "B E"],
    row: Int[Array, "B"],
    classes: Int[Array, "M"],
    mask: Bool[Array, "B"],
    *,
    alpha: float,
    eps: float = 0.0,
    surplus: int = 0,
    radius: float = 0.0,
    sharpness: float = 1.0,
    total: Callable = lambda x: x,
) -> tuple[Float[Array, "B"], Float[Array, ""]]:
    """`magnet_loss` of examples in any order, or of a part of the batch.

    Args:
        z: embeddings [B, E].
        row: which of the M clusters each belongs to [B].
        classes: of the clusters [M].
        mask: [B].
        alpha, eps, surplus, radius, sharpness: as in `magnet_loss`.
        total: adds up over all parts of the batch: means and variance are then those of the whole, for the
            price of M (E + 1) + 1 numbers.

    Returns:
        the loss of each example [B], and sigma^2 [].

    >>> z, row = jnp.array([[5.0], [0.0], [7.0], [2.0]]), jnp.array([1, 0, 1, 0])  # [B=4, E=1]
    >>> loss, variance = losses.magnet_loss_of_rows(
    ...     z, row, jnp.array([0, 1]), jnp.ones(4, bool), alpha=12.5
    ... )
    >>> print(loss)
    [6.875 0.    0.    6.875]
    """
    sizes: dict[str, int] = {}
    z = arrays.floats(z, "z", "B E", sizes, squares="between them")
    classes = arrays.labels(classes, None, sizes, "classes", axis="M")
    row = arrays.labels(row, sizes["M"], sizes, "row", top=", the clusters of the batch")
    mask = arrays.mask(mask, "mask", "B", sizes, some="example")
    arrays.number(alpha, "alpha", "a finite number", math.isfinite)
    arrays.not_negative(eps, "eps")
    arrays.not_negative(radius, "radius")
    arrays.positive(sharpness, "sharpness")
    surplus = arrays.whole(surplus, "surplus", low=0)
    z = jnp.where(mask[:, None], z, 0.0)  # 0 times what stands there need not be 0
    member = jax.nn.one_hot(row, classes.shape[0], dtype=z.dtype) * mask[:, None]
    # sums and counts of the clusters together: one message between devices
    extended = jnp.concatenate([z, jnp.ones((z.shape[0], 1), z.dtype)], axis=1)
    sums = total(jnp.matmul(member.T, extended, precision="highest"))
    members = sums[:, -1]
    means = sums[:, :-1] / jnp.maximum(members, 1.0)[:, None]
    # Direct differences, never |z|^2 + |mu|^2 - 2 z.mu: the expanded square loses the digits that matter.
    squared = jnp.sum(jnp.square(z[:, None, :] - means[None, :, :]), axis=-1)
    own = jnp.take_along_axis(squared, row[:, None], axis=1)[:, 0]
    variance = total(jnp.sum(own * mask)) / jnp.maximum(jnp.sum(members) - 1.0, 1.0)
    variance = jnp.maximum(variance, least_variance(means))
    sigma2 = variance / sharpness
    other = (classes[:, None] != classes[None, :]) & (members > 0)[None, :]
    exponents = -squared / (2 * sigma2)
    if radius:
        exponents = exponents + (radius * distances(means, means) / sigma2)[row]
    exponents = jnp.where(other[row], exponents, -jnp.inf)
    has_other = jnp.any(other, axis=1)[row]
    # log sum exp over an empty set is -inf with a NaN gradient: give it something finite, then drop it.
    exponents = jnp.where(has_other[:, None], exponents, 0.0)
    attraction = own / (2 * sigma2)
    if eps:
        numerator = jnp.exp(-alpha - attraction)
        denominator = jnp.sum(jnp.exp(exponents), axis=-1)
        if surplus:
            denominator = denominator + surplus
        hinge = jax.nn.relu(-jnp.log(numerator / (denominator + eps) + eps))
    else:
        attracting = jax.nn.logsumexp(exponents, axis=-1)
        if surplus:
            attracting = jnp.logaddexp(attracting, math.log(surplus))
        hinge = jax.nn.relu(alpha + attraction + attracting)
    return jnp.where(mask & has_other, hinge, 0.0), variance
