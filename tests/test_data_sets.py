"""Data sets by name: shapes, ranges, what each holds, and TFDS's files."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from clustr_jax import data
from clustr_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


# Digits and toy2d


@pytest.mark.parametrize(("split", "count"), [("train", 1438), ("test", 359)])
def test_digits_are_the_scans_of_scikit_learn(split, count):
    """float32 [N, 8, 8, 1] in [0, 1], every fifth scan a test image."""
    x, y = data.load("digits", split)
    assert x.shape == (count, 8, 8, 1) and x.dtype == np.float32
    assert y.shape == (count,) and y.dtype == np.int32
    assert x.min() == 0.0 and x.max() == 1.0
    scans = load_digits()
    chosen = [i for i in range(1797) if (i % 5 == 4) == (split == "test")]
    np.testing.assert_array_equal(x[..., 0], (scans.images[chosen] / 16).astype(np.float32))
    np.testing.assert_array_equal(y, scans.target[chosen])


@pytest.mark.parametrize("name", ["toy2d", "toy2d_moons", "toy2d_pairs"])
def test_toy2d_is_two_balanced_classes_of_points_without_a_box(name):
    x, y = data.load(name, "train")
    assert x.shape == (1000, 2) and x.dtype == np.float32 and y.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(y), [500, 500])
    assert data.load(name, "test")[0].shape == (500, 2)
    assert data.load_split(name, "train").bounds is None
    assert np.isfinite(x).all() and x.min() < 0 and x.max() > 1  # points, not pixels
    again, _ = data.load(name, "train")
    np.testing.assert_array_equal(again, x)  # the same set in every run
    test, _ = data.load(name, "test")
    assert not set(map(bytes, test)) & set(map(bytes, x))


def test_toy2d_moons_lie_on_their_half_circles():
    """Class 0 around the upper half of the unit circle, class 1 around the lower half shifted by (1, 0.5)."""
    x, y = data.load("toy2d_moons", "train")
    x = x.astype(np.float64)
    upper, lower = x[y == 0], x[y == 1] - [1.0, 0.5]
    for points, sign in ((upper, 1), (lower, -1)):
        assert abs(np.linalg.norm(points, axis=1) - 1).max() < 0.5  # noise of 0.1: 5 standard deviations
        assert (sign * points[:, 1] > -0.5).all()
    np.testing.assert_array_equal(data.load("toy2d", "train")[0], data.load("toy2d_moons", "train")[0])


def test_toy2d_pairs_are_opposite_corners():
    """No line separates the classes: each lies on two opposite corners of a square."""
    x, y = data.load("toy2d_pairs", "train")
    corners = {tuple(corner) for corner in np.sign(x[y == 0]).astype(int)}
    counts = [np.mean(np.sign(x[:, 0]) == np.sign(x[:, 1])) for x in (x[y == 0], x[y == 1])]
    assert counts[0] > 0.99 and counts[1] < 0.01  # same sign against opposite signs, 4 standard deviations
    assert {(1, 1), (-1, -1)} <= corners


# Names


@pytest.mark.parametrize("name", ["digit", "toy2d_rings", "cifar", ""])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match="unknown data set") as caught:
        data.load(name, "train")
    assert ("toy2d_pairs" if name.startswith("toy2d") else "svhn_cropped") in str(caught.value)


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match="train or test, got 'validation'"):
        data.load("digits", "validation")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "svhn_cropped"])
def test_an_unprepared_set_is_named_when_it_cannot_be_downloaded(name, tmp_path, monkeypatch):
    """Without TensorFlow there is nothing to prepare it with; `svhn` is `svhn_cropped`."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda package: None if package == "tensorflow" else find_spec(package)
    )
    full_name = "svhn_cropped" if name == "svhn" else name
    for directory in (str(tmp_path), None):  # as an argument, and from the environment
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
        with pytest.raises(UserError, match=f"^{full_name} is not prepared") as caught:
            data.load(name, "test", directory)
        assert str(tmp_path) in str(caught.value) and f"clustr_jax.prepare {full_name}" in str(caught.value)


def test_the_default_folder_is_that_of_tfds(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "~/sets")
    assert data.default_data_dir() == pathlib.Path.home() / "sets"
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert data.default_data_dir() == pathlib.Path.home() / "tensorflow_datasets"


# TFDS

READ = """
import json, sys
import numpy as np
from clustr_jax import data
x, y = data.load("cifar10", sys.argv[1])
split = data.load_split("cifar10", sys.argv[1])
print(json.dumps({
    "x": [x.shape, str(x.dtype), float(x.min()), float(x.max())],
    "y": [y.shape, str(y.dtype), np.bincount(y).tolist()],
    "stored": [split.images.shape, str(split.images.dtype), split.subset, split.bounds],
    "mean": split.images.mean(axis=(0, 1, 2)).tolist(),
    "tensorflow": "tensorflow" in sys.modules,
}))
"""


@pytest.mark.needs_cifar10
@pytest.mark.parametrize(
    ("split", "per_class"), [("test", 1000), pytest.param("train", 5000, marks=pytest.mark.slow)]
)
def test_cifar10_is_read_without_tensorflow(split, per_class, data_dir):
    """The official sizes, balanced classes, the published channel means (so RGB), and no TensorFlow."""
    environment = os.environ | {"TFDS_DATA_DIR": data_dir}
    command = [sys.executable, "-c", READ, split]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found, size = json.loads(done.stdout), 10 * per_class
    assert found["x"] == [[size, 32, 32, 3], "float32", 0.0, 1.0]
    assert found["y"] == [[size], "int32", [per_class] * 10]
    assert found["stored"] == [[size, 32, 32, 3], "uint8", "", [0.0, 1.0]]
    # the train split's means are published; the test split's lie within 0.005 of them
    published = 255 * np.array([0.4914, 0.4822, 0.4465])
    np.testing.assert_allclose(found["mean"], published, atol=0.02 if split == "train" else 1.3)
    assert found["tensorflow"] is False


@pytest.mark.needs_cifar10
def test_a_truncated_file_is_named(data_dir, tmp_path):
    """A copy with half of the test file: an error that says which set and where, not array_record's own."""
    source = next(pathlib.Path(data_dir).glob("cifar10/*/dataset_info.json")).parent
    target = tmp_path / "cifar10" / source.name
    target.mkdir(parents=True)
    for file in source.iterdir():
        if "array_record" not in file.name:
            shutil.copy(file, target)
        elif "-test." in file.name:
            with file.open("rb") as whole:
                (target / file.name).write_bytes(whole.read(file.stat().st_size // 2))
    with pytest.raises(UserError, match="cannot read cifar10/test") as caught:
        data.load("cifar10", "test", str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
