"""What lies between the centroids: the cluster term of IKL, and the centroid that an adversary goes for.

Both look at the scores of single clusters, [B, Y, K], before those of a class are added up. A linear head's
logits are the scores of one cluster per class (docs/lab-notes.md, "A linear head is one centroid per class").
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clustr_jax import losses
from clustr_jax.clusters import Clusters
from clustr_jax.models import Outputs
from clustr_jax.runtime import mesh

# A squared distance below this is none: two clusters whose scores have the same gradient.
_SAME = 1e-24


def scores(outputs: Outputs, clusters: Clusters | None) -> Float[Array, "B Y K"]:
    """Each cluster's -|z - mu|^2 / 2 sigma^2, -inf where there is none; or the logits as clusters of one."""
    return outputs.logits[..., None] if clusters is None else clusters.exponents(outputs.embeddings)


def class_means(values: Float[Array, "B C"], y: Int[Array, "B"], mask: Bool[Array, "B"], num_classes: int):
    """The mean of each example's class over the whole batch [B, C]."""
    member = jax.nn.one_hot(y, num_classes, dtype=values.dtype) * mask[:, None]
    extended = jnp.concatenate([values, jnp.ones((values.shape[0], 1), values.dtype)], axis=1)
    sums = mesh.total(jnp.matmul(member.T, extended, precision="highest"))
    return (sums[:, :-1] / jnp.maximum(sums[:, -1:], 1.0))[y]


def consistency(
    clean: Float[Array, "B Y K"],
    adversarial: Float[Array, "B Y K"],
    y: Int[Array, "B"],
    mask: Bool[Array, "B"],
    temperature: float,
) -> Float[Array, "B"]:
    """1/4 sum_jk w_j w_k (D_jk(x) - D_jk(x_adv))^2, D_jk = s_j - s_k (Cui et al. 2024, IKL) [B].

    w are the mean probabilities, at this temperature, of the clean images of the example's class in the
    batch; no gradient flows through them, and it flows through both D. With one cluster per class D_jk(x) -
    D_jk(x_adv) is (mu_j - mu_k).(f - f') / sigma^2: the shift of the features, measured between centroids.
    As sum w = 1, the double sum is twice the variance under w of s(x) - s(x_adv).
    """
    size, num_classes, k = clean.shape
    exists = jnp.isfinite(clean)
    shift = jnp.where(exists, jnp.where(exists, clean, 0.0) - jnp.where(exists, adversarial, 0.0), 0.0)
    shift = shift.reshape(size, -1)
    probs = jax.nn.softmax(jax.lax.stop_gradient(clean).reshape(size, -1) / temperature)
    weights = class_means(probs, y, mask, num_classes)
    centre = jnp.sum(weights * shift, axis=1, keepdims=True)
    return 0.5 * jnp.sum(weights * jnp.square(shift - centre), axis=1)


def against_rival(
    outputs: Outputs, head: Clusters | Float[Array, "E Y"], y: Int[Array, "B"]
) -> Float[Array, "B 2"]:
    """(score of the label, score of the cluster of another class that is nearest to winning) [B, 2].

    MALT (Melamed et al. 2024) ranks classes by (z_y - z_c) / |grad_x (z_y - z_c)|, a gradient pass for each.
    This is its cheap form: the gradient by the embedding, which is (sum_l r_l mu_yl - mu_j) / sigma^2 with r
    the shares of the own clusters in the label's score, and costs no pass. `head` is the linear head's kernel
    or the clusters.
    """
    if isinstance(head, Clusters):
        each = head.exponents(outputs.embeddings)
        own = jnp.take_along_axis(each, y[:, None, None], axis=1)[:, 0]  # [B, K]
        label = jax.nn.logsumexp(own, axis=1)
        centroids = jnp.where(head.valid[..., None], head.centroids, 0.0)
        slope = jnp.einsum("bk,bke->be", jax.nn.softmax(own), centroids[y], precision="highest")
        apart = jnp.sum(jnp.square(slope[:, None, None, :] - centroids[None]), axis=-1) / head.variance**2
    else:
        each = outputs.logits[..., None]
        label = jnp.take_along_axis(outputs.logits, y[:, None], axis=1)[:, 0]
        apart = jnp.square(losses.distances(head.T, head.T))[y][..., None]
    size, num_classes, k = each.shape
    other = (jnp.arange(num_classes)[None, :] != y[:, None])[..., None] & jnp.isfinite(each)
    length = jnp.sqrt(jnp.maximum(apart, _SAME))
    margin = label[:, None, None] - jnp.where(other, each, 0.0)
    # an image that is misclassified by some goes for the one that it is deepest in
    distance = jnp.where(other, margin / length, jnp.inf).reshape(size, -1)
    rival = jax.lax.stop_gradient(jnp.argmin(distance, axis=1))
    flat = jnp.where(jnp.isfinite(each), each, 0.0).reshape(size, -1)
    return jnp.stack([label, jnp.take_along_axis(flat, rival[:, None], axis=1)[:, 0]], axis=1)
