"""Train, evaluate and report on one work directory. Run again, it resumes.

python run.py --config=configs/cifar10.py:clustr_qtrades [--workdir=DIR]       or: clustr-jax train
python run.py --help        and --list, which says what each config, method and variant is
"""

import importlib
import logging
import os
import pathlib
import re
import shlex
import signal
import sys

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
_PLATFORMS = ("cpu", "cuda", "tpu")
# XLA takes its temporary memory afresh at each call; with huge pages the page faults stop dominating
# on CPU. glibc reads this before Python starts, hence the second exec.
_TUNABLE = "glibc.malloc.hugetlb=1"
_LONGEST = 480  # characters of a mistake
_notes: list[str] = []  # what was found on the way, to be told once it is known whether anything may be


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 done, 2 a mistake that the user can mend, 3 a collapse, 75 a signal."""
    try:
        from clustr_jax.runtime import surroundings
    except Exception as error:  # JAX reads its switches (JAX_*) when it is imported
        return _mistake(_first_line(error))
    with surroundings.steady():
        return _main(argv)


def _main(argv):
    from clustr_jax.runtime.errors import UserError
    from clustr_jax.settings import usage
    from configs.common import METHODS, VARIANTS, base

    if argv[1:] == ["--version"]:
        from clustr_jax.runtime import provenance

        print(" ".join(f"{package} {number}" for package, number in provenance.versions().items()))
        return 0
    if {"--help", "-h", "--list"} & set(argv) or argv[1:] == ["help"]:
        text = usage.listing if "--list" in argv else usage.screen
        print(text(configs(), METHODS, VARIANTS))
        return 0
    from absl.flags import UnrecognizedFlagError

    from clustr_jax.command import COMMANDS, guesses
    from clustr_jax.stages import command_line

    try:
        spec, words = command_line.split(argv, "digits:clustr_qtrades")
        config = command_line.read(spec, configs(), base("digits"))
        words = command_line.decimals(words, config)
        values = _flags(config, words)
        try:
            rest = values(words)
        except UnrecognizedFlagError as error:
            return _mistake(guesses.flag(error.flagname, config, values))
        config = values.config
    except Exception as error:  # UserError, and the many types that absl has for a mistyped flag
        return _mistake(_first_line(error))
    if len(rest) > 1:
        found = [path.stem for path in configs().glob("*.py") if path.stem not in ("__init__", "common")]
        return _mistake(guesses.argument(rest[1], found, METHODS, COMMANDS))
    for note in () if values.quiet else _notes:
        print(note, file=sys.stderr)

    from jax.errors import JaxRuntimeError

    from clustr_jax import stages
    from clustr_jax.runtime import preemption, processes

    joined = processes.joined(values.coordinator, values.num_processes, values.process_id, values.platform)
    try:
        with joined, preemption.guard():
            stages.run(
                config,
                values.workdir,
                None if values.stages is None else tuple(values.stages),
                command=shlex.join([*_typed(argv[0]), *argv[1:]]),
                quiet=values.quiet,
                profile=values.profile,
            )
    except UserError as error:
        code = _mistake(_first_line(error))
        return getattr(error, "exit_code", code)  # a collapse has its own
    except OSError as error:  # a full disk, a file that went away
        return _mistake(f"{error.strerror or _first_line(error)}: {error.filename or 'a file of this run'}")
    except JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        return _mistake(
            f"the device's memory is full: {_first_line(error)}; lower train.batch_size (or "
            f"warmup.batch_size, magnet.samples) in training, eval.slots in an evaluation, or add devices"
        )
    except preemption.Preempted as stop:
        print(stop, file=sys.stderr)
        return preemption.EXIT_CODE
    except processes.Lost as loss:
        print(loss, file=sys.stderr)
        return preemption.EXIT_CODE
    return 0


def configs() -> pathlib.Path:
    """The folder of the configs: beside run.py in a copy of the repository, else in the installed package."""
    beside = _PACKAGE.parent
    return (beside if (beside / "run.py").exists() else _PACKAGE) / "configs"


def _find_configs() -> None:
    """`import configs` works from any folder; an installed package's go by that name, too."""
    if configs().parent != _PACKAGE:
        sys.path.insert(0, str(configs().parent))
    else:
        sys.modules.setdefault("configs", importlib.import_module("clustr_jax.configs"))


