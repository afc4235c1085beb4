"""What a stage of training changes, and the images that it trains on."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from clustr_jax import data
from clustr_jax.clusters import Clusters
from clustr_jax.runtime import mesh, struct
from clustr_jax.training import learned
from clustr_jax.training.sampling import Sampler

# The augmentation that turns every image in every other epoch.
ALTERNATE = "translate_alternate"


class TrainState(struct.PyTreeNode):
    """Everything that a stage changes; saved and restored as a whole. `totals` sums metrics of the epoch.

    Where the head is trained (`learned`), `clusters` is what it started from and `params` has the rest.
    """

    step: Int[Array, ""]
    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    totals: dict[str, Float[Array, ""]]
    clusters: Clusters | None = None
    sampler: Sampler | None = None
    delta: Array | None = None  # Free AT: the perturbation that is carried from batch to batch
    slow: dict | None = None  # the variables that recipe.lookahead comes back to
    average: dict | None = None  # moving average of the variables, if train.ema
    average_clusters: Clusters | None = None  # fitted on the average's embeddings

    @property
    def variables(self) -> dict:
        """What `net.eval` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def deployed(self) -> tuple[dict, Clusters | None]:
        """(variables, clusters) to evaluate: the moving average where there is one."""
        variables, clusters = self.variables, self.clusters
        if self.average is not None:
            variables, clusters = self.average, self.average_clusters
        params, clusters = learned.split(variables["params"], clusters)
        if params is variables["params"]:  # no head among them
            return variables, clusters
        return {**variables, "params": params}, clusters


class TrainSet(struct.PyTreeNode):
    """The training split on the device: uint8 images (float32 points) and labels.

    `sharded`: each device has its share of the images (`mesh.scatter`), and all have the labels.
    """

    images: Array
    labels: Int[Array, "N"]
    scale: float = struct.field(pytree_node=False)
    augment: str = struct.field(pytree_node=False)
    # images of a pass in train mode, as the authors make them (reference.switches)
    authors_batch: int = struct.field(pytree_node=False, default=125)
    sharded: bool = struct.field(pytree_node=False, default=False)

    @property
    def specs(self) -> Any:
        """For `mesh.spread`: what of it each device has."""
        if not self.sharded:
            return mesh.SAME
        return jax.tree.map(lambda _: mesh.SAME, self).replace(images=mesh.ROWS)

    def take(self, ids: Int[Array, "B"]) -> Array:
        """The images of these examples, undecoded; inside `mesh.spread` each device has ids of its own."""
        return mesh.taken(self.images, ids) if self.sharded else self.images[ids]

    def share(self) -> "TrainSet":
        """Inside `mesh.spread`, where it is sharded: this device's images as a set, the last filled up."""
        rows = self.images.shape[0]
        filled = jnp.pad(self.labels, (0, mesh.whole(rows) - self.labels.shape[0]))
        return self.replace(labels=mesh.own(filled), sharded=False)

    def batch(self, ids: Int[Array, "B"], key: Array | None = None, flips: Bool[Array, "B"] | None = None):
        """(pixels in [0, 1], labels) of these examples; augmented where there is a key.

        `flips` [B]: the images that "translate_alternate" turns, chance where there is none.
        """
        images = self.take(ids)
        if key is not None and self.augment == ALTERNATE:
            images = data.translate_flip(key, images, flips)
        elif key is not None and self.augment != "none":
            flip, crop = "flip" in self.augment, "crop" in self.augment
            images = data.crop_flip(key, images, flip=flip, crop=crop)
        return images.astype(jnp.float32) / self.scale, self.labels[ids]
