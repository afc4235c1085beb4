"""Foolbox on our classifiers: what it finds is found to be adversarial by the classifier itself."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Foolbox 3.3.4 imports names that SciPy renames
    foolbox = pytest.importorskip("foolbox")

from clustr_jax import clusters, data, models  # noqa: E402
from clustr_jax.classifier import Classifier  # noqa: E402
from clustr_jax.doors.foolbox_model import to_foolbox  # noqa: E402
from clustr_jax.runtime.errors import UserError  # noqa: E402

EPS = 0.1


@pytest.fixture(scope="module")
def attacked():
    """(classifier, x, y): an untrained CNN with clusters of its embeddings of digits, well above chance."""
    net = models.build("cnn", num_classes=10, input_shape=(8, 8, 1), mean=(0.3,), std=(0.37,), width=4)
    variables = jax.jit(net.init)(jax.random.key(0))
    x, y = data.load("digits", "train")
    z = jax.jit(net.eval)(variables, x).embeddings
    clf = Classifier(variables, clusters.fit(jax.random.key(1), z, y, num_classes=10, k=2), net)
    x, y = data.load("digits", "test")
    return clf, jnp.asarray(x[:40]), jnp.asarray(y[:40])


def test_pgd_finds_what_the_classifier_confirms(attacked):
    """Clean accuracies are equal; LinfPGD stays in ball and box, and each of its successes is one of ours."""
    clf, x, y = attacked
    fmodel = to_foolbox(clf)
    np.testing.assert_array_equal(fmodel(x), clf.logits(x))
    right = np.asarray(clf.predict(x)) == np.asarray(y)
    assert foolbox.accuracy(fmodel, x, y) == pytest.approx(right.mean(), abs=1e-6)
    assert 0.5 < right.mean() < 1
    attack = foolbox.attacks.LinfPGD(abs_stepsize=EPS / 4, steps=10, random_start=False)
    with jax.debug_key_reuse(False):  # Foolbox draws its starts by itself
        _, x_adv, success = attack(fmodel, x, y, epsilons=EPS)
    x_adv, success = np.asarray(x_adv), np.asarray(success)
    assert np.abs(x_adv - x).max() <= EPS + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    np.testing.assert_array_equal(np.asarray(clf.predict(x_adv)) != np.asarray(y), success)
    assert success[~right].all() and success.mean() > 0.3 + (~right).mean()


def test_the_paper_s_scores_can_be_attacked(attacked):
    clf, x, _ = attacked
    for output in ("scores", "deployed"):
        np.testing.assert_array_equal(to_foolbox(clf, output)(x), getattr(clf, output)(x))
    with pytest.raises(UserError, match="output must be one of logits, scores, deployed, got 'probs'"):
        to_foolbox(clf, "probs")
