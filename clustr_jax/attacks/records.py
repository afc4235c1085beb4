"""What an interrupted attack or evaluation had done, so that it goes on from there."""

import pathlib
import time

import jax
import numpy as np
from jaxtyping import Float

from clustr_jax.attacks.scheduler import Outcome
from clustr_jax.runtime import preemption, processes

# Arrays of an Outcome that are kept as they are.
_OUTCOME = ("broken", "restart", "step", "spent", "unconfirmed", "blind")
# Seconds between two records. Where writing one takes longer than the second number, they are as many times
# rarer.
_RECORD_SECONDS, _WRITING_SECONDS = 20.0, 0.4


class Records:
    """What an interrupted evaluation had done, attack by attack: files beside the results, gone when it ends.

    `identity` is that of the result they belong to, so that another config never takes them up. An
    evaluation counts successes; with `images` what broke an example is kept as well.
    """

    def __init__(self, directory: pathlib.Path, identity: str, images: bool = False):
        self.directory, self.identity, self.images = directory / "partial", identity, images
        self._saved, self._pause = time.monotonic(), 1.0

    def path(self, name: str) -> pathlib.Path:
        """Where the record of this attack lies."""
        return self.directory / f"{self.identity}-{name}.npz"

    def strangers(self, prefix: str) -> bool:
        """Whether there are records whose identity begins with `prefix`, and none of this one."""
        paths = [path.name for path in self.directory.glob(f"{prefix}*")]
        return bool(paths) and not any(name.startswith(f"{self.identity}-") for name in paths)

    def load(
        self, name: str, x: Float[np.ndarray, "N ..."], restarts: int
    ) -> tuple[Outcome | None, dict[str, np.ndarray]]:
        """(the outcome to go on from, what was saved with it); (None, {}) where there is none."""
        path = self.path(name)
        if not path.exists():
            return None, {}
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                found = {key: file[key] for key in file.files}
        except Exception:  # cut off by a crash, or damaged in any other way: start this attack again
            return None, {}
        outcome = Outcome.fresh(x, restarts)
        wanted = {*_OUTCOME, "leaves", "evaluations"} | ({"images"} if self.images else set())
        if not found.keys() >= wanted or found["spent"].shape != outcome.spent.shape:
            return None, {}
        if self.images:
            outcome.x_adv[found["broken"]] = found["images"]
        outcome.flight = [found[f"flight_{i}"] for i in range(int(found["leaves"]))] or None
        outcome.evaluations = int(found["evaluations"])
        for key in _OUTCOME:
            setattr(outcome, key, found[key])
        return outcome, {key[6:]: value for key, value in found.items() if key.startswith("extra_")}

    def save(
        self,
        name: str,
        outcome: Outcome,
        extra: dict[str, np.ndarray] | None = None,
        now: bool = False,
        leaving: bool = False,
    ) -> None:
        """Store it, every so many seconds (or `now`, its end; or when the process is asked to leave, or is
        `leaving`)."""
        started = time.monotonic()
        due = now or leaving or started - self._saved >= _RECORD_SECONDS * self._pause
        if not preemption.requested() and not due:
            return
        self._saved = started
        if not processes.leader():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        flight = [] if now else [np.asarray(leaf) for leaf in jax.tree.leaves(outcome.flight)]
        arrays = {key: getattr(outcome, key) for key in _OUTCOME}
        arrays |= {f"flight_{i}": leaf for i, leaf in enumerate(flight)}
        arrays |= {f"extra_{key}": value for key, value in (extra or {}).items()}
        if self.images:
            arrays["images"] = outcome.x_adv[outcome.broken]
        temporary = self.path(name).with_suffix(".tmp.npz")
        try:
            np.savez(temporary, leaves=len(flight), evaluations=outcome.evaluations, **arrays)  # pyright: ignore[reportArgumentType]
            temporary.replace(self.path(name))
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._saved = time.monotonic()
        self._pause = max(1.0, (self._saved - started) / _WRITING_SECONDS)

    def clear(self) -> None:
        """The result is written: nothing to go on from."""
        if not processes.leader():
            return
        for path in self.directory.glob(f"{self.identity}-*"):
            path.unlink()
        if self.directory.exists() and not any(self.directory.iterdir()):
            self.directory.rmdir()
