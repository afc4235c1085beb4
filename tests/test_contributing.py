"""CONTRIBUTING.md's worked example, step by step in a copy of the repository: tests pass there, and it runs.

A reader who does what is written, and no more, has a method that trains.
"""

import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

from runs import ROOT, read

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
STEPS = TEXT.split("### Worked example: a method")[1].split("\n## ")[0]
# The files that a checkout has for these tests; links are enough for what the steps leave alone.
EDITED = ("clustr_jax/training/objectives.py", "configs/common.py", "tests/test_objectives.py", "README.md")
TESTS = (
    "tests/test_objectives.py",
    "tests/test_readme.py::test_names_in_backticks",
    "tests/test_batch_statistics.py",
    "tests/test_usage.py",
    "tests/test_configs_train_steps.py",
    "tests/test_configs_values.py",
    "tests/test_configs_mistakes.py",
)


def blocks():
    """The Python of the steps, in order: objective, config, row of the test."""
    return [textwrap.dedent(b) for b in re.findall(r"^ +```python\n(.*?)^ +```", STEPS, re.M | re.S)]


def test_every_file_of_the_steps_is_there():
    named = set(re.findall(r"`([\w/]+\.(?:py|md))`", STEPS)) - {"tests/test_contributing.py"}
    assert named == set(EDITED)
    assert len(blocks()) == 3


@pytest.fixture
def copy(tmp_path):
    """The repository with the steps done."""
    target = tmp_path / "copy"
    for folder in ("clustr_jax", "configs", "tests"):
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "run.py", "pyproject.toml", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, target / name)
    objective, config, row = blocks()
    (line,) = re.findall(r"`(\"pairing\": Method\(.*?\),)`", STEPS)
    (words,) = re.findall(r"`` (\| `pairing` \|.*?\|) ``", STEPS)

    def insert(path, before, text):
        """In front of the first place that matches."""
        content = (target / path).read_text(encoding="utf-8")
        changed = re.sub(before, lambda m: text + m[0], content, count=1, flags=re.M)
        assert changed != content
        (target / path).write_text(changed, encoding="utf-8")

    methods, configs, tests, readme = EDITED
    insert(methods, r"^def nominal\(", f"{objective}\n\n")
    insert(methods, r'^    "nominal_certified": ', f"    {line}\n")
    insert(configs, r"^def nominal_certified\(", f"{config}\n\n")
    insert(configs, r"nominal_certified, clustr_certified,$", "pairing, ")
    insert(tests, r"^}\n\nOPTIONS", textwrap.indent(row, "    "))
    insert(readme, r"^\| `clustr_certified`", f"{words}\n")
    return target


def finished(folder, *command, **variables):
    """The output of a command that succeeds in this folder, with the package that lies there."""
    environment = os.environ | {"PYTHONPATH": str(folder)} | variables
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_worked_example(copy, shared):
    chosen = "pairing or table or backticks or every"
    options = ("-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", chosen)
    output = finished(copy, "-m", "pytest", *options, *TESTS)
    assert re.search(r"\d+ passed", output)
    workdir = copy / "runs" / "pairing"
    output = finished(
        copy,
        "run.py",
        "--config=digits:pairing",
        "--config.smoke=True",
        f"--workdir={workdir}",
        XDG_CACHE_HOME=str(shared / "cache"),
        XLA_FLAGS=os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0",
    )
    assert "pairing on digits" in output and "robust accuracy" in output
    assert read(workdir / "results" / "sound.json")["method"] == "pairing"
