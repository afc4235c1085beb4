"""What augmentation does to images.

The frequencies are tested by chi-square at p > 1e-4 with fixed keys (see test_sampling.py).
"""

import jax
import numpy as np
import pytest
import scipy.stats

from clustr_jax import data
from clustr_jax.training.train_state import TrainSet

PADDING = 4  # of the random crop, on each side


def test_crop_flip_moves_each_image_uniformly_and_flips_half(key):
    """One image 4,050 times: 81 offsets x 2 flips, all equally often, nothing else.

    Every pixel has its own value (1..63), so each output is one of the 162 candidates only; 63
    pixels of a 9 x 7 image also tell height from width.
    """
    image = np.arange(1, 64, dtype=np.uint8).reshape(9, 7, 1)
    padded = {flip: np.pad(image[:, :: 1 - 2 * flip], ((4, 4), (4, 4), (0, 0))) for flip in (0, 1)}
    candidates = {
        padded[flip][top : top + 9, left : left + 7].tobytes(): (flip, top, left)
        for flip in (0, 1)
        for top in range(2 * PADDING + 1)
        for left in range(2 * PADDING + 1)
    }
    assert len(candidates) == 162
    out = np.asarray(data.crop_flip(key, np.repeat(image[None], 4050, axis=0)))
    assert out.shape == (4050, 9, 7, 1) and out.dtype == np.uint8
    counts = np.zeros((2, 9, 9), int)
    for crop in out:
        counts[candidates[crop.tobytes()]] += 1  # KeyError: not a shifted copy
    assert scipy.stats.chisquare(counts.ravel()).pvalue > 1e-4  # 25 expected in each cell
    assert scipy.stats.chisquare(counts.sum(axis=(1, 2))).pvalue > 1e-4
    assert scipy.stats.chisquare(counts.sum(axis=0).ravel()).pvalue > 1e-4


@pytest.mark.parametrize("augment", ["crop_flip", "crop", "none"])
def test_each_image_stays_itself(augment, key, rng):
    """Output i is a shifted copy of image i, all channels alike; flipped only where flips were asked for."""
    images = rng.integers(1, 256, (200, 32, 32, 3)).astype(np.uint8)
    labels = rng.integers(0, 10, 200).astype(np.int32)
    ids = rng.permutation(200)[:60]
    x, y = TrainSet(jax.numpy.asarray(images), jax.numpy.asarray(labels), scale=255.0, augment=augment).batch(
        ids, key
    )
    np.testing.assert_array_equal(y, labels[ids])
    assert x.dtype == np.float32
    flips, shifts = 0, set()
    for crop, image in zip(np.round(np.asarray(x) * 255).astype(np.uint8), images[ids], strict=True):
        # the padding is 0 and no pixel is: the rows and columns that are 0 everywhere say how far it moved
        ((top, left), (bottom, right)) = (ends(crop != 0) for ends in (_first, _last))
        patch = crop[top:bottom, left:right]
        down, along = (top or bottom - 32), (left or right - 32)  # moved by so much
        assert abs(down) <= PADDING and abs(along) <= PADDING
        straight = image[top - down : bottom - down, left - along : right - along]
        mirrored = image[:, ::-1][top - down : bottom - down, left - along : right - along]
        flipped = np.array_equal(patch, mirrored)
        assert flipped or np.array_equal(patch, straight)
        flips += flipped
        shifts.add((down, along))
    if augment == "none":
        assert shifts == {(0, 0)} and flips == 0
    else:
        assert len(shifts) > 30  # of 81; 60 draws give 42 on average
        assert flips == 0 if augment == "crop" else 15 <= flips <= 45  # 30 +- 3.9 standard deviations


def _first(present):
    """The first row and column with anything in it."""
    return np.argmax(present.any(axis=(1, 2))), np.argmax(present.any(axis=(0, 2)))


def _last(present):
    """One past the last row and column with anything in it."""
    top, left = _first(present[::-1, ::-1])
    return present.shape[0] - top, present.shape[1] - left


def test_without_a_key_nothing_is_augmented(rng):
    """Embedding the training set for k-means looks at the images themselves."""
    images = rng.integers(1, 256, (20, 32, 32, 3)).astype(np.uint8)
    train_set = TrainSet(
        jax.numpy.asarray(images), jax.numpy.zeros(20, int), scale=255.0, augment="crop_flip"
    )
    x, _ = train_set.batch(np.arange(20))
    np.testing.assert_allclose(x, images / np.float32(255), rtol=2e-7)  # XLA's division is a rounding off


def test_augmentation_follows_its_key(key, rng):
    images = rng.integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
    first = data.crop_flip(jax.random.clone(key), images)
    np.testing.assert_array_equal(data.crop_flip(jax.random.clone(key), images), first)
    assert (np.asarray(data.crop_flip(jax.random.key(1), images)) != np.asarray(first)).any()
