"""What is around a run: switches, streams, locales, homes, caches. Each works, or is one line.

Runs are the smallest there are (points, smoke), in processes of their own. Two of them have many surroundings
at once; those that CI has no time for have one each, so that it can be seen which is to blame.
"""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from clustr_jax import stages
from clustr_jax.runtime.errors import UserError
from marks import in_ci
from runs import ROOT, TOY, arrays, read

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
)


SMOKE = (f"{TOY}:clustr_qtrades", "--config.smoke=True")
NUMBERS = {
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_RANDOM_SEED_OFFSET": "7",
}
CHECKS = {"JAX_DEBUG_NANS": "1", "JAX_DEBUG_KEY_REUSE": "1", "JAX_NUMPY_RANK_PROMOTION": "raise"}
TERMINAL = {"PYTHONIOENCODING": "ascii", "COLUMNS": "50", "TERM": "dumb", "NO_COLOR": "1"}
LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
MACHINE = {
    "TMPDIR": "/nonexistent",
    "MPLBACKEND": "nonsense",
    "PYTHONOPTIMIZE": "2",
    "PYTHONWARNINGS": "error",
}
CACHE = {"XDG_CACHE_HOME": "/proc/none"}
RUNS = {
    "numbers": NUMBERS,
    "around": {**TERMINAL, **LOCALE, **MACHINE},
    "cache": CACHE,
    **{name: {name: value} for name, value in (NUMBERS | CHECKS | MACHINE).items()},
    "unsafe_rbg": {"JAX_DEFAULT_PRNG_IMPL": "unsafe_rbg"},
    "terminal": TERMINAL,
    "locale": LOCALE,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Where the run without anything around it goes, once."""
    return tmp_path_factory.mktemp("plain") / "run"


@pytest.mark.slow
@pytest.mark.parametrize("name", in_ci(RUNS, "numbers", "around"))
def test_a_run_in_surroundings(name, plain, start, run, tmp_path):
    """It ends with its verdict, and its outcomes are those of a run without them, bit for bit."""
    if not plain.exists():
        run(*SMOKE, f"--workdir={plain}")
    workdir = tmp_path / ("réseau-日本" if name in ("around", "locale") else "run")
    stdout, stderr = run(*SMOKE, f"--workdir={workdir}", **RUNS[name])
    assert "robust accuracy" in " ".join(stdout.split())
    assert "report: " in stdout
    assert stderr == "" if name != "cache" else stderr.count("\n") == 1 and "/proc/none" in stderr
    for result in ("clean", "paper", "sound", "certified"):
        found, expected = (arrays(place / "results" / f"{result}.npz") for place in (workdir, plain))
        assert found.keys() == expected.keys()
        for array, values in expected.items():
            np.testing.assert_array_equal(found[array], values, err_msg=f"{result} {array}")
        assert (
            read(workdir / "results" / f"{result}.json")["network_sha"]
            == read(plain / "results" / f"{result}.json")["network_sha"]
        )


HOMELESS = """
import pwd, runpy, sys
def none(*_):
    raise KeyError("getpwuid(): uid not found")
pwd.getpwuid = none
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def alone(*arguments, drop=(), program=(), **more):
    """A finished process of run.py with these variables, and without those."""
    environment = {k: v for k, v in os.environ.items() if k not in drop} | more
    command = [sys.executable, *(program or (str(ROOT / "run.py"),)), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_without_a_home(tmp_path):
    """No HOME, and no entry of this user in the password file."""
    homeless = dict(
        drop=("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR", "JAX_COMPILATION_CACHE_DIR"),
        program=("-c", HOMELESS, str(ROOT / "run.py")),
        GLIBC_TUNABLES="glibc.malloc.hugetlb=1",
    )
    done = alone("--help", **homeless)
    assert done.returncode == 0 and "usage" in done.stdout and done.stderr == ""
    done = alone("--config=cifar10:nominal", f"--workdir={tmp_path / 'run'}", **homeless)
    assert done.returncode == 2 and "set HOME" in done.stderr
    note, error = done.stderr.splitlines()
    assert note.startswith("note: ") and error.startswith("error: ")


@pytest.mark.slow
def test_a_pipe_that_is_closed_costs_the_output_and_nothing_else(start, tmp_path):
    """`run.py ... | head -1`: it trains and evaluates all the same, says where, and leaves with 0."""
    process = start(f"{TOY}:nominal", "--config.smoke=True", f"--workdir={tmp_path / 'run'}")
    assert process.stdout.readline().startswith("nominal on ")
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(timeout=300) == 0
    assert "Broken pipe" in stderr and str(tmp_path / "run" / "results") in stderr and stderr.count("\n") == 1
    assert (tmp_path / "run" / "results" / "diagnostics.json").exists()
    assert (tmp_path / "run" / "report.html").exists()
    process.stdout = open(os.devnull)  # for the fixture, which reads to the end


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("arguments", "streams"),
    [
        (("--help",), "| true"),
        (("--help",), ">/dev/full"),
        (("--config=nope",), ">&- 2>&- <&-"),
        *(
            pytest.param((word,), streams, marks=[pytest.mark.slow])
            for word in ("--list", "--config=nope")
            for streams in (">/dev/full", "2>/dev/full", ">&-", "2>&-", "2>&1 | true")
        ),
    ],
)
def test_codes_are_the_same_wherever_the_output_goes(arguments, streams):
    line = f'set -o pipefail; "{sys.executable}" "{ROOT / "run.py"}" {" ".join(arguments)} {streams}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == (2 if arguments == ("--config=nope",) else 0), done
    assert "Traceback" not in done.stdout + done.stderr and "Exception ignored" not in done.stderr


def test_run_py_keeps_the_options_that_python_was_given():
    """It starts itself again, for glibc: -X, -O and -W are meant for that one."""
    shown = "import sys; print(sys.flags.optimize, sys.flags.utf8_mode, sys.warnoptions)"
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import run; run._prepare_process(); {shown}"
    done = alone("-O", "-X", "utf8", "-W", "once", "-c", script, program=("-B",), GLIBC_TUNABLES="")
    assert done.stdout.split() == ["1", "1", "['once']"], done


def test_stages_run_takes_a_stdout_of_a_caller(monkeypatch):
    """Refused settings leave the streams as they were."""
    before = sys.stdout, sys.stderr
    with pytest.raises(UserError):
        stages.run(_nothing(), "gs://bucket/run")
    assert (sys.stdout, sys.stderr) == before


def _nothing():
    from configs import toy2d

    return toy2d.get_config("nominal")
