"""Own images: folders laid out otherwise get a proper answer."""

import shutil
import zipfile

import numpy as np
import pytest

from own_images import SIZE, make, refused, write


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
)
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
