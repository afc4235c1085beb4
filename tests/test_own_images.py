"""Own images: nothing is left out without a word, every class has its share, no image is on two sides.

Each kind of fault with several of its kind, through folders and .npz files.
"""

import pathlib
import shlex
import shutil
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clustr_jax import data
from clustr_jax.data import folder, folder_images, mend, remarks
from clustr_jax.runtime import memory
from clustr_jax.runtime.errors import cut, listed, shown
from clustr_jax.stages import configuration
from own_images import COMPOSED, DECOMPOSED, SIZE, arrays, make, refused, section, write

# Left out


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


# Labels


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64, ">i4"])
def test_labels_of_any_type_are_read(dtype, tmp_path, rng):
    np.savez(tmp_path / "a.npz", **arrays(rng, y_train=(np.arange(12) % 3).astype(dtype)))
    np.testing.assert_array_equal(folder.read(tmp_path / "a.npz").train.labels, np.arange(12) % 3)


@pytest.mark.parametrize("value", [2**32, 2**32 + 1, 2**63 - 1, 2**31, 2**64 - 1, 2**53, -(2**32), -1, 3])
@pytest.mark.parametrize("name", ["y_train", "y_test", "y_val"])
def test_labels_are_checked_before_they_are_narrowed(name, value, tmp_path, rng):
    made = arrays(rng)
    made |= {"x_val": made["x_test"], "y_val": made["y_test"]}
    labels = made[name].astype(np.uint64 if value >= 2**63 else np.int64)
    labels[labels == 0] = value
    if name == "y_train" and value == 3:
        labels = np.arange(12) % 4 + (np.arange(12) % 4 > 0)  # a gap at 1
    np.savez(tmp_path / "a.npz", **(made | {name: labels}))
    assert name in refused(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("labels", "hint"),
    [
        (np.zeros((12, 1), int), ".ravel()"), (np.eye(12, dtype=int), ".argmax(1)"),
        (np.zeros(12), ".astype(np.int64)"), (np.zeros(12, bool), "whole numbers"),
    ],
)  # fmt: skip
def test_labels_in_another_form_are_refused_with_what_to_do(labels, hint, tmp_path, rng):
    np.savez(tmp_path / "a.npz", **arrays(rng, y_train=labels))
    assert hint in refused(tmp_path / "a.npz")


# Names


