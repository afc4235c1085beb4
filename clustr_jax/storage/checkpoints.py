"""Checkpoints through orbax: the only file that knows its API (v1, still called experimental).

A checkpoint holds named items, so that a later stage, or a notebook, can read the model alone:
model {params, batch_stats}, clusters (if any), training {step, opt_state, totals, sampler}.
"""

import concurrent.futures
import functools
import logging
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from clustr_jax.clusters import Clusters
from clustr_jax.runtime import processes
from clustr_jax.runtime.errors import UserError, first_line
from clustr_jax.storage import integrity
from clustr_jax.training import learned
from clustr_jax.training.sampling import Sampler
from clustr_jax.training.train_state import TrainState

# What orbax's threads log, with tracebacks, is raised as well, and told in one line.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class Checkpoints:
    """The checkpoints of one stage, by step: the newest and the best. Writes in the background.

    `identity` names the training that they belong to. Whoever trains takes over the folder (`mend`):
    what is damaged or unfinished is set aside with a line to `say`, and work goes on from the newest
    that is whole; UserError if all are damaged. Whoever only reads takes the newest whole one.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        identity: str,
        *,
        keep: int = 2,
        keep_best: int = 1,
        mend: bool = False,
        say: Callable[[str], None] = print,
    ):
        self.directory = pathlib.Path(directory).resolve()  # orbax takes absolute paths only
        self._seals, self._identity = self.directory.with_name("seals"), identity
        if mend:
            if processes.leader():
                self.directory.mkdir(parents=True, exist_ok=True)
                self._mend(say)
            processes.wait(f"{directory} is mended")
        self._keep, self._keep_best = keep, keep_best
        self._sealer = concurrent.futures.ThreadPoolExecutor(1)
        self._sealing: concurrent.futures.Future | None = None

    @functools.cached_property
    def _manager(self):
        """Made by the first write: it removes unfinished files, and reads the metrics of all checkpoints."""
        policies = ocp.training.preservation_policies
        policy = policies.AnyPreservationPolicy(
            [
                policies.LatestN(self._keep),
                policies.BestN(
                    get_metric_fn=_score, n=self._keep_best, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        return ocp.training.Checkpointer(
            str(self.directory),
            preservation_policy=policy,  # pyright: ignore[reportArgumentType]  orbax's own types disagree
            cleanup_tmp_directories=True,
        )

    def _steps(self):
        """Steps that have a folder, newest first."""
        folders = self.directory.iterdir() if self.directory.exists() else ()
        return sorted((int(p.name) for p in folders if p.name.isdigit()), reverse=True)

    def _problem(self, step):
        return integrity.problem(self.directory / str(step), self._seals / f"{step}.json", self._identity)

    def _mend(self, say):
        damaged, whole = [], False
        for step in self._steps():
            problem = self._problem(step)
            if problem is None:
                whole = True
                continue
            if problem != integrity.UNFINISHED:
                damaged.append(f"{step} ({problem})")
            place = self.directory.with_name("damaged")
            target = integrity.set_aside(self.directory / str(step), self._seals / f"{step}.json", place)
            say(f"warning: checkpoint {step} is not used: {problem}; moved to {target}")
        if damaged and not whole:
            raise UserError(
                f"no whole checkpoint in {self.directory}: {', '.join(damaged)}; "
                f"they are in {self.directory.with_name('damaged')}; run again to start this stage again"
            )

    @property
    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return next((step for step in self._steps() if self._problem(step) is None), None)

    @property
    def best(self) -> int | None:
        """The step with the best held-out accuracy; of equal ones the newest."""
        return self.best_since(0)

    def best_since(self, first: int) -> int | None:
        """The best of the steps from `first` on."""
        scored = [(_score(c.metrics), c.step) for c in self._manager.checkpoints if c.metrics]
        scored = [(score, step) for score, step in scored if step >= first]
        return max(scored)[1] if scored else self.latest

    def save(self, state: TrainState, accuracy: float | None = None) -> None:
        """Store a TrainState; returns once the arrays are copied, the files follow (`wait`).

        `accuracy` on held-out images is what `best` goes by.
        """
        self.wait()
        step = int(state.step)
        metrics = None if accuracy is None else {"val_accuracy": accuracy}
        if processes.leader():
            (self._seals / f"{step}.json").unlink(missing_ok=True)
        try:
            response = self._manager.save_checkpointables_async(
                step,
                _items(state),
                overwrite=True,
                metrics=metrics,  # pyright: ignore[reportArgumentType]
            )
        except Exception as error:  # whatever the file system, or orbax on top of it, has to say
            raise self._unwritable(error) from error
        self._sealing = self._sealer.submit(self._seal, step, response)

    def _seal(self, step, response):
        if response is not None:
            response.result()
        if not processes.leader():
            return
        integrity.seal(self.directory / str(step), self._seals / f"{step}.json", self._identity)
        for path in self._seals.glob("*.json"):  # of checkpoints that are no longer kept
            if not (self.directory / path.stem).exists():
                path.unlink()

    def wait(self) -> None:
        """Block until the last save is on disk and sealed."""
        pending, self._sealing = self._sealing, None
        try:
            if "_manager" in vars(self):
                self._manager.wait()
            if pending is not None:
                pending.result()
                processes.wait(f"{self.directory} is sealed")
        except Exception as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error):
        return UserError(
            f"cannot write a checkpoint to {self.directory}: {first_line(error)}; the one before is whole: "
            f"make room (or the folder writable) and run again"
        )

    def restore(self, template: TrainState):
        """The newest TrainState; `template` is one of the same structure and shapes."""
        items = self._load(_items(template))
        training = items["training"]
        raw = training.get("raw", items["model"])
        average = training.get("average", items["model"])
        state = template.replace(
            **raw,
            step=training["step"],
            opt_state=training["opt_state"],
            totals=training["totals"],
            delta=training.get("delta"),
            slow=training.get("slow"),
            average=average if template.average else None,
        )
        if template.clusters is not None:
            raw_clusters = training.get("raw_clusters", items.get("clusters"))
            state = state.replace(clusters=Clusters(**raw_clusters))
        if template.average_clusters is not None:
            of_average = raw_clusters if learned.HEAD in template.params else items["clusters"]
            state = state.replace(average_clusters=Clusters(**of_average))
        if template.sampler is not None:
            state = state.replace(sampler=Sampler(**training["sampler"]))
        return state

    def model(self, abstract_variables: dict, step: int | None = None) -> dict:
        """{params, batch_stats} of the checkpoint `step` (None: the newest), nothing else."""
        return self._load({"model": abstract_variables}, step)["model"]

    def clusters(self, num_classes: int, k: int, embedding: int, step: int | None = None) -> Clusters:
        """The clusters of the checkpoint `step` (None: the newest)."""
        shape = jax.ShapeDtypeStruct
        abstract = {
            "centroids": shape((num_classes, k, embedding), "float32"),
            "variance": shape((), "float32"),
            "mask": shape((num_classes, k), "bool"),
        }
        return Clusters(**self._load({"clusters": abstract}, step)["clusters"])

    def _load(self, items: dict, step: int | None = None) -> dict:
        problem = None if step is None else self._problem(step)
        if problem is not None:
            raise UserError(
                f"checkpoint {step} in {self.directory} cannot be used: {problem}; to train the stage again "
                f"from the newest whole one, delete {self.directory.parent / 'done.json'}"
            )
        step = self.latest if step is None else step
        if step is None:
            found = [f"{s} ({self._problem(s)})" for s in self._steps()]
            raise UserError(f"no whole checkpoint in {self.directory}; found: {', '.join(found) or 'none'}")
        try:
            loaded = ocp.load_checkpointables(str(self.directory / str(step)), _abstract(items))
        except (ValueError, KeyError, OSError) as error:
            raise UserError(
                f"checkpoint {step} in {self.directory} does not fit this config: {first_line(error)}"
            ) from error
        # orbax commits arrays to their device, which would compile every step a second time
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), loaded)

    def close(self) -> None:
        """Finish writing and let go of the directory."""
        try:
            self.wait()
        finally:
            self._sealer.shutdown()
            if "_manager" in vars(self):
                self._manager.close()


def _score(metrics) -> float:
    return metrics["val_accuracy"]


def _items(state) -> dict:
    """A TrainState as named items of plain dicts, so that files do not depend on the names of classes.

    `model` and `clusters` are what is deployed (the moving average where there is one, a trained head as it
    is now); `raw` and `raw_clusters`, and `average` of a trained head, are what training goes on with.
    """
    model, clusters = state.deployed
    training = {"step": state.step, "opt_state": state.opt_state, "totals": state.totals}
    if state.delta is not None:
        training["delta"] = state.delta
    if state.slow is not None:
        training["slow"] = state.slow
    if state.sampler is not None:
        training["sampler"] = {k: v for k, v in vars(state.sampler).items() if v is not None}
    trained_head = learned.HEAD in state.params
    if state.average is not None or trained_head:
        training["raw"] = state.variables
        if state.clusters is not None:
            training["raw_clusters"] = vars(state.clusters)
    if state.average is not None and trained_head:
        training["average"] = state.average
    items = {"model": model, "training": training}
    if clusters is not None:
        items["clusters"] = vars(clusters)
    return items


def _abstract(tree):
    """Shapes and types, to be placed on this process's first device wherever the file was written."""
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)
