"""Profiler traces on request: one short piece of each kind of work."""

import pathlib

import jax


class Profiler:
    """Traces the second piece of each kind of work (the first one compiles), nothing without a folder.

    Work is done in pieces of a few seconds, a call of the device each; `tick` is called after each of them.
    XProf and https://ui.perfetto.dev show the traces (docs/performance.md).
    """

    def __init__(self, folder: pathlib.Path | None):
        self._folder, self._pieces, self._tracing = folder, {}, ""

    def tick(self, what: str) -> None:
        """A piece of `what` (a stage, or "evaluate-PROTOCOL") has ended."""
        if self._folder is None:
            return
        self._pieces[what] = self._pieces.get(what, 0) + 1
        self.close()
        if self._pieces[what] == 1:
            jax.profiler.start_trace(self._folder / what, create_perfetto_trace=True)
            self._tracing = what

    def close(self) -> None:
        """End a trace that is still being made: the work ended with it."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = ""
