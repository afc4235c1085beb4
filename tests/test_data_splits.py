"""Which images a split or a subset holds."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustr_jax import data
from clustr_jax.data import prepared
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import DataSettings
from data_splits import rows, split_config

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
        dataclasses.replace(split, images=pixel),
        dataclasses.replace(split, labels=label),
        split.take(slice(None, None, -1), ""),
        split.take(slice(0, 358), ""),
    )
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
