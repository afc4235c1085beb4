"""Own images as folders and arrays, small."""

import numpy as np
from PIL import Image


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
