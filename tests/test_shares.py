"""Which images a subset has: every class its share, and no image on two sides of a split."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clustr_jax import data
from clustr_jax.data import remarks, shares
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import DataSettings
from clustr_jax.stages import refusals
from configs import cifar10, digits
from own_images import SIZE, make, refused, section

# Classes without images


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=30).map(np.array),
    share=st.floats(0, 1),
    least=st.integers(0, 1),
    keep=st.integers(0, 1),
)
def test_quotas(counts, share, least, keep):
    """The sum, the bounds, and the proportions where no bound is in their way."""
    size = round(share * counts.sum())
    quota = shares.quotas(counts, size, least=least, keep=keep)
    most = np.maximum(counts - keep, 0)
    assert (quota >= 0).all() and (quota <= most).all()
    assert quota.sum() == min(size, most.sum())
    if least and size >= np.count_nonzero(counts):
        assert (quota[most > 0] > 0).all()
    if not least and not keep and counts.sum():
        assert (abs(quota - counts * size / counts.sum()) < 1).all()


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=80).map(np.array), share=st.floats(0.01, 1.0))
def test_where_each_class_had_its_share_the_subset_is_what_it_was(labels, share):
    """Against the rule of before: floor and largest remainders, the first of a fixed order."""
    size = max(1, round(share * len(labels)))
    counts = np.bincount(labels, minlength=5)
    exact = counts * size / len(labels)
    quota = np.floor(exact).astype(int)
    quota[np.argsort(-(exact - quota), kind="stable")[: size - quota.sum()]] += 1
    order = np.random.default_rng(0).permutation(len(labels))
    before = np.sort(np.concatenate([order[labels[order] == c][: quota[c]] for c in range(5)]))
    if (quota[counts > 0] > 0).all():
        np.testing.assert_array_equal(data.stratified(labels, size, 5), before)
        np.testing.assert_array_equal(shares.quotas(counts, size, least=1), quota)


def digest(index):
    return hashlib.sha256(np.asarray(index, "<i8").tobytes()).hexdigest()[:16]


def split_digests(config):
    train, val, test = data.splits(DataSettings.of(config.data))
    return (
        len(val),
        data.digest(val),
        data.digest(train, val, test),
        digest(data.stratified(test.labels, 1000 if len(test) > 1000 else 100, 10)),
    )


def test_the_held_out_digits_are_what_they_were():
    """Of commit 9fd55a1, as all golden values here."""
    assert split_digests(digits.get_config()) == GOLDEN["digits"]


@pytest.mark.slow
@pytest.mark.needs_cifar10
def test_the_held_out_images_of_cifar10_are_what_they_were(data_dir):
    config = cifar10.get_config()
    config.data.dir = data_dir
    assert split_digests(config) == GOLDEN["cifar10"]


GOLDEN = {
    "digits": (29, "e4d75081528d1327", "5b79f102ccd6fb5b", "4897c75245038f5e"),
    "cifar10": (1000, "26c929d0076c793a", "1ee34cf59f185617", "ea4c06cc72ec292e"),
}


@pytest.mark.parametrize(("classes", "each"), [(50, 2), (20, 3), (7, 11), (2, 2)])
def test_the_own_test_split_has_images_of_every_class(classes, each, tmp_path, rng):
    make(tmp_path, rng, train=(each,) * classes, test=())
    train, _, test = data.splits(section(tmp_path))
    left, taken = (np.bincount(s.labels, minlength=classes) for s in (train, test))
    assert (left >= 1).all() and (taken >= 1).all() and (left + taken == each).all()
    assert taken.sum() >= round(0.2 * classes * each)


@pytest.mark.parametrize("counts", [(1, 5), (5, 1, 5), (1, 1)])
def test_a_class_of_one_image_has_none_to_hold_out(counts, tmp_path, rng):
    make(tmp_path, rng, train=counts, test=())
    message = refused(tmp_path)
    assert f"class 'c{counts.index(1):02d}'" in message and "add a test folder" in message


@pytest.mark.parametrize(("each", "val_size"), [(1, 0.05), (2, 0.8)])
def test_val_size_cannot_empty_a_class(each, val_size, tmp_path, rng):
    make(tmp_path, rng, train=(each,) * 40, test=(1,) * 40)
    message = refused(tmp_path, val_size=val_size)
    assert f"data.val_size={val_size}" in message and "class 'c00'" in message and "lower it" in message


def test_val_size_takes_nothing_from_classes_of_one_image(tmp_path, rng):
    """Two large classes give what the 38 single ones cannot; the remarks name those that are not held out."""
    make(tmp_path, rng, train=(1,) * 38 + (20, 20), test=(1,) * 40)
    train, val, test = data.splits(section(tmp_path, val_size=0.05))
    assert np.bincount(train.labels, minlength=40).min() == 1 and len(val) == round(0.05 * 78)
    (note,) = remarks.of(train, val, test).notes
    assert "held out: no image of class 'c00', 'c01', 'c02' and 35 more (38 of 40 classes)" in note


@pytest.mark.parametrize(("size", "least"), [(40, 1), (60, 1), (41, 1)])
def test_train_size_keeps_every_class_that_it_can(size, least, tmp_path, rng):
    make(tmp_path, rng, train=(2,) * 39 + (60,), test=(1,) * 40)
    train = data.splits(section(tmp_path, train_size=size))[0]
    assert len(train) == size and np.bincount(train.labels, minlength=40).min() >= least


@pytest.mark.parametrize("setting", ["train_size", "val_size"])
def test_training_without_a_class_is_refused_by_name_and_setting(setting):
    labels = np.array([0, 0, 2, 2], np.int32)
    split = data.Split(np.zeros((4, *SIZE), np.uint8), labels, 4, 255.0, (0.0, 1.0), "", ("a", "b", "c", "d"))
    asked = DataSettings("folder", train_size=4 if setting == "train_size" else 0, val_size=0.1)
    with pytest.raises(
        UserError, match=rf"class 'b' has no training .*\(and 1 more of 4 classes\).*data.{setting}"
    ):
        refusals.check_classes("data", asked, split)


def test_few_attacked_images_of_many_classes_are_drawn_and_the_rest_named(tmp_path, rng):
    labels = np.repeat(np.arange(100, dtype=np.int32), 10)
    split = data.Split(
        rng.integers(0, 9, (1000, 2, 2, 1)).astype(np.uint8), labels, 100, 255.0, (0.0, 1.0), ""
    )
    index = data.stratified(labels, 20, 100)
    attacked = labels[index]
    assert len(set(attacked.tolist())) == 20 and attacked.max() > 50  # and not the first twenty
    note = remarks.of(split, split.take(slice(0, 0), ""), split, attacked=20).notes[-1]
    gone = next(c for c in range(100) if c not in attacked)
    assert note.startswith(f"eval.n=20: no image of class {gone}, ") and "(80 of 100 classes)" in note
    assert not remarks.of(split, split.take(slice(0, 0), ""), split, attacked=0).notes
    assert not remarks.of(split, split.take(slice(0, 0), ""), split, attacked=100).notes


def test_a_test_split_without_a_class_is_named(tmp_path, rng):
    make(tmp_path, rng, train=(3, 3, 3), test=(2, 2))
    (note,) = remarks.of(*data.splits(section(tmp_path))).notes
    assert "test: no image of class 'c02' (1 of 3 classes)" in note


# The same image twice


def by_hand(first, second):
    """(images of `second` that are in `first`, those of them under other labels only)."""
    there = {}
    for image, label in zip(first.images, first.labels, strict=True):
        there.setdefault(image.tobytes(), set()).add(int(label))
    same = [
        int(label) not in there[image.tobytes()]
        for image, label in zip(second.images, second.labels, strict=True)
        if image.tobytes() in there
    ]
    return len(same), sum(same)


def contradicted(split):
    """(images that are there under another label as well, their different contents)."""
    there = {}
    for image, label in zip(split.images, split.labels, strict=True):
        there.setdefault(image.tobytes(), []).append(int(label))
    several = [labels for labels in there.values() if len(set(labels)) > 1]
    return sum(map(len, several)), len(several)


@given(seed=st.integers(0, 10**6), copies=st.integers(0, 12))
def test_equal_images_are_found(seed, copies):
    rng = np.random.default_rng(seed)
    splits = [
        data.Split(
            rng.integers(0, 256, (n, 3, 3, 1)).astype(np.uint8), rng.integers(0, 3, n).astype(np.int32), 3,
            255.0, (0.0, 1.0), "",
        ) for n in (20, 8, 12)
    ]  # fmt: skip
    for _ in range(copies):
        a, b = rng.choice(3, 2)
        splits[b].images[rng.integers(len(splits[b]))] = splits[a].images[rng.integers(len(splits[a]))]
    found = remarks.of(*splits).duplicates
    assert found is not None
    names = ("train", "held_out", "test")
    for i, j in ((0, 1), (0, 2), (1, 2)):
        pair = found[f"{names[i]}/{names[j]}"]
        assert (pair["images"], pair["other_labels"]) == by_hand(splits[i], splits[j])
        assert len(pair["pairs"]) == pair["images"]
        for first, second in pair["pairs"]:
            np.testing.assert_array_equal(splits[i].images[first], splits[j].images[second])
    for name, split in zip(names, splits, strict=True):
        assert (found[name]["images"], found[name]["contents"]) == contradicted(split)
        for i, j in found[name]["pairs"]:
            np.testing.assert_array_equal(split.images[i], split.images[j])
            assert split.labels[i] != split.labels[j]
    assert bool(remarks.sentence(found)) == any(pair["images"] for pair in found.values())
    assert json.loads(json.dumps(found)) == found


def test_leaks_between_the_folders_are_said(tmp_path, rng):
    make(tmp_path, rng)
    shutil.copy(tmp_path / "train" / "c00" / "000.png", tmp_path / "test" / "c00" / "a.png")
    # other bytes in the file, the same pixels, another class
    Image.open(tmp_path / "train" / "c00" / "001.png").save(
        tmp_path / "test" / "c01" / "b.png", compress_level=0
    )
    (line,) = remarks.of(*data.splits(section(tmp_path))).lines
    assert line.startswith("duplicates: 2 test images are among the training images as well, 1 under another")


@pytest.mark.parametrize(("copies", "times"), [(1, "2 times"), (2, "3 times")])
def test_one_image_under_two_labels_is_said(copies, times, tmp_path, rng):
    """Within the training images: no leak between splits, and no label to learn."""
    make(tmp_path, rng)
    for i in range(copies):
        shutil.copy(tmp_path / "train" / "c00" / "000.png", tmp_path / "train" / "c01" / f"copy{i}.png")
    (line,) = remarks.of(*data.splits(section(tmp_path))).lines
    assert line.startswith(
        f"duplicates: 1 image is among the training images under several labels, {times} in"
    )


def test_one_image_twice_under_one_label_is_no_contradiction(tmp_path, rng):
    make(tmp_path, rng)
    shutil.copy(tmp_path / "train" / "c00" / "000.png", tmp_path / "train" / "c00" / "copy.png")
    assert not remarks.of(*data.splits(section(tmp_path))).lines


@given(
    contents=st.lists(st.integers(0, 12), min_size=6, max_size=60).map(np.array),
    seed=st.integers(0, 99),
    share=st.floats(0, 0.9),
)
def test_what_is_held_out_shares_no_content_with_what_is_left(contents, seed, share):
    labels = np.random.default_rng(seed).integers(0, 3, len(contents))
    hashes = contents.astype(np.uint64)
    quota = shares.quotas(np.bincount(labels, minlength=3), round(share * len(labels)), keep=1)
    index = shares.chosen(labels, quota, hashes)
    rest = np.setdiff1d(np.arange(len(labels)), index)
    assert not set(contents[index]) & set(contents[rest])
    assert (np.bincount(labels[rest], minlength=3) > 0)[np.unique(labels)].all()
    alone = len(np.unique(contents)) == len(contents)
    assert not alone or (np.bincount(labels[index], minlength=3) == quota).all()


@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=60).map(np.array), share=st.floats(0, 1))
def test_without_duplicates_the_same_images_are_held_out_as_ever(labels, share):
    quota = shares.quotas(np.bincount(labels, minlength=4), round(share * len(labels)), keep=1)
    hashes = np.random.default_rng(5).permutation(len(labels)).astype(np.uint64)
    np.testing.assert_array_equal(shares.chosen(labels, quota, hashes), shares.chosen(labels, quota))


@pytest.mark.parametrize("val_size", [0.0, 0.3])
def test_the_own_splits_of_a_folder_share_no_image(val_size, tmp_path, rng):
    make(tmp_path, rng, train=(12, 12), test=())
    for i in range(5):  # in the same class, and in both
        shutil.copy(tmp_path / f"train/c00/00{i}.png", tmp_path / f"train/c0{i % 2}/copy{i}.png")
    splits = data.splits(section(tmp_path, val_size=val_size))
    assert sum(map(len, splits)) == 29 and len(splits[1]) >= (5 if val_size else 0)
    found = remarks.of(*splits).duplicates
    assert found is not None and not any(found[pair]["images"] for pair in found if "/" in pair)


def test_a_class_of_one_content_is_named(tmp_path, rng):
    make(tmp_path, rng, train=(6, 1), test=())
    for i in range(1, 4):
        shutil.copy(tmp_path / "train/c01/000.png", tmp_path / f"train/c01/00{i}.png")
    assert "class 'c01' in" in (message := refused(tmp_path)) and "different pixels" in message
