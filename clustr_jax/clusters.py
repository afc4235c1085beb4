"""The cluster head: centroids per class, log scores (paper Eq. 4), and the fit that makes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from clustr_jax.kmeans import kmeans
from clustr_jax.losses import MIN_VARIANCE
from clustr_jax.runtime import mesh
from clustr_jax.runtime.errors import UserError


class Clusters(struct.PyTreeNode):
    """K centroids for each of Y classes and one variance; `mask` is False where a class has fewer.

    >>> centroids = jnp.array([[[0.0, 0.0], [4.0, 0.0]], [[0.0, 3.0], [4.0, 3.0]]])  # [Y=2, K=2, E=2]
    >>> c = Clusters(centroids, jnp.float32(1.0))
    >>> z = jnp.array([[0.0, 1.0]])  # [B=1, E=2]: nearest to the first cluster of class 0
    """

    centroids: Float[Array, "Y K E"]
    variance: Float[Array, ""]
    mask: Bool[Array, "Y K"] | None = None

    @property
    def valid(self) -> Bool[Array, "Y K"]:
        """`mask`, with None spelled out.

        >>> print(c.valid)
        [[ True  True]
         [ True  True]]
        """
        return jnp.ones(self.centroids.shape[:2], bool) if self.mask is None else self.mask

    def squared_distances(self, z: Float[Array, "B E"]) -> Float[Array, "B Y K"]:
        """|z - mu|^2 from differences (the expanded square would lose the digits an attack needs).

        >>> print(c.squared_distances(z))
        [[[ 1. 17.]
          [ 4. 20.]]]
        """
        return jnp.sum(jnp.square(z[:, None, None, :] - self.centroids[None]), axis=-1)

    def exponents(self, z: Float[Array, "B E"]) -> Float[Array, "B Y K"]:
        """-|z - mu|^2 / 2 sigma^2 of every cluster, -inf where `mask` is False.

        >>> print(c.exponents(z))
        [[[ -0.5  -8.5]
          [ -2.  -10. ]]]
        """
        exponents = -self.squared_distances(z) / (2 * self.variance)
        return jnp.where(self.valid[None], exponents, -jnp.inf)

    def log_scores(self, z: Float[Array, "B E"], nearest: int | None = None) -> Float[Array, "B Y"]:
        """z_c = logsumexp_j(-|z - mu_cj|^2 / 2 sigma^2): Eq. 4 before normalisation, in nats.

        `nearest` keeps only the D nearest clusters over all classes, as the paper's inference does on
        CIFAR-100; a class that owns none of them gets -inf. Without it every entry is finite.

        >>> print(c.log_scores(z))  # log domain: what attacks should see
        [[-0.5 -2. ]]
        >>> print(c.log_scores(z, nearest=1))  # class 1 owns none of the one nearest
        [[-0.5 -inf]]
        >>> far = jnp.array([[0.0, 40.0]])
        >>> print(c.log_scores(far).argmax(axis=1), c.scores(far).argmax(axis=1))  # exp underflows to a tie
        [1] [0]
        """
        squared = self.squared_distances(z)
        keep = jnp.broadcast_to(self.valid[None], squared.shape)
        if nearest is not None and nearest < self.centroids.shape[0] * self.centroids.shape[1]:
            if nearest < 1:
                raise UserError(f"nearest must be at least 1, got {nearest}")
            flat = jnp.where(keep, squared, jnp.inf).reshape(z.shape[0], -1)
            _, index = jax.lax.top_k(-flat, nearest)
            chosen = jnp.zeros(flat.shape, bool).at[jnp.arange(z.shape[0])[:, None], index].set(True)
            keep = keep & chosen.reshape(keep.shape)
        exponents = jnp.where(keep, -squared / (2 * self.variance), -jnp.inf)
        empty = ~jnp.any(keep, axis=-1)
        # logsumexp of an empty set has a NaN gradient: compute it on something finite and drop it.
        safe = jnp.where(empty[..., None], 0.0, exponents)
        return jnp.where(empty, -jnp.inf, jax.nn.logsumexp(safe, axis=-1))

    def scores(self, z: Float[Array, "B E"], nearest: int | None = None) -> Float[Array, "B Y"]:
        """exp(log_scores), the authors' "logits". They underflow and saturate: only for their protocol.

        >>> print(c.scores(z))
        [[0.607 0.135]]
        """
        return jnp.exp(self.log_scores(z, nearest))

    def probs(self, z: Float[Array, "B E"], nearest: int | None = None) -> Float[Array, "B Y"]:
        """Class probabilities p_c of Eq. 4.

        >>> print(c.probs(z))
        [[0.818 0.182]]
        """
        return jax.nn.softmax(self.log_scores(z, nearest))


def fit(
    key: Array,
    z: Float[Array, "N E"],
    y: Int[Array, "N"],
    *,
    num_classes: int,
    k: int | tuple[int, ...] = 2,
    n_init: int = 1,
    max_iter: int = 20,
) -> Clusters:
    """k-means++ of each class's embeddings -> Clusters.

    sigma^2 is the sum of the squared distances to the nearest own-class centroids, divided by N - 1
    (paper Eq. 3). Raises UserError where a class has fewer than k members; a class with fewer than k
    *distinct* embeddings gets fewer clusters (`mask`).

    >>> z = jnp.array([[0.0, 0.0], [0.0, 1.0], [5.0, 0.0], [5.0, 1.0]])  # [N=4, E=2]
    >>> c = clusters.fit(jax.random.key(0), z, jnp.array([0, 0, 1, 1]), num_classes=2, k=1)
    >>> print(c.centroids.tolist(), f"{c.variance:.3f}")  # [Y=2, K=1, E=2]; 4 x 0.25 / (4 - 1)
    [[[0.0, 0.5]], [[5.0, 0.5]]] 0.333
    """
    return fit_assign(key, z, y, num_classes=num_classes, k=k, n_init=n_init, max_iter=max_iter)[0]


def fit_assign(
    key: Array,
    z: Float[Array, "N E"],
    y: Int[Array, "N"],
    *,
    num_classes: int,
    k: int | tuple[int, ...] = 2,
    n_init: int = 1,
    max_iter: int = 20,
) -> tuple[Clusters, Int[Array, "N"]]:
    """As `fit`, with the cluster of each example: class * K + the nearest of its own class.

    >>> z = jnp.array([[0.0, 0.0], [5.0, 1.0], [0.0, 1.0], [5.0, 0.0]])
    >>> y = jnp.array([0, 1, 0, 1])
    >>> c, assignments = clusters.fit_assign(jax.random.key(0), z, y, num_classes=2, k=1)
    >>> print(assignments)
    [0 1 0 1]
    """
    per_class = (k,) * num_classes if isinstance(k, int) else tuple(k)
    if len(per_class) != num_classes or min(per_class) < 1:
        raise UserError(f"k must be a positive int or one per class ({num_classes}), got {k}")
    labels = np.asarray(y)
    counts = np.bincount(labels, minlength=num_classes)
    if len(counts) > num_classes:
        raise UserError(f"labels must lie in 0..{num_classes - 1}, got {labels.max()}")
    for c, (count, wanted) in enumerate(zip(counts, per_class, strict=True)):
        if count < wanted:
            raise UserError(
                f"class {c} has {count} examples, fewer than k={wanted} clusters: lower k or add data"
            )
    blocks = np.full((num_classes, counts.max()), -1, np.int32)
    order = np.argsort(labels, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    for c in range(num_classes):
        blocks[c, : counts[c]] = order[starts[c] : starts[c] + counts[c]]
    limits = jnp.asarray(per_class, jnp.int32)
    return _fit(key, z, jnp.asarray(labels, jnp.int32), blocks, limits, max(per_class), n_init, max_iter)


@functools.partial(jax.jit, static_argnames=("k", "n_init", "max_iter"))
def _fit(key, z, y, blocks, limits, k, n_init, max_iter):
    """One compiled call for all classes; `blocks` [Y, max count] holds each class's examples, -1 = none."""

    def some_classes(z, keys, blocks, limits):
        def one_class(task):
            key, block, limit = task
            points = z[jnp.maximum(block, 0)]
            result = kmeans(key, points, k, mask=block >= 0, n_init=n_init, max_iter=max_iter, limit=limit)
            return result.centroids, result.valid

        # One class after the other: on CPU faster than vmap, on every device a fraction of its memory.
        centroids, mask = jax.lax.map(one_class, (keys, blocks, limits))
        return mesh.gather(centroids), mesh.gather(mask)

    # whole classes for each device of a mesh, the last ones again where there are too few
    num_classes = blocks.shape[0]
    turn = np.minimum(np.arange(-(-num_classes // mesh.devices()) * mesh.devices()), num_classes - 1)
    keys = jax.random.split(key, num_classes)
    inputs = (mesh.SAME, mesh.ROWS, mesh.ROWS, mesh.ROWS)
    centroids, mask = mesh.spread(some_classes, inputs, mesh.SAME)(z, keys[turn], blocks[turn], limits[turn])
    centroids, mask = centroids[:num_classes], mask[:num_classes]

    clusters, nearest = _with_variance(Clusters(centroids, jnp.ones(()), mask), z, y)
    return clusters, y * k + nearest


def of_linear_head(
    kernel: Float[Array, "E Y"], bias: Float[Array, "Y"], means: Float[Array, "Y E"]
) -> Clusters:
    """One centroid per class whose Eq. 4 is softmax(z @ kernel + bias), as near to `means` as that allows.

    -|z - mu_c|^2 / 2 s = z.mu_c / s - |mu_c|^2 / 2 s + a term of z alone, so with mu_c = s (w_c + u) it is
    the linear head's logit wherever s |w_c + u|^2 / 2 + b_c is the same for all classes: Y - 1 linear
    equations in u for every s > 0. Of their solutions this is the one that minimises
    sum_c |mu_c - means_c|^2, in closed form and float64. `means` are those of the classes' embeddings; the
    variance is s and not that of Eq. 3. Raises UserError where the differences of the classes' weights
    do not span Y - 1 dimensions (as with E < Y - 1), or do not point to the classes' means.

    >>> kernel, bias = jnp.array([[1.0, -1.0], [0.0, 2.0]]), jnp.array([[0.5, 0.0]])  # [E=2, Y=2]
    >>> c = clusters.of_linear_head(kernel, bias[0], means=jnp.array([[3.0, 0.0], [0.0, 4.0]]))
    >>> z = jnp.array([[1.0, 1.0], [-1.0, 2.0]])
    >>> bool(jnp.allclose(c.probs(z), jax.nn.softmax(z @ kernel + bias), atol=1e-6))
    True
    """
    w, b, m = (np.asarray(a, np.float64) for a in (np.asarray(kernel).T, bias, means))
    num_classes, size = w.shape
    apart, b = w - w.mean(axis=0), b - b.mean()  # a term common to all classes changes nothing
    if np.linalg.matrix_rank(apart) < num_classes - 1:
        raise UserError(
            f"a linear head of {num_classes} classes on {size} features is not one centroid per class: "
            f"its weights must span {num_classes - 1} dimensions; use magnet.fit=kmeans"
        )
    inverse = np.linalg.pinv(apart)  # [E, Y]
    squares = np.sum(np.square(w), axis=1)
    # u = shift - inverse b / s + what no class's logit sees
    shift = -inverse @ (squares - squares.mean()) / 2
    scaled, wanted = w + shift, m + inverse @ b  # mu_c - m_c = s scaled_c - wanted_c + the unseen part
    seen = inverse @ apart  # projection on the span of the differences
    along = scaled @ seen
    s = np.sum(along * (wanted @ seen)) / np.sum(np.square(along))
    if not s > 0:
        raise UserError(
            "the linear head's weights do not point to the means of their classes (is it trained?); "
            "use magnet.fit=kmeans"
        )
    unseen = np.mean(wanted - s * scaled, axis=0)
    centroids = s * scaled - inverse @ b + unseen - seen @ unseen
    mask = jnp.ones((num_classes, 1), bool)  # as `fit` has it
    return Clusters(jnp.asarray(centroids[:, None], jnp.float32), jnp.float32(s), mask)


@jax.jit
def with_variance(clusters: Clusters, z: Float[Array, "N E"], y: Int[Array, "N"]) -> Clusters:
    """The same centroids with the variance of these embeddings (paper Eq. 3).

    >>> c = Clusters(jnp.array([[[0.0]], [[5.0]]]), jnp.float32(1.0))
    >>> z, y = jnp.array([[1.0], [4.0], [7.0]]), jnp.array([0, 1, 1])
    >>> print(clusters.with_variance(c, z, y).variance)  # (1 + 1 + 4) / (3 - 1)
    3.0
    """
    return _with_variance(clusters, z, y)[0]


def _with_variance(clusters, z, y):
    """sigma^2 = sum of squared distances to the nearest own-class centroid / (N - 1), and which one it is."""
    squared = jnp.sum(jnp.square(z[:, None, :] - clusters.centroids[y]), axis=-1)
    squared = jnp.where(clusters.valid[y], squared, jnp.inf)
    variance = jnp.sum(jnp.min(squared, axis=1)) / max(z.shape[0] - 1, 1)
    nearest = jnp.argmin(squared, axis=1).astype(jnp.int32)
    return clusters.replace(variance=jnp.maximum(variance, MIN_VARIANCE)), nearest
