"""What is around a run: switches of JAX, streams, locales, homes, caches, paths. Each works, or is one line.

Runs are the smallest there are (points, smoke), in processes of their own. Two of them have many surroundings
at once; those that CI has no time for have one each, so that it can be seen which is to blame.
"""

import errno
import io
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clustr_jax
from clustr_jax import attacks, certify, clusters, data, lipschitz, losses, stages
from clustr_jax.data import folder
from clustr_jax.kmeans import kmeans
from clustr_jax.report.__main__ import main as report_main
from clustr_jax.runtime import paths, surroundings
from clustr_jax.runtime.errors import UserError
from clustr_jax.storage import safetensors_file
from clustr_jax.storage.workdir import Workdir
from marks import in_ci
from runs import DIGITS, ROOT, TOY, arrays, assert_one_line, read

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
)

# Streams


class Broken(io.StringIO):
    """Takes some characters, then nothing more."""

    def __init__(self, error, room=0, encoding="utf-8"):
        super().__init__()
        self._error, self._room, self._encoding = error, room, encoding

    @property
    def encoding(self):
        return self._encoding

    def write(self, text):
        text.encode(self._encoding)
        if self.tell() + len(text) > self._room:
            raise self._error
        return super().write(text)


TROUBLE = [
    BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"), ValueError("I/O operation on closed file."),
]  # fmt: skip


@pytest.mark.parametrize("error", TROUBLE, ids=lambda e: type(e).__name__ + str(getattr(e, "errno", "")))
def test_output_that_is_lost_is_told_once_and_ends_nothing(error, monkeypatch):
    stdout, stderr = Broken(error, room=4), io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    with surroundings.steady("the rest is in a file"):
        print("one")
        print("two")
        with surroundings.steady("unheard"):
            print("three", flush=True)
    assert sys.stdout is stdout and sys.stderr is stderr
    assert stdout.getvalue() == "one\n"
    assert stderr.getvalue().count("\n") == 1 and stderr.getvalue().endswith("; the rest is in a file\n")


@pytest.mark.parametrize("error", TROUBLE[:2], ids=["pipe", "disk"])
def test_whoever_closes_a_pipe_has_seen_enough(error, monkeypatch):
    """Of a screen that is not a run's, only a disk is worth a word."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Broken(error))
    monkeypatch.setattr(sys, "stderr", stderr)
    with surroundings.steady():
        print("usage")
    assert stderr.getvalue() == ("" if error is TROUBLE[0] else "stdout: No space left on device\n")


@pytest.mark.parametrize("stdout", [None, Broken(TROUBLE[0])], ids=["closed", "broken"])
@pytest.mark.parametrize("stderr", [None, Broken(TROUBLE[0])], ids=["closed", "broken"])
def test_nothing_to_write_to(stdout, stderr, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    with surroundings.steady("so"):
        print("one", flush=True)
        print("two", file=sys.stderr, flush=True)
        assert not sys.stdout.isatty()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("text", ["a", "…", "≤ –", "┏━┓", "réseau/日本", "\udcff", "🙂"])
def test_any_character_can_be_printed(encoding, text, monkeypatch):
    """What the stream has no letter for is written in ASCII; what it has is left alone."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    with surroundings.steady():
        print(text)
    found = stream.buffer.getvalue().decode(encoding).rstrip("\r\n")
    try:
        text.encode(encoding)
        assert found == text
    except UnicodeEncodeError:
        found.encode(encoding)
        assert found and found != text


# Switches of JAX


OTHER = {
    "jax_enable_x64": True, "jax_numpy_dtype_promotion": "strict", "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False, "jax_random_seed_offset": 7, "jax_high_dynamic_range_gumbel": True,
}  # fmt: skip


@pytest.fixture
def switch():
    """switch(name, value) sets it as JAX_NAME does, until the test is over."""
    before = {}

    def set_to(name, value):
        before.setdefault(name, getattr(jax.config, name))
        jax.config.update(name, value)

    yield set_to
    for name, value in before.items():
        jax.config.update(name, value)


