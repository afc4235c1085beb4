"""Runs of run.py in processes of their own, and what two of them are compared by.

The compiled programs of all runs are shared (compiled.py).
Everything but `*_seconds` and `*_per_second` must be reproduced exactly, by an interrupted run as well.
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import clustr_jax

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = f"--config={ROOT}/configs/digits.py"
TOY = f"--config={ROOT}/configs/toy2d.py"
# Warm-up of a few epochs until its target, fine-tuning of five, both protocols on 40 images.
TINY = (
    f"{DIGITS}:clustr_qtrades",
    "--config.model.width=4", "--config.data.train_size=400", "--config.data.test_size=60",
    "--config.data.val_size=0.2", "--config.warmup.epochs=30", "--config.warmup.target=0.6",
    "--config.warmup.batch_size=32", "--config.train.epochs=5", "--config.magnet.samples=4",
    "--config.magnet.n_init=2", "--config.eval.n=40", "--config.eval.slots=16",
    "--config.eval.attack.steps=5", "--config.eval.attack.restarts=2",
    "--config.eval.paper_steps=(3,5)", "--config.eval.sweep=(0.1,)", "--config.eval.curve=(0.1,)",
    "--config.eval.apgd_steps=5", "--config.eval.queries=30", "--config.eval.targets=2",
)  # fmt: skip
REQUIRED = (
    "dataset", "subset", "n", "method", "protocol", "eps", "clean", "robust", "attack", "seed", "config_sha",
    "network_sha", "versions", "wall_seconds",
)  # fmt: skip


# Running


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder for all workers of this test session."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    (folder / "run").mkdir(exist_ok=True)
    return folder / "run"


@pytest.fixture
def start(tmp_path):
    """start(*arguments) -> a running process of run.py in an empty folder."""
    # XLA's optimiser is most of a first run here, and changes nothing that these tests look at
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    environment = os.environ | {"COLUMNS": "120", "XLA_FLAGS": flags}
    running = []

    def begin(*arguments, program=("run.py",), **more):
        command = [
            sys.executable,
            str(ROOT / program[0]) if program[0] == "run.py" else program[0],
            *program[1:],
        ]
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=tmp_path,
            env=environment | more,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def run(start):
    """run(*arguments) -> (stdout, stderr) of a run that succeeds."""

    def finish(*arguments, code=0, **more):
        process = start(*arguments, **more)
        stdout, stderr = process.communicate(timeout=600)
        assert process.returncode == code, stdout + stderr
        return stdout, stderr

    return finish


@contextlib.contextmanager
def locked(path):
    """One worker at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def reference(shared, run):
    """The work directory of an uninterrupted run of TINY, made once per session."""
    folder = shared / "reference"
    with locked(shared / "reference.lock"):
        if not (folder / "stdout").exists():
            shutil.rmtree(folder, ignore_errors=True)
            stdout, stderr = run(*TINY, f"--workdir={folder}", JAX_LOG_COMPILES="1")
            (folder / "stderr").write_text(stderr)
            (folder / "stdout").write_text(stdout)
    return folder


# What is compared


def timeless(value):
    """JSON without the fields that hold times, the commit, and the hash of the content with them."""
    if isinstance(value, dict):
        return {
            name: timeless(v)
            for name, v in value.items()
            if not name.endswith(("_seconds", "_per_second")) and name not in ("content_sha", "commit")
        }
    return [timeless(v) for v in value] if isinstance(value, list) else value


def read(path):
    return json.loads(path.read_text())


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def arrays(path):
    with np.load(path) as file:
        return dict(file)


def assert_same_arrays(a, b):
    """Two pytrees, equal to the last bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def assert_same_run(folder, other):
    """Metrics, results, per-example outcomes and every trained array are equal."""
    assert timeless(metrics(folder)) == timeless(metrics(other))
    assert (folder / "1_warmup").exists() == (other / "1_warmup").exists()
    for name in [name for name in ("1_warmup", "2_train") if (other / name).exists()]:
        assert read(folder / name / "done.json") == read(other / name / "done.json")
        a, b = clustr_jax.load(folder / name), clustr_jax.load(other / name)
        assert_same_arrays((a.variables, a.clusters), (b.variables, b.clusters))
    assert {p.name for p in (folder / "results").iterdir()} == {p.name for p in (other / "results").iterdir()}
    for path in sorted((other / "results").glob("*.json")):
        assert timeless(read(folder / "results" / path.name)) == timeless(read(path)), path.name
        found, expected = (arrays((f / "results" / path.name).with_suffix(".npz")) for f in (folder, other))
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values, err_msg=f"{path.name} {name}")


# Mistakes


@pytest.fixture
def program(monkeypatch, tmp_path):
    """run.py as a module of this process, started in an empty folder."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("run_under_test", ROOT / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def attempt(program, monkeypatch, capsys):
    """attempt(*arguments) -> (exit code, stderr) of run.main, in this process."""

    def call(*arguments):
        argv = ["run.py", *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # ml_collections looks for overrides there
        capsys.readouterr()
        code = program.main(argv)
        return code, capsys.readouterr().err

    return call


def assert_one_line(stderr):
    """A mistake is told in one line that starts with error: and shows no traceback."""
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    assert "Traceback" not in stderr and "\\n" not in stderr, stderr
