"""To PyTorch: the same logits, gradients and deployed rule, and a file that needs torch alone."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from clustr_jax.doors import clustr_torch  # noqa: E402
from clustr_jax.doors import pytorch as door  # noqa: E402
from clustr_jax.runtime.errors import UserError  # noqa: E402
from torch_networks import SETTINGS, assert_close, classifier, images, to_nchw  # noqa: E402


@pytest.mark.parametrize("clustered", [False, True], ids=["linear", "clusters"])
@pytest.mark.parametrize("name", SETTINGS)
def test_logits_embeddings_and_gradients_agree(name, clustered):
    """Random parameters, statistics and inputs; the gradient is what an attack follows."""
    clf = classifier(name, clustered)
    x, model = images(clf.net), door.to_torch(clf)
    assert not model.training
    leaf = to_nchw(x).requires_grad_()
    z = model(leaf)
    ours = np.asarray(clf.logits(x))
    assert np.ptp(ours, axis=0).max() > 1e-2 * np.abs(ours).max()  # the inputs matter
    assert_close(z, ours)
    if not clustered:
        assert_close(model.embed(to_nchw(x)), clf.embed(x))
        return
    weights = np.random.default_rng(3).standard_normal(z.shape).astype(np.float32)
    (z * torch.tensor(weights)).sum().backward()
    gradient = jax.grad(lambda x: jnp.sum(clf.logits(x) * weights))(jnp.asarray(x))
    theirs = leaf.grad.numpy()
    theirs = np.moveaxis(theirs, 1, -1) if x.ndim == 4 else theirs
    np.testing.assert_allclose(theirs, gradient, atol=1e-3 * np.abs(gradient).max())


@pytest.mark.parametrize("nearest", [0, 1, 3, 12, 99])
def test_scores_and_the_deployed_rule_agree(nearest):
    """D nearest clusters, with classes that own none of them (-inf) and clusters that do not exist."""
    clf = classifier("cnn", True, nearest)
    x = images(clf.net)
    assert_close(door.to_torch(clf, "logits")(to_nchw(x)), clf.logits(x))
    assert_close(door.to_torch(clf, "scores")(to_nchw(x)), clf.scores(x))
    deployed = door.to_torch(clf, "deployed")
    leaf = to_nchw(x).requires_grad_()
    z = deployed(leaf)
    assert_close(z, clf.deployed(x))
    assert bool(torch.isinf(z).any()) == (nearest in (1, 3))
    np.testing.assert_array_equal(z.argmax(1), clf.predict(x))
    z.max(dim=1).values.sum().backward()
    assert torch.isfinite(leaf.grad).all() and leaf.grad.abs().max() > 0
    with pytest.raises(UserError, match="output must be one of logits, scores, deployed, got 'probs'"):
        door.to_torch(clf, "probs")


ALONE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "flax", "clustr_jax"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import numpy, torch
from clustr_torch import load
model = load("model.pt")
x = torch.tensor(numpy.load("x.npy")).permute(0, 3, 1, 2)
numpy.save("z.npy", model(x).detach().numpy())
"""


def test_a_saved_model_needs_torch_alone(tmp_path):
    """In a folder with the model and clustr_torch.py, where neither JAX nor clustr_jax can be imported."""
    clf = classifier("cnn", True)
    apart = door.save(clf, tmp_path / "model.pt", dataset="none")
    assert 0 < apart < 1e-5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clustr_torch.py", "model.pt"]
    x = images(clf.net)
    np.save(tmp_path / "x.npy", x)
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_close(np.load(tmp_path / "z.npy"), clf.logits(x))


def test_a_model_that_differs_is_not_written(tmp_path, monkeypatch):
    """Another epsilon of the batch norm, as if a version of PyTorch had changed: the export looks."""
    real = clustr_torch.load

    def load(path):
        model = real(path)
        model.net.bn1.eps = 1e-2
        return model

    monkeypatch.setattr(clustr_torch, "load", load)
    with pytest.raises(UserError, match="differ by .* of max .z.; .*model.pt was not written"):
        door.save(classifier("cnn", False), tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_the_command(capsys, tmp_path):
    """Its own mistakes; that it exports a run is tested with a run, in test_run_whole.py's way."""
    assert door.main([str(tmp_path / "none"), f"--out={tmp_path / 'model.pt'}"]) == 2
    assert capsys.readouterr().err.startswith("error: no finished stage in ")
    assert not pathlib.Path(tmp_path / "model.pt").exists()
