"""Every method of a Classifier looks at its images as the attacks do."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax import Classifier, models
from clustr_jax.attacks.models import open_model
from clustr_jax.classifier import correct
from clustr_jax.clusters import Clusters
from clustr_jax.runtime.errors import UserError
from gate_doors import DOORS, KEY, said

pytestmark = pytest.mark.wrong_arrays
SHAPE, CLASSES, B = (8, 12, 3), 3, 5
# What is public on a Classifier and takes images.
METHODS = [
    name
    for name, method in inspect.getmembers(Classifier, inspect.isfunction)
    if not name.startswith("_") and "x" in inspect.signature(method).parameters
]


def test_all_methods_are_looked_at():
    assert set(METHODS) >= {"embed", "logits", "scores", "deployed", "view", "predict"}


@functools.cache
def classifier(head="linear"):
    net = models.build("cnn", num_classes=CLASSES, input_shape=SHAPE, mean=(0.5,) * 3, std=(0.2,) * 3)
    variables = net.init(jax.random.key(1))
    if head == "linear":
        return Classifier(variables, None, net)
    z = net.eval(variables, images()[:1]).embeddings
    centroids = np.random.default_rng(3).normal(size=(CLASSES, 2, z.shape[1])).astype(np.float32)
    return Classifier(variables, Clusters(jnp.asarray(centroids), jnp.float32(10.0)), net, nearest=1)


@functools.cache
def images():
    return np.random.default_rng(2).uniform(size=(B, *SHAPE)).astype(np.float32)


def wrong_images():
    x = images()
    return {
        "levels": (255 * x, "divide by 255"),
        "levels on the device": (jnp.asarray(255 * x), "divide by 255"),
        "uint8": ((255 * x).astype(np.uint8), "divide by 255"),
        "normalised": ((x - 0.5) / 0.2, "before normalisation"),
        "minus one to one": (2 * x - 1, "(x + 1) / 2"),
        "nan": (np.where(x > 0.99, np.nan, x), "not finite"),
        "inf": (np.where(x > 0.99, np.inf, x), "not finite"),
        "NCHW": (x.transpose(0, 3, 1, 2), "NCHW; give x.transpose(0, 2, 3, 1)"),
        "one image": (x[0], "give x[None]"),
        "one row": (x[0, 0, 0], "x must be [B, 8, 12, 3], got (3,)"),
        "one pixel": (np.float32(0.5), "x must be [B, 8, 12, 3], got ()"),
        "flat": (x.reshape(B, -1), "give x.reshape(-1, 8, 12, 3)"),
        "grey": (x[..., :1], "x must be [B, 8, 12, 3], got (5, 8, 12, 1)"),
        "words": (np.full((B, *SHAPE), "a"), "x must be an array of numbers"),
        "complex": (x + 1j, "x must be an array of numbers"),
        "complex on the device": (jnp.asarray(x) + 1j, "x must be an array of numbers"),
        "keys": (jax.random.split(jax.random.key(0), B), "x must be an array of numbers"),
        "ragged": ([[1.0, 2.0], [3.0]], "x must be an array"),
        "nothing": (None, "x must be an array"),
    }


@pytest.mark.parametrize("case", list(wrong_images()))
def test_a_classifier_looks_at_its_images_as_attacks_do(case):
    """The same line from every method, with either head, and from every attack on it."""
    x, text = wrong_images()[case]
    found = {
        (head, name): said(getattr(classifier(head), name), x)
        for head in ("linear", "clusters")
        for name in METHODS
    }
    found["correct"] = said(correct, classifier(), x, np.zeros(B, np.int32))
    if getattr(x, "ndim", 0) == 4:
        y = np.zeros(B, np.int32)
        found |= {name: said(door, KEY, classifier().logits, x, y) for name, door in DOORS.items()}
    assert len(set(found.values())) == 1 and text in found["correct"], found


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_what_it_took(name):
    x = images()
    for head in ("linear", "clusters"):
        clf = classifier(head)
        method = getattr(clf, name)
        expected = jax.tree.leaves(method(x))
        for same in (x.astype(np.float64), x.tolist(), jnp.asarray(x)):
            found = jax.tree.leaves(method(same))
            assert all((a == b).all() for a, b in zip(found, expected, strict=True))
        assert all(len(leaf) == 0 for leaf in jax.tree.leaves(method(x[:0])))
        # where values cannot be looked at, and where all are allowed
        inside = jax.tree.leaves(jax.jit(method)(jnp.asarray(x)))
        captured = jax.tree.leaves(jax.jit(lambda: method(jnp.asarray(x)))())  # noqa: B023
        anywhere = getattr(clf.replace(bounds=None), name)(3 * x)
        for found in (inside, captured, jax.tree.leaves(anywhere)):
            assert [leaf.shape for leaf in found] == [leaf.shape for leaf in expected]


@pytest.mark.parametrize("name", METHODS)
def test_images_that_a_program_captures_are_looked_at(name):
    """A constant of a jit is no tracer."""
    method, wrong = getattr(classifier(), name), jnp.asarray(255 * images())
    assert "divide by 255" in said(jax.jit(lambda: method(wrong)))


@pytest.mark.parametrize("name", METHODS)
def test_one_program_whatever_the_box(name, compilations):
    """The paper's protocol looks at the same images with and without one."""
    clf, x = classifier(), images()
    getattr(clf, name)(x)
    with compilations() as found:
        getattr(clf.replace(bounds=None), name)(x)
        getattr(clf.replace(bounds=(-1.0, 1.0)), name)(x)
    assert not found


@pytest.mark.parametrize(
    ("y", "text"),
    [
        (np.zeros((B, 1), np.int32), "give y[:, 0]"),
        (np.eye(CLASSES, dtype=np.int32)[np.zeros(B, int)], "give y.argmax(axis=1)"),
        (np.full((B, CLASSES), 1 / CLASSES), "give y.argmax(axis=1)"),
        (np.zeros(1, np.int32), "with the same B"),
        (np.int32(0), "one label"),
        (np.zeros(B), "integer labels"),
        (np.resize(np.arange(CLASSES) + 1, B), "labels from 1 want y - 1"),
        (np.full(B, 2**32), "y must lie in 0..2"),
        (np.full(B, -1), "y must lie in 0..2"),
    ],
)
def test_labels_that_are_not_the_images_are_no_accuracy(y, text):
    """Compared as they are, they would broadcast, or never be met."""
    assert text in said(correct, classifier(), images(), y)


def test_points_of_a_network_without_a_shape_need_a_batch_axis():
    from centroid_classifiers import linear_classifier

    clf = linear_classifier(np.eye(3), np.eye(3)[:, None], 1.0, bounds=None)
    for name in METHODS:
        with pytest.raises(UserError, match=r"got \(3,\); for one image give x\[None\]"):
            getattr(clf, name)(np.zeros(3, np.float32))


def test_the_probes_do_not_change_what_the_engine_runs():
    """A classifier's own methods are called as before: the very program of earlier versions, bit for bit."""
    opened = open_model(classifier().logits, (B, *SHAPE))
    assert opened.model.func is Classifier.logits and opened.classes == CLASSES