def numbers():
    """Something of all that the switches change."""
    key = jax.random.key(3)
    many = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (3,)))(jnp.arange(4))
    drawn = jax.random.categorical(jax.random.fold_in(key, 9), jnp.zeros(7), shape=(5,))
    return [np.asarray(v) for v in (many, drawn, jnp.arange(3) * 0.5, np.ones(2) * jnp.ones(2))]


@pytest.mark.parametrize("name", OTHER)
def test_a_runs_numbers_do_not_depend_on_a_switch(name, switch):
    assert set(OTHER) == set(surroundings.PINNED)
    with surroundings.pinned(pytest.fail):
        expected = numbers()
    switch(name, OTHER[name])
    said = []
    with surroundings.pinned(said.append):
        found = numbers()
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert getattr(jax.config, name) == OTHER[name]  # as it was for whoever called
    (line,) = said
    assert f"{name.upper()}={OTHER[name]}" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_disable_jit", True), ("jax_check_tracer_leaks", True), ("jax_debug_infs", True),
        ("jax_transfer_guard", "disallow"), ("jax_transfer_guard_host_to_device", "disallow_explicit"),
    ],
)  # fmt: skip
def test_a_switch_under_which_nothing_works_is_one_line(name, value, switch, attempt, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "splits", lambda *_, **__: pytest.fail("it began"))
    switch(name, value)
    code, stderr = attempt(f"{DIGITS}:clustr", f"--workdir={tmp_path / 'run'}")
    assert code == 2 and name.upper() in stderr and "unset it" in stderr
    assert_one_line(stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("JAX_ENABLE_X64", "maybe"), ("JAX_NUMPY_DTYPE_PROMOTION", "some")]
)
def test_a_switch_that_jax_does_not_understand(name, value, run):
    _, stderr = run("--help", code=2, **{name: value})
    assert_one_line(stderr)
    assert name.lower() in stderr.lower() and value in stderr


# The same functions from Python, under the switches of whoever calls them.

X = np.random.default_rng(0).random((6, 2, 2, 1)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
Z = np.random.default_rng(2).standard_normal((20, 3)).astype(np.float32)
Y, LABELS = (X.reshape(6, 4) @ W).argmax(axis=1), np.arange(20) % 2


def logits(x):
    return x.reshape(x.shape[0], -1) @ jnp.asarray(W, x.dtype)


def threefry():
    return jax.random.key(0, impl="threefry2x32")


def fitted():
    return clusters.fit(threefry(), Z, LABELS, num_classes=2, k=1)


FUNCTIONS = {
    "pgd": lambda: attacks.pgd(threefry(), logits, X, Y, eps=0.1, step_size=0.05, steps=3, start="zero"),
    "qtrades": lambda: (
        attacks.qtrades(
            threefry(), logits, X, np.full((6, 3), 1 / 3, np.float32), eps=0.1, step_size=0.1
        ).shape
    ),
    "fgsm": lambda: attacks.fgsm(threefry(), logits, X, Y, eps=0.1),
    "apgd": lambda: logits(attacks.apgd(threefry(), logits, X, Y, eps=0.5, steps=5)).argmax(axis=1) == Y,
    "fab": lambda: attacks.fab(threefry(), logits, X, Y, eps=0.1, steps=3),
    "square": lambda: attacks.square(threefry(), logits, X, Y, eps=0.1, queries=9).shape,
    "autoattack": lambda: attacks.autoattack(threefry(), logits, X, Y, eps=0.3).robust,
    "kmeans": lambda: kmeans(threefry(), Z, 1).centroids,
    "fit": lambda: fitted().centroids,
    "log_scores": lambda: fitted().log_scores(Z),
    "probs": lambda: fitted().probs(Z),
    "magnet_loss": lambda: losses.magnet_loss(Z.reshape(4, 5, 3), np.array([0, 1, 0, 1]), alpha=1.0)[0],
    "cross_entropy": lambda: losses.cross_entropy(Z, np.arange(20) % 3),
    "radius": lambda: certify.radius(fitted(), Z, LABELS, lipschitz=1.0, rule="any_d"),
    "jacobian_norm": lambda: lipschitz.jacobian_norm(logits, X),
}
SWITCHES = {
    "x64": lambda: jax.enable_x64(True),
    "strict": lambda: jax.numpy_dtype_promotion("strict"),
    "rank": lambda: jax.numpy_rank_promotion("raise"),
    "nans": lambda: jax.debug_nans(True),
}


SLOW = ("autoattack", "square", "fab")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FUNCTIONS]
)
def test_functions_give_the_same_under_switches_of_the_caller(name):
    expected = np.asarray(FUNCTIONS[name]())
    for what, within in SWITCHES.items():
        with within():
            found = np.asarray(FUNCTIONS[name]())
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=what)


