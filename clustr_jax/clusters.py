"""The cluster head: centroids per class, log scores (paper Eq. 4), and the fit that makes them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from clustr_jax.kmeans import kmeans
from clustr_jax.losses import least_variance
from clustr_jax.runtime import arrays, mesh
from clustr_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Clusters:
    """K centroids for each of Y classes and one variance; `mask` is False where a class has fewer.

    A pytree. Raises UserError for shapes that do not fit, centroids that are not finite and a variance that
    is not positive; inside jit, for shapes and types. What jax makes of it (by `jax.tree.map`, `jax.vmap`)
    is not looked at before it is used: it may hold shapes, gradients, or many heads at once.

    >>> centroids = jnp.array([[[0.0, 0.0], [4.0, 0.0]], [[0.0, 3.0], [4.0, 3.0]]])  # [Y=2, K=2, E=2]
    >>> c = Clusters(centroids, jnp.float32(1.0))
    >>> z = jnp.array([[0.0, 1.0]])  # [B=1, E=2]: nearest to the first cluster of class 0
    """

    centroids: Float[Array, "Y K E"]
    variance: Float[Array, ""]
    mask: Bool[Array, "Y K"] | None = None

    def __post_init__(self):
        if not all(arrays.is_array(value) for value in (self.centroids, self.variance)):
            return  # of shapes, or of how to shard
        for name, value in self._checked().items():
            if not isinstance(getattr(self, name), (int, float)):  # these keep JAX's weak type
                object.__setattr__(self, name, value)

    def _checked(self) -> dict[str, Any]:
        """The fields with the types that are computed with, or UserError."""
        sizes: dict[str, int] = {}
        centroids = arrays.as_array(self.centroids, "centroids")
        arrays.check_shape(centroids, "centroids", "Y K E", sizes)
        mask = self.mask
        if arrays.is_array(mask):
            mask = arrays.mask(mask, "mask", "Y K", sizes, some="cluster")
        where = mask if arrays.is_array(mask) else None
        return {
            "centroids": arrays.floats(centroids, "centroids", "Y K E", sizes, where=where),
            "variance": _positive(arrays.floats(self.variance, "variance", "")),
            "mask": mask,
        }

    def _embeddings(self, z):
        """z with the type that is computed with, or UserError."""
        centroids, variance, mask = self._checked().values()
        z = arrays.floats(z, "z", "B E", {"E": centroids.shape[2]}, empty=True)
        if z.size and arrays.concrete(z, centroids, variance, mask):
            ends = [float(v) for a in (z, self._places) for v in arrays.extent(a, None)]
            # 2 sigma^2 may be below 1
            exponent = (max(ends) - min(ends)) ** 2 * z.shape[1] / min(1.0, 2 * float(variance))
            if exponent > float(np.finfo(np.float32).max):
                raise UserError(
                    f"z and the centroids reach from {min(ends):.4g} to {max(ends):.4g}; squared distances "
                    f"over the variance ({float(variance):.4g}) overflow float32: are these the embeddings "
                    f"that the clusters were fitted to?"
                )
        return z

    def replace(self, **changes: Any) -> "Clusters":
        """A copy with these fields changed.

        >>> print(c.replace(variance=jnp.float32(2.0)).exponents(z)[:, 0])
        [[-0.25 -4.25]]
        """
        return dataclasses.replace(self, **changes)

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
        return self._squared(self._embeddings(z))

    @property
    def _places(self):
        """The centroids, 0 where there is none: whatever stands there would be in gradients too."""
        return self.centroids if self.mask is None else jnp.where(self.mask[..., None], self.centroids, 0.0)

    def _squared(self, z):
        return jnp.sum(jnp.square(z[:, None, None, :] - self._places[None]), axis=-1)

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
        nearest = None if nearest is None else arrays.whole(nearest, "nearest")
        z = self._embeddings(z)
        squared = self._squared(z)
        keep = jnp.broadcast_to(self.valid[None], squared.shape)
        if nearest is not None and nearest < self.centroids.shape[0] * self.centroids.shape[1]:
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


_FIELDS = ("centroids", "variance", "mask")


def _flatten(clusters):
    return tuple(getattr(clusters, name) for name in _FIELDS), None


def _flatten_with_keys(clusters):
    return list(zip(map(jax.tree_util.GetAttrKey, _FIELDS), _flatten(clusters)[0], strict=True)), None


def _unflatten(_, children):
    """Without a look at them: JAX puts anything into a tree."""
    made = object.__new__(Clusters)
    for name, value in zip(_FIELDS, children, strict=True):
        object.__setattr__(made, name, value)
    return made


jax.tree_util.register_pytree_with_keys(Clusters, _flatten_with_keys, _unflatten, _flatten)


def _positive(variance):
    """UserError for a variance of 0, below it, or so small that 1 / variance is none."""
    least = float(np.finfo(np.float32).tiny)
    return arrays.number(variance, "variance", "positive and finite", lambda v: least <= v < np.inf)


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
    """k-means++ of each class's embeddings.

    sigma^2 is the sum of the squared distances to the nearest own-class centroids, divided by N - 1 (paper
    Eq. 3). A class with fewer than k *distinct* embeddings gets fewer clusters (`mask`).

    Args:
        key: of `jax.random.key`.
        z: embeddings [N, E].
        y: labels [N].
        num_classes: Y.
        k: clusters of each class; one number, or one for each class.
        n_init: seedings, of which the best wins.
        max_iter: Lloyd iterations, at most.

    Returns:
        `Clusters` of centroids [Y, K, E].

    Raises:
        UserError: where a class has fewer than k members, for embeddings that are not finite, for labels that
            are no classes, and inside jit (the labels decide the shapes).

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
    """As `fit`, with the cluster of each example.

    Args:
        key, z, y, num_classes, k, n_init, max_iter: as in `fit`.

    Returns:
        `Clusters`, and class * K + the nearest of its own class [N].

    >>> z = jnp.array([[0.0, 0.0], [5.0, 1.0], [0.0, 1.0], [5.0, 0.0]])
    >>> y = jnp.array([0, 1, 0, 1])
    >>> c, assignments = clusters.fit_assign(jax.random.key(0), z, y, num_classes=2, k=1)
    >>> print(assignments)
    [0 1 0 1]
    """
    arrays.key(key)
    num_classes, n_init = arrays.whole(num_classes, "num_classes"), arrays.whole(n_init, "n_init")
    max_iter, per_class = arrays.whole(max_iter, "max_iter", low=0), _per_class(k, num_classes)
    if not arrays.concrete(y):
        raise UserError("clusters.fit does not run inside jit: y decides the shapes; call it outside")
    sizes: dict[str, int] = {}
    z = arrays.floats(z, "z", "N E", sizes, squares="between them")
    labels = np.asarray(arrays.labels(y, num_classes, sizes, axis="N"))
    counts = np.bincount(labels, minlength=num_classes)
    for c, (count, wanted) in enumerate(zip(counts, per_class, strict=True)):
        if count < wanted:
            raise UserError(
                f"class {c} has {count} examples, fewer than k={wanted} clusters: lower k or add data"
            )
    blocks = np.full((num_classes, counts.max()), -1, np.int32)
    for c in range(num_classes):
        blocks[c, : counts[c]] = np.flatnonzero(labels == c)
    limits = jnp.asarray(per_class, jnp.int32)
    return _fit(key, z, jnp.asarray(labels, jnp.int32), blocks, limits, max(per_class), n_init, max_iter)


