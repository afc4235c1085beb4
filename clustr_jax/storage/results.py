"""Result files: one JSON each, per-example outcomes beside it, and what two of them have to share."""

import hashlib
import json
import pathlib

import numpy as np

from clustr_jax.runtime import processes, provenance
from clustr_jax.runtime.errors import UserError
from clustr_jax.storage.files import read_json, write_json

# Meaning of the protocols; bumped when it changes, and versions never share a table.
PROTOCOLS = {
    "clean": "clean-1",
    "paper": "paper-1",
    "sound": "sound-2",
    "quick": "quick-1",
    "diagnostics": "diagnostics-6",
    "certified": "certified-2",
}


def comparable(one: dict, other: dict) -> bool:
    """Whether there is a difference to be had of two results.

    Both are about the same network, images, radius and D, and both or neither of a protocol's quick form.
    """
    quick = [result.get("protocol", "").endswith("-quick") for result in (one, other)]
    same = ("network_sha", "n", "eps", "nearest")
    return quick[0] == quick[1] and all(one.get(what) == other.get(what) for what in same)


def save(directory: pathlib.Path, name: str, result: dict, outcomes: dict[str, np.ndarray]) -> None:
    """Write <name>.npz (per-example outcomes), then <name>.json: no JSON is there without its outcomes.

    The JSON holds the commit, and the hash of its own content and of the outcomes, which `load` checks.
    """
    if processes.leader():
        _write(directory, name, result, outcomes)
    processes.wait(f"{name}.json")


def _write(directory, name, result, outcomes):
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f"{name}.tmp.npz"
    # pyright minds an array for allow_pickle; no outcome has that name
    np.savez_compressed(temporary, **outcomes)  # pyright: ignore[reportArgumentType]
    temporary.replace(directory / f"{name}.npz")
    content = json.loads(json.dumps({**result, "commit": provenance.commit()}))
    content["outcomes_sha"] = _digest(directory / f"{name}.npz")
    write_json(directory / f"{name}.json", {**content, "content_sha": provenance.sha(content)})


def load(directory: pathlib.Path, name: str) -> dict | None:
    """A result, or None where there is none yet; UserError if it (or its outcomes) has changed since."""
    path = directory / f"{name}.json"
    if not path.exists():
        return None
    content = read_json(path)
    changed = None
    if content.pop("content_sha", None) != provenance.sha(content):
        changed = path
    elif content["outcomes_sha"] != _digest(path.with_suffix(".npz")):
        changed = path.with_suffix(".npz")
    if changed is not None:
        raise UserError(f"{changed} is not what was written there; delete {path} to have it made again")
    return content


def load_outcomes(directory: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    """The per-example arrays of a result that `load` has found whole."""
    with np.load(directory / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def _digest(path):
    """Short SHA-256 of a file; "" where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else ""


def diagnosis_sha(sound: dict | None, paper: dict | None, certified: dict | None) -> str:
    """The `config_sha` of a diagnosis: a hash of the results that it was made of."""
    sources = [r and [r["config_sha"], r.get("network_sha")] for r in (sound, paper, certified)]
    return provenance.sha([*sources, PROTOCOLS])


def diagnosis(found: dict[str, dict]) -> dict | None:
    """diagnostics.json among results by name, if it was made of the others that are there now."""
    checks = found.get("diagnostics")
    identity = diagnosis_sha(*(found.get(name) for name in ("sound", "paper", "certified")))
    return checks if checks and checks["config_sha"] == identity else None
