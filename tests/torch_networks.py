"""Networks for the door to PyTorch. Tolerance: 1e-4 of max |z|, the contract of the door."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from clustr_jax import models  # noqa: E402
from clustr_jax.classifier import Classifier  # noqa: E402
from clustr_jax.clusters import Clusters  # noqa: E402

IMAGES = dict(num_classes=5, width=4, input_shape=(16, 16, 3), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
SETTINGS = {
    "resnet18": IMAGES,
    "resnet8": IMAGES | dict(input_shape=(9, 7, 3), mean=(0.4,), std=(0.3,)),  # odd, and one mean for all
    "cnn": IMAGES | dict(input_shape=(9, 7, 3)),
    "fast": IMAGES,
    "fast_plain": IMAGES | dict(input_shape=(9, 20, 3)),
    "mlp": IMAGES | dict(input_shape=(3,)),
    "lip_sll": IMAGES,
    "lip_aol": IMAGES,
    "lip_cpl": IMAGES | dict(input_shape=(8, 24, 3)),
    "lip_cpl points": IMAGES | dict(input_shape=(3,)),
    "lip_orthogonal": IMAGES | dict(input_shape=(8, 24, 3)),
    "lip_orthogonal points": IMAGES | dict(input_shape=(3,)),
}
READABLE = ("resnet18", "resnet8", "cnn", "fast", "fast_plain", "mlp")


@functools.cache
def network(name):
    """A network with random parameters and batch statistics, none of them at its initial value."""
    net = models.build(name.split()[0], **SETTINGS[name])
    rng = np.random.default_rng(0)

    def shake(path, leaf):
        leaf, kind = np.asarray(leaf), path[-1].key
        if kind in ("kernel", "top", "free"):
            return leaf + 0.3 * leaf.std() * rng.standard_normal(leaf.shape).astype(np.float32)
        if kind in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return 0.3 * rng.standard_normal(leaf.shape).astype(np.float32)  # biases, means, log_q

    return net, jax.tree_util.tree_map_with_path(shake, jax.jit(net.init)(jax.random.key(0)))


def classifier(name, clustered, nearest=0):
    net, variables = network(name)
    if not clustered:
        return Classifier(variables, None, net)
    z = np.asarray(classifier(name, False).embed(images(net)))
    rng = np.random.default_rng(1)
    centroids = z[:15].reshape(5, 3, -1) + 0.1 * z.std() * rng.standard_normal((5, 3, z.shape[1]))
    variance = float(np.mean(np.sum((z - z.mean(0)) ** 2, axis=1)))
    mask = np.ones((5, 3), bool)
    mask[1, 2] = mask[3, 1:] = False
    clusters = Clusters(jnp.asarray(centroids, jnp.float32), jnp.float32(variance / 8), jnp.asarray(mask))
    return Classifier(variables, clusters, net, nearest=nearest)


def images(net, count=16):
    return np.random.default_rng(2).random((count, *net.input_shape)).astype(np.float32)


def to_nchw(x):
    return torch.tensor(np.moveaxis(x, -1, 1) if x.ndim == 4 else x)


def assert_close(theirs, ours):
    ours = np.asarray(ours)
    theirs = np.asarray(theirs.detach() if hasattr(theirs, "detach") else theirs)
    assert theirs.shape == ours.shape and theirs.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(theirs), np.isneginf(ours))
    finite = np.isfinite(ours)
    assert np.isfinite(theirs[finite]).all()
    assert np.abs(theirs[finite] - ours[finite]).max() <= 1e-4 * np.abs(ours[finite]).max()
