"""Data sets: shapes and ranges, which images a split holds, and what augmentation does to them.

The frequencies are tested by chi-square at p > 1e-4 with fixed keys (see test_sampling.py).
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from clustr_jax import data
from clustr_jax.data import prepared
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import DataSettings
from clustr_jax.training.train_state import TrainSet

ROOT = pathlib.Path(__file__).parents[1]
PADDING = 4  # of the random crop, on each side


def split_config(name="digits", **changes):
    """The data section of a config."""
    settings = dict(name=name, dir="", train_size=0, test_size=0, val_size=0.0, augment="none")
    return DataSettings.of(settings | changes)


def rows(*splits):
    """Images and labels of these splits together, sorted: equal lists are equal sets of examples."""
    return sorted((s.images[i].tobytes(), int(s.labels[i])) for s in splits for i in range(len(s)))


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


# Subsets


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=80).map(np.array),
    share=st.floats(0.01, 1.0),
)
def test_stratified_keeps_the_proportions(labels, share):
    """Exact size, distinct sorted indices, each class within one example of its share."""
    size = max(1, round(share * len(labels)))
    index = data.stratified(labels, size, 5)
    assert len(index) == size
    assert (np.diff(index) > 0).all()
    exact = np.bincount(labels, minlength=5) * size / len(labels)
    assert (abs(np.bincount(labels[index], minlength=5) - exact) < 1).all()


@given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=80).map(np.array), fraction=st.floats(0, 1))
def test_stratified_subsets_are_nested(labels, fraction):
    """Per class the smaller of two subsets lies in the larger one, and asking again gives the same."""
    small = 1 + round(fraction * (len(labels) - 1))
    first, second = data.stratified(labels, small, 5), data.stratified(labels, len(labels) - 1, 5)
    for c in range(5):
        a, b = (set(index[labels[index] == c]) for index in (first, second))
        assert a <= b or b <= a
    np.testing.assert_array_equal(data.stratified(labels, small, 5), first)


def test_stratified_is_a_sample_not_the_first_images():
    labels = np.repeat(np.arange(2), 500)
    index = data.stratified(labels, 100, 2)
    # 50 of 500 per class: their mean position has a standard deviation of about 20
    assert abs(np.mean(index[:50]) - 249.5) < 80 and abs(np.mean(index[50:]) - 749.5) < 80


@pytest.mark.parametrize("size", [0, -1, 11])
def test_stratified_refuses_impossible_sizes(size):
    with pytest.raises(UserError, match=f"a subset of {size} was asked for, of 10 examples"):
        data.stratified(np.arange(10) % 2, size, 2)


# Splits


@pytest.mark.parametrize(
    ("name", "val_size", "held_out"),
    [("digits", 0.02, 29), ("digits", 0.1, 144), ("toy2d_moons", 0.02, 20), ("digits", 0.0, 0)],
)
def test_splits_divide_the_training_set_and_keep_the_test_set(name, val_size, held_out):
    """Train and held-out part are disjoint and together the training split; the test split is whole."""
    train, val, test = data.splits(split_config(name, val_size=val_size))
    official = data.load_split(name, "train")
    assert len(val) == held_out
    assert rows(train, val) == rows(official)
    assert rows(test) == rows(data.load_split(name, "test"))
    if held_out:
        exact = np.bincount(official.labels) * held_out / len(official)
        assert (abs(np.bincount(val.labels) - exact) < 1).all()
        # a held-out part is no subset of a benchmark
        assert train.subset == "" and test.subset == "" and val.subset


def test_splits_describe_subsets():
    train, val, test = data.splits(split_config(train_size=200, test_size=50, val_size=0.1))
    assert (len(train), len(val), len(test)) == (180, 20, 50)
    assert train.subset == "200 train" and test.subset == "50 test" and "200 train" in val.subset
    whole = data.load_split("digits", "train")
    assert set(rows(train, val)) <= set(rows(whole))
    exact = np.bincount(data.load_split("digits", "test").labels) * 50 / 359
    assert (abs(np.bincount(test.labels) - exact) < 1).all()


@pytest.mark.parametrize(("classes", "size"), [(10, 400), (250, 1000)])
def test_a_smoke_run_trains_on_some_of_every_class(classes, size, monkeypatch):
    labels = np.tile(np.arange(classes, dtype=np.int32), 50)
    whole = data.Split(np.zeros((len(labels), 1, 1, 1), np.uint8), labels, classes, 255.0, (0.0, 1.0), "")
    monkeypatch.setattr(data, "load_split", lambda *_: whole)
    section = DataSettings("many", train_size=400)
    train = data.splits(section, smoke=True)[0]
    assert len(train) == size and np.bincount(train.labels).min() >= 4
    assert len(data.splits(section)[0]) == 400  # elsewhere a size is what was asked for


def test_a_set_larger_than_the_memory_is_not_called_damaged(tmp_path, monkeypatch):
    class Builder:
        info = SimpleNamespace(splits={"train": SimpleNamespace(num_examples=50_000)})

        def as_data_source(self, split):
            raise MemoryError("Unable to allocate 143 MiB")

    monkeypatch.setattr(prepared, "_builder", lambda *_: Builder())
    with pytest.raises(UserError, match="50,000 images of cifar10/train do not fit .*143 MiB"):
        data.load_split("cifar10", "train", str(tmp_path))


def test_a_digest_names_images_and_labels_and_their_order():
    split = data.load_split("digits", "test")
    pixel = split.images.copy()
    pixel[5, 3, 3] ^= 1
    label = split.labels.copy()
    label[5] = 9 - label[5]
    others = (
        dataclasses.replace(split, images=pixel), dataclasses.replace(split, labels=label),
        split.take(slice(None, None, -1), ""), split.take(slice(0, 358), ""),
    )  # fmt: skip
    assert len({data.digest(s) for s in (split, *others)}) == 5
    assert data.digest(split) == data.digest(split.take(slice(None), "said otherwise"))
    assert data.digest(split, others[0]) != data.digest(others[0], split)


def test_subsets_do_not_depend_on_the_held_out_part():
    """The 200 images of a subset are the same with and without validation."""
    whole, nothing, _ = data.splits(split_config(train_size=200))
    train, val, _ = data.splits(split_config(train_size=200, val_size=0.1))
    assert len(nothing) == 0
    assert rows(whole) == rows(train, val)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(train_size=-1), "data.train_size must be >= 0"),
        (dict(test_size=-5), "data.test_size must be >= 0"),
        (dict(train_size=2000), "a subset of 2000 was asked for, of 1438"),
        (dict(val_size=1.0), "data.val_size"),
        (dict(val_size=-0.1), "data.val_size"),
        (dict(val_size=float("nan")), "data.val_size"),
    ],
)
def test_splits_refuse_impossible_settings(changes, message):
    with pytest.raises(UserError, match=message):
        data.splits(split_config(**changes))


def test_pixels_of_some_images():
    split = data.load_split("digits", "test")
    np.testing.assert_array_equal(split.pixels(np.array([3, 5])), split.pixels()[[3, 5]])
    assert split.pixels().dtype == np.float32


# Augmentation


def test_crop_flip_moves_each_image_uniformly_and_flips_half(key):
    """One image 4,050 times: 81 offsets x 2 flips, all equally often, nothing else.

    Every pixel has its own value (1..63), so each output is one of the 162 candidates only; 63
    pixels of a 9 x 7 image also tell height from width.
    """
    image = np.arange(1, 64, dtype=np.uint8).reshape(9, 7, 1)
    padded = {flip: np.pad(image[:, :: 1 - 2 * flip], ((4, 4), (4, 4), (0, 0))) for flip in (0, 1)}
    candidates = {
        padded[flip][top : top + 9, left : left + 7].tobytes(): (flip, top, left)
        for flip in (0, 1)
        for top in range(2 * PADDING + 1)
        for left in range(2 * PADDING + 1)
    }
    assert len(candidates) == 162
    out = np.asarray(data.crop_flip(key, np.repeat(image[None], 4050, axis=0)))
    assert out.shape == (4050, 9, 7, 1) and out.dtype == np.uint8
    counts = np.zeros((2, 9, 9), int)
    for crop in out:
        counts[candidates[crop.tobytes()]] += 1  # KeyError: not a shifted copy
    assert scipy.stats.chisquare(counts.ravel()).pvalue > 1e-4  # 25 expected in each cell
    assert scipy.stats.chisquare(counts.sum(axis=(1, 2))).pvalue > 1e-4
    assert scipy.stats.chisquare(counts.sum(axis=0).ravel()).pvalue > 1e-4


@pytest.mark.parametrize("augment", ["crop_flip", "crop", "none"])
def test_each_image_stays_itself(augment, key, rng):
    """Output i is a shifted copy of image i, all channels alike; flipped only where flips were asked for."""
    images = rng.integers(1, 256, (200, 32, 32, 3)).astype(np.uint8)
    labels = rng.integers(0, 10, 200).astype(np.int32)
    ids = rng.permutation(200)[:60]
    x, y = TrainSet(jax.numpy.asarray(images), jax.numpy.asarray(labels), scale=255.0, augment=augment).batch(
        ids, key
    )
    np.testing.assert_array_equal(y, labels[ids])
    assert x.dtype == np.float32
    flips, shifts = 0, set()
    for crop, image in zip(np.round(np.asarray(x) * 255).astype(np.uint8), images[ids], strict=True):
        # the padding is 0 and no pixel is: the rows and columns that are 0 everywhere say how far it moved
        ((top, left), (bottom, right)) = (ends(crop != 0) for ends in (_first, _last))
        patch = crop[top:bottom, left:right]
        down, along = (top or bottom - 32), (left or right - 32)  # moved by so much
        assert abs(down) <= PADDING and abs(along) <= PADDING
        straight = image[top - down : bottom - down, left - along : right - along]
        mirrored = image[:, ::-1][top - down : bottom - down, left - along : right - along]
        flipped = np.array_equal(patch, mirrored)
        assert flipped or np.array_equal(patch, straight)
        flips += flipped
        shifts.add((down, along))
    if augment == "none":
        assert shifts == {(0, 0)} and flips == 0
    else:
        assert len(shifts) > 30  # of 81; 60 draws give 42 on average
        assert flips == 0 if augment == "crop" else 15 <= flips <= 45  # 30 +- 3.9 standard deviations


def _first(present):
    """The first row and column with anything in it."""
    return np.argmax(present.any(axis=(1, 2))), np.argmax(present.any(axis=(0, 2)))


def _last(present):
    """One past the last row and column with anything in it."""
    top, left = _first(present[::-1, ::-1])
    return present.shape[0] - top, present.shape[1] - left


def test_without_a_key_nothing_is_augmented(rng):
    """Embedding the training set for k-means looks at the images themselves."""
    images = rng.integers(1, 256, (20, 32, 32, 3)).astype(np.uint8)
    train_set = TrainSet(
        jax.numpy.asarray(images), jax.numpy.zeros(20, int), scale=255.0, augment="crop_flip"
    )
    x, _ = train_set.batch(np.arange(20))
    np.testing.assert_allclose(x, images / np.float32(255), rtol=2e-7)  # XLA's division is a rounding off


def test_augmentation_follows_its_key(key, rng):
    images = rng.integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
    first = data.crop_flip(jax.random.clone(key), images)
    np.testing.assert_array_equal(data.crop_flip(jax.random.clone(key), images), first)
    assert (np.asarray(data.crop_flip(jax.random.key(1), images)) != np.asarray(first)).any()


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