# Paths

DOORS = {
    "--workdir": Workdir,
    "load": clustr_jax.load,
    "load, a file": lambda path: safetensors_file.load(path),
    "own images": folder.read,
    "a prepared set": lambda path: data.load_split("cifar10", "test", path),
    "TFDS_DATA_DIR": lambda path: data.load_split("cifar10", "test"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gs://bucket/run", "gs://bucket/run is an address"), ("s3://b/x.safetensors", "is an address"),
        ("hdfs:///x", "is an address"), ("file:///tmp/run", "without file://"),
        ("~nobody_here/run", "no such home"),
        ("a\udcff", "UTF-8"), ("a\0b", "null"),
    ],
    ids=lambda value: ascii(value),
)  # fmt: skip
def test_a_path_that_no_file_can_have(door, path, words, monkeypatch, tmp_path):
    """Before anything is written: no folder is called gs:."""
    monkeypatch.chdir(tmp_path)
    if door == "TFDS_DATA_DIR" and "\0" in path or "\udcff" in path and door == "TFDS_DATA_DIR":
        pytest.skip("no variable of an environment can hold it")
    monkeypatch.setenv("TFDS_DATA_DIR", path if door == "TFDS_DATA_DIR" else str(tmp_path))
    with pytest.raises(UserError, match=words) as refused:
        DOORS[door](path)
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["run", "./a:b", "C:", "a b", "ü", "x/y:z", "http:", "~"])
def test_paths_that_files_can_have(path):
    assert paths.local(path, "it") == pathlib.Path(path).expanduser()


def test_addresses_at_the_command_lines(attempt, capsys, tmp_path):
    for name, argument in (
        ("digits", "--workdir=gs://b/run"), ("folder", "--config.data.dir=s3://b/x"),
        ("digits", "--config.init_from=gs://b/run"),
    ):  # fmt: skip
        code, stderr = attempt(f"--config={name}:nominal", f"--workdir={tmp_path / 'run'}", argument)
        assert code == 2 and "is an address" in stderr
        assert_one_line(stderr)
    assert report_main(["gs://b/run"]) == 2
    assert_one_line(capsys.readouterr().err)


# Whole runs

SMOKE = (f"{TOY}:clustr_qtrades", "--config.smoke=True")
NUMBERS = {
    "JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0", "JAX_RANDOM_SEED_OFFSET": "7",
}  # fmt: skip
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
        program=("-c", HOMELESS, str(ROOT / "run.py")), GLIBC_TUNABLES="glibc.malloc.hugetlb=1",
    )  # fmt: skip
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
        (("--help",), "| true"), (("--help",), ">/dev/full"), (("--config=nope",), ">&- 2>&- <&-"),
        *(
            pytest.param((word,), streams, marks=[pytest.mark.slow])
            for word in ("--list", "--config=nope")
            for streams in (">/dev/full", "2>/dev/full", ">&-", "2>&-", "2>&1 | true")
        ),
    ],
)  # fmt: skip
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
