"""A trained network with its head, as one pytree: what attacks, evaluation and notebooks work on."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from clustr_jax.attacks import placement
from clustr_jax.attacks.attack_losses import View
from clustr_jax.attacks.input_checks import check_input, check_labels, check_sizes, labels_of
from clustr_jax.clusters import Clusters
from clustr_jax.runtime import mesh, struct
from clustr_jax.runtime.errors import UserError

if TYPE_CHECKING:  # flax comes with it
    from clustr_jax.models import Net

# Whole test sets go through the network in pieces of this many images.
_CHUNK = 500


class Classifier(struct.PyTreeNode):
    """Parameters, clusters (None for a linear head) and the rule that turns them into predictions.

    `logits` always use all clusters and are finite; `predict` is the deployed rule, which may use the
    `nearest` D clusters only (0 = all). x holds pixels in [0, 1], [B, H, W, C]: every method raises
    UserError for other values and shapes. `clf.replace(bounds=None)` takes any values; the paper's protocol,
    whose starts leave the box, is run on that.

    `clustr_jax.load` makes one of a work directory. By hand, here with an untrained network:

    >>> net = models.build("mlp", num_classes=2, input_shape=(2,), mean=(0.0, 0.0), std=(1.0, 1.0))
    >>> variables = net.init(jax.random.key(0))
    >>> x, y = data.load("toy2d", "test")  # points in the plane
    >>> z = net.eval(variables, x).embeddings
    >>> found = clusters.fit(jax.random.key(1), z, jnp.asarray(y), num_classes=2, k=2)
    >>> clf = Classifier(variables, found, net, nearest=1, bounds=None)
    """

    variables: dict
    clusters: Clusters | None
    net: "Net" = struct.field(pytree_node=False)
    nearest: int = struct.field(pytree_node=False, default=0)
    bounds: tuple[float, float] | None = struct.field(pytree_node=False, default=(0.0, 1.0))

    def embed(self, x: Float[Array | np.ndarray, "B ..."]) -> Float[Array, "B E"]:
        """Embeddings in eval mode.

        >>> clf.embed(x).shape
        (500, 20)
        """
        return self._applied(x, "embed")

    def logits(self, x: Float[Array | np.ndarray, "B ..."]) -> Float[Array, "B Y"]:
        """Log-domain logits: logsumexp_j(-|f - mu_cj|^2 / 2 sigma^2) for clusters, else the linear head.

        >>> z = clf.logits(x)
        >>> z.shape, bool((z < 10).all())  # logarithms of sums of at most K terms, each at most 1
        ((500, 2), True)
        >>> print(jnp.allclose(jax.nn.softmax(z), clf.clusters.probs(clf.embed(x)), atol=1e-4))
        True
        """
        return self._applied(x, "logits")

    def scores(self, x: Float[Array | np.ndarray, "B ..."]) -> Float[Array, "B Y"]:
        """What the authors attack: exp scores over the D nearest clusters; the logits of a linear head.

        >>> scores = clf.scores(x)
        >>> print(scores.shape, bool((scores >= 0).all()), bool((scores <= 2).all()))  # bounded by K
        (500, 2) True True
        """
        return self._applied(x, "scores")

    def deployed(self, x: Float[Array | np.ndarray, "B ..."]) -> Float[Array, "B Y"]:
        """What `predict` takes the argmax of: log scores over the D nearest clusters (-inf without one).

        >>> print(jnp.isneginf(clf.deployed(x)).any(axis=1).all())  # with D = 1 only one class has a cluster
        True
        """
        return self._applied(x, "deployed")

    def view(self, x: Float[Array | np.ndarray, "B ..."]) -> View:
        """All that an evaluation looks at, from one forward pass: logits, deployed, clusters' exponents.

        >>> view = clf.view(x)
        >>> view.logits.shape, view.exponents.shape  # [B, Y], [B, Y, K]
        ((500, 2), (500, 2, 2))
        """
        return self._applied(x, "view")

    def predict(self, x: Float[Array | np.ndarray, "B ..."]) -> Int[Array, "B"]:
        """Predicted classes; ties go to the first class.

        >>> print(bool((clf.predict(x) == clf.deployed(x).argmax(axis=1)).all()))
        True
        """
        return jnp.argmax(self._applied(x, "deployed"), axis=1).astype(jnp.int32)

    def _applied(self, x, what: str):
        """UserError for images that are not the network's; inside jit only their shape is looked at."""
        x = placement.beside(placement.home(jax.tree.leaves(self)), x)
        x = check_input(x, getattr(self.net, "input_shape", None), self.bounds)
        return _apply(self.replace(bounds=None), x, what)  # one program, whatever the box


@jax.jit(static_argnames="what")
def _apply(clf: Classifier, x, what):
    def outputs(clf, x):
        # float32 throughout: reduced matmul precision would hide the gradients that an attack follows
        with jax.default_matmul_precision("highest"):
            logits, z = clf.net.eval(clf.variables, x)
            if what == "embed":
                return z
            if clf.clusters is None:
                return View(logits, logits) if what == "view" else logits
            nearest = clf.nearest or None
            if what == "view":
                log_scores = clf.clusters.log_scores(z)
                deployed = clf.clusters.log_scores(z, nearest) if nearest else log_scores
                return View(log_scores, deployed, clf.clusters.exponents(z))
            if what == "scores":
                return clf.clusters.scores(z, nearest)
            return clf.clusters.log_scores(z, None if what == "logits" else nearest)

    def pieces(clf, x):
        if x.shape[0] <= 2 * _CHUNK:
            return outputs(clf, x)
        whole = x.shape[0] // _CHUNK * _CHUNK
        chunks = x[:whole].reshape(-1, _CHUNK, *x.shape[1:])
        result = jax.lax.map(lambda chunk: outputs(clf, chunk), chunks)
        result = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), result)
        if whole == x.shape[0]:
            return result
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), result, outputs(clf, x[whole:]))

    x = jnp.asarray(x, jnp.float32)
    if not x.shape[0]:  # not every network can be applied to no images
        return jax.tree.map(lambda a: a[:0], outputs(clf, jnp.zeros((1, *x.shape[1:]))))
    return mesh.by_rows(pieces, clf, x)


def correct(
    clf: Classifier, x: Float[Array | np.ndarray, "N ..."], y: Array | np.ndarray
) -> Bool[np.ndarray, "N"]:
    """Which examples the deployed rule classifies correctly; UserError for labels that are not theirs.

    >>> from clustr_jax.classifier import correct
    >>> net = models.build("mlp", num_classes=2, input_shape=(2,), mean=(0.0, 0.0), std=(1.0, 1.0))
    >>> clf = Classifier(net.init(jax.random.key(0)), None, net, bounds=None)  # a linear head
    >>> x, y = data.load("toy2d", "test")
    >>> right = correct(clf, x, y)
    >>> right.shape, bool((right == (clf.predict(x) == y)).all())
    ((500,), True)
    """
    found, y = np.asarray(clf.predict(x)), labels_of(y)
    check_sizes(x if hasattr(x, "ndim") else np.asarray(x), y)
    if y.ndim == 2:
        raise UserError(f"y must be labels [B], got {y.dtype} {y.shape}; give y.argmax(axis=1)")
    classes = getattr(clf.net, "num_classes", None)
    if classes is not None and len(y):
        check_labels(y, classes)
    return found == np.asarray(y)
