"""How the programs beside run.py begin and end: `python -m clustr_jax.NAME`, and clustr-jax NAME.

    @program
    def main(argv): ...          # under the switches of JAX that a run has, whatever the user has set
    @program(computes=False)
    def main(argv): ...          # where JAX computes nothing

A mistake of the user is one line and exit code 2, an interrupt 130; output that nobody reads ends nothing.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, overload

from clustr_jax.runtime import output
from clustr_jax.runtime.errors import UserError, cut, first_line

type Main = Callable[[list[str]], int | None]
_INTERRUPTED = 130  # as shells have it for SIGINT


@overload
def program(main: Main) -> Callable[[list[str]], int]: ...
@overload
def program(*, computes: bool) -> Callable[[Main], Callable[[list[str]], int]]: ...
def program(main: Main | None = None, *, computes: bool = True) -> Any:
    """`main` as a program: it returns the exit code, and raises for what is no mistake of the user."""
    if main is None:
        return functools.partial(_program, computes=computes)
    return _program(main, computes=computes)


def _program(main: Main, computes: bool) -> Callable[[list[str]], int]:
    @functools.wraps(main)
    def run(argv: list[str]) -> int:
        with output.steady():
            try:
                if not computes or {"-h", "--help"} & set(argv):
                    return main(argv) or 0
                from clustr_jax.runtime import surroundings  # JAX comes with it

                with surroundings.pinned(lambda line: print(f"note: {line}", file=sys.stderr)):
                    return main(argv) or 0
            except UserError as error:
                return mistake(str(error))
            except OSError as error:  # a full disk, a file that went away
                return mistake(f"{error.strerror or error}: {error.filename or 'a file'}")
            except KeyboardInterrupt as stopped:
                print(str(stopped) or "interrupted", file=sys.stderr)
                return _INTERRUPTED

    return run


def mistake(text: str) -> int:
    """Its one line on stderr; returns the exit code."""
    print(cut(f"error: {' '.join(text.split())}"), file=sys.stderr)
    return 2


def check_jax() -> None:
    """Ends the program in one line for a switch (JAX_*) that JAX does not understand.

    JAX reads them when it is imported, before there is a `main` that could say anything about it.
    """
    try:
        import jax  # noqa: F401
    except ImportError:  # told by whoever needs it
        return
    except Exception as error:
        sys.exit(mistake(first_line(error)))
