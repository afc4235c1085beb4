"""What an interrupted evaluation had done, so that it goes on from there."""

import pathlib
import time
import zipfile

import jax
import numpy as np

from clustr_jax.attacks.scheduler import Outcome
from clustr_jax.runtime import preemption, processes

# Arrays of an Outcome that are kept; images are not.
_OUTCOME = ("broken", "restart", "step", "spent", "unconfirmed")
_RECORD_SECONDS = 20.0


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