def _per_class(k, num_classes: int) -> tuple[int, ...]:
    """k of each class."""
    if np.ndim(k) == 0:
        return (arrays.whole(k, "k"),) * num_classes
    if len(k) != num_classes:
        raise UserError(f"k must be one number, or one for each of the {num_classes} classes, got {len(k)}")
    return tuple(arrays.whole(value, "k") for value in k)


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

    The exponent -|z - mu_c|^2 / 2 s is z.mu_c / s - |mu_c|^2 / 2 s + a term of z alone. With mu_c = s (w_c +
    u) it is the linear head's logit wherever s |w_c + u|^2 / 2 + b_c is the same for all classes: Y - 1
    linear equations in u for every s > 0. Of their solutions this one minimises sum_c |mu_c - means_c|^2, in
    closed form and float64. The variance is s and not that of Eq. 3.

    Args:
        kernel: weights [E, Y] of the linear head.
        bias: its [Y].
        means: of the classes' embeddings [Y, E].

    Returns:
        `Clusters` of centroids [Y, 1, E].

    Raises:
        UserError: where the differences of the classes' weights do not span Y - 1 dimensions (as with E < Y -
            1), or do not point to the classes' means.

    >>> kernel, bias = jnp.array([[1.0, -1.0], [0.0, 2.0]]), jnp.array([[0.5, 0.0]])  # [E=2, Y=2]
    >>> c = clusters.of_linear_head(kernel, bias[0], means=jnp.array([[3.0, 0.0], [0.0, 4.0]]))
    >>> z = jnp.array([[1.0, 1.0], [-1.0, 2.0]])
    >>> bool(jnp.allclose(c.probs(z), jax.nn.softmax(z @ kernel + bias), atol=1e-6))
    True
    """
    sizes: dict[str, int] = {}
    given = (kernel, "kernel", "E Y"), (bias, "bias", "Y"), (means, "means", "Y E")
    w, b, m = (np.asarray(arrays.floats(*a, sizes, double=True), np.float64) for a in given)
    size, num_classes = w.shape
    w, b = w.T - w.mean(axis=1), b - b.mean()  # a term common to all classes changes nothing
    # of Y directions the last is rounding, which an inverse of all of them would make the largest
    left, scales, right = np.linalg.svd(w, full_matrices=False)
    least = scales[0] * max(w.shape) * np.finfo(np.float64).eps
    left, scales, right = left[:, : num_classes - 1], scales[: num_classes - 1], right[: num_classes - 1].T
    if np.sum(scales > least) < num_classes - 1:
        raise UserError(
            f"a linear head of {num_classes} classes on {size} features is not one centroid per class: "
            f"its weights must span {num_classes - 1} dimensions; use magnet.fit=kmeans"
        )
    inverse = right / scales @ left.T  # [E, Y]
    squares = np.sum(np.square(w), axis=1)
    # u = shift - inverse b / s + what no class's logit sees
    shift = -inverse @ (squares - squares.mean()) / 2
    scaled, wanted = w + shift, m + inverse @ b  # mu_c - m_c = s scaled_c - wanted_c + the unseen part
    seen = right @ right.T  # projection on the span of the differences
    along = scaled @ seen
    s = np.sum(along * (wanted @ seen)) / np.sum(np.square(along))
    if not s > 0:
        raise UserError(
            "the linear head's weights do not point to the means of their classes (is it trained?); "
            "use magnet.fit=kmeans"
        )
    unseen = np.mean(wanted - s * scaled, axis=0)
    centroids = s * scaled - inverse @ b + unseen - seen @ unseen
    return Clusters(jnp.float32(centroids[:, None]), jnp.float32(s), jnp.ones((num_classes, 1), bool))


def with_variance(clusters: Clusters, z: Float[Array, "N E"], y: Int[Array, "N"]) -> Clusters:
    """The same centroids with the variance of these embeddings z [N, E], labels y [N] (paper Eq. 3).

    UserError where a class of `y` has no cluster to be near to.

    >>> c = Clusters(jnp.array([[[0.0]], [[5.0]]]), jnp.float32(1.0))
    >>> z, y = jnp.array([[1.0], [4.0], [7.0]]), jnp.array([0, 1, 1])
    >>> print(clusters.with_variance(c, z, y).variance)  # (1 + 1 + 4) / (3 - 1)
    3.0
    """
    centroids, _, mask = clusters._checked().values()
    z = arrays.floats(z, "z", "N E", sizes := {"E": centroids.shape[2]}, squares="between them")
    y = arrays.labels(y, centroids.shape[0], sizes, axis="N")
    arrays.check_members(mask, y)
    return _with_its_variance(clusters, z, y)


@jax.jit
def _with_its_variance(clusters, z, y):
    return _with_variance(clusters, z, y)[0]


def _with_variance(clusters, z, y):
    """sigma^2 = sum of squared distances to the nearest own-class centroid / (N - 1), and which one it is."""
    squared = jnp.sum(jnp.square(z[:, None, :] - clusters.centroids[y]), axis=-1)
    squared = jnp.where(clusters.valid[y], squared, jnp.inf)
    variance = jnp.sum(jnp.min(squared, axis=1)) / max(z.shape[0] - 1, 1)
    nearest = jnp.argmin(squared, axis=1).astype(jnp.int32)
    return clusters.replace(variance=jnp.maximum(variance, least_variance(clusters._places))), nearest
