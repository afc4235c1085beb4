"""What a work directory holds, read and checked: all that a report is made of, but for the network itself."""

import dataclasses
import pathlib

import numpy as np

from clustr_jax.data import label
from clustr_jax.runtime import provenance
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.stage_names import TRAINING
from clustr_jax.settings import DataSettings
from clustr_jax.storage import results
from clustr_jax.storage.files import read_json
from clustr_jax.storage.workdir import Workdir

# Bumped when a report says something else about the same results.
VERSION = "report-3"


@dataclasses.dataclass(frozen=True)
class Record:
    """Config, environment, results by name, metrics and finished stages of one work directory."""

    root: pathlib.Path
    config: dict
    environment: dict  # {} where it is missing
    results: dict[str, dict]  # those of results.PROTOCOLS that are there
    metrics: list[dict]
    stages: dict[str, dict]  # done.json of each finished stage
    network: str | None = None  # the classifier that `results` are of, as in their network_sha
    # results that are there and left out of `results`: of another network, or of another D than the config's
    outdated: tuple[str, ...] = ()

    @property
    def data(self) -> str:
        """What the data set is called: "digits", or an own set's folder."""
        return label(DataSettings.of(self.config["data"]))

    @property
    def title(self) -> str:
        """ "clustr_qtrades on digits"."""
        return f"{self.config['method']} on {self.data}"

    @property
    def identity(self) -> str:
        """Hash of everything that a report of this directory depends on."""
        shown = {name: result["config_sha"] for name, result in self.results.items()}
        outcomes = {name: result["outcomes_sha"] for name, result in self.results.items()}
        last = self.metrics[-1:] and {k: self.metrics[-1][k] for k in ("stage", "step")}
        return provenance.sha(
            [VERSION, self.config, self.network, self.outdated, shown, outcomes, self.stages, last]
        )

    @property
    def checks(self) -> dict | None:
        """diagnostics.json, if it was made of the results that are there now."""
        return results.diagnosis(self.results)

    def outcomes(self, name: str) -> dict[str, np.ndarray]:
        """Per-example arrays of a result that is there."""
        return results.load_outcomes(self.root / "results", name)


def read(path: str | pathlib.Path, network: str | None = None) -> Record:
    """The record of a work directory; UserError where there is no finished stage, or a file is damaged.

    `network`: the digest of its classifier (`loading.digest`); without it, what clean.json is about. Results
    of another one, from before the stage was trained again, are left out, and so are those of another D
    (`eval.nearest`) than the config has now: with it the clusters are another classifier.
    """
    from clustr_jax.storage.loading import find_stage, read_config  # a judgement's page does without "train"

    place = Workdir(path)
    if find_stage(place.root).parent != place.root:
        raise UserError(f"{place.root} is a stage; expected the work directory, {place.root.parent}")
    environment = place.root / "environment.json"
    found = {name: results.load(place.results, name) for name in results.PROTOCOLS}
    network = network or (found["clean"] or {}).get("network_sha")
    config = read_config(place.root)
    nearest = config["eval"]["nearest"]
    # results of earlier commits do not say which network they are of, nor do the checks, which name results
    other = {
        name
        for name, result in found.items()
        if result is not None
        and (
            result.get("network_sha", network) != network
            or (result.get("head") == "clusters" and result.get("nearest", nearest) != nearest)
        )
    }
    kept = {name: result for name, result in found.items() if result is not None and name not in other}
    if other and results.diagnosis(kept) is None:
        kept.pop("diagnostics", None)  # of results that are left out
    stages = {name: place.finished(name) for name in TRAINING}
    return Record(
        place.root,
        config,
        read_json(environment) if environment.exists() else {},
        kept,
        place.records(),
        {name: done for name, done in stages.items() if done is not None},
        network,
        tuple(sorted(other)),
    )
