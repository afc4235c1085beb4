"""To PyTorch and back: the same logits and gradients, the authors' layout, a file that needs torch alone.

The reference for the layout is a ResNet-18 written here with torch.nn.functional on the names of
kuangliu's state_dict. Tolerance: 1e-4 of max |z|, the contract of the door.
"""

import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402

from clustr_jax import models  # noqa: E402
from clustr_jax.classifier import Classifier  # noqa: E402
from clustr_jax.clusters import Clusters  # noqa: E402
from clustr_jax.doors import clustr_torch  # noqa: E402
from clustr_jax.doors import pytorch as door  # noqa: E402
from clustr_jax.runtime.errors import UserError  # noqa: E402

IMAGES = dict(num_classes=5, width=4, input_shape=(16, 16, 3), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
SETTINGS = {
    "resnet18": IMAGES,
    "resnet8": IMAGES | dict(input_shape=(9, 7, 3), mean=(0.4,), std=(0.3,)),  # odd, and one mean for all
    "cnn": IMAGES | dict(input_shape=(9, 7, 3)),
    "mlp": IMAGES | dict(input_shape=(3,)),
    "lip_sll": IMAGES,
    "lip_aol": IMAGES,
    "lip_cpl": IMAGES | dict(input_shape=(8, 24, 3)),
    "lip_cpl points": IMAGES | dict(input_shape=(3,)),
}
READABLE = ("resnet18", "resnet8", "cnn", "mlp")


@functools.cache
def network(name):
    """A network with random parameters and batch statistics, none of them at its initial value."""
    net = models.build(name.split()[0], **SETTINGS[name])
    rng = np.random.default_rng(0)

    def shake(path, leaf):
        leaf, kind = np.asarray(leaf), path[-1].key
        if kind in ("kernel", "top"):
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


# The layout


def reference_resnet18(state, x):
    """(logits, embeddings) of normalised images, by the names of kuangliu's ResNet-18."""

    def conv(name, x, stride, padding):
        return F.conv2d(x, state[f"{name}.weight"], None, stride, padding)

    def norm(name, x):
        get = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *get)

    x = F.relu(norm("bn1", conv("conv1", x, 1, 1)))
    for layer, j in ((1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1)):
        block, stride = f"layer{layer}.{j}", 2 if layer > 1 and j == 0 else 1
        y = F.relu(norm(f"{block}.bn1", conv(f"{block}.conv1", x, stride, 1)))
        y = norm(f"{block}.bn2", conv(f"{block}.conv2", y, 1, 1))
        if stride == 2:
            x = norm(f"{block}.shortcut.1", conv(f"{block}.shortcut.0", x, 2, 0))
        x = F.relu(x + y)
    z = F.avg_pool2d(x, x.shape[-1]).flatten(1)
    return F.linear(z, state["linear.weight"], state["linear.bias"]), z