@pytest.mark.parametrize("first", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("second", [COMPOSED, DECOMPOSED])
def test_classes_are_compared_in_one_unicode_form(first, second, tmp_path, rng):
    for split, name in (("train", first), ("test", second)):
        for other in (name, "tea"):
            write(tmp_path / split / other / "0.png", rng.integers(0, 256, SIZE, np.uint8))
    found = folder.read(tmp_path)
    assert found.class_names == (COMPOSED, "tea") and found.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("one", "other"), [(COMPOSED, DECOMPOSED), ("tea", "tea "), ("tea", "te\u200ba"), ("a b", "a\u00a0b")]
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_two_names_that_look_alike_are_refused(split, one, other, tmp_path, rng):
    make(tmp_path, rng, names=(one, "x"))
    write(tmp_path / split / other / "0.png", np.zeros(SIZE, np.uint8))
    message = refused(tmp_path)
    assert "two folders called" in message and "merge them" in message


@pytest.mark.parametrize("other", ["Tea", "tea "])
def test_an_unknown_class_that_looks_like_a_known_one(other, tmp_path, rng):
    make(tmp_path, rng, names=("tea", "x"))
    (tmp_path / "test" / "tea").rename(tmp_path / "test" / other)
    assert "but 'tea': rename one" in refused(tmp_path)


# Memory


@pytest.mark.parametrize("kind", ["folder", "npz", "compressed npz"])
def test_memory_is_known_before_a_pixel_is_decoded(kind, tmp_path, rng, monkeypatch):
    root = make(tmp_path / "own", rng)
    if kind != "folder":
        root = tmp_path / "own.npz"
        (np.savez if kind == "npz" else np.savez_compressed)(root, **arrays(rng))
    needed = {"folder": 2 * 18, "npz": 2 * 17, "compressed npz": 2 * 17}[kind] * np.prod(SIZE)
    needed += 0 if kind == "folder" else 2 * 8 * 17  # labels
    monkeypatch.setattr(memory, "available", lambda: needed)
    folder.read(root)
    monkeypatch.setattr(memory, "available", lambda: needed - 1)

    def decode(*_):
        raise AssertionError("decoded before the memory was known")

    monkeypatch.setattr(folder_images, "_decoded", decode)
    monkeypatch.setattr(np.lib.format, "read_array", decode)
    message = refused(root)
    assert "need memory" in message and "are free; take fewer images" in message


def test_memory_that_is_not_there_after_all(tmp_path, rng, monkeypatch):
    make(tmp_path, rng)
    monkeypatch.setattr(np, "empty", lambda *_: (_ for _ in ()).throw(MemoryError("Unable to allocate")))
    assert "do not fit into memory (Unable" in refused(tmp_path)


def test_the_available_memory_is_a_plausible_number(monkeypatch, tmp_path):
    found = memory.available()
    assert found is None or 2**20 < found < 2**50
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4000000\n")
    assert memory._left(tmp_path) == [1_000_000]
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 500000\n")
    assert memory._left(tmp_path) == [1_500_000]
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._left(tmp_path) == []
    monkeypatch.setattr(memory, "_machine", lambda: None)
    monkeypatch.setattr(memory, "_groups", lambda: None)
    monkeypatch.setattr(memory, "_limit", lambda: None)
    memory.check(10**30, "where nothing is known", "nothing is refused")


@pytest.mark.parametrize("side", [8, 300, 1500])
def test_statistics_take_a_bounded_number_of_bytes(side):
    """Of images that are larger than a chunk as well; the peak is that of a chunk, not of the set."""
    import tracemalloc

    rng = np.random.default_rng(0)
    images = rng.integers(
        0, 200, (9_000 if side == 8 else 13_500_000 // (3 * side**2), side, side, 3), np.uint8
    )
    split = data.Split(images, np.zeros(len(images), np.int32), 2, 255.0, (0.0, 1.0), "")
    tracemalloc.start()
    mean, std = configuration.statistics(split)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * configuration._CHUNK_BYTES
    for c in range(3):
        levels = np.bincount(images[..., c].ravel(), minlength=256) / images[..., c].size
        expected = (levels * np.arange(256)).sum()
        deviation = np.sqrt((levels * (np.arange(256) - expected) ** 2).sum())
        np.testing.assert_allclose((mean[c], std[c]), (expected / 255, deviation / 255), atol=2e-6)


# All faults at once, and the command that mends


def test_all_faults_are_told_together_and_the_command_mends_them(tmp_path, rng, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = make(pathlib.Path("own"), rng, train=(40, 40), test=(5, 5))
    for i in range(39):
        write(root / f"train/c00/{i:03d}.png", rng.integers(0, 256, SIZE[:2], np.uint8))
    for i in range(3):
        write(root / f"train/c01/{i:03d}.png", rng.integers(0, 256, (9, 9, 3), np.uint8))
    Image.new("RGBA", (5, 6)).save(root / "train/c01/a.png")
    Image.new("CMYK", (5, 6)).save(root / "train/c01/a.jpg")
    Image.fromarray(rng.integers(0, 60000, (6, 5)).astype(np.uint16)).save(root / "train/c01/deep.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (6, 5)).save(root / "train/c01/turned.jpg", exif=exif)
    (root / "train/c01/broken.png").write_bytes(b"x")
    (root / "train/c01/notes.txt").write_text("x")
    (root / "train/c02/images").mkdir(parents=True)
    for i in range(4):
        write(root / f"train/c02/images/{i}.png", rng.integers(0, 256, SIZE, np.uint8))
    shutil.copy(root / "train/c01/020.png", root / "test/c01/leak.png")
    message = refused(root)
    for count in (
        "42 images of another size or kind", "1 images of mode RGBA", "1 images of mode CMYK",
        "1 files of other kinds", "1 folders inside classes", "1 damaged images",
    ):  # fmt: skip
        assert count in message, message
    command = shlex.split(message.split("a copy without such: ")[1])
    assert command == ["python", "-m", "clustr_jax.data.mend", "own", "MENDED"]
    assert mend.main(command[3:]) == 0
    found = folder.read("MENDED")
    assert found.class_names == ("c00", "c01", "c02") and found.train.images.shape[1:] == SIZE
    assert np.bincount(found.train.labels).tolist() == [40, 43, 4]  # all but the broken and the leaked one
    assert found.test is not None and len(found.test.labels) == 11
    assert remarks.sentence(remarks.of(*data.splits(section("MENDED"))).duplicates) == ""


def test_faults_are_measured_against_the_commonest_shape(tmp_path, rng):
    make(tmp_path, rng)
    write(tmp_path / "train/c00/000.png", np.zeros((7, 5, 3), np.uint8))  # the first one is the odd one
    assert "c00/000.png is 7x5x3, 17 others (such as" in refused(tmp_path)


def test_photographs_of_any_size(tmp_path, rng):
    for i in range(12):
        write(tmp_path / f"train/c{i % 2}/{i}.png", np.zeros((8 + i, 9, 3), np.uint8))
    assert "12 images have 12 sizes and kinds" in refused(tmp_path)


def test_mend_refuses_what_it_cannot(tmp_path, rng, capsys):
    make(tmp_path / "own", rng)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken/train/a").mkdir(parents=True)
    (tmp_path / "broken/train/a/x.png").write_text("x")
    for arguments, words in (
        (["none", "out"], "is no folder"), (["own", "own"], "is there already"),
        (["empty", "out"], "has no images in train"), (["broken", "out"], "can be read"),
        (["own", "out", "--size", "32"], "HEIGHTxWIDTH"),
    ):  # fmt: skip
        arguments[:2] = [str(tmp_path / name) for name in arguments[:2]]
        assert mend.main(arguments) == 2
        assert words in capsys.readouterr().err
    assert mend.main([str(tmp_path / "own"), str(tmp_path / "out"), "--size", "4x8"]) == 0
    assert folder.read(tmp_path / "out").train.images.shape == (12, 4, 8, 3)


def test_mend_takes_a_folder_of_classes_for_train(tmp_path, rng):
    make(tmp_path / "own", rng, test=())
    assert mend.main([str(tmp_path / "own" / "train"), str(tmp_path / "out")]) == 0
    assert folder.read(tmp_path / "out").sha == folder.read(tmp_path / "own").sha


# Proper answers


def test_a_folder_of_images_inside_a_class(tmp_path, rng):
    make(tmp_path, rng)
    for name in ("c00", "c01"):
        files = list((tmp_path / "train" / name).iterdir())
        (tmp_path / "train" / name / "images").mkdir()
        for file in files:
            file.rename(file.parent / "images" / file.name)
    message = refused(tmp_path)
    assert "c00/images is a folder with 6 images" in message and "move them up into" in message
    assert "2 folders inside classes" in message


def _wrap(root):
    inner = root.parent / "inner"
    root.rename(inner)
    root.mkdir()
    inner.rename(root / "flowers")


def _flat(root):
    for place in sorted((root / "train").iterdir()):
        place.rename(root / place.name)
    (root / "train").rmdir()


def _loose(root):
    shutil.rmtree(root / "train")
    write(root / "a.png", np.zeros(SIZE, np.uint8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_wrap, "flowers has one: set data.dir to that"),
        (lambda p: (p / "train").rename(p / "training"), "rename .*training to train"),
        (_flat, "are the classes"),
        (_loose, "has 1 images itself"),
    ],
)  # fmt: skip
def test_folders_laid_out_otherwise(change, words, tmp_path, rng):
    import re

    root = make(tmp_path / "own", rng)
    change(root)
    message = refused(root)
    assert "there is no folder" in message and re.search(words, message), message


def test_the_train_folder_itself(tmp_path, rng):
    make(tmp_path / "own", rng)
    assert f"set data.dir to the folder above it, {tmp_path / 'own'}" in refused(tmp_path / "own" / "train")


@pytest.mark.parametrize("count", [1, 3, 20_000])
@pytest.mark.parametrize("name", ["flowers.zip", "flowers.npz"])
def test_a_zip_of_a_folder(name, count, tmp_path):
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        for i in range(count):
            archive.writestr(f"flowers/train/{'a' * 80}/{i:05d}.png", b"")
    message = refused(tmp_path / name)
    assert f"zip archive of {count:,} files" in message and "unpack it (unzip" in message


def test_a_tar_of_a_folder(tmp_path, rng):
    make(tmp_path / "own", rng)
    shutil.make_archive(str(tmp_path / "own"), "gztar", tmp_path / "own")
    assert "is a tar archive; unpack it (tar -xf)" in refused(tmp_path / "own.tar.gz")


@pytest.mark.parametrize("place", ["a" * 300, "~nobody-of-that-name/x", "nul\0", "/dev/null"])
def test_places_that_are_none(place):
    refused(place)


# Words


@given(text=st.text(max_size=400), at_most=st.integers(20, 120))
def test_a_name_in_a_message_is_printable_and_short(text, at_most):
    assert shown(text, at_most).isprintable() and len(shown(text, at_most)) <= at_most
    assert len(cut(text, at_most)) <= at_most
    assert len(text) > at_most or not text.isprintable() or shown(text, at_most) == text


def test_a_list_in_a_message_counts_the_rest():
    assert listed("abcde") == "a, b, c and 2 more" and listed("ab") == "a, b" and listed([]) == ""
