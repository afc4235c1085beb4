"""A program that runs under an experiment, and is given the time to save its work."""

import contextlib
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Collection

from clustr_jax.storage.files import write_json

ROOT = pathlib.Path(__file__).resolve().parents[1]
STOPPED = 75  # the exit code of run.py for it


def run(command: list[str]) -> int:
    """The exit code of `python COMMAND`; STOPPED where this process was told to stop meanwhile.

    Ctrl-C reaches the child from the terminal, SIGTERM is passed on. The child is waited for in any case:
    run.py saves and leaves.
    """
    child, asked = None, []

    def stop(number, _):
        asked.append(number)
        if number == signal.SIGTERM and child is not None:
            child.send_signal(number)

    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, stop))
        child = subprocess.Popen([sys.executable, *command], cwd=ROOT)
        code = child.wait()
    return STOPPED if asked else code


def make(target: pathlib.Path, commands: list[list[str]], measure: Callable[[], dict]) -> int:
    """The exit code of the first command that fails, or 0: then the JSON holds what `measure` has found."""
    for line in commands:
        print("python", *line, flush=True)
        if code := run(line):
            return code
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, measure())
    return 0


def chosen(text: str, known: Collection[str], option: str = "--only") -> list[str]:
    """The names of a comma-separated list, all of them for ""; ends the program with 2 for an unknown one."""
    names = text.split(",") if text else [*known]
    if unknown := set(names) - set(known):
        print(f"error: {option}: unknown {sorted(unknown)[0]!r}; known: {', '.join(known)}", file=sys.stderr)
        raise SystemExit(2)
    return names


def listed(commands: list[list[str]]) -> str:
    """The commands as a shell takes them, a line each."""
    return "\n".join("python " + " ".join(words) for words in commands)
