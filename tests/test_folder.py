"""Own images: what is read from a folder and from an .npz, what is refused, and a run on them.

The images of the tests are random or scikit-learn's digits, written by Pillow and read back by us.
"""

import dataclasses
import json
import os
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from sklearn.datasets import load_digits

import clustr_jax
from clustr_jax import data
from clustr_jax.data import folder
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import DataSettings
from clustr_jax.stages import configuration
from marks import in_ci
from runs import ROOT, assert_one_line, read


def write(path, pixels):
    """One image; pixels uint8 [H, W] or [H, W, 3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def flowers(root, rng, size=(6, 5, 3), test=True):
    """Two classes, 10 and 6 training images, 3 and 2 test images; returns {split: {class: pixels}}."""
    made = {}
    for split, counts in (("train", (10, 6)), ("test", (3, 2))):
        if split == "test" and not test:
            continue
        for name, count in zip(("rose", "daisy"), counts, strict=True):
            pixels = rng.integers(0, 256, (count, *size)).astype(np.uint8)
            made.setdefault(split, {})[name] = pixels
            for i, image in enumerate(pixels):
                write(root / split / name / f"{i:03d}.png", image)
    return made


def arrays(rng, classes=3, **changes):
    made = {
        "x_train": rng.integers(0, 256, (12, 6, 5, 3)).astype(np.uint8),
        "y_train": np.arange(12) % classes,
        "x_test": rng.integers(0, 256, (5, 6, 5, 3)).astype(np.uint8),
        "y_test": np.arange(5) % classes,
    }
    made |= changes
    return {name: value for name, value in made.items() if value is not None}


# What is read


def test_a_folder_of_colour_images(tmp_path, rng):
    """Classes in alphabetical order, images in that of their names, pixels as stored."""
    made = flowers(tmp_path, rng)
    (tmp_path / "train" / "rose" / ".hidden").write_text("not looked at")
    x, y = data.load("folder", "train", data_dir=str(tmp_path))
    assert x.shape == (16, 6, 5, 3) and x.dtype == np.float32 and y.dtype == np.int32
    expected = np.concatenate([made["train"]["daisy"], made["train"]["rose"]])
    np.testing.assert_array_equal(x, expected / np.float32(255))
    np.testing.assert_array_equal(y, [0] * 6 + [1] * 10)
    test = data.load_split("folder", "test", str(tmp_path))
    np.testing.assert_array_equal(test.images, np.concatenate(list(made["test"].values())[::-1]))
    assert test.class_names == ("daisy", "rose") and test.num_classes == 2
    assert (test.scale, test.bounds, test.subset) == (255.0, (0.0, 1.0), "")


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG"])
def test_grey_images_have_one_channel(suffix, tmp_path, rng):
    """Flat ones, which survive JPEG; a palette and a bitmap are spelled out."""
    for name, value in (("a", 40), ("b", 200)):
        for i in range(2):
            write(tmp_path / "train" / name / f"{i}.{suffix}", np.full((4, 4), value, np.uint8))
    found = folder.read(tmp_path)
    assert found.train.images.shape == (4, 4, 4, 1) and found.test is None
    assert np.abs(found.train.images[:2].astype(int) - 40).max() <= 1
    assert np.abs(found.train.images[2:].astype(int) - 200).max() <= 1


def test_palettes_and_bitmaps_are_spelled_out(tmp_path, rng):
    pixels = rng.integers(0, 2, (4, 4)).astype(bool)
    for name in "ab":
        write(tmp_path / "bits" / "train" / name / "0.png", pixels)
        palette = Image.fromarray((255 * pixels[..., None] * [1, 0, 1]).astype(np.uint8)).quantize(2)
        (tmp_path / "palette" / "train" / name).mkdir(parents=True)
        palette.save(tmp_path / "palette" / "train" / name / "0.png")
        assert palette.mode == "P"
    bits = folder.read(tmp_path / "bits").train.images
    np.testing.assert_array_equal(bits[0, ..., 0], 255 * pixels)
    colours = folder.read(tmp_path / "palette").train.images
    np.testing.assert_array_equal(colours[0], 255 * pixels[..., None] * [1, 0, 1])


def test_without_a_test_folder_a_fifth_of_each_class_is_held_out(tmp_path, rng):
    made = flowers(tmp_path, rng, test=False)
    train, test = (data.load_split("folder", split, str(tmp_path)) for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [5, 8] and np.bincount(test.labels).tolist() == [1, 2]
    together = {image.tobytes() for image in np.concatenate([train.images, test.images])}
    assert together == {image.tobytes() for images in made["train"].values() for image in images}
    assert "20% of the train folder" in test.subset and "no test folder" in test.subset
    again = data.load_split("folder", "test", str(tmp_path))
    np.testing.assert_array_equal(again.images, test.images)


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_an_npz(channels, tmp_path, rng):
    """uint8 [N, H, W] or [N, H, W, C], any whole-number labels; numbers for class names."""
    shape = (6, 5) if channels is None else (6, 5, channels)
    made = arrays(
        rng, x_train=rng.integers(0, 256, (12, *shape)).astype(np.uint8),
        x_test=rng.integers(0, 256, (5, *shape)).astype(np.uint8), y_test=np.zeros(5, np.uint8),
    )  # fmt: skip
    np.savez(tmp_path / "mine.npz", **made)
    for split in ("train", "test"):
        found = data.load_split("folder", split, str(tmp_path / "mine.npz"))
        np.testing.assert_array_equal(found.images.reshape(made[f"x_{split}"].shape), made[f"x_{split}"])
        np.testing.assert_array_equal(found.labels, made[f"y_{split}"])
        assert found.images.shape[1:] == (6, 5, channels or 1) and found.labels.dtype == np.int32
        assert found.num_classes == 3 and found.class_names == ()


def test_the_sha_names_the_content_and_not_the_place(tmp_path, rng):
    """The same images elsewhere have the same one; any change of a pixel, a label or a name another."""
    flowers(tmp_path / "a", rng)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shas = [folder.read(tmp_path / "a").sha]
    assert folder.read(tmp_path / "b").sha == shas[0] and re.fullmatch("[0-9a-f]{16}", shas[0])
    image = tmp_path / "b" / "test" / "rose" / "000.png"
    pixels = np.asarray(Image.open(image)).copy()
    pixels[0, 0, 0] ^= 1
    write(image, pixels)
    shas.append(folder.read(tmp_path / "b").sha)
    (tmp_path / "b" / "train" / "rose" / "000.png").rename(tmp_path / "b" / "train" / "daisy" / "zzz.png")
    shas.append(folder.read(tmp_path / "b").sha)
    for split in ("train", "test"):
        (tmp_path / "b" / split / "rose").rename(tmp_path / "b" / split / "tulip")
    shas.append(folder.read(tmp_path / "b").sha)
    shutil.rmtree(tmp_path / "b" / "test")
    shas.append(folder.read(tmp_path / "b").sha)
    assert len(set(shas)) == 5
    section = DataSettings("folder", str(tmp_path / "a"), sha=shas[0])
    assert len(data.splits(section)[0]) == 16
    section = dataclasses.replace(section, dir=str(tmp_path / "b"))
    with pytest.raises(UserError, match=f"b has changed: {shas[-1]} now, {shas[0]} when this was trained"):
        data.splits(section)


# What is refused


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


# What the config leaves to the data


def own(size, channels=3, count=40):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (count, size, size, channels)).astype(np.uint8)
    images[..., -1] = 7  # a channel of one colour
    return data.Split(images, np.arange(count, dtype=np.int32) % 2, 2, 255.0, (0.0, 1.0), "", (), "abc")


def config(method="clustr", **model):
    found = ConfigDict(dict(
        method=method, variant="", smoke=False, model=dict(name="auto", mean=(), std=()) | model,
        data=dict(name="folder", dir="x/flowers"), eval=dict(n=32),
    ))  # fmt: skip
    return found.lock()


def test_mean_and_std_are_those_of_the_training_images():
    split = own(20, count=2500)  # more than are looked at together
    found = configuration.complete(config(), split, split)
    pixels = split.images.astype(np.float64) / 255
    np.testing.assert_allclose(found.model.mean, pixels.mean(axis=(0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(found.model.std[:2], pixels.std(axis=(0, 1, 2))[:2], atol=1e-6)
    assert found.model.std[2] == 1.0  # and not 0, by which nothing can be divided
    assert found.data.sha == "abc"
    given = configuration.complete(config(mean=(0.1,), std=(0.3,)), split, split)
    assert given.model.mean == (0.1,) and given.model.std == (0.3,)
    assert json.loads(json.dumps(found.to_dict()))["data"]["sha"] == "abc"


@pytest.mark.parametrize(
    ("size", "variant", "expected"),
    [(8, "", "cnn"), (16, "cpu", "cnn"), (17, "", "resnet18"), (32, "cpu", "resnet8")],
)
def test_the_network_goes_by_the_size_of_the_images(size, variant, expected):
    c = config()
    c.variant = variant
    assert configuration.complete(c, own(size), own(size)).model.name == expected


def test_eval_n_fits_own_images_and_a_smoke_run():
    """Elsewhere too many are refused: there the sizes are known."""
    c, other = config(), dataclasses.replace(own(8), sha="")
    assert configuration.complete(c, own(8), own(8, count=9)).eval.n == 9
    assert configuration.complete(c, other, own(8, count=9)).eval.n == 32
    c.smoke = True
    assert configuration.complete(c, other, own(8, count=9)).eval.n == 9


def test_the_set_is_called_after_its_folder(tmp_path):
    c = config(method="clustr_qtrades")
    assert data.label(DataSettings.of(c.data)) == "flowers"
    assert str(configuration.default_workdir(c)) == "runs/flowers-clustr_qtrades"
    assert data.label(DataSettings(**dict(name="digits", dir="x"))) == "digits"
    # a dot is part of a folder's name; the figures of a known set are not those of own images called so
    (tmp_path / "birds.v2").mkdir()
    for place, label in (
        ("birds.v2", "birds.v2"), ("birds.v2.npz", "birds.v2"), ("cifar10", "own-cifar10"),
        ("svhn.npz", "own-svhn"), ("toy2d_pairs", "own-toy2d_pairs"),
    ):  # fmt: skip
        assert data.label(DataSettings(**dict(name="folder", dir=str(tmp_path / place)))) == label
    assert data.label(DataSettings(**dict(name="svhn", dir=""))) == "svhn_cropped"


# A run


def digits(root, per_class=12):
    """scikit-learn's digits as PNGs, in folders called zero to nine."""
    names = "zero one two three four five six seven eight nine".split()
    scans = load_digits()
    for label, name in enumerate(names):
        for i, index in enumerate(np.flatnonzero(scans.target == label)[:per_class]):
            image = (scans.images[index] * 255 / 16).astype(np.uint8)
            write(root / ("test" if i < 3 else "train") / name / f"{index}.png", image)


