"""Augmentation on the device, inside the compiled step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt8

from clustr_jax.runtime import mesh

_PADDING = 4  # of the random crop
_SHIFT = 2  # pixels of a translation


def crop_flip(
    key: Array, images: UInt8[Array, "B H W C"], *, flip: bool = True, crop: bool = True
) -> UInt8[Array, "B H W C"]:
    """Random crop after zero padding by 4 on each side, and a horizontal flip of every second image.

    Of a batch that is spread over devices, each image gets what it would get in the whole.

    >>> images = jnp.ones((2, 8, 8, 1), jnp.uint8)
    >>> moved = data.crop_flip(jax.random.key(0), images)
    >>> moved.shape, moved.dtype, bool(moved.sum() < images.sum())  # zeros came in at the border
    ((2, 8, 8, 1), dtype('uint8'), True)
    """
    size = mesh.whole(images.shape[0])
    crop_key, flip_key = jax.random.split(key)
    offsets = mesh.own(jax.random.randint(crop_key, (size, 2), 0, 2 * _PADDING + 1))
    if flip:
        flipped = mesh.own(jax.random.bernoulli(flip_key, 0.5, (size, 1, 1, 1)))
        images = jnp.where(flipped, images[:, :, ::-1], images)
    if not crop:
        return images
    padded = jnp.pad(images, ((0, 0), (_PADDING, _PADDING), (_PADDING, _PADDING), (0, 0)))
    return _windows(padded, offsets, images.shape)


def translate_flip(
    key: Array, images: UInt8[Array, "B H W C"], flips: Bool[Array, "B"] | None = None
) -> UInt8[Array, "B H W C"]:
    """Shift by up to 2 pixels each way, mirrored at the border, and a flip of those in `flips` (None: half).

    Of a batch that is spread over devices, each image gets what it would get in the whole; `flips` are those
    of the device's own images.

    >>> images = jnp.arange(2 * 8 * 8, dtype=jnp.uint8).reshape(2, 8, 8, 1)
    >>> moved = data.translate_flip(jax.random.key(0), images, jnp.array([False, True]))
    >>> moved.shape, moved.dtype
    ((2, 8, 8, 1), dtype('uint8'))
    """
    size = mesh.whole(images.shape[0])
    shift_key, flip_key = jax.random.split(key)
    offsets = mesh.own(jax.random.randint(shift_key, (size, 2), 0, 2 * _SHIFT + 1))
    if flips is None:
        flips = mesh.own(jax.random.bernoulli(flip_key, 0.5, (size,)))
    images = jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)
    border = (_SHIFT, _SHIFT)
    return _windows(jnp.pad(images, ((0, 0), border, border, (0, 0)), mode="reflect"), offsets, images.shape)


def _windows(images, offsets, shape):
    """Of each image the window [H, W] that begins at its offset."""

    def window(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), shape[1:])

    return jax.vmap(window)(images, offsets)
