"""The console command: clustr-jax train, judge, verify, report, quirks, prepare, fidelity, completion."""

import importlib
import os
import pathlib
import sys

from clustr_jax.runtime import provenance
from clustr_jax.runtime.errors import listed, nearest, shown

# Command -> (module, what it does); `train`, `judge` and `completion` have no `python -m clustr_jax.NAME`.
COMMANDS = {
    "train": ("clustr_jax.command.train", "train, evaluate and report on a work directory (run.py)"),
    "judge": ("clustr_jax.command.judge", "the verdict on any JAX model: attacks, checks, a witness"),
    "verify": ("clustr_jax.verify", "measure the stored images of a judgement again"),
    "report": ("clustr_jax.report.__main__", "the page about a work directory, or about several"),
    "quirks": ("clustr_jax.evaluation.quirks", "what each departure of the paper's protocol buys"),
    "prepare": ("clustr_jax.data.prepare", "download and prepare a data set, once"),
    "fidelity": ("clustr_jax.reference.switches", "the authors' switches as a table"),
    "completion": ("clustr_jax.command.completion", "a script for bash, zsh or fish that completes all this"),
}
_OF_A_DIRECTORY = ("report", "quirks")
# What other programs call it.
_MEANT = {
    "compare": "clustr-jax report DIR DIR",
    "run": "clustr-jax train",
    "list": "clustr-jax train --list",
    "--list": "clustr-jax train --list",
    "demo": "make demo, in a clone",
    **dict.fromkeys(
        ("attack", "evaluate", "eval", "test"), "clustr-jax judge module:function, or clustr-jax train"
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; `train` ends the process itself."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print("usage: clustr-jax COMMAND ...\n")
        print("\n".join(f"  {name:12}{text}" for name, (_, text) in COMMANDS.items()))
        print("\nclustr-jax COMMAND --help says more; clustr-jax train is where to begin.")
        return 0 if words else 2
    name, *rest = words
    if name == "--version":
        print(" ".join(f"{package} {number}" for package, number in provenance.versions().items()))
        return 0
    if name not in COMMANDS:
        print(f"error: {_unknown(name)}", file=sys.stderr)
        return 2
    if name in _OF_A_DIRECTORY and not rest:
        print(f"error: clustr-jax {name} needs a work directory{_found()}", file=sys.stderr)
        return 2
    if name not in ("train", "verify", "completion"):  # which says it itself, and needs none
        from clustr_jax.runtime import programs

        programs.check_jax()
    try:
        module = importlib.import_module(COMMANDS[name][0])
        if name == "train":
            module.program(["clustr-jax train", *rest])
        return module.main(rest) or 0
    except ImportError as error:
        from clustr_jax.runtime import extras

        told = extras.explained(error, f"clustr-jax {name}")
        if not isinstance(told, extras.Missing):
            raise
        print(f"error: {told}", file=sys.stderr)
        return 2


def _unknown(name):
    """What to do about a word that is no command."""
    if name.startswith("--config") or ":" in name:
        spec = name if name.startswith("--") else f"--config={name}"
        return f"unknown command {shown(name)!r}; to train: clustr-jax train {shown(spec)}"
    if name in _MEANT:
        return f"unknown command {name!r}; try: {_MEANT[name]}"
    return f"unknown command {shown(name)!r}{nearest(name, COMMANDS)}; known: {', '.join(COMMANDS)}"


def _found():
    """The work directories below runs/, the newest first."""
    there = sorted(pathlib.Path("runs").glob("*/config.json"), key=os.path.getmtime, reverse=True)
    if not there:
        return "; `clustr-jax train` makes one, runs/digits-clustr_qtrades"
    return f": {listed([path.parent for path in there])}"


def console() -> None:
    """The entry point of the wheel."""
    sys.exit(main())
