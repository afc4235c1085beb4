"""The cluster head that is trained with the network: its parameters, what it starts from, who belongs where.

The head is that of every cluster method, log scores of `Clusters`. What is learned of it lies among the
parameters of the network, in units of the head that it starts from (mu0 and sigma0^2, which are held):

    mu = mu0 + sigma0 nu,    sigma^2 = sigma0^2 exp(t)

nu [Y, K, E] and t [] start at 0. So one rate suits every network, whatever the length of its features, and
weight decay pulls the centroids back to where they started.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clustr_jax.clusters import Clusters
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import TermSettings

# Among the parameters: where nu and t are.
HEAD = "cluster_head"
_OFFSETS, _LOG_SCALE = "offsets", "log_scale"


def parameters(train: TermSettings, num_classes: int, k: int, size: int) -> dict[str, Array]:
    """What is learned of a head of centroids [Y, K, E], at its start: zeros; {} where all of it is held."""
    found = {}
    if train.centroids == "learned":
        found[_OFFSETS] = jnp.zeros((num_classes, k, size))
    if train.learn_variance:
        found[_LOG_SCALE] = jnp.zeros(())
    return found


def split(params: dict, start: Clusters | None) -> tuple[dict, Clusters | None]:
    """(the parameters of the network alone, the head as it is now).

    Without a learned head what was given, and no head where there is no start yet (`refit.first_head`).
    """
    if HEAD not in params:
        return params, start
    own = {name: value for name, value in params.items() if name != HEAD}
    if start is None:
        return own, None
    learned, head = params[HEAD], start
    if _OFFSETS in learned:
        unit = jnp.sqrt(start.variance)
        head = head.replace(centroids=start.centroids + unit * learned[_OFFSETS])
    if _LOG_SCALE in learned:
        head = head.replace(variance=start.variance * jnp.exp(learned[_LOG_SCALE]))
    return own, head


def simplex(key: Array, num_classes: int, k: int, size: int) -> Float[Array, "Y K E"]:
    """Y K points of length 1 as far from each other as they can be: a regular simplex, turned at random.

    Their inner products are -1 / (Y K - 1), the largest smallest distance that so many points of a sphere
    can have (Pang et al. 2018, max-Mahalanobis centres). UserError where E < Y K - 1.
    """
    count = num_classes * k
    if size < count - 1 or count < 2:
        raise UserError(
            f"train.centroids=simplex places {count} centroids in at least {max(count - 1, 1)} dimensions, "
            f"the embedding has {size}; lower magnet.k, or set train.centroids=learned"
        )
    # an orthonormal basis of what is orthogonal to (1, ..., 1), then of a random subspace of the embedding
    centred = jnp.eye(count) - 1.0 / count
    basis = jnp.linalg.eigh(centred)[1][:, 1:]  # the first eigenvalue is 0, the others 1
    frame = jnp.linalg.qr(jax.random.normal(key, (size, count - 1)))[0]
    points = jnp.matmul(basis, frame.T, precision="highest") * jnp.sqrt(count / (count - 1.0))
    return points.reshape(num_classes, k, size)


def around(key: Array, z: Float[Array, "N E"], num_classes: int, k: int) -> Clusters:
    """The simplex around the mean of these embeddings, as far from it as they are in the root mean square.

    The variance is the square of that distance, their trace.
    """
    mean = jnp.mean(z, axis=0)
    square = jnp.mean(jnp.sum(jnp.square(z - mean[None]), axis=1))
    centroids = mean[None, None] + jnp.sqrt(square) * simplex(key, num_classes, k, z.shape[1])
    return Clusters(centroids, square, jnp.ones((num_classes, k), bool))


def assign(clusters: Clusters, z: Float[Array, "N E"], y: Int[Array, "N"]) -> Int[Array, "N"]:
    """class * K + the nearest centroid of its own class, of each example."""
    squared = jnp.sum(jnp.square(z[:, None, :] - clusters.centroids[y]), axis=-1)
    squared = jnp.where(clusters.valid[y], squared, jnp.inf)
    return y * clusters.centroids.shape[1] + jnp.argmin(squared, axis=1).astype(jnp.int32)
