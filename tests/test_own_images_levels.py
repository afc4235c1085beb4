"""Own images whose levels are not 0 to 255, and splits that are hidden: each is said."""

import numpy as np
import pytest
from PIL import Image

from clustr_jax import data
from clustr_jax.data import folder, remarks
from own_images import arrays, make, section, write


def noted(root):
    return remarks.of(*data.splits(section(root))).lines


@pytest.mark.parametrize("most", [1, 16, 100])
@pytest.mark.parametrize("splits", [("train", "test"), ("test",), ("train",)])
def test_images_without_a_bright_pixel_are_told(tmp_path, rng, most, splits):
    root = make(tmp_path / "set", rng)
    for split in splits:
        for file in (root / split).rglob("*.png"):
            write(file, (np.asarray(Image.open(file)) * (most / 255)).astype(np.uint8))
    told = [line for line in noted(root) if "brightest pixel" in line]
    assert len(told) == 1
    for split in ("train", "test"):
        assert (f"in {split}" in told[0]) == (split in splits)


def test_arrays_without_a_bright_pixel_are_told(tmp_path, rng):
    made = arrays(rng)
    for change in ("x_train", "x_test"):
        path = tmp_path / f"{change}.npz"
        np.savez(path, **(made | {change: made[change] // 16}))
        assert f"15 in {change[2:]}, of 255" in folder.read(path).notes[0]


def test_bright_images_are_not_told_of(tmp_path, rng):
    assert not noted(make(tmp_path / "set", rng))


@pytest.mark.parametrize("name", [".test", ".val", ".more"])
def test_hidden_splits_are_told(tmp_path, rng, name):
    root = make(tmp_path / "set", rng)
    (root / "test").rename(root / name)
    assert any("6 hidden images" in line and name in line for line in noted(root))
