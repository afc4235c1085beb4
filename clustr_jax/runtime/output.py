"""Output that nobody reads any more, or that cannot hold a character, ends no program. Needs no JAX."""

import contextlib
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

# ASCII for what tables and paths draw with; any other character becomes its number.
_PLAIN = {"\u2026": "~", "\u2013": "-", "\u2264": "<=", "\u2265": ">=", "\u00b7": "-"}


_PACKAGE = pathlib.Path(__file__).parents[1]


class Output:
    """A text stream that never ends a program: what cannot be written is left out.

    `lost` is told once, what the trouble is (a closed pipe, a full disk); nothing is written after it.
    """

    def __init__(self, stream: Any, lost: Callable[[Exception], None]):
        self._open = stream is not None
        if isinstance(stream, Output):  # of a block around this one: what gets lost in here is told here
            stream, self._open = stream.stream, stream._open
        self.stream, self._lost = stream, lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """All of it is taken, whether it can be shown or not."""
        self._try(lambda: self.stream.write(self._shown(text)))
        return len(text)

    def flush(self) -> None:
        """As far as there is anybody to read it."""
        self._try(lambda: self.stream.flush())

    def isatty(self) -> bool:
        """Whether somebody may be looking."""
        return self._open and self.stream.isatty()

    def _shown(self, text: str) -> str:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        try:
            text.encode(encoding, getattr(self.stream, "errors", None) or "strict")
        except UnicodeEncodeError:
            plain = "".join(_PLAIN.get(c, c) for c in text)
            return plain.encode(encoding, "backslashreplace").decode(encoding)
        return text

    def _try(self, action: Callable[[], Any]) -> None:
        if not self._open:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: of a file that was closed
            self._open = False
            with contextlib.suppress(OSError, ValueError):
                # what is left in its buffer would fail once more when Python ends
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)
            self._lost(error)


@contextlib.contextmanager
def steady(consequence: str = "") -> Iterator[None]:
    """A block whose printing ends nothing: a closed pipe, a full disk, characters that cannot be shown.

    A warning of this package is one sentence in it, without the line of code that says nothing to a user.

    Where stdout is lost, stderr is told so once, with the `consequence`; of a closed pipe without one nothing
    is said, for whoever closed it (head, less) had seen enough.
    """
    before = sys.stdout, sys.stderr

    def lost(error):
        if consequence or not isinstance(error, BrokenPipeError):
            what = [getattr(error, "strerror", None) or str(error), consequence]
            print("stdout: " + "; ".join(filter(None, what)), file=sys.stderr)

    formatted = warnings.formatwarning

    def sentence(message, category, filename, lineno, line=None):
        ours = category.__module__.startswith("clustr_jax.") or _PACKAGE in pathlib.Path(filename).parents
        if ours:
            return f"warning: {' '.join(str(message).split())}\n"
        return formatted(message, category, filename, lineno, line)

    warnings.formatwarning = sentence
    sys.stdout = Output(before[0], lost)
    sys.stderr = Output(before[1], lambda error: None)
    mine = sys.stdout, sys.stderr
    try:
        yield
        sys.stdout.flush()
    finally:
        if warnings.formatwarning is sentence:
            warnings.formatwarning = formatted
        if sys.stdout is mine[0]:
            sys.stdout = before[0]
        if sys.stderr is mine[1]:
            sys.stderr = before[1]
