"""Result files (one JSON each, per-example outcomes beside it), intervals, and the side-by-side table."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import pathlib
import subprocess
import time
import zipfile
from collections.abc import Iterable

import jax
import numpy as np
from rich.markup import escape
from rich.table import Table

from clustr_jax.attacks.scheduler import Outcome
from clustr_jax.reference import claims
from clustr_jax.runtime import preemption, processes
from clustr_jax.runtime.errors import UserError
from clustr_jax.storage.files import read_json, write_json

# Meaning of the protocols; bumped when it changes, and versions never share a table.
PROTOCOLS = {
    "clean": "clean-1", "paper": "paper-1", "sound": "sound-2", "quick": "quick-1",
    "diagnostics": "diagnostics-4", "certified": "certified-2",
}  # fmt: skip
# Arrays of an Outcome that are kept; images are not.
_OUTCOME = ("broken", "restart", "step", "spent", "unconfirmed")
_RECORD_SECONDS = 20.0
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "clustr-jax")


def sha(content) -> str:
    """Short hash of a JSON value, independent of the order of keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of what decides a number."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@functools.cache
def commit() -> str:
    """The commit of this package's source, "-dirty" where it was changed since; "" where it is not known."""
    here = pathlib.Path(__file__)
    told = []
    # an installed package can lie in a folder of somebody else's repository
    for command in (("ls-files", "--error-unmatch", here.name), ("describe", "--always", "--dirty")):
        try:
            done = subprocess.run(
                ["git", *command], cwd=here.parent, capture_output=True, text=True, timeout=5
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        if done.returncode:
            return ""
        told.append(done.stdout.strip())
    return told[-1]


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % Wilson score interval of a fraction (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def fraction(mask) -> float:
    """Mean of a boolean array as a plain float."""
    return float(np.mean(np.asarray(mask, np.float64)))


def comparable(one: dict, other: dict) -> bool:
    """Whether two results are about the same network, images, radius and D: else there is no difference."""
    return all(one.get(what) == other.get(what) for what in ("network_sha", "n", "eps", "nearest"))


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
    content = json.loads(json.dumps({**result, "commit": commit()}))
    content["outcomes_sha"] = _digest(directory / f"{name}.npz")
    write_json(directory / f"{name}.json", {**content, "content_sha": sha(content)})


def load(directory: pathlib.Path, name: str) -> dict | None:
    """A result, or None where there is none yet; UserError if it (or its outcomes) has changed since."""
    path = directory / f"{name}.json"
    if not path.exists():
        return None
    content = read_json(path)
    changed = None
    if content.pop("content_sha", None) != sha(content):
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


class Records:
    """What an interrupted evaluation had done, attack by attack: files beside the results, gone when it ends.

    `identity` is that of the result they belong to, so that another config never takes them up.
    """

    def __init__(self, directory: pathlib.Path, identity: str):
        self.directory, self.identity = directory / "partial", identity
        self._saved = time.monotonic()

    def _path(self, name):
        return self.directory / f"{self.identity}-{name}.npz"

    def load(self, name: str, x, restarts: int) -> tuple[Outcome | None, dict[str, np.ndarray]]:
        """(the outcome to go on from, what was saved with it); (None, {}) where there is none."""
        path = self._path(name)
        if not path.exists():
            return None, {}
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                found = {key: file[key] for key in file.files}
        except (
            OSError,
            EOFError,
            ValueError,
            KeyError,
            zipfile.BadZipFile,
        ):  # cut off by a crash: start this attack again
            return None, {}
        outcome = Outcome.fresh(x, restarts)
        if not found.keys() >= {*_OUTCOME} or found["spent"].shape != outcome.spent.shape:
            return None, {}
        outcome.flight = [found[f"flight_{i}"] for i in range(int(found["leaves"]))] or None
        outcome.evaluations = int(found["evaluations"])
        for key in _OUTCOME:
            setattr(outcome, key, found[key])
        return outcome, {key[6:]: value for key, value in found.items() if key.startswith("extra_")}

    def save(
        self, name: str, outcome: Outcome, extra: dict[str, np.ndarray] | None = None, now=False
    ) -> None:
        """Store it, every so many seconds (or `now`, its end; or when the process is asked to leave)."""
        due = now or time.monotonic() - self._saved >= _RECORD_SECONDS
        if not preemption.requested() and not due:
            return
        self._saved = time.monotonic()
        if not processes.leader():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        flight = [] if now else [np.asarray(leaf) for leaf in jax.tree.leaves(outcome.flight)]
        arrays = {key: getattr(outcome, key) for key in _OUTCOME}
        arrays |= {f"flight_{i}": leaf for i, leaf in enumerate(flight)}
        arrays |= {f"extra_{key}": value for key, value in (extra or {}).items()}
        temporary = self._path(name).with_suffix(".tmp.npz")
        np.savez(temporary, leaves=len(flight), evaluations=outcome.evaluations, **arrays)  # pyright: ignore[reportArgumentType]
        temporary.replace(self._path(name))

    def clear(self) -> None:
        """The result is written: nothing to go on from."""
        if not processes.leader():
            return
        for path in self.directory.glob(f"{self.identity}-*"):
            path.unlink()
        if self.directory.exists() and not any(self.directory.iterdir()):
            self.directory.rmdir()


def percent(value: float | None, result: dict | None = None, key: str = "robust") -> str:
    """ "12.3" or, with the result it comes from, "12.3 [10.1, 14.8]"; "-" for None."""
    if value is None:
        return "-"
    text = f"{100 * value:.2f}"
    if result is not None:
        low, high = wilson(round(value * result["n"]), result["n"])
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return text


@dataclasses.dataclass(frozen=True)
class Row:
    """One accuracy, as a fraction of `n` images, from each source that has it.

    `kind`: "all" (the whole test split, by no protocol), "clean" (what was attacked), "attack" (one of the
    paper's), "part" (one of the sound protocol) or "worst".
    """

    label: str
    kind: str
    eps: float
    n: int
    claim: float | None = None  # what the paper reports
    paper: float | None = None  # its protocol here
    sound: float | None = None


def comparison(results: dict[str, dict]) -> list[Row]:
    """The rows of the side-by-side table: the paper's figure, its protocol here, the sound protocol here.

    A figure of the paper stands only beside the radius that it was reported for.
    """
    any_result = next(iter(results.values()))
    dataset, method = any_result["dataset"], any_result["method"]
    clean, claimed, sound = (results.get(name) for name in ("clean", "paper", "sound"))
    rows = []
    if clean:
        said = claims.claim(dataset, method, "clean")
        label = f"clean, all {clean['n']} test images"
        rows.append(Row(label, "all", 0.0, clean["n"], said, clean["clean"]))
    for n in dict.fromkeys(r["n"] for r in (claimed, sound) if r):  # one row, unless the numbers differ
        values = (r["clean"] if r and r["n"] == n else None for r in (claimed, sound))
        rows.append(Row(f"clean, the {n} attacked images", "clean", 0.0, n, None, *values))

    def attacks(found, eps, n):
        for name, value in found.items():
            said = claims.claim(dataset, method, name, eps)
            rows.append(Row(f"{name}, eps {radius(eps)}", "attack", eps, n, said, value))

    if claimed:
        attacks(claimed["attacks"], claimed["eps"], claimed["n"])
    if sound:
        for name, attack in sound["attacks"].items():
            rows.append(Row(name, "part", sound["eps"], sound["n"], sound=attack["robust"]))
        label = f"worst case, eps {radius(sound['eps'])}"
        rows.append(Row(label, "worst", sound["eps"], sound["n"], sound=sound["robust"]))
    if claimed:
        for eps, found in claimed["sweep"].items():
            attacks(found, float(eps), claimed["n"])
    return rows


def side_by_side(results: dict[str, dict]) -> Table:
    """`comparison` as a table for the terminal."""
    title, caption = escape(_title(next(iter(results.values())))), _caption(results)
    table = Table(title=title, caption=caption, caption_justify="left")
    table.add_column("accuracy in % [95 %]")
    for column in ("paper says", "paper's protocol", "sound protocol"):
        table.add_column(column, justify="right")
    for row in comparison(results):
        cells = ("" if v is None else percent(v, {"n": row.n}) for v in (row.paper, row.sound))
        indent = "  " if row.kind == "part" else ""
        table.add_row(escape(indent + row.label), "" if row.claim is None else percent(row.claim), *cells)
    if quick := results.get("quick"):  # a protocol of its own, whose column is not worth its width
        label = f"{quick['protocol']}, eps {radius(quick['eps'])}"
        table.add_row(label, "", "", percent(quick["robust"], {"n": quick["n"]}))
    return table


def checks_table(diagnosis: dict) -> Table:
    """The checks of diagnostics.json, a line each."""
    table = Table(title="can it be believed?")
    for column in ("", "check", "status", "value", "limit", "note"):
        table.add_column(column)
    colours = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red", "SKIP": "dim"}
    for check in diagnosis["checks"]:
        value = "-" if check["value"] is None else f"{check['value']:.3g}"
        status = f"[{colours[check['status']]}]{check['status']}[/]"
        table.add_row(
            str(check["number"]), check["name"], status, value, escape(check["limit"]), escape(check["note"])
        )
    return table


def radius(eps: float) -> str:
    """8/255 for the radii that are quoted so (up to 32/255), else the number."""
    scaled = eps * 255
    return f"{scaled:.3g}/255" if abs(scaled - round(scaled)) < 1e-3 and scaled < 33 else f"{eps:.4g}"


def other_radii(radii: Iterable[float], eps: float) -> list[float]:
    """Those that are not `eps`, each once, to the six digits that a radius has in a result's keys.

    On the command line 4/255 is a decimal.

    >>> results.other_radii((0.015686, 2 / 255, 0.00784314), 4 / 255)
    [0.00784313725490196]
    """
    found = {f"{eps:.6f}": eps}
    for radius in radii:
        found.setdefault(f"{radius:.6f}", radius)
    return list(found.values())[1:]


def diagnosis_sha(sound: dict | None, paper: dict | None, certified: dict | None) -> str:
    """Which results a diagnosis was made of; its `config_sha`."""
    sources = [r and [r["config_sha"], r.get("network_sha")] for r in (sound, paper, certified)]
    return sha([*sources, PROTOCOLS])


def diagnosis(found: dict[str, dict]) -> dict | None:
    """diagnostics.json among results by name, if it was made of the others that are there now."""
    checks = found.get("diagnostics")
    identity = diagnosis_sha(*(found.get(name) for name in ("sound", "paper", "certified")))
    return checks if checks and checks["config_sha"] == identity else None


def _title(result):
    where = result["dataset"] + (f" ({result['subset']})" if result["subset"] else "")
    return f"{result['method']} on {where}"


def _caption(results):
    claimed, sound = results.get("paper"), results.get("sound")
    if not claimed or not sound or not comparable(claimed, sound):
        return ""
    gap = 100 * (claimed["robust"] - sound["robust"])
    lines = [
        f"masking gap at eps {radius(sound['eps'])}: {gap:.2f} points "
        f"(paper's protocol minus {sound['protocol']})"
    ]
    if sound["head"] == "clusters":
        lines.append("The paper's attack follows the gradient of exp scores, which vanishes;")
        lines.append("RobustBench lists the authors' CIFAR-10 model at 0.00 % under AutoAttack.")
    return "\n".join(lines)
