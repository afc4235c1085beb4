"""To PyTorch and back: the authors' layout, and state dicts that are refused.

The reference for the layout is a ResNet-18 written here with torch.nn.functional on the names of
kuangliu's state_dict.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402

from clustr_jax import models  # noqa: E402
from clustr_jax.clusters import Clusters  # noqa: E402
from clustr_jax.doors import clustr_torch  # noqa: E402
from clustr_jax.doors import pytorch as door  # noqa: E402
from clustr_jax.runtime.errors import UserError  # noqa: E402
from torch_networks import IMAGES, READABLE, assert_close, classifier, images, to_nchw  # noqa: E402

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
            ("weight", 0.5, 1.5),
            ("bias", -0.3, 0.3),
            ("running_mean", -0.3, 0.3),
            ("running_var", 0.5, 1.5),
        ):
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


def test_a_file_knows_its_normalisation():
    """Another one would be another classifier; the same one may be said again."""
    saved = door.checkpoint(classifier("cnn", False))
    own = {name: saved["meta"][name] for name in ("mean", "std")}
    for name in own:
        other = tuple(v + 0.1 for v in own[name])
        with pytest.raises(UserError, match=f"{name}=.* is given, and the network of this file"):
            door.from_torch(saved, **own | {name: other})
    assert door.from_torch(saved, **own).net == door.from_torch(saved).net
    for name in ("model", "nearest", "bounds"):
        with pytest.raises(UserError, match="part of the description itself"):
            door.checkpoint(classifier("cnn", False), **{name: 1})


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
    with pytest.raises(UserError, match="lip_sll .*not read back"):
        door.from_torch(door.checkpoint(classifier("lip_sll", False)))


def test_stages_are_those_of_the_models():
    built = {name: models.build(name, **IMAGES).module.stages for name in clustr_torch.STAGES}
    assert built == clustr_torch.STAGES


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
