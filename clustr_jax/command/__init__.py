"""The console command: clustr-jax train, judge, verify, report, quirks, prepare, fidelity."""

import importlib
import sys

# Command -> (module, what it does); each but `train` and `judge` is `python -m clustr_jax.NAME` as well.
COMMANDS = {
    "train": ("clustr_jax.command.train", "train, evaluate and report on a work directory (run.py)"),
    "judge": ("clustr_jax.command.judge", "the verdict on any JAX model: attacks, checks, a witness"),
    "verify": ("clustr_jax.verify", "measure the stored images of a judgement again"),
    "report": ("clustr_jax.report.__main__", "the page about a work directory, or about several"),
    "quirks": ("clustr_jax.evaluation.quirks", "what each departure of the paper's protocol buys"),
    "prepare": ("clustr_jax.data.prepare", "download and prepare a data set, once"),
    "fidelity": ("clustr_jax.reference.switches", "the authors' switches as a table"),
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; `train` ends the process itself."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print("usage: clustr-jax COMMAND ...\n")
        print("\n".join(f"  {name:10}{text}" for name, (_, text) in COMMANDS.items()))
        return 0 if words else 2
    name, *rest = words
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if name != "train":  # which says it itself
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


def console() -> None:
    """The entry point of the wheel."""
    sys.exit(main())
