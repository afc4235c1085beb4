"""Where the compiled programs of tests are kept: one folder for all workers and the runs that they start.

Most of a test's time is compilation. The folder is XDG_CACHE_HOME of this process and of its children, so
run.py finds it as a user's. Another set of requirements, of XLA's flags or another processor has another
folder; what nobody has used for two weeks goes.
"""

import hashlib
import os
import pathlib
import shutil
import time

ROOT = pathlib.Path(__file__).parents[1]
_KEPT_SECONDS = 14 * 24 * 3600


def _folder() -> pathlib.Path:
    base = (
        pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        / "clustr_jax"
        / "tests"
    )
    processor = pathlib.Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else []
    parts = [
        (ROOT / "requirements-cpu.txt").read_text(),
        os.environ.get("XLA_FLAGS", ""),
        *sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}),
    ]
    return base / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _forget(folder: pathlib.Path) -> None:
    """Remove the folders beside this one that no session has used for long."""
    for other in folder.parent.iterdir():
        if other != folder and time.time() - other.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(other, ignore_errors=True)


def _share() -> pathlib.Path:
    """This process and its children use the folder; workers have it from the session that started them."""
    told = os.environ.get("CLUSTR_JAX_TEST_CACHE")
    folder = pathlib.Path(told) if told else _folder()
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    if not told:
        _forget(folder)
    os.environ["CLUSTR_JAX_TEST_CACHE"] = os.environ["XDG_CACHE_HOME"] = str(folder)
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # run.py's own place, which is below XDG_CACHE_HOME
    return folder / "clustr_jax" / "xla"


PROGRAMS = _share()
