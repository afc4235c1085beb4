"""What run.py says when it is asked, and when it is asked to be quiet."""

import pathlib

import pytest

from clustr_jax.settings import usage
from configs.common import METHODS, VARIANTS
from runs import TOY

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
FLAGS = (
    "config", "workdir", "stages", "platform", "coordinator", "num_processes", "process_id", "profile",
    "quiet", "list",
)  # fmt: skip


def test_help_fits_a_screen_and_names_everything():
    text = usage.screen(CONFIGS, METHODS, VARIANTS)
    lines = text.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 84
    for flag in FLAGS:
        assert f"--{flag}" in text
    for name in (*METHODS, *VARIANTS, "digits", "toy2d"):
        assert name in text
    assert "common" not in text


def test_list_says_what_each_is():
    lines = usage.listing(CONFIGS, METHODS, VARIANTS).splitlines()
    for name, method in METHODS.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.split(maxsplit=1)[1] == method.__doc__.strip().splitlines()[0]
    for path in CONFIGS.glob("*.py"):
        found = [line for line in lines if line.split()[:1] == [path.stem]]
        assert len(found) == (path.stem not in ("__init__", "common"))
    assert [line.split()[0] for line in lines[-len(VARIANTS) :]] == [*VARIANTS]


@pytest.mark.parametrize("flag", ["--help", "-h", "--list"])
def test_at_the_command_line(flag, run):
    stdout, stderr = run(flag, "--config=no_such_file.py")
    assert "clustr_trades" in stdout and stderr == ""


@pytest.mark.more
def test_quiet_says_nothing_and_profile_leaves_traces(run, tmp_path):
    stdout, stderr = run(
        f"{TOY}:nominal",
        "--config.smoke=True",
        "--quiet",
        "--profile",
        "--stages=2_train",
        f"--workdir={tmp_path / 'run'}",
    )
    assert stdout == "" and stderr == ""
    assert list((tmp_path / "run" / "profile" / "2_train").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_a_file_gets_no_control_characters(run, tmp_path):
    stdout, stderr = run(
        f"{TOY}:nominal", "--config.smoke=True", "--stages=2_train,evaluate", f"--workdir={tmp_path / 'run'}"
    )
    assert stdout.strip() and all(c.isprintable() or c == "\n" for c in stdout + stderr)
