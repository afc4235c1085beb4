"""Where the training images lie: all of them on every device, or sharded by rows, each device its share.

Either way the same images are drawn, and every figure is the same bit for bit (tests/test_placement.py).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from clustr_jax.runtime import memory, mesh, processes
from clustr_jax.runtime.errors import UserError, nearest

# What data.placement can be.
AUTO, EVERY_DEVICE, SHARDED = "auto", "every_device", "sharded"
KNOWN = (AUTO, EVERY_DEVICE, SHARDED)
# "auto" shards what would take more of a device's memory than this: network and activations need the rest.
_SHARE = 0.25
# Or more bytes than this, where a device does not tell its memory.
_UNTOLD = 2**30


@dataclasses.dataclass(frozen=True)
class Placement:
    """What was chosen for the images of one training split: `whole` bytes, on so many devices."""

    sharded: bool = False
    whole: int = 0
    devices: int = 1

    @property
    def each(self) -> int:
        """Bytes of images that one device holds."""
        return -(-self.whole // self.devices) if self.sharded else self.whole

    @property
    def name(self) -> str:
        """As the setting has it: "every_device" or "sharded"."""
        return SHARDED if self.sharded else EVERY_DEVICE

    def put(self, images: np.ndarray) -> Array:
        """Images [N, ...] on the devices of the current mesh; sharded ones are filled up (`mesh.scatter`)."""
        return mesh.scatter(images) if self.sharded else mesh.place(jnp.asarray(images))

    def __str__(self):
        """One line."""
        whole, each = memory.gigabytes(self.whole), memory.gigabytes(self.each)
        if self.sharded:
            return f"training images: {whole}, sharded by rows: {each} on each of {self.devices} devices"
        return f"training images: {whole} on every device"


def of(section: str, asked: str, whole: int, devices: int) -> Placement:
    """The placement of `whole` bytes of images on so many devices.

    Args:
        section: of the config, for messages: data or pretrain.
        asked: its `placement`. "auto" shards what is more than a quarter of a device's memory, or than 1 GiB
            where that is not known. The memory of a CPU is shared by its devices.
        whole: bytes of the training images as they are kept (uint8).
        devices: how many there are; with one there is nothing to share.

    Raises:
        UserError: for an unknown word, and for images that the memory of the devices cannot hold.
    """
    if asked not in KNOWN:
        known = ", ".join(KNOWN)
        raise UserError(f"{section}.placement must be one of {known}, got {asked!r}{nearest(asked, KNOWN)}")
    limit = _limit(devices)
    sharded = asked == SHARDED or (asked == AUTO and whole > (_UNTOLD if limit is None else _SHARE * limit))
    found = Placement(sharded and devices > 1, whole, devices)
    if limit is not None and found.each > limit:
        remedy = f"set {section}.placement={SHARDED}"
        if found.sharded or devices == 1:
            remedy = f"use more devices, or fewer or smaller images ({section}.train_size)"
        raise UserError(
            f"{section}: {memory.gigabytes(whole)} of training images are {memory.gigabytes(found.each)} for "
            f"each of {devices} devices, which have {memory.gigabytes(limit)} each; {remedy}"
        )
    return found


def _limit(devices: int) -> int | None:
    """Bytes that one device may take, the leader's number; None where it is not told."""
    limit = memory.of_device()
    if limit is not None and jax.default_backend() == "cpu":
        limit //= max(1, devices // jax.process_count())
    mebibytes = processes.agree([-1 if limit is None else limit // 2**20])[0]
    return None if mebibytes < 0 else mebibytes * 2**20
