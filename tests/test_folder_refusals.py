"""Own images: folders and .npz files that are refused."""

import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from clustr_jax import data
from clustr_jax.data import folder
from clustr_jax.runtime.errors import UserError
from small_folders import arrays, flowers, write


def _touch(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _cut(path):
    path.write_bytes(path.read_bytes()[:60])


def _save(path, mode, **settings):
    Image.new(mode, (5, 6)).save(path, **settings)


def _sixteen_bits():
    """A PNG of 5 x 6 colour pixels with 16 bits each, which Pillow reads and cannot write."""
    rows = b"".join(b"\0" + bytes(5 * 6) for _ in range(6))

    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", 5, 6, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def _turned():
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    return exif


FOLDERS = {
    "no such place": (lambda p: shutil.rmtree(p), "there is no .*; expected train/<class>/"),
    "no train folder": (
        lambda p: (p / "train").rename(p / "training"),
        "there is no folder .*train; expected",
    ),
    "no classes": (
        lambda p: [shutil.rmtree(p / "train" / n) for n in ("rose", "daisy")],
        "no folders of classes",
    ),
    "one class": (lambda p: [shutil.rmtree(p / s / "rose") for s in ("train", "test")], "only one class"),
    "a class without images": (
        lambda p: (p / "train" / "tulip").mkdir(),
        "class 'tulip' has no images: .*is empty",
    ),
    "an image beside the classes": (
        lambda p: _touch(p / "train" / "a.png"),
        "a.png is not in the folder of a class",
    ),
    "another kind of file": (
        lambda p: _touch(p / "train" / "rose" / "a.gif"),
        "a.gif is no .png, .jpg, .jpeg file",
    ),
    "a folder in a class": (
        lambda p: (p / "train" / "rose" / "more").mkdir(),
        "more is a folder without images in the class 'rose'; take it out",
    ),
    "an unreadable image": (
        lambda p: _touch(p / "train" / "rose" / "a.png", "x"),
        "cannot read the image .*a.png",
    ),
    "a truncated image": (lambda p: _cut(p / "test" / "rose" / "001.png"), "cannot read the image .*001.png"),
    "another size": (
        lambda p: write(p / "train" / "rose" / "005.png", np.zeros((7, 5, 3), np.uint8)),
        r"005.png is 7x5x3, 20 others \(such as .*daisy/000.png\) are 6x5x3 .*one size",
    ),
    "grey among colour": (
        lambda p: write(p / "train" / "rose" / "005.png", np.zeros((6, 5), np.uint8)),
        "005.png is 6x5x1",
    ),
    "test images of another size": (
        lambda p: [write(f, np.zeros((8, 8, 3), np.uint8)) for f in (p / "test").glob("*/*.png")],
        r"test/daisy/000.png is 8x8x3, 16 others \(such as .*train.*\) are 6x5x3 .*5 images of another size",
    ),
    "transparency": (
        lambda p: _save(p / "train" / "rose" / "a.png", "RGBA"),
        "a.png is of mode RGBA; expected 8-bit",
    ),
    "16 bits": (
        lambda p: _save(p / "train" / "rose" / "a.png", "I;16"),
        "a.png is of mode I;16; expected 8-bit",
    ),
    "16 bits of colour": (
        lambda p: (p / "train" / "rose" / "a.png").write_bytes(_sixteen_bits()),
        "a.png has 16 bits per channel; expected 8",
    ),
    "a name of another encoding": (
        lambda p: os.rename(p / "train" / "daisy", os.fsencode(p / "train") + b"/caf\xe9"),
        r"name is not UTF-8, 'caf\\udce9'; rename it",
    ),
    "CMYK": (lambda p: _save(p / "train" / "rose" / "a.jpg", "CMYK"), "a.jpg is of mode CMYK"),
    "a rotation in EXIF": (
        lambda p: _save(p / "train" / "rose" / "a.jpg", "RGB", exif=_turned()),
        "a.jpg is stored rotated",
    ),
    "a test class that is not trained": (
        lambda p: (p / "test" / "rose").rename(p / "test" / "roses"),
        "there is no class 'roses' in",
    ),
    "a class too small to hold one out": (
        lambda p: [
            shutil.rmtree(p / "test"),
            *(f.unlink() for f in (p / "train" / "daisy").glob("00[1-5].png")),
            *(f.unlink() for f in (p / "train" / "rose").glob("00[1-9].png")),
        ],
        "class '(daisy|rose)' in .* has too few images",
    ),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_folders_that_are_refused(what, tmp_path, rng):
    change, message = FOLDERS[what]
    flowers(tmp_path / "flowers", rng)
    change(tmp_path / "flowers")
    with pytest.raises(UserError, match=message) as caught:
        data.load("folder", "test", data_dir=str(tmp_path / "flowers"))
    assert "\n" not in str(caught.value) and str(tmp_path / "flowers") in str(caught.value)


def test_the_place_has_to_be_named():
    with pytest.raises(UserError, match="data.dir must name your images .--config.data.dir=PATH.: expected"):
        data.load("folder", "train")


ARRAYS = {
    "a missing array": (
        dict(y_test=None),
        "has no array y_test; expected x_train, .*got x_train, y_train, x_test",
    ),
    "float images": (
        dict(x_train=np.zeros((12, 6, 5, 3))),
        "x_train is float64; expected uint8.*multiply by 255",
    ),
    "int64 images": (dict(x_test=np.zeros((5, 6, 5, 3), int)), r"x_test is int64; .*\.astype"),
    "values of 0 and 1": (dict(x_train=np.ones((12, 6, 5, 3), np.uint8)), "x_train has no value above 1"),
    "vectors": (dict(x_train=np.full((12, 30), 9, np.uint8)), r"x_train has the shape \(12, 30\)"),
    "no images": (
        dict(x_test=np.zeros((0, 6, 5, 3), np.uint8), y_test=np.zeros(0, int)),
        r"shape \(0, 6, 5, 3\)",
    ),
    "channels first": (
        dict(x_train=np.full((12, 3, 6, 5), 9, np.uint8)),
        r"5 channels .*expected 1 or 3; channels come last",
    ),
    "two channels": (dict(x_train=np.full((12, 6, 5, 2), 9, np.uint8)), r"2 channels .*expected 1 or 3$"),
    "labels too few": (dict(y_train=np.arange(11) % 3), "x_train has 12 images, y_train 11 labels"),
    "float labels": (dict(y_train=np.arange(12.0) % 3), "y_train is float64 .*whole numbers"),
    "one-hot labels": (dict(y_train=np.eye(12, dtype=int)), r"y_train is int64 \(12, 12\)"),
    "negative labels": (dict(y_train=np.arange(12) % 3 - 1), "y_train must have classes 0 to Y-1, got -1"),
    "labels from 1": (dict(y_train=np.arange(12) % 3 + 1), "got 1 to 3 without 0"),
    "a gap": (dict(y_train=np.arange(12) % 3 * 2), "got 0 to 4 without 1"),
    "one class": (dict(y_train=np.zeros(12, int), y_test=np.zeros(5, int)), "has only one class"),
    "an unknown test class": (dict(y_test=np.arange(5)), "y_test has class 4, y_train only 0 to 2"),
    "other test images": (
        dict(x_test=np.full((5, 6, 6, 3), 9, np.uint8)),
        "are 6x5x3, the test images 6x6x3",
    ),
    "an array of objects": (dict(y_train=np.array([{}] * 12)), "cannot read .*mine.npz as an .npz file"),
}


@pytest.mark.parametrize("what", ARRAYS)
def test_arrays_that_are_refused(what, tmp_path, rng):
    changes, message = ARRAYS[what]
    np.savez(tmp_path / "mine.npz", **arrays(rng, **changes))
    with pytest.raises(UserError, match=message) as caught:
        data.load("folder", "test", data_dir=str(tmp_path / "mine.npz"))
    assert "\n" not in str(caught.value) and "mine.npz" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_files_that_are_no_npz(content, tmp_path):
    path = tmp_path / "mine.npz"
    if content is None:
        np.save(tmp_path / "mine.npy", np.zeros(3))
        path = tmp_path / "mine.npy"
    else:
        path.write_bytes(content)
    with pytest.raises(
        UserError, match="cannot read .*mine.np. as an .npz file, as np.savez writes it"
    ) as caught:
        folder.read(path)
    assert "\n" not in str(caught.value)
