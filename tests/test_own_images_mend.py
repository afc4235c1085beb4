"""Own images: all faults are told at once, and a command mends them."""

import pathlib
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from clustr_jax import data
from clustr_jax.data import folder, mend, remarks
from own_images import SIZE, make, refused, section, write


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
        "42 images of another size or kind",
        "1 images of mode RGBA",
        "1 images of mode CMYK",
        "1 files of other kinds",
        "1 folders inside classes",
        "1 damaged images",
    ):
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
        (["none", "out"], "is no folder"),
        (["own", "own"], "is there already"),
        (["empty", "out"], "has no images in train"),
        (["broken", "out"], "can be read"),
        (["own", "out", "--size", "32"], "HEIGHTxWIDTH"),
    ):
        arguments[:2] = [str(tmp_path / name) for name in arguments[:2]]
        assert mend.main(arguments) == 2
        assert words in capsys.readouterr().err
    assert mend.main([str(tmp_path / "own"), str(tmp_path / "out"), "--size", "4x8"]) == 0
    assert folder.read(tmp_path / "out").train.images.shape == (12, 4, 8, 3)


def test_mend_takes_a_folder_of_classes_for_train(tmp_path, rng):
    make(tmp_path / "own", rng, test=())
    assert mend.main([str(tmp_path / "own" / "train"), str(tmp_path / "out")]) == 0
    assert folder.read(tmp_path / "out").sha == folder.read(tmp_path / "own").sha


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (("training", "test"), "training, test"),
        (("testing", "train"), "testing, train"),
        (("val", "test"), "val"),
        (("val", "valid", "train"), "which all mean val"),
        (("Train", "train"), "which all mean train"),
    ],
)
def test_no_split_is_taken_for_a_class_and_none_is_lost(folders, named, tmp_path, rng, capsys):
    for split in folders:
        for name in ("cat", "dog"):
            write(tmp_path / "own" / split / name / "0.png", rng.integers(0, 256, SIZE, np.uint8))
    assert mend.main([str(tmp_path / "own"), str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert named in told and told.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("largest", "shift"), [(300, 8), (255, 0)])
def test_all_files_of_16_bits_keep_the_same_8(largest, shift, tmp_path):
    """By the largest level of all of them: darker images are no brighter than others."""
    levels = (200, 255, 256 if shift else 7, largest)
    for i, level in enumerate(levels):
        place = tmp_path / "own" / "train" / "c" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), level, np.uint16)).save(place)
    assert mend.main([str(tmp_path / "own"), str(tmp_path / "out")]) == 0
    found = [np.asarray(Image.open(tmp_path / "out" / "train" / "c" / f"{i}.png")) for i in range(4)]
    assert [int(image.max()) for image in found] == [level >> shift for level in levels]
