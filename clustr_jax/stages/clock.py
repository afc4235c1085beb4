"""How long an epoch has taken, over all the runs that worked on it."""

import pathlib
import time

from clustr_jax.runtime import processes
from clustr_jax.runtime.errors import UserError
from clustr_jax.storage.files import read_json, write_json


class EpochClock:
    """Seconds of the epoch that is being trained; a file keeps them with each checkpoint in its midst."""

    def __init__(self, path: pathlib.Path):
        self._path, self._noted = path, _read(path)
        self._began, self._whole = time.monotonic(), False

    def start(self, step: int, first: int) -> int:
        """Start in front of `step` of the epoch that begins with `first`; the step that time is counted from.

        That is `first` where it is known what the steps since took, and otherwise `step`.
        """
        before = self._noted.get(str(step)) if step > first else None
        self._whole = step == first or before is not None
        self._noted = {} if before is None else {str(step): before}
        self._began = time.monotonic() - (before or 0.0)
        return first if self._whole else step

    def seconds(self) -> float:
        """Since that step."""
        return time.monotonic() - self._began

    def note(self, step: int) -> None:
        """A checkpoint is made after `step`."""
        if not self._whole:
            return
        self._noted[str(step)] = self.seconds()
        if processes.leader():
            write_json(self._path, self._noted)


def _read(path: pathlib.Path) -> dict[str, float]:
    """Nothing, where nothing can be read: times are no part of what a training computes."""
    try:
        return read_json(path) if path.exists() else {}
    except UserError:
        return {}
