"""Own images: what is read from a folder and from an .npz.

The images of the tests are random or scikit-learn's digits, written by Pillow and read back by us.
"""

import dataclasses
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from clustr_jax import data
from clustr_jax.data import folder
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import DataSettings
from small_folders import arrays, flowers, write


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


def test_images_keep_the_names_of_their_files(tmp_path, rng):
    """Through subsets, too, and where a fifth of train is the test; an .npz has none."""
    flowers(tmp_path, rng)
    test = data.load_split("folder", "test", str(tmp_path))
    for i, name in enumerate(test.files):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name)), test.images[i])
    assert test.take([2, 0], "").files == (test.files[2], test.files[0])
    assert test.take(slice(1, 3), "").files == test.files[1:3]
    shutil.rmtree(tmp_path / "test")
    for split in data.splits(DataSettings("folder", str(tmp_path), train_size=8)):
        assert len(split.files) == len(split)
        for name, image, label in zip(split.files, split.images, split.labels, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name)), image)
            assert name.split("/")[1] == split.class_names[label]
    np.savez(tmp_path / "set.npz", **arrays(rng))
    assert data.load_split("folder", "test", str(tmp_path / "set.npz")).files == ()


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
        rng,
        x_train=rng.integers(0, 256, (12, *shape)).astype(np.uint8),
        x_test=rng.integers(0, 256, (5, *shape)).astype(np.uint8),
        y_test=np.zeros(5, np.uint8),
    )
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