FOLDER = f"--config={ROOT}/configs/folder.py"


@pytest.mark.slow
@pytest.mark.parametrize("method", in_ci(["nominal", "clustr_qtrades"], "nominal"))
def test_a_run_from_a_folder(method, run, start, tmp_path):
    """Trains, evaluates, loads again; a changed folder is refused; tiny: 9 training images per class."""
    digits(tmp_path / "pngs")
    (tmp_path / "pngs" / "README.txt").write_text("not read")
    leaked = sorted((tmp_path / "pngs" / "test" / "two").iterdir())[0]
    shutil.copy(leaked, tmp_path / "pngs" / "train" / "three")
    arguments = (f"{FOLDER}:{method}", "--config.smoke=True", "--config.data.dir=pngs", "--workdir=out")
    stdout, _ = run(*arguments)
    assert "10 classes: eight, five, four, nine, one" in stdout
    assert f"{method} on pngs, cnn with" in stdout
    names = folder.read(tmp_path / "pngs").class_names
    (label, name), *_ = re.findall(r"class (\d) \((\w+)\) is predicted", stdout)
    assert names[int(label)] == name
    place = tmp_path / "out"
    kept = read(place / "config.json")
    assert kept["model"]["name"] == "cnn" and len(kept["model"]["mean"]) == 1
    assert kept["data"]["sha"] == folder.read(tmp_path / "pngs").sha
    clean = read(place / "results" / "clean.json")
    assert clean["dataset"] == "pngs" and clean["n"] == 30
    assert clean["class_names"][:3] == ["eight", "five", "four"]
    # the image on two sides, and the file that is not read: in the output, the results, the report, the card
    said = "1 test image is among the training images as well, 1 under another label"
    assert f"duplicates: {said}" in stdout and "not read: README.txt, beside train" in stdout
    for name in ("clean", "sound"):
        found = read(place / "results" / f"{name}.json")
        assert found["duplicates"]["train/test"]["images"] == 1
        assert "not read: README.txt, beside train" in found["data_notes"]
    for document in ("report.html", "MODEL_CARD.md"):
        text = (place / document).read_text(encoding="utf-8")
        assert said in text and "README.txt, beside train" in text
    clf = clustr_jax.load(place)
    with pytest.warns(UserWarning, match="not read: README.txt"):
        x, y = data.load("folder", "test", data_dir=str(tmp_path / "pngs"))
    assert float(np.mean(np.asarray(clf.predict(x)) == y)) == clean["clean"]
    stdout, _ = run(*arguments)
    assert "2_train: finished before" in stdout and "clean was done before" in stdout
    write(tmp_path / "pngs" / "train" / "one" / "more.png", np.full((8, 8), 9, np.uint8))
    process = start(*arguments)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 2
    assert_one_line(stderr)
    assert "pngs has changed since" in stderr and "put the images back, or use another --workdir" in stderr
