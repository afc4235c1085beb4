"""What a user sees while work runs: a live line on a terminal, plain lines elsewhere."""

import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

# On a terminal the line is redrawn this often; elsewhere long work still gives a sign of life.
_REDRAWS_PER_SECOND, _PLAIN_SECONDS = 4, 30.0


class Progress:
    """`status` replaces the live line, `line` prints one that stays. Use as a context manager."""

    def __init__(self, console: Console):
        self.console = console
        self._live = None
        self._spoke = time.monotonic()

    def __enter__(self):
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=_REDRAWS_PER_SECOND, transient=True)
            self._live.__enter__()
        return self

    def __exit__(self, *exc):
        if self._live is not None:
            self._live.__exit__(*exc)
            self._live = None

    def status(self, text: str) -> None:
        """What is going on right now."""
        if self._live is not None:
            self._live.update(Text(text, overflow="ellipsis", no_wrap=True))
        elif time.monotonic() - self._spoke > _PLAIN_SECONDS:
            self.line(text)

    def line(self, text: str) -> None:
        """Something to keep."""
        self._spoke = time.monotonic()
        # a log file has no width to wrap at
        self.console.print(text, markup=False, highlight=False, soft_wrap=not self.console.is_terminal)


def duration(seconds: float) -> str:
    """ "42s", "3m05s", "2h07m"."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
