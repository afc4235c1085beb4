"""Small sets that need no download: handwritten digits, and points in the plane."""

import numpy as np

from clustr_jax.data.split import Split
from clustr_jax.runtime.errors import UserError


def digits(split: str):
    """scikit-learn's 1,797 scans of handwritten digits, 8x8, 0..16; every fifth is a test image."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    assert not isinstance(scans, tuple)  # it is one with return_X_y=True
    test = np.arange(len(scans.target)) % 5 == 4
    chosen = test if split == "test" else ~test
    images = scans.images[chosen].astype(np.uint8)[..., None]
    return Split(images, scans.target[chosen].astype(np.int32), 10, 16.0, (0.0, 1.0), "")


def points(name: str, split: str):
    """Two binary sets in the plane (those of the paper's Fig. 3 are not published).

    toy2d / toy2d_moons: two interleaved half circles; toy2d_pairs: two Gaussians per class on the
    corners of a square, classes on opposite corners.
    """
    count, seed = (1000, 0) if split == "train" else (500, 1)
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % 2).astype(np.int32)
    if name in ("toy2d", "toy2d_moons"):
        angle = rng.uniform(0, np.pi, count)
        upper = np.stack([np.cos(angle), np.sin(angle)], 1)
        lower = np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], 1)
        points = np.where(labels[:, None] == 0, upper, lower) + 0.1 * rng.standard_normal((count, 2))
    elif name == "toy2d_pairs":
        side = np.where(rng.random(count) < 0.5, 1.0, -1.0)
        centre = np.stack([side, np.where(labels == 0, side, -side)], 1)
        points = centre + 0.25 * rng.standard_normal((count, 2))
    else:
        raise UserError(f"unknown data set {name!r}; toy2d_moons and toy2d_pairs exist")
    return Split(points.astype(np.float32), labels, 2, 1.0, None, "")
