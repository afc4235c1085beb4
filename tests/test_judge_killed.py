"""`clustr-jax judge`, killed at every delicate moment: the same command ends as if nothing had happened."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from clustr_jax.evaluation import witness
from judged import EPS, images, timeless
from runs import ROOT

# Small budgets, a record after every call of the device; dies at the n-th call of a function of the project.
PROGRAM = """
import importlib, os, signal, sys
sys.path[:0] = [sys.argv.pop(1), sys.argv.pop(1)]
moment = sys.argv.pop(1)
from clustr_jax.attacks import records, scheduler
from clustr_jax.evaluation import judging
from judged import images, small
images()  # its weights, before anything is traced
budget = small()
judging.budget = lambda eps, slots, curve=(): budget
scheduler._OPERATIONS = {"cpu": 1000.0}
records._RECORD_SECONDS = 0.0
if moment:
    where, name, when, count = moment.split(":")
    module = importlib.import_module("clustr_jax." + where)
    owner, _, attribute = name.rpartition(".")
    owner = getattr(module, owner) if owner else module
    original, calls = getattr(owner, attribute), 0

    def dying(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(count) and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, attribute, dying)
from clustr_jax.command import main
sys.exit(main(sys.argv[1:]))
"""
MOMENTS = (
    "attacks.records:Records.save:after:1",  # the first record is there
    "attacks.records:np.savez:after:3",  # another one is written, and has not its name yet
    "attacks.adaptive:_run_pairs:after:2",  # between two rounds of restarts
    "attacks.records:Records.save:after:40",  # somewhere in one of the later ones
    "evaluation.probes:Probe.effort:before:1",  # in the checks
    "attacks.records:Records.save:after:25",  # in the audit
    "evaluation.witness:write:after:1",  # the images are there, what is said of them is not
    "judge:write_json:after:1",  # all is there, and the records as well
)


def judge(folder, moment=""):
    command = ["judge", "judged:curved", "--data=images.npz", f"--eps={EPS}", "--n=0", "--slots=32"]
    return subprocess.run(
        [
            sys.executable, "-c", PROGRAM, str(ROOT), str(ROOT / "tests"), moment, *command, "--audit",
            f"--folder={folder}",
        ],
        cwd=folder.parent, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_at_every_delicate_moment(tmp_path):
    """Each process goes on from what the one before left; images and judgement are those of one run."""
    x, y = images()
    np.savez(tmp_path / "images.npz", x=x, y=y)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = judge(whole)
    assert done.returncode == 0, done.stderr
    for moment in MOMENTS:
        died = judge(killed, moment)
        assert died.returncode == -signal.SIGKILL, (moment, died.stdout, died.stderr)
        assert list((killed / "partial").glob("attack-*.npz")), moment
        written = [(killed / name).exists() for name in (witness.NPZ, witness.JSON)]
        assert written == [moment in MOMENTS[-2:], moment == MOMENTS[-1]], moment
    again = judge(killed)
    assert again.returncode == 0 and again.stdout == done.stdout.replace("whole", "killed"), again.stderr
    contents = [timeless(json.loads((f / witness.JSON).read_text())) for f in (whole, killed)]
    assert contents[0] == contents[1]
    assert (whole / witness.NPZ).read_bytes() == (killed / witness.NPZ).read_bytes()
    assert not (killed / "partial").exists()
