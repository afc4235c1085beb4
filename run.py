"""Train, evaluate and report on one work directory. Run again, it resumes.

python run.py --config=configs/cifar10.py:clustr_qtrades [--workdir=DIR]
python run.py --help        and --list, which says what each config, method and variant is
"""

import os
import pathlib
import re
import shlex
import signal
import sys
import traceback

HERE = pathlib.Path(__file__).resolve().parent
_PLATFORMS = ("cpu", "cuda", "tpu")
# XLA takes its temporary memory afresh at each call; with huge pages the page faults stop dominating
# on CPU. glibc reads this before Python starts, hence the second exec.
_TUNABLE = "glibc.malloc.hugetlb=1"


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 done, 2 a mistake that the user can mend, 75 stopped by a signal."""
    if {"--help", "-h", "--list"} & set(argv):
        from clustr_jax.settings import usage
        from configs.common import METHODS, VARIANTS

        text = usage.listing if "--list" in argv else usage.screen
        print(text(HERE / "configs", METHODS, VARIANTS))
        return 0
    try:
        values = _flags()
        rest = values(argv)
        config = values.config
        config.method  # noqa: B018  a file that cannot be read is noticed at the first look only
    except Exception as error:  # the config file is code, and absl raises many types for a mistyped flag
        text = _first_line(error)
        if text.endswith(
            "has no attribute 'get_config'"
        ):  # ml_collections has a module name of its own for it
            text = "the file of --config has no function get_config(name), which returns the settings; "
            text += "configs/digits.py is one that has"
        return _mistake(text + _place(error))
    if len(rest) > 1:
        return _mistake(f"unexpected argument {rest[1]!r}; options start with --")

    from jax.errors import JaxRuntimeError

    from clustr_jax import stages
    from clustr_jax.runtime import preemption, processes
    from clustr_jax.runtime.errors import UserError

    joined = processes.joined(values.coordinator, values.num_processes, values.process_id, values.platform)
    try:
        with joined, preemption.guard():
            stages.run(
                config,
                values.workdir,
                None if values.stages is None else tuple(values.stages),
                command=shlex.join(["python", *argv]),
                quiet=values.quiet,
                profile=values.profile,
            )
    except UserError as error:
        return _mistake(_first_line(error))
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


def _flags():
    """All of them. Raises what the code of a config file raises: the settings are given to it at once."""
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    default = str(HERE / "configs" / "digits.py") + ":clustr_qtrades"
    config_flags.DEFINE_config_file(
        "config", default, "FILE.py[:METHOD]", lock_config=True, flag_values=values
    )
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


def _place(error: BaseException) -> str:
    """ " (FILE, line N)" for an error in the code of a config file, else nothing."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f for f in frames if pathlib.Path(f.filename).suffix == ".py" and "site-packages" not in f.filename
    ]
    last = own[-1] if own else None
    if last is None or last.filename == __file__ or isinstance(error, ValueError):
        return ""
    return f" ({last.filename}, line {last.lineno})"


def _mistake(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


def _several() -> bool:
    """Whether this process has joined others."""
    import jax

    return jax.distributed.is_initialized()


def _prepare_process() -> None:
    """Settings that must be there before JAX is imported."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "malloc.hugetlb" not in tunables:
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:{_TUNABLE}" if tunables else _TUNABLE
        os.execv(sys.executable, [sys.executable, *sys.argv])
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "clustr_jax" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.path.insert(0, str(HERE))  # configs are found from any folder


if __name__ == "__main__":
    # Until the run takes signals over: as an exception, Ctrl-C can be lost in a module being imported.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _prepare_process()
    code = main(sys.argv)
    if code and _several():  # the usual way out would wait for the others, who wait for this one
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
