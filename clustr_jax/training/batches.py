"""One training batch, as objectives and adversaries see it."""

from jaxtyping import Array, Bool, Float, Int

from clustr_jax.runtime import struct


class Batch(struct.PyTreeNode):
    """One training batch. Magnet batches are M x S rows of clusters, flattened to B = M S.

    On a mesh x, y and mask are those of one device.
    """

    x: Float[Array, "B ..."]
    y: Int[Array, "B"]
    mask: Bool[Array, "B"]
    classes: Int[Array, "M"] | None = None
