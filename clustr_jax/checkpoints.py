"""Checkpoints through orbax: the only file that knows its API (v1, still called experimental).

A checkpoint holds named items, so that a later stage, or a notebook, can read the model alone:
model {params, batch_stats}, clusters (if any), training {step, opt_state, totals, sampler}.
"""

import json
import logging
import pathlib

import jax
from orbax.checkpoint import v1 as ocp

from clustr_jax.clusters import Clusters
from clustr_jax.errors import UserError

logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints of one stage, by step; the newest `keep` are kept. Writes in the background."""

    def __init__(self, directory: pathlib.Path, keep: int = 2):
        self.directory = pathlib.Path(directory).resolve()  # orbax takes absolute paths only
        policy = ocp.training.preservation_policies.LatestN(keep)
        self._manager = ocp.training.Checkpointer(
            self.directory, preservation_policy=policy, cleanup_tmp_directories=True
        )

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        found = self._manager.latest
        return None if found is None else found.step

    def save(self, state) -> None:
        """Store a TrainState; returns once the arrays are copied, the files follow (`wait`)."""
        items = {
            "model": state.variables,
            "training": {
                "step": state.step,
                "opt_state": state.opt_state,
                "totals": state.totals,
                "sampler": _plain(state.sampler),
            },
        }
        if state.clusters is not None:
            items["clusters"] = _plain(state.clusters)
        self.wait()
        self._manager.save_checkpointables_async(int(state.step), items, overwrite=True)

    def wait(self) -> None:
        """Block until the last save is on disk."""
        self._manager.wait()

    def restore(self, template):
        """The newest TrainState; `template` is one of the same structure (clusters and sampler apart)."""
        step = self.latest
        items = self._manager.load_checkpointables(
            step,
            {
                "model": _abstract(template.variables),
                "training": _abstract(
                    {
                        "step": template.step,
                        "opt_state": template.opt_state,
                        "totals": template.totals,
                        "sampler": _plain(template.sampler),
                    }
                ),
                **({} if template.clusters is None else {"clusters": _abstract(_plain(template.clusters))}),
            },
        )
        training = items["training"]
        state = template.replace(
            step=training["step"],
            params=items["model"]["params"],
            batch_stats=items["model"]["batch_stats"],
            opt_state=training["opt_state"],
            totals=training["totals"],
        )
        if template.sampler is not None:
            state = state.replace(sampler=type(template.sampler)(**training["sampler"]))
        if template.clusters is not None:
            state = state.replace(clusters=Clusters(**items["clusters"]))
        return state

    def model(self, abstract_variables: dict) -> dict:
        """{params, batch_stats} of the newest checkpoint, nothing else."""
        return self._manager.load_checkpointables(self.latest, {"model": _abstract(abstract_variables)})["model"]

    def clusters(self, num_classes: int, k: int, embedding: int) -> Clusters:
        """The clusters of the newest checkpoint."""
        shape = jax.ShapeDtypeStruct
        abstract = {
            "centroids": shape((num_classes, k, embedding), "float32"),
            "variance": shape((), "float32"),
            "mask": shape((num_classes, k), "bool"),
        }
        items = self._manager.load_checkpointables(self.latest, {"clusters": abstract})
        return Clusters(**items["clusters"])

    def close(self) -> None:
        """Finish writing and let go of the directory."""
        self.wait()
        self._manager.close()


def _plain(node):
    """A struct dataclass as a dict, so that files do not depend on our class names."""
    if node is None:
        return {}
    return {name: value for name, value in vars(node).items() if value is not None}


def _abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def read_json(path: pathlib.Path) -> dict:
    """A JSON file of the work directory; UserError naming it where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def write_json(path: pathlib.Path, content: dict) -> None:
    """Write in one piece: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)