def random_state(width=4, classes=5):
    """A random state_dict in kuangliu's layout, written without our code."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def conv(name, before, after, size):
        scale = (2 / (before * size * size)) ** 0.5
        state[f"{name}.weight"] = scale * torch.randn(after, before, size, size, generator=generator)

    def norm(name, features):
        for part, low, high in (
            ("weight", 0.5, 1.5), ("bias", -0.3, 0.3), ("running_mean", -0.3, 0.3), ("running_var", 0.5, 1.5)
        ):  # fmt: skip
            state[f"{name}.{part}"] = low + (high - low) * torch.rand(features, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("conv1", 3, width, 3)
    norm("bn1", width)
    before = width
    for layer in (1, 2, 3, 4):
        after = width * 2 ** (layer - 1)
        for j in (0, 1):
            conv(f"layer{layer}.{j}.conv1", before, after, 3)
            norm(f"layer{layer}.{j}.bn1", after)
            conv(f"layer{layer}.{j}.conv2", after, after, 3)
            norm(f"layer{layer}.{j}.bn2", after)
            if layer > 1 and j == 0:
                conv(f"layer{layer}.{j}.shortcut.0", before, after, 1)
                norm(f"layer{layer}.{j}.shortcut.1", after)
            before = after
    state["linear.weight"] = torch.randn(classes, before, generator=generator)
    state["linear.bias"] = torch.randn(classes, generator=generator)
    return state


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def reference_logits(state, x):
    normalised = (x - np.float32(MEAN)) / np.float32(STD)
    return reference_resnet18(state, to_nchw(normalised))


def test_an_exported_resnet18_has_the_layout_of_the_authors():
    """Names, shapes, and what they are used for."""
    clf = classifier("resnet18", False)
    state = door.to_torch(clf).net.state_dict()
    other = random_state()
    assert list(state) == list(other)  # the authors copy parameters by position
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in other.items()}
    x = images(clf.net)
    normalised = (x - np.float32(IMAGES["mean"])) / np.float32(IMAGES["std"])
    assert_close(reference_resnet18(state, to_nchw(normalised))[0], clf.logits(x))


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_a_state_dict_is_read(prefix):
    """As saved by the network, by DataParallel, and by a wrapper."""
    state = random_state()
    clf = door.from_torch({prefix + k: v for k, v in state.items()}, mean=MEAN, std=STD)
    assert models.name_of(clf.net) == "resnet18" and clf.net.module.width == 4
    assert clf.clusters is None and clf.net.num_classes == 5 and clf.bounds == (0.0, 1.0)
    x = np.random.default_rng(0).random((4, 32, 32, 3)).astype(np.float32)
    logits, z = reference_logits(state, x)
    assert_close(logits, clf.logits(x))
    assert_close(z, clf.embed(x))


@pytest.mark.parametrize(("kept", "limit"), [(True, 4), (True, 10), (False, 4)])
def test_a_checkpoint_of_the_authors_is_read(kept, limit, tmp_path):
    """Their dict with clusters: exp scores over the L nearest of 10 (all of them, if not normalize_probs)."""
    state = random_state()
    x = np.random.default_rng(0).random((6, 32, 32, 3)).astype(np.float32)
    _, z = reference_logits(state, x)
    centers = torch.cat([z, z.flip(1)])[:10] + 0.05
    variance = z.var(dim=0).sum()
    saved = {
        "state_dict": state, "test_acc": 91.0, "epoch": 24, "cluster_centers": centers,
        "cluster_classes": torch.arange(10) // 2, "variance": variance.expand(10).clone(),
        "normalize_probs": kept, "K": 2, "L": limit,
    }  # fmt: skip
    torch.save(saved, tmp_path / "checkpoint.pth")
    clf = door.from_torch(tmp_path / "checkpoint.pth", mean=MEAN, std=STD)
    squared = ((z[:, None] - centers[None]) ** 2).sum(-1)
    scores = torch.exp(-0.5 * squared / variance)
    assert_close(torch.log(scores.view(6, 5, 2).sum(-1)), clf.logits(x))
    if kept:  # all but the largest are dropped
        scores = scores * (scores >= scores.topk(limit, dim=1).values[:, -1:])
    assert clf.nearest == (4 if kept and limit == 4 else 0)
    assert_close(scores.view(6, 5, 2).sum(-1), clf.scores(x))
    linear = door.from_torch(tmp_path / "checkpoint.pth", mean=MEAN, std=STD, head="linear")
    assert linear.clusters is None and linear.nearest == 0
    other = Clusters(jnp.asarray(centers.numpy()).reshape(5, 2, -1) + 1, jnp.float32(2.0))
    given = door.from_torch(saved, mean=MEAN, std=STD, clusters=other, nearest=3)
    assert given.clusters is other and given.nearest == 3


@pytest.mark.parametrize("clustered", [False, True], ids=["linear", "clusters"])
@pytest.mark.parametrize("name", READABLE)
def test_there_and_back_is_the_same_classifier(name, clustered, tmp_path):
    """Bit for bit: parameters, statistics, clusters, and all that is needed to rebuild the network."""
    clf = classifier(name, clustered, nearest=4 if clustered else 0)
    torch.save(door.checkpoint(clf), tmp_path / "model.pt")
    again = door.from_torch(tmp_path / "model.pt")
    assert again.net.input_shape == clf.net.input_shape and again.bounds == clf.bounds
    assert again.nearest == clf.nearest and models.name_of(again.net) == name
    jax.tree.map(np.testing.assert_array_equal, again.variables, clf.variables)
    if clf.clusters is None:
        assert again.clusters is None
    else:
        valid = np.asarray(clf.clusters.valid)
        np.testing.assert_array_equal(again.clusters.valid, valid)
        np.testing.assert_array_equal(again.clusters.variance, clf.clusters.variance)
        np.testing.assert_array_equal(
            np.asarray(again.clusters.centroids)[valid], np.asarray(clf.clusters.centroids)[valid]
        )
    x = images(clf.net)
    np.testing.assert_array_equal(again.logits(x), clf.logits(x))
    np.testing.assert_array_equal(again.deployed(x), clf.deployed(x))


def test_a_lipschitz_network_is_not_read_back():
    with pytest.raises(UserError, match="lip_sll can be exported to PyTorch, but not read back"):
        door.from_torch(door.checkpoint(classifier("lip_sll", False)))


def test_stages_are_those_of_the_models():
    built = {name: models.build(name, **IMAGES).module.stages for name in clustr_torch.STAGES}
    assert built == clustr_torch.STAGES


# The file


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


def test_a_file_of_another_kind_is_refused(tmp_path):
    torch.save({"state_dict": random_state()}, tmp_path / "theirs.pth")
    (tmp_path / "text.pt").write_text("no model\n")
    for name in ("theirs.pth", "text.pt"):
        with pytest.raises(ValueError, match=f"{name} is no model that clustr_jax exported") as caught:
            clustr_torch.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="text.pt as a file of torch.save"):
        door.from_torch(tmp_path / "text.pt", mean=MEAN, std=STD)
    with pytest.raises(UserError, match="missing.pt as a file of torch.save"):
        door.from_torch(tmp_path / "missing.pt", mean=MEAN, std=STD)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="list.pt holds a list; expected a dict"):
        door.from_torch(tmp_path / "list.pt", mean=MEAN, std=STD)


# Mistakes


def without(name):
    return lambda state: {k: v for k, v in state.items() if k != name}


MISTAKES = {
    "a missing layer": (without("layer3.1.conv2.weight"), {}, r"layer3.1.conv2.weight is missing"),
    "no head": (without("linear.weight"), {}, "linear.weight is missing"),
    "one too much": (lambda s: s | {"fc.weight": s["linear.weight"]}, {}, "fc.weight is in this state_dict"),
    "another width": (
        lambda s: s | {"layer2.0.conv1.weight": torch.zeros(9, 4, 3, 3)}, {},
        r"layer2.0.conv1: kernel of shape \(3, 3, 4, 9\) .*, expected \(3, 3, 4, 8\)",
    ),
    "another network": (
        lambda s: {"features.0.weight": s["conv1.weight"]}, {}, "ResNet-18 .* none, first name features.0"
    ),
    "fewer blocks": (
        lambda s: {k: v for k, v in s.items() if not k.startswith("layer4.1")}, {}, r"stage \[2, 2, 2, 1\]"
    ),
    "no parameters": (lambda s: {}, {}, "got blocks per stage none, first name none"),
    "no mean": (lambda s: s, dict(mean=None), "give both, in .0, 1. units"),
    "a mean too much": (lambda s: s, dict(mean=(0.1,) * 4), "mean must have 1 or 3 values"),
    "a std of zero": (lambda s: s, dict(std=(0.0,)), "std must be > 0"),
    "no clusters": (lambda s: s, dict(head="clusters"), "no clusters in this file"),
    "an unknown head": (lambda s: s, dict(head="both"), "head must be linear, clusters or None, got 'both'"),
    "a class without clusters": (
        lambda s: {
            "state_dict": s, "cluster_centers": torch.zeros(4, 32), "cluster_classes": torch.arange(4),
            "variance": torch.ones(4),
        }, {}, "clusters cannot be read: there are 5 classes, and at least one has no cluster",
    ),
    "several variances": (
        lambda s: {
            "state_dict": s, "cluster_centers": torch.zeros(5, 32), "cluster_classes": torch.arange(5),
            "variance": torch.arange(5) + 1.0,
        }, {}, "variance must be one positive value",
    ),
    "clusters of other classes": (
        lambda s: s, dict(clusters=Clusters(jnp.zeros((4, 1, 32)), jnp.ones(()))), "clusters of 4 classes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_told_in_one_line(what):
    change, settings, message = MISTAKES[what]
    with pytest.raises(UserError, match=message) as caught:
        door.from_torch(change(random_state()), **{"mean": MEAN, "std": STD} | settings)
    assert "\n" not in str(caught.value)


def test_the_command(capsys, tmp_path):
    """Its own mistakes; that it exports a run is tested with a run, in test_run.py's way."""
    assert door.main([str(tmp_path / "none"), f"--out={tmp_path / 'model.pt'}"]) == 2
    assert capsys.readouterr().err.startswith("error: no finished stage in ")
    assert not pathlib.Path(tmp_path / "model.pt").exists()
