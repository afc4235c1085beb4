"""Interrupted runs: killed at random and at every delicate moment, then resumed."""

import contextlib
import random
import signal
import subprocess
import time

import pytest

from marks import in_ci
from runs import ROOT, TINY, assert_same_run

# orbax and ml_collections use outdated calls of their own libraries.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")
]


@pytest.mark.slow
@pytest.mark.parametrize("stage", in_ci(("1_warmup", "2_train", "evaluate"), "2_train"))
def test_a_run_killed_at_a_random_moment_is_resumed(stage, reference, start, run, tmp_path):
    """SIGKILL somewhere within the stage; the run that goes on ends as if nothing had happened."""
    begun = {"1_warmup": "1_warmup", "2_train": "2_train", "evaluate": "2_train/done.json"}[stage]
    ended = {
        "1_warmup": "1_warmup/done.json",
        "2_train": "2_train/done.json",
        "evaluate": "results/sound.json",
    }[stage]
    longest = 6.0
    for attempt in range(8):
        folder = tmp_path / f"killed-{attempt}"
        process = start(*TINY, f"--workdir={folder}")
        while not (folder / begun).exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        delay = random.uniform(0, longest)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not (folder / ended).exists():
            break
        longest = delay  # too late: the stage was over
    else:
        pytest.fail(f"{stage} was over before it could be killed")
    there = sorted(str(p.relative_to(folder)) for p in folder.glob("*/*"))
    print(f"killed {delay:.3f} s into {stage}; there were {there}")  # shown if it fails
    run(*TINY, f"--workdir={folder}")
    assert_same_run(folder, reference)


# Dies at the n-th call of a function of the project, before or after it.
CRASH = """
import importlib, os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
where, name, when, count = sys.argv.pop(1).split(":")
import run
run._prepare_process()
module = importlib.import_module("clustr_jax." + where)
owner, _, attribute = name.rpartition(".")
owner = getattr(module, owner) if owner else module
original, calls = getattr(owner, attribute), 0

def crash(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(count) and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    if calls == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, attribute, crash)
if where == "training.train":  # checkpoints after every step
    stages = importlib.import_module("clustr_jax.stages.training")
    stages._CHECKPOINT_SECONDS = stages._CHUNK_SECONDS = 0.0
sys.exit(run.main(sys.argv))
"""
TUNED = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # else run.py starts itself again with it
MOMENTS = [
    # stage 1: the first epoch is logged, and nothing was ever saved
    ("storage.workdir:Workdir.log:after:1", "metrics.jsonl", "1_warmup/done.json"),
    # in the middle of an epoch of stage 1, with checkpoints in it
    ("training.train:run_steps:after:15", "1_warmup", "1_warmup/done.json"),
    # an epoch is logged, its checkpoint was not begun
    ("storage.workdir:Workdir.log:after:2", "1_warmup", "1_warmup/done.json"),
    # a checkpoint is being written
    ("storage.checkpoints:Checkpoints.save:after:2", "1_warmup", "1_warmup/done.json"),
    # the target is reached, the stage is not yet marked as finished
    ("stages.training:write_json:before:1", "1_warmup", "1_warmup/done.json"),
    # stage 2: before its first checkpoint, within an epoch, and at its very end
    ("storage.workdir:Workdir.log:after:1", "2_train", "2_train/done.json"),
    ("training.train:run_steps:after:10", "2_train", "2_train/done.json"),
    ("storage.checkpoints:Checkpoints.save:after:2", "2_train", "2_train/done.json"),
    ("stages.training:write_json:before:1", "2_train", "2_train/done.json"),
    # evaluation: outcomes are written, their result is not; and between two attacks
    ("storage.results:write_json:before:2", "results/paper.npz", "results/paper.json"),
    ("evaluation.sound_protocol:execute:after:1", "results/paper.json", "results/sound.json"),
]


@pytest.mark.long
def test_a_run_that_dies_at_every_delicate_moment(reference, start, run, tmp_path):
    """Eleven crashes of one run, each resumed by the next; a torn line at the end of the metrics, too."""
    folder = tmp_path / "unlucky"
    for moment, present, absent in MOMENTS:
        process = start(
            *TINY,
            f"--workdir={folder}",
            program=("-c", CRASH, str(ROOT), moment),
            GLIBC_TUNABLES="glibc.malloc.hugetlb=1",
        )
        stdout, stderr = process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL, (moment, stdout, stderr)
        assert (folder / present).exists() and not (folder / absent).exists(), moment
        if moment == "checkpoints:Checkpoints.save:after:2":
            with (folder / "metrics.jsonl").open("a") as file:
                file.write('{"stage": "1_warmup", "epo')
    run(*TINY, f"--workdir={folder}")
    assert_same_run(folder, reference)
