"""Augmentation on the device, inside the compiled step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from clustr_jax.runtime import mesh

_PADDING = 4  # of the random crop


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
    height, width, channels = images.shape[1:]
    size = mesh.whole(images.shape[0])
    crop_key, flip_key = jax.random.split(key)
    offsets = mesh.own(jax.random.randint(crop_key, (size, 2), 0, 2 * _PADDING + 1))
    if flip:
        flipped = mesh.own(jax.random.bernoulli(flip_key, 0.5, (size, 1, 1, 1)))
        images = jnp.where(flipped, images[:, :, ::-1], images)
    if not crop:
        return images
    padded = jnp.pad(images, ((0, 0), (_PADDING, _PADDING), (_PADDING, _PADDING), (0, 0)))

    def window(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))

    return jax.vmap(window)(padded, offsets)
