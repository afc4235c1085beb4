"""`make setup` finds a suitable Python where version managers keep theirs, or says what to do."""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SUITABLE, UNSUITABLE = "exit 0", "exit 1"  # what a Python answers when it is asked
TOOLS = ("make", "sh", "sed", "awk", "rm", "touch", "uname")


@pytest.fixture
def setup(tmp_path):
    """setup() -> (exit code, output) of `make setup` for a user with this home."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(shutil.which(name))

    def go(*arguments):
        environment = {"PATH": str(tools), "HOME": str(tmp_path / "home")}
        done = subprocess.run(
            ["make", "setup", "ACCEL=cpu", f"VENV={tmp_path}/venv", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    return go


def python(path, answer):
    """An interpreter that only says whether it is suitable, and makes no environment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncase $1 in -c) {answer};; --version) echo here;; *) exit 1;; esac\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "place",
    [
        ".pyenv/versions/3.13.0/bin/python3.13",
        ".pyenv/versions/3.12.7/bin/python3.12",
        ".local/share/uv/python/cpython-3.13.2-linux-x86_64-gnu/bin/python3.13",
        "miniconda3/envs/mine/bin/python3.12",
        "miniforge3/bin/python3.13",
    ],
)
def test_an_interpreter_of_a_version_manager_is_found(setup, tmp_path, place):
    """Where the PATH has shims that do not run and a python3 that is too old."""
    for name in ("python3.13", "python3.12", "python3"):
        python(tmp_path / "tools" / name, UNSUITABLE)
    found = python(tmp_path / "home" / place, SUITABLE)
    assert f"here ({found})" in setup()[1]


def test_the_path_comes_first(setup, tmp_path):
    python(tmp_path / "tools" / "python3.12", SUITABLE)
    python(tmp_path / "home" / ".pyenv/versions/3.13.0/bin/python3.13", SUITABLE)
    assert "here (python3.12)" in setup()[1]


def test_none_is_one_line(setup, tmp_path):
    """With what to install, and the way to name one."""
    python(tmp_path / "home" / ".pyenv/versions/3.13.0/bin/python3.13", UNSUITABLE)
    code, said = setup()
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert code and len(lines) == 1
    for part in ("3.12 or 3.13", "apt install", "PYTHON="):
        assert part in lines[0]


def test_a_named_one_is_the_only_one(setup, tmp_path):
    python(tmp_path / "tools" / "python3.13", SUITABLE)
    mine = python(tmp_path / "mine", UNSUITABLE)
    assert f"none of [{mine}]" in setup(f"PYTHON={mine}")[1]
