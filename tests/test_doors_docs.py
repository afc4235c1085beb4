"""The examples of docs/doors.md run, block after block, on a finished run of the digits."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from runs import ROOT

_TOOLS = ("torch", "foolbox", "pyautoattack")


def blocks():
    """{heading: its fenced blocks as (language, text)}"""
    found = {}
    for section in re.split("^## ", (ROOT / "docs" / "doors.md").read_text(), flags=re.M)[1:]:
        heading = section.splitlines()[0]
        found[heading] = re.findall("^```(\\w+)\n(.*?)^```", section, flags=re.M | re.S)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("heading", blocks())
def test_the_examples_run(heading, reference, tmp_path):
    text = "\n".join(text for _, text in blocks()[heading])
    for tool in _TOOLS:
        if re.search(rf"\b(import|from) {tool}\b", text):
            pytest.importorskip(tool)
    shutil.copytree(reference, tmp_path / "runs" / "digits-clustr_qtrades")
    if "flowers" in text:
        rng = np.random.default_rng(0)
        for name in ("rose", "daisy"):
            for i in range(12):
                path = tmp_path / "flowers" / "train" / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)).save(path)
    program = ["import sys", "sys.path.insert(0, 'exported')"]
    for language, text in blocks()[heading]:
        if language == "sh":
            (command,) = text.strip().splitlines()
            arguments = command.replace("configs/", f"{ROOT}/configs/").split()
            arguments = [sys.executable, *arguments[1:]]
            if arguments[1] == "run.py":
                arguments[1] = str(ROOT / "run.py")
            _succeeds(arguments, tmp_path)
        else:
            program.append(text.replace('"model.pt"', '"exported/model.pt"'))
    assert len(program) > 2
    (tmp_path / "example.py").write_text("\n".join(program))
    _succeeds([sys.executable, "example.py"], tmp_path)


def _succeeds(command, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
