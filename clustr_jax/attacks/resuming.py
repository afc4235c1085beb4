"""`folder=`: an interrupted attack keeps what it had done, and the same call goes on from there.

The same call has the same images, labels, ids, key and settings, and a model that answers as before: with the
same logits on all images, and the same first step of each attack. A model with other gradients is another
one. The rest of an interrupted attack is then bit for bit that of an uninterrupted one. Records of other
calls are left alone, and a RecordWarning says what is different.
"""

import hashlib
import json
import os
import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from clustr_jax.attacks import scheduler
from clustr_jax.attacks.gate import Admitted
from clustr_jax.attacks.records import Records
from clustr_jax.attacks.scheduled_attack import Attack, Work
from clustr_jax.runtime import mesh, paths, processes, provenance
from clustr_jax.runtime.errors import UserError, cut, first_line, shown

_PREFIX = "attack-"
_ADDRESS = re.compile(r"0x[0-9a-f]+")


class RecordWarning(UserWarning):
    """Records in `folder` are of another attack, cannot be read, or could not be written."""


class Planned(NamedTuple):
    """An attack that a call may run, with its targets [T, B] (None: none), restarts, and what ranking cost.

    `ranking`: gradients that went into the choice of the targets.
    """

    name: str
    attack: Attack
    targets: np.ndarray | None
    restarts: int
    ranking: int = 0


