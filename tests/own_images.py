"""Folders of random images and files of arrays, and what is said of them."""

import unicodedata

import numpy as np
import pytest
from PIL import Image

from clustr_jax import data
from clustr_jax.runtime.errors import LONGEST, UserError
from clustr_jax.settings import DataSettings

SIZE = (6, 5, 3)
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def write(path, pixels):
    """One image; pixels uint8 [H, W] or [H, W, 3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make(root, rng, train=(6, 6), test=(3, 3), names=None, size=SIZE, val=()):
    """An image folder with so many random images in each class."""
    for split, counts in (("train", train), ("test", test), ("val", val)):
        for c, count in enumerate(counts):
            for i in range(count):
                name = names[c] if names else f"c{c:02d}"
                write(root / split / name / f"{i:03d}.png", rng.integers(0, 256, size, np.uint8))
    return root


def section(root, **changes):
    """The data section of a config about own images."""
    return DataSettings("folder", str(root), **changes)


def refused(root, **changes):
    """The message of the UserError that reading it raises: one line, short, and about `root`."""
    with pytest.raises(UserError) as caught:
        data.splits(section(root, **changes))
    message = str(caught.value)
    assert "\n" not in message and len(message) < LONGEST
    return message


def arrays(rng, **changes):
    made = {"x_train": rng.integers(0, 256, (12, *SIZE)).astype(np.uint8), "y_train": np.arange(12) % 3}
    made |= {"x_test": rng.integers(0, 256, (5, *SIZE)).astype(np.uint8), "y_test": np.arange(5) % 3}
    return {name: value for name, value in (made | changes).items() if value is not None}
