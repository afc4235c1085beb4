"""How much memory an evaluation takes, said before it starts, and how many images may be side by side.

What a backward pass keeps of one image is read off the model's own trace: nothing is compiled or computed for
it. It is an estimate: XLA keeps less where it fuses, and more where a convolution needs a work space.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from clustr_jax.attacks.attack_losses import differentiated, logits_of
from clustr_jax.runtime import memory, mesh

# Images that a slot holds beside what the model keeps: its queue, the attack's state, what has ended.
_PER_SLOT = 16
# Copies of the whole set on the host: clean, adversarial, nearest, and an attack's own of each.
_COPIES = 6
# Share of the memory that may be planned for.
_SHARE = 0.7


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes: of one image that is attacked, of all images of the set on the host, and what there is."""

    slots: int
    asked: int  # slots
    per_slot: int
    images: int
    limit: int | None
    shape: tuple[int, ...]
    count: int
    classes: int

    @property
    def needed(self) -> int:
        """All of it."""
        return self.slots * self.per_slot + self.images

    def __str__(self):
        """One line."""
        size = "x".join(map(str, self.shape))
        of = "" if self.limit is None else f" of {memory.gigabytes(self.limit)}"
        fewer = "" if self.slots == self.asked else f" (not {self.asked}: they would not fit)"
        return (
            f"memory: about {memory.gigabytes(self.needed)}{of}: {self.count} images of {size}, "
            f"{self.classes} classes, {self.slots} side by side{fewer}"
        )


def of(model: Partial, x: np.ndarray, classes: int, slots: int) -> Footprint:
    """For images x [N, ...]; at most `slots` side by side, fewer where they would not fit."""
    image = int(np.prod(x.shape[1:])) * 4
    devices = mesh.devices()
    rows = -(-slots // devices)
    per_slot = _PER_SLOT * image + _kept(model, (rows, *x.shape[1:])) // rows
    images = _COPIES * len(x) * image
    limit = memory.of_device()
    fitting = slots
    if limit is not None:
        here = jax.default_backend() == "cpu"  # elsewhere the host keeps the set
        fitting = int((_SHARE * limit - here * images) / per_slot) * (1 if here else devices)
    fitting = max(1, min(slots, fitting))
    return Footprint(fitting, slots, per_slot, images, limit, x.shape[1:], len(x), classes)


def _kept(model, shape) -> int:
    """Bytes that a backward pass through the model needs of a forward one, parameters left out."""

    def backward(model, x):
        outputs, pull_back = jax.vjp(lambda x: logits_of(model(x)), x)
        return outputs, pull_back

    with differentiated():
        kept = jax.eval_shape(backward, model, jax.ShapeDtypeStruct(shape, jnp.float32))
    own = sum(_size(leaf) for leaf in jax.tree.leaves(model))
    return max(0, sum(_size(leaf) for leaf in jax.tree.leaves(kept)) - own)


def _size(leaf: Any) -> int:
    return int(np.prod(leaf.shape)) * leaf.dtype.itemsize if hasattr(leaf, "dtype") else 0
