"""Own images: nothing is left out without a word, no image is on two sides.

Each kind of fault with several of its kind, through folders and .npz files.
"""

import shutil

import numpy as np
import pytest

from clustr_jax import data
from clustr_jax.data import folder, remarks
from own_images import SIZE, arrays, make, refused, section, write


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("val", "and no folder test: rename it to test"),
        ("Validation", "and no folder test: rename it to test"),
        ("DEV", "and no folder test: rename it to test"),
        ("testing", "is no folder test with test images"),
        ("Tests", "is no folder test with test images"),
        ("eval", "is no folder test with test images"),
        ("unlabeled", "has 6 images and is none of train, test and val"),
    ],
)
def test_other_splits_are_not_passed_over_for_a_fifth_of_train(name, words, tmp_path, rng):
    make(tmp_path, rng)
    (tmp_path / "test").rename(tmp_path / name)
    message = refused(tmp_path)
    assert words in message and "a fifth of train held out" in message and name in message


@pytest.mark.parametrize("name", ["test.zip", "Test.csv", "test.txt", "val.tar", "test"])
def test_files_in_place_of_a_test_folder_are_not_passed_over(name, tmp_path, rng):
    make(tmp_path, rng, test=())
    (tmp_path / name).write_text("x")
    assert f"{name} is no folder test" in refused(tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("spell", [str.upper, str.title])
def test_splits_in_another_case_are_used(split, spell, tmp_path, rng):
    make(tmp_path / "a", rng)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / split).rename(tmp_path / "b" / spell(split))
    one, other = (folder.read(tmp_path / name) for name in "ab")
    assert one.sha == other.sha and other.test is not None and other.notes == ()


@pytest.mark.parametrize("twin", ["Test", "TRAIN", "validation"])
def test_two_folders_of_one_split_are_refused(twin, tmp_path, rng):
    make(tmp_path, rng, val=(2, 2))
    if not (tmp_path / twin).exists():  # on a file system that tells them apart
        shutil.copytree(tmp_path / ("test" if twin == "Test" else "train"), tmp_path / twin)
        assert "which all mean" in refused(tmp_path)


@pytest.mark.parametrize("name", ["val", "Valid", "validation"])
@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_val_beside_test_is_what_is_held_out(kind, name, tmp_path, rng):
    """All of it, whatever data.val_size above 0; at 0 it is named as not used."""
    root = make(tmp_path / "own", rng, val=(2, 1))
    if kind == "npz":
        found = folder.read(root)
        parts = {"train": found.train, "test": found.test, "val": found.val}
        arrays = {f"x_{s}": p.images for s, p in parts.items() if p is not None}
        arrays |= {f"y_{s}": p.labels for s, p in parts.items() if p is not None}
        np.savez(tmp_path / "own.npz", **arrays)
        root = tmp_path / "own.npz"
    else:
        (root / "val").rename(root / name)
    train, val, test = data.splits(section(root, val_size=0.1))
    assert (len(train), len(val), len(test)) == (12, 3, 6)
    assert any("held out: the 3 images of val, and not data.val_size=0.1" in note for note in train.notes)
    train, val, test = data.splits(section(root))
    assert (len(train), len(val), len(test)) == (12, 0, 6)
    assert any("not used: the 3 images of val, as data.val_size is 0" in note for note in train.notes)


def test_val_is_part_of_the_sha(tmp_path, rng):
    make(tmp_path, rng, val=(2, 2))
    shas = {folder.read(tmp_path).sha}
    (tmp_path / "val" / "c00" / "000.png").unlink()
    shas.add(folder.read(tmp_path).sha)
    shutil.rmtree(tmp_path / "val")
    shas.add(folder.read(tmp_path).sha)
    assert len(shas) == 3


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("train/.rose/0.png", "1 hidden images (train/.rose)"),
        ("train/c00/.0.png", "1 hidden images (train/c00/.0.png)"),
        ("test/c01/._001.png", "1 hidden images (test/c01/._001.png)"),
        ("train/c00/.more/a/0.png", "1 hidden images (train/c00/.more)"),
        ("extra/c00/0.png", "not read: extra, beside train"),
        ("0.png", "not read: 0.png, beside train"),
    ],
)
def test_images_that_are_not_read_are_noted(place, words, tmp_path, rng):
    """Beside a test split; where the splits, the results and a warning of data.load say it."""
    make(tmp_path, rng)
    write(tmp_path / place, np.full(SIZE, 9, np.uint8))
    train, val, test = data.splits(section(tmp_path))
    assert len(train) == 12 and len(train.notes) == 1 and words in train.notes[0]
    assert words in remarks.of(train, val, test).fields["data_notes"][0]
    with pytest.warns(UserWarning) as caught:
        data.load("folder", "train", str(tmp_path))
    assert words in str(caught[0].message)


@pytest.mark.parametrize("name", ["README.txt", "labels.csv", "Thumbs.db"])
def test_stray_files_are_noted_beside_train_and_refused_inside(name, tmp_path, rng):
    make(tmp_path, rng)
    (tmp_path / name).write_text("x")
    assert folder.read(tmp_path).notes == (f"not read: {name}, beside train",)
    for place, words in (("train", "is not in the folder of a class"), ("train/c00", "is no .png, .jpg")):
        (tmp_path / place / name).write_text("x")
        assert words in refused(tmp_path)
        (tmp_path / place / name).unlink()


@pytest.mark.parametrize("extra", [("ids",), ("x_extra", "y_extra"), ("a", "b", "c", "d", "e")])
def test_arrays_that_are_not_read_are_noted(extra, tmp_path, rng):
    np.savez(tmp_path / "a.npz", **arrays(rng), **{name: np.zeros(3) for name in extra})
    (note,) = folder.read(tmp_path / "a.npz").notes
    assert note.startswith("not read: array") and extra[0] in note
    assert len(extra) < 4 or "2 more" in note