def _typed(program: str) -> list[str]:
    """What stood before the arguments on the command line."""
    return ["python", program] if program.endswith(".py") else program.split()


def _flags(config, words):
    """All of them, the settings of `config` among them."""
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=words)
    flags.DEFINE_string("workdir", None, "default: runs/<dataset>-<method>[-<variant>]", flag_values=values)
    flags.DEFINE_list("stages", None, "default: all; comma-separated", flag_values=values)
    flags.DEFINE_enum("platform", None, _PLATFORMS, "default: the best that JAX finds", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, or auto", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "with --coordinator", flag_values=values)
    flags.DEFINE_integer("process_id", None, "0 to num_processes - 1", flag_values=values)
    flags.DEFINE_bool("profile", False, "write profiler traces to WORKDIR/profile", flag_values=values)
    flags.DEFINE_bool("quiet", False, "print mistakes and nothing else", flag_values=values)
    return values


def _first_line(error: Exception) -> str:
    """What went wrong without quotes, line ends and the traceback that ml_collections puts into its text."""
    cause: object = error
    while isinstance(cause, Exception) and cause.args and not isinstance(cause, OSError):
        cause = cause.args[0]  # some wrap the error that counts
    lines = [line for line in str(cause).splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        lines = [re.sub(r"^[\w.]+(Error|Exception): ", "", lines[-1])]
    return " ".join(" ".join(lines).split())


def _mistake(text: str) -> int:
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    print(f"error: {text}", file=sys.stderr)
    return 2


def _several() -> bool:
    """Whether this process has joined others."""
    jax = sys.modules.get("jax")  # not there if it could not be imported
    return jax is not None and jax.distributed.is_initialized()


def _prepare_process() -> None:
    """Settings that must be there before JAX is imported."""
    wanted = {}
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "malloc.hugetlb" not in tunables:
        wanted["GLIBC_TUNABLES"] = f"{tunables}:{_TUNABLE}" if tunables else _TUNABLE
    # paths are bytes, and orbax takes them for UTF-8 whatever the locale; what is shown stays in the locale's
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        wanted["PYTHONUTF8"] = "1"
        if sys.stdout is not None and "PYTHONIOENCODING" not in os.environ:
            wanted["PYTHONIOENCODING"] = f"{sys.stdout.encoding}:backslashreplace"
    if wanted and sys.executable:
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for number in range(3):  # a stream that was closed: a file of the run would get its number, and its text
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    _prepare_cache()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["MPLBACKEND"] = "agg"  # figures are files, whatever a notebook around this has set
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where it cannot keep its fonts
    _find_configs()


def _prepare_cache():
    """Compiled programs are kept under $XDG_CACHE_HOME or ~/.cache, if there is such a folder to write to."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # no home: it stays "~/.cache"
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(home, "clustr_jax", "xla")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if "://" not in folder:  # JAX itself takes a bucket
        try:
            if folder.startswith("~"):
                raise OSError("there is no home folder")
            os.makedirs(folder, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise OSError("it cannot be written")
        except OSError as error:
            os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
            _notes.append(
                f"note: compiled programs are not kept ({folder}: {error.strerror or error}); set "
                f"XDG_CACHE_HOME to a folder that can be written"
            )
            return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder


def program(argv: list[str]) -> None:
    """A process of its own: prepares it, runs `main` and ends it."""
    # Until the run takes signals over: as an exception, Ctrl-C can be lost in a module being imported.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _prepare_process()
    code = main(argv)
    if code and _several():  # the usual way out would wait for the others, who wait for this one
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
