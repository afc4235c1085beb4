"""One file and back, bit for bit; what is damaged, foreign or incomplete is told in one line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import clustr_jax
from clustr_jax import models
from clustr_jax.classifier import Classifier
from clustr_jax.clusters import Clusters
from clustr_jax.runtime.errors import UserError
from clustr_jax.storage import loading
from clustr_jax.storage import safetensors_file as door

IMAGES = dict(num_classes=3, width=4, input_shape=(8, 8, 3), mean=(0.4914, 1 / 3, 0.6), std=(0.2,))
SETTINGS = {"resnet8": IMAGES, "cnn": IMAGES, "lip_cpl": IMAGES, "mlp": IMAGES | dict(input_shape=(3,))}


def classifier(name, clustered=True, mask=True):
    """Random numbers in every array, special ones among them."""
    net = models.build(name, **SETTINGS[name])
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    fill = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), shapes)
    if not clustered:
        return Classifier(fill, None, net)
    z = jax.eval_shape(net.eval, shapes, jax.ShapeDtypeStruct((1, *net.input_shape), "float32")).embeddings
    centroids = rng.standard_normal((3, 2, z.shape[-1])).astype(np.float32)
    centroids[0, 0, :2] = np.float32(1e-42), -0.0  # a subnormal number, and a zero with a sign
    valid = jnp.asarray([[True, True], [True, False], [True, True]]) if mask else None
    clusters = Clusters(jnp.asarray(centroids), jnp.float32(1 / 3), valid)
    return Classifier(fill, clusters, net, nearest=4, bounds=None if name == "mlp" else (0.0, 1.0))


def bits(tree):
    return jax.tree.map(lambda a: (str(a.dtype), a.shape, np.asarray(a).tobytes()), tree)


@pytest.mark.parametrize("clustered", [False, True], ids=["linear", "clusters"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_round_trip_is_bit_identical(name, clustered, tmp_path):
    clf = classifier(name, clustered)
    door.save(clf, tmp_path / "some" / "model.safetensors", seed=3)
    again = clustr_jax.load(tmp_path / "some" / "model.safetensors")
    assert again.net == clf.net and (again.nearest, again.bounds) == (clf.nearest, clf.bounds)
    assert bits(again.variables) == bits(clf.variables) and bits(again.clusters) == bits(clf.clusters)
    assert jax.tree.structure(again) == jax.tree.structure(clf)  # nothing compiles a second time
    assert [p.name for p in (tmp_path / "some").iterdir()] == ["model.safetensors"]
    with safetensors.safe_open(tmp_path / "some" / "model.safetensors", "numpy") as file:
        about = json.loads(file.metadata()["classifier"])
        assert about["model"] == name and about["about"] == {"seed": 3}


def test_without_a_mask(tmp_path):
    clf = classifier("mlp", mask=False)
    door.save(clf, tmp_path / "model.safetensors")
    assert door.load(tmp_path / "model.safetensors").clusters.mask is None


def test_the_head_can_be_chosen(tmp_path):
    path = tmp_path / "model.safetensors"
    door.save(classifier("mlp"), path)
    assert clustr_jax.load(path, head="clusters").nearest == 4
    linear = clustr_jax.load(str(path), head="linear")
    assert linear.clusters is None and linear.nearest == 0
    door.save(classifier("mlp", clustered=False), path)
    with pytest.raises(UserError, match="model.safetensors has no clusters; fit some"):
        clustr_jax.load(path, head="clusters")
    with pytest.raises(UserError, match="head must be clusters, linear or None, got 'both'"):
        clustr_jax.load(path, head="both")


def saved(tmp_path):
    """(path, arrays, metadata) of a saved classifier."""
    path = tmp_path / "model.safetensors"
    door.save(classifier("cnn"), path)
    with safetensors.safe_open(path, "numpy") as file:
        return path, {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("where", ["header", "first byte", "last byte", "cut", "empty"])
def test_a_damaged_file_is_refused(where, tmp_path):
    path, _, _ = saved(tmp_path)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    if where in ("cut", "empty"):
        content = content[: len(content) // 2 if where == "cut" else 0]
    else:
        content[{"header": 12, "first byte": header, "last byte": -1}[where]] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="model.safetensors (is damaged|as a safetensors file)") as caught:
        door.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["std", "nearest", "model"])
def test_a_changed_description_is_damage(what, tmp_path):
    """Other normalisation, another rule, another network: with the same arrays."""
    path, arrays, metadata = saved(tmp_path)
    about = json.loads(metadata["classifier"])
    about[what] = {"std": [9.0] * len(about["std"]), "nearest": 1, "model": "mlp"}[what]
    metadata["classifier"] = json.dumps(about)
    path.write_bytes(safetensors.numpy.save(arrays, metadata))
    with pytest.raises(UserError, match="is damaged: its arrays or description are not as they were saved"):
        door.load(path)


def test_files_of_the_format_before_are_read(tmp_path):
    path, arrays, metadata = saved(tmp_path)
    expected = door.load(path)
    metadata |= {"format": "clustr_jax-1", "sha256": door._digest(arrays, "")}
    path.write_bytes(safetensors.numpy.save(arrays, metadata))
    found = door.load(path)
    assert bits(found.variables) == bits(expected.variables) and found.net == expected.net


def change(arrays, metadata, **description):
    """Written anew, the digest as it should be: the arrays do not fit the description."""
    about = json.loads(metadata["classifier"]) | description
    about = {name: value for name, value in about.items() if value is not ...}
    text = json.dumps(about)
    return safetensors.numpy.save(
        arrays, metadata | {"classifier": text, "sha256": door._digest(arrays, text)}
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(width=8), "is not part of cnn"),
        (dict(model="resnet8"), "is not part of resnet8"),
        (dict(model="vgg"), "unknown model 'vgg'"),
        (dict(model=...), "lacks 'model'"),
        (dict(input_shape="large"), "cannot be read"),
        (dict(input_shape=[]), "takes images"),
        (dict(num_classes=4), r"params.head.* is not part of cnn"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(settings, message, tmp_path):
    path, arrays, metadata = saved(tmp_path)
    path.write_bytes(change(arrays, metadata, **settings))
    with pytest.raises(UserError, match=f"does not hold a classifier of this version: .*{message}") as caught:
        door.load(path)
    assert "\n" not in str(caught.value)


def test_missing_arrays_are_named(tmp_path):
    path, arrays, metadata = saved(tmp_path)
    for name in ("params.Conv_0.kernel", "batch_stats.BatchNorm_1.var"):
        path.write_bytes(change({k: v for k, v in arrays.items() if k != name}, metadata))
        with pytest.raises(UserError, match=f"{name} is missing"):
            door.load(path)
    path.write_bytes(change(arrays | {"clusters.centroids": np.zeros((2, 2, 16), "f")}, metadata))
    with pytest.raises(UserError, match=r"clusters of shape \(2, 2, 16\) for 3 classes"):
        door.load(path)


def test_foreign_and_missing_files_are_named(tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(UserError, match="there is no file .*other.safetensors"):
        clustr_jax.load(path)
    path.write_bytes(safetensors.numpy.save({"weight": np.zeros(3)}, {"format": "pt"}))
    with pytest.raises(UserError, match="has the format 'pt'; expected 'clustr_jax-2'"):
        clustr_jax.load(path)
    path.write_bytes(safetensors.numpy.save({"weight": np.zeros(3)}))
    with pytest.raises(UserError, match="has the format None"):
        clustr_jax.load(path)
    with pytest.raises(UserError, match="cannot write .*other.safetensors/x.safetensors"):
        door.save(classifier("mlp"), path / "x.safetensors")


def test_training_can_start_from_a_file(tmp_path):
    """config.init_from; a file of another network is refused, and says where they differ."""
    clf = classifier("cnn", clustered=False)
    door.save(clf, tmp_path / "model.safetensors")
    assert bits(loading.model_variables(tmp_path / "model.safetensors", clf.net)) == bits(clf.variables)
    other = models.build("cnn", **SETTINGS["cnn"] | {"width": 8})
    with pytest.raises(UserError, match="another network.*BatchNorm"):
        loading.model_variables(tmp_path / "model.safetensors", other)


@pytest.mark.parametrize("name", ["resnet8", "lip_cpl"])
def test_a_file_is_loaded_where_float64_is_switched_on(name, tmp_path):
    """Its arrays stay float32, and images of either type are embedded."""
    clf = classifier(name)
    door.save(clf, tmp_path / "model.safetensors")
    images = np.random.default_rng(1).uniform(size=(2, 8, 8, 3))
    with jax.enable_x64(True):
        again = clustr_jax.load(tmp_path / "model.safetensors")
        assert bits(again.variables) == bits(clf.variables)
        found = [np.asarray(again.logits(jnp.asarray(images, kind))) for kind in ("float32", "float64")]
        fresh = again.net.init(jax.random.key(0))  # its weights are what the session computes in
        assert again.net.eval(fresh, jnp.asarray(images, "float32")).logits.dtype == "float64"
    for logits in found:
        np.testing.assert_allclose(logits, clf.logits(images.astype(np.float32)), rtol=1e-3, atol=1e-3)
