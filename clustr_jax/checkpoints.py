"""Checkpoints through orbax: the only file that knows its API (v1, still called experimental).

A checkpoint holds named items, so that a later stage, or a notebook, can read the model alone:
model {params, batch_stats}, clusters (if any), training {step, opt_state, totals, sampler}.
"""

import json
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from clustr_jax.clusters import Clusters
from clustr_jax.errors import UserError
from clustr_jax.sampling import Sampler

logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints of one stage, by step; the newest `keep` are kept. Writes in the background."""

    def __init__(self, directory: pathlib.Path, keep: int = 2):
        self.directory = pathlib.Path(directory).resolve()  # orbax takes absolute paths only
        policy = ocp.training.preservation_policies.LatestN(keep)
        self._manager = ocp.training.Checkpointer(
            str(self.directory),
            preservation_policy=policy,  # pyright: ignore[reportArgumentType]  orbax's own types disagree
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        found = self._manager.latest
        return None if found is None else found.step

    def save(self, state) -> None:
        """Store a TrainState; returns once the arrays are copied, the files follow (`wait`)."""
        self.wait()
        self._manager.save_checkpointables_async(int(state.step), _items(state), overwrite=True)

    def wait(self) -> None:
        """Block until the last save is on disk."""
        self._manager.wait()

    def restore(self, template):
        """The newest TrainState; `template` is one of the same structure and shapes."""
        items = self._load(_items(template))
        training = items["training"]
        raw = training["raw"] if template.average else items["model"]
        state = template.replace(
            **raw,
            step=training["step"],
            opt_state=training["opt_state"],
            totals=training["totals"],
            delta=training.get("delta"),
            average=items["model"] if template.average else None,
        )
        if template.sampler is not None:
            clusters = Clusters(**items["clusters"])
            raw_clusters = Clusters(**training["raw_clusters"]) if template.average else clusters
            state = state.replace(
                sampler=Sampler(**training["sampler"]),
                clusters=raw_clusters,
                average_clusters=clusters if template.average else None,
            )
        return state

    def model(self, abstract_variables: dict) -> dict:
        """{params, batch_stats} of the newest checkpoint, nothing else."""
        return self._load({"model": abstract_variables})["model"]

    def clusters(self, num_classes: int, k: int, embedding: int) -> Clusters:
        """The clusters of the newest checkpoint."""
        shape = jax.ShapeDtypeStruct
        abstract = {
            "centroids": shape((num_classes, k, embedding), "float32"),
            "variance": shape((), "float32"),
            "mask": shape((num_classes, k), "bool"),
        }
        return Clusters(**self._load({"clusters": abstract})["clusters"])

    def _load(self, items: dict) -> dict:
        loaded = self._manager.load_checkpointables(self.latest, _abstract(items))
        # orbax commits arrays to their device, which would compile every step a second time
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), loaded)

    def close(self) -> None:
        """Finish writing and let go of the directory."""
        self.wait()
        self._manager.close()


def _items(state) -> dict:
    """A TrainState as named items of plain dicts, so that files do not depend on our class names.

    `model` and `clusters` are what is deployed (the moving average where there is one).
    """
    model, clusters = state.deployed
    training = {"step": state.step, "opt_state": state.opt_state, "totals": state.totals}
    if state.delta is not None:
        training["delta"] = state.delta
    if state.sampler is not None:
        training["sampler"] = vars(state.sampler)
    if state.average is not None:
        training["raw"] = state.variables
        if state.clusters is not None:
            training["raw_clusters"] = vars(state.clusters)
    items = {"model": model, "training": training}
    if clusters is not None:
        items["clusters"] = vars(clusters)
    return items


def _abstract(tree):
    """Shapes and types, to be placed on this process's first device wherever the file was written."""
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)


def read_json(path: pathlib.Path) -> dict:
    """A JSON file of the work directory; UserError naming it where it is missing or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_json(path: pathlib.Path, content: dict) -> None:
    """Write in one piece: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)
