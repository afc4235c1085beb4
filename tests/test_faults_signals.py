"""Faults put in on purpose: kills, SIGTERM, Ctrl-C, a second process."""

import random
import shutil
import signal
import time

import numpy as np
import pytest

from clustr_jax.runtime import preemption
from faults import ALL, KILLS, KILLS_PER_RUN, LIMIT_SECONDS
from runs import ROOT, TINY, assert_one_line, assert_same_run

pytestmark = [
    pytest.mark.slow,
    # orbax and ml_collections use outdated calls of their own libraries
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning"
    ),
]


def test_kills_at_random_moments(reference, start, run, tmp_path, table):
    """SIGKILL, SIGTERM and SIGINT in turns, in any stage; left alone, the run ends as if undisturbed."""
    rng = random.Random(0 if not ALL else 1)
    kinds, longest = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT), {}
    kills = chain = 0
    while kills < KILLS:
        chain += 1
        folder = tmp_path / f"run-{chain}"
        for i in range(min(KILLS_PER_RUN, KILLS - kills)):
            kind = kinds[kills % len(kinds)]
            process = start(*TINY, f"--workdir={folder}")
            while not (folder / "config.json").exists() and process.poll() is None:
                time.sleep(0.01)
            # past the start-up, which costs most of these seconds; further and further along the run
            time.sleep(rng.uniform(2.0, 6.0 + 3.0 * i))
            if process.poll() is not None:
                break  # it got through: the next chain goes on
            started = time.monotonic()
            process.send_signal(kind)
            stdout, stderr = process.communicate(timeout=60)
            if process.returncode == 0:
                continue  # it had just finished: not a kill
            kills += 1
            if kind == signal.SIGKILL:
                assert process.returncode == -signal.SIGKILL
                continue
            longest[kind.name] = max(longest.get(kind.name, 0.0), time.monotonic() - started)
            # while it still imports, signals end it as they end any program, without a traceback
            assert process.returncode in (preemption.EXIT_CODE, -kind), stdout + stderr
            assert "Traceback" not in stderr
            if process.returncode == preemption.EXIT_CODE:
                assert f"stopped by {kind.name}" in stderr and "run the same command again" in stderr
        run(*TINY, f"--workdir={folder}")
        assert_same_run(folder, reference)
        shutil.rmtree(folder)
    assert max(longest.values()) < LIMIT_SECONDS
    seconds = ", ".join(f"{name} to exit at most {s:.1f} s" for name, s in sorted(longest.items()))
    table.append(
        (
            "SIGKILL, SIGTERM, SIGINT at random moments over all stages (digits)",
            kills,
            f"all resumed: parameters, clusters, metrics and results bit-identical; {seconds}",
        )
    )


@pytest.mark.long
def test_sigterm_while_a_larger_network_trains(start, data_dir, tmp_path, table):
    """resnet8 on CIFAR-10: first during the compilation, then during training."""
    arguments = (
        f"--config={ROOT}/configs/cifar10.py:nominal,cpu",
        "--config.data.train_size=1000",
        "--config.data.test_size=100",
        "--config.eval.n=20",
        f"--workdir={tmp_path / 'run'}",
    )
    taken = []
    for wanted in (tmp_path / "run" / "config.json", tmp_path / "run" / "metrics.jsonl"):
        process = start(*arguments)
        while not wanted.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        time.sleep(1.0)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
        taken.append(time.monotonic() - started)
        assert process.returncode == preemption.EXIT_CODE and "stopped by SIGTERM" in stderr
    assert max(taken) < LIMIT_SECONDS
    table.append(
        (
            "SIGTERM in compilation and in training (resnet8, CIFAR-10)",
            2,
            f"exit code {preemption.EXIT_CODE} after {taken[0]:.1f} and {taken[1]:.1f} s",
        )
    )


def test_ctrl_c_is_not_lost_while_modules_are_imported(start, tmp_path):
    """As a KeyboardInterrupt it was: a library caught it, and the run went on; or run.py left with 130."""
    for seconds in np.linspace(0.2, 4.0, 12):
        process = start(*TINY, f"--workdir={tmp_path / 'run'}")
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        # no look at stderr: before run.py's first line it is Python that shows where it was
        assert process.returncode in (preemption.EXIT_CODE, -signal.SIGINT), stderr


def test_a_second_process_in_the_same_work_directory(start, tmp_path, table):
    folder = tmp_path / "run"
    first = start(*TINY, f"--workdir={folder}")
    while not (folder / "config.json").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    second = start(*TINY, f"--workdir={folder}")
    _, stderr = second.communicate(timeout=120)
    assert second.returncode == 2 and f"in use by process {first.pid}" in stderr
    assert_one_line(stderr)
    assert first.poll() is None
    table.append(("a second process in the same work directory", 1, "one line that names the first"))
