"""The work directory: its config, metrics and result files, and what it refuses."""

import contextlib
import glob
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import jax

from clustr_jax.runtime import locks, processes, provenance
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.paths import local
from clustr_jax.storage import additions
from clustr_jax.storage.files import read_json, write_json
from clustr_jax.storage.tensorboard import Events

# A work directory belongs to one training; evaluation settings may change from run to run.
_TRAINING = (
    "method",
    "seed",
    "smoke",
    "init_from",
    "data",
    "pretrain",
    "model",
    "warmup",
    "train",
    "magnet",
    "fidelity",
)

_IMAGES = ("data", "pretrain")  # the sections that say where images are


class Workdir:
    """Paths and small files under one directory; UserError for a root that no folder can have."""

    def __init__(self, root: str | pathlib.Path):
        self.root = local(root, "--workdir").resolve()
        self._events = Events(self.root / "tensorboard", self.records)

    @property
    def results(self) -> pathlib.Path:
        """Where result files go."""
        return self.root / "results"

    @property
    def metrics(self) -> pathlib.Path:
        """One JSON object per line."""
        return self.root / "metrics.jsonl"

    def stage(self, name: str) -> pathlib.Path:
        """Folder of a training stage."""
        return self.root / name

    def finished(self, name: str) -> dict | None:
        """What a finished stage left behind (epochs, steps, reason), or None."""
        path = self.stage(name) / "done.json"
        return read_json(path) if path.exists() else None

    def open(self, config: Any, command: str = "", images: dict[str, str] | None = None) -> None:
        """Write config.json and environment.json, or check that the directory belongs to this training.

        environment.json keeps the `commands` that worked on the directory, each once, the newest last, the
        `machines` that they ran on, and which images they saw: `images` is section of the config ->
        `data.digest` of its splits. Images that are known to be the same may have been moved: `dirs` is where
        they were at first.
        """
        if glob.has_magic(str(self.root)):  # orbax takes the path for a pattern, and would find nothing
            raise UserError(
                f"{self.root}: the path of a work directory may not have *, ? or [ in it; use another"
            )
        content = config_dict(config)
        path = self.root / "config.json"
        noted, first = self._noted(), content
        seen = noted.get("images") or {}
        if path.exists():
            first = before = additions.filled(read_json(path))
            was, now = (c.get("data", {}).get("sha") for c in (before, content))
            if was and now and was != now:
                raise UserError(
                    f"{content['data']['dir']} has changed since {self.root} was trained on it ({was} then, "
                    f"{now} now); put the images back, or use another --workdir"
                )
            same = {s for s, sha in (images or {}).items() if seen.get(s) == sha}
            same |= {"data"} if was else set()
            for section in _TRAINING:
                old, new = (additions.fixed(section, c.get(section)) for c in (before, content))
                if section in same:
                    old, new = ({**values, "dir": ""} for values in (old, new))
                if old != new:
                    raise UserError(
                        f"{self.root} was trained with another config ({_difference(section, old, new)}); "
                        f"use another --workdir, or delete it to start again"
                    )
            for section, sha in (images or {}).items():
                if seen.get(section, sha) != sha:
                    raise UserError(
                        f"{self.root} was trained on other images of {content[section]['name']} than those "
                        f"found now ({seen[section]} then, {sha} now): set {section}.dir (or TFDS_DATA_DIR) "
                        f"to where they are, or use another --workdir"
                    )
        processes.wait("config.json is read")
        commands = [c for c in noted.get("commands") or [] if c != command] + ([command] if command else [])
        dirs = noted.get("dirs") or {s: first[s]["dir"] for s in _IMAGES if s in first}
        here = environment()
        known = noted.get("machines") or ([_machine(noted)] if noted.get("devices") else [])
        machines = [*known, *({_machine(here)} - {*known})]
        images = {**seen, **(images or {})}
        note = {"commands": commands, "machines": machines, "images": images, "dirs": dirs, **here}
        try:
            write_json(path, content)
            write_json(self.root / "environment.json", note)
        except OSError as error:
            raise UserError(f"cannot write to the work directory {self.root}: {error.strerror}") from error

    def identity(self, content: dict) -> str:
        """Which training its checkpoints are of, by a config (JSON values), wherever its images lie."""
        dirs = self._noted().get("dirs") or {}
        moved = {s: {**content[s], "dir": place} for s, place in dirs.items() if s in content}
        return training_sha({**content, **moved})

    def _noted(self) -> dict:
        """environment.json; what cannot be read there is written anew."""
        try:
            return read_json(self.root / "environment.json")
        except UserError:
            return {}

    def locked(self, say: Callable[[str], None] = print) -> contextlib.AbstractContextManager[None]:
        """Hold the directory for this process (the leader of several); UserError if another one does."""
        return locks.held(self.root, "the work directory ", "--workdir", say)

    def log(self, record: dict) -> None:
        """Append one record to metrics.jsonl, and to the event files."""
        if not processes.leader():
            return
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._events.add(record)

    def records(self) -> list[dict]:
        """All complete records of metrics.jsonl."""
        if not self.metrics.exists():
            return []
        kept = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                kept.append(json.loads(line))
            except ValueError:
                break  # a line cut off by a crash: what follows it was never written
        return kept

    def rewind(self, stage: str, step: int) -> None:
        """Drop the records of `stage` after `step`: the run goes on from there and writes them again."""
        if self.metrics.exists() and processes.leader():
            kept = [r for r in self.records() if r["stage"] != stage or r["step"] <= step]
            temporary = self.metrics.with_name(self.metrics.name + ".tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
            temporary.replace(self.metrics)
        processes.wait("metrics.jsonl is rewound")


def training_sha(content: dict) -> str:
    """Which training a config (as JSON values) describes, whatever its evaluation."""
    return provenance.sha(additions.plain({section: content.get(section) for section in _TRAINING}))


def config_dict(config: Any) -> dict:
    """The config as JSON values."""
    return json.loads(json.dumps(config.to_dict()))


def environment() -> dict:
    """Machine, versions and commit, for the record."""
    # an uninstallation that went wrong leaves folders without a name
    installed = [d for d in importlib.metadata.distributions() if d.metadata and d.metadata["Name"]]
    packages = {d.metadata["Name"]: d.version for d in installed}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "packages": dict(sorted(packages.items())),
    }


def _machine(environment: dict) -> str:
    """As a reader tells one from another."""
    return f"{', '.join(environment['devices'])} on {environment.get('platform', '')}"


def _difference(section, old, new):
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(set(old) | set(new)):
            if old.get(name) != new.get(name):
                return _difference(f"{section}.{name}", old.get(name), new.get(name))
    return f"{section}: {old!r} there, {new!r} now"