def usable(folder: str | os.PathLike | None) -> pathlib.Path | None:
    """The folder, made where there is none yet; UserError where no records can be written to it."""
    if folder is None:
        return None
    if not isinstance(folder, (str, os.PathLike)) or not isinstance(os.fspath(folder), str):
        raise UserError(f"folder must be a path or None, got {shown(repr(folder))}")
    text = os.fspath(folder)
    if not text.strip():
        raise UserError("folder must be a path or None, got an empty one; give folder='.' for this one")
    path = paths.local(text, "folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        partial = path / "partial"
        with tempfile.TemporaryFile(dir=partial if partial.exists() else path):
            pass
    except OSError as error:
        why = error.strerror or first_line(error, 100)
        raise UserError(
            f"folder={shown(text, 200)}: cannot write records there ({why}); give a folder that can be "
            f"written to, or leave folder out"
        ) from error
    return path


def begin(
    folder: pathlib.Path | None,
    given: Admitted,
    logits: np.ndarray,
    planned: Iterable[Planned],
    slots: int,
    door: str,
) -> "Kept":
    """The records of this call in `folder`, those of an interrupted one where there are any."""
    if folder is None:
        return Kept(None, {})
    return kept_in(folder, parts_of(given, logits, list(planned), slots, door))


def kept_in(folder: pathlib.Path, parts: dict[str, str]) -> "Kept":
    """The records in `folder` of the call that depends on these parts."""
    records = Records(folder, _PREFIX + provenance.sha(parts), images=True)
    if not any(records.directory.glob(f"{records.identity}-*")):
        _warn_of_others(records.directory, parts)
    return Kept(records, parts)


def forget(folder: pathlib.Path, parts: dict[str, str]) -> None:
    """Remove the records of the call that depends on these parts: it had ended when it was killed."""
    Kept(Records(folder, _PREFIX + provenance.sha(parts), images=True), parts).clear()


class Kept:
    """Records of one call, attack by attack; without `records` all of it does nothing."""

    def __init__(self, records: Records | None, parts: dict[str, str]):
        self._records, self._extra = records, {"parts": np.array(json.dumps(parts))}
        self._failed = False

    def load(self, name: str, x: Float[np.ndarray, "N ..."], restarts: int) -> scheduler.Outcome:
        """The outcome to go on from, or a fresh one."""
        return self.load_with(name, x, restarts)[0]

    def load_with(
        self, name: str, x: Float[np.ndarray, "N ..."], restarts: int
    ) -> tuple[scheduler.Outcome, dict[str, np.ndarray]]:
        """(the outcome to go on from, what was noted beside it); (a fresh one, {}) where there is none."""
        fresh = scheduler.Outcome.fresh(x, restarts)
        if self._records is None:
            return fresh, {}
        outcome, extra = self._records.load(name, x, restarts)
        if outcome is None and self._records.path(name).exists():
            _warn(
                f"{shown(self._records.path(name), 200)} is damaged: {name} starts again from its beginning"
            )
        return (fresh, {}) if outcome is None else (outcome, extra)

    def note(
        self,
        name: str,
        outcome: scheduler.Outcome,
        beside: dict[str, np.ndarray] | None = None,
        **how: bool,
    ) -> str:
        """Store it, if it is time to (`how`: see Records.save); returns why that failed, or ""."""
        if self._records is None:
            return ""
        try:
            self._records.save(name, outcome, {**self._extra, **(beside or {})}, **how)
        except OSError as error:
            why = error.strerror or first_line(error, 100)
            if not self._failed:
                where = shown(self._records.directory, 200)
                _warn(f"records cannot be written to {where} ({why}); {name} goes on")
            self._failed = True
            return why
        return ""

    def noting(self, name: str, report: Callable | None) -> Callable | None:
        """`report` for the scheduler, which keeps records as well."""
        if self._records is None:
            return report

        def both(outcome):
            self.note(name, outcome)
            if report is not None:
                report(outcome)

        return both

    def leave(
        self, name: str, outcome: scheduler.Outcome, beside: dict[str, np.ndarray] | None = None
    ) -> str:
        """Store it now; returns what to say about that to the user who has interrupted it."""
        if self._records is None:
            return ""
        self._failed = True  # it is said here
        why = self.note(name, outcome, beside, leaving=True)
        where = shown(self._records.directory.parent, 200)
        return (
            f"; {where}: cannot write records ({why})"
            if why
            else f"; the same call with folder={where} goes on"
        )

    def clear(self) -> None:
        """The attack has ended: nothing to go on from."""
        if self._records is None:
            return
        try:
            self._records.clear()
        except OSError as error:
            where = shown(self._records.directory, 200)
            _warn(f"records of an attack that has ended cannot be removed from {where}: {error.strerror}")


def _warn(text):
    warnings.warn(cut(text), RecordWarning, stacklevel=6)


def parts_of(
    given: Admitted, logits: np.ndarray, planned: Sequence[Planned], slots: int, door: str
) -> dict[str, str]:
    """What the outcome depends on, each as a short hash."""
    attacks = [
        [p.name, p.restarts, p.targets is None, type(p.attack).__name__, _numbers(p.attack)] for p in planned
    ]
    return {
        "images": _digest(given.x),
        "labels": _digest(given.y),
        "ids": _digest(given.ids),
        "key": _digest(jax.random.key_data(given.key)),
        "settings": provenance.sha([door, attacks, slots]),
        "versions or device": surroundings(),
        "model": _digest(*jax.tree.leaves(logits)),
        "gradients or loss": provenance.sha([_first_steps(p, given, slots) for p in planned]),
    }


def surroundings() -> str:
    """A short hash of what computes an attack: libraries, devices, and code."""
    place = [mesh.devices(), jax.default_backend(), jax.devices()[0].device_kind]
    return provenance.sha([provenance.versions(), place, _source()])


def _numbers(attack) -> dict[str, str]:
    """The settings of an attack that are numbers, words or bounds."""
    plain = (str, int, float, tuple, type(None), np.generic, np.ndarray, jax.Array)
    found = {name: value for name, value in vars(attack).items() if isinstance(value, plain)}
    return {
        name: repr(value if isinstance(value, str) else np.asarray(value).tolist())
        for name, value in found.items()
    }


def _first_steps(planned: Planned, given: Admitted, slots: int) -> list[str]:
    """(the program of one step, what it makes of the first images): the model's gradients and the loss."""
    index = np.resize(np.arange(len(given.x)), slots)
    nothing = np.zeros(slots, np.int32)
    target = nothing - 1 if planned.targets is None else planned.targets[0, index]
    random = np.repeat(np.asarray(jax.random.key_data(given.key))[None], slots, 0)
    work = Work(nothing, nothing, random, given.x[index], given.y[index], target)  # pyright: ignore[reportArgumentType]
    program = str(_step.trace(planned.attack, given.model, work).jaxpr)
    state = _step(planned.attack, given.model, work)
    return [
        _digest(np.frombuffer(_ADDRESS.sub("", program).encode(), np.uint8)),
        _digest(*jax.tree.leaves(state)),
    ]


@jax.jit
def _step(attack, model, work):
    def rows(shared, *fields):
        attack, model = shared
        work = Work(*fields)
        return attack.update(model, work, attack.init(work), jnp.zeros(work.y.shape, jnp.int32))

    fields = (work.example, work.restart, work.random, work.x, work.y, work.target)
    return mesh.by_rows(rows, (attack, model), *fields)


def _digest(*arrays) -> str:
    found = hashlib.sha256()
    for array in map(np.asarray, arrays):
        found.update(f"{array.dtype} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def _source() -> str:
    """Of the code that an attack, its protocol and the package's own networks are made of."""
    root, found = pathlib.Path(__file__).parents[1], hashlib.sha256()
    rooms = ("attacks", "evaluation", "models", "runtime")
    for path in sorted([*root.glob("*.py"), *(p for room in rooms for p in root.glob(f"{room}/*.py"))]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _warn_of_others(directory: pathlib.Path, parts: dict[str, str]) -> None:
    """Say it where there are records of other calls only, and what is different in the most similar one."""
    others = {}
    for path in sorted(directory.glob(f"{_PREFIX}*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                theirs = json.loads(str(file["extra_parts"]))
            others[path.name] = [name for name in parts if theirs.get(name) != parts[name]]
        except Exception:  # a damaged record belongs to no call
            continue
    if not others or not processes.leader():
        return
    name = min(others, key=lambda name: len(others[name]))
    different = others[name]
    # what follows from the others is no news
    if different != ["gradients or loss"]:
        different = [n for n in different if n != "gradients or loss"]
    if "images" in different:
        different = [n for n in different if n != "model"]
    _warn(
        f"{shown(directory, 150)} has records of another attack (different: {', '.join(different)}); they "
        f"are left alone, and this one starts from its beginning. The same call as before goes on with them; "
        f"to be rid of them delete {_PREFIX}*.npz there"
    )
