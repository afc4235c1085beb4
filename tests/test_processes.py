"""Several processes over loopback: they train, stop together when one is killed, and go on together."""

import json
import os
import signal
import socket
import time

import jax
import pytest

import clustr_jax
from clustr_jax.runtime import processes
from clustr_jax.runtime.errors import UserError
from marks import in_ci
from runs import TINY, metrics


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(start, count, *arguments):
    """`count` processes of one run."""
    join = (f"--coordinator=127.0.0.1:{port()}", f"--num_processes={count}", "--platform=cpu")
    return [start(*arguments, *join, f"--process_id={i}") for i in range(count)]


def ends(processes):
    """(exit codes, what was written to stderr)."""
    written = [process.communicate(timeout=300)[1] for process in processes]
    return [process.returncode for process in processes], written


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("UNAVAILABLE: connection reset", True),
        ("INTERNAL: Gloo all-reduce failed", True),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes", False),
        ("INVALID_ARGUMENT: shapes", False),
    ],
)
def test_what_starting_again_does_not_mend_is_no_lost_process(text, lost, monkeypatch):
    """Also where it stands behind an error of one's own."""
    monkeypatch.setattr(processes, "_connect", lambda *_: None)
    monkeypatch.setattr(processes, "use_cores", lambda **_: None)
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    with pytest.raises(processes.Lost if lost else UserError), processes.joined(None):
        raise UserError("of an attack") from jax.errors.JaxRuntimeError(text)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "victim"), in_ci([(2, 1), (4, 0)], (4, 0)))
def test_all_stop_when_one_is_killed_and_go_on_together(start, run, tmp_path, count, victim):
    """One line from each survivor; afterwards another number of processes ends the run."""
    folder = tmp_path / "run"
    settings = (*TINY, "--config.warmup.target=0.0", "--config.warmup.epochs=60", f"--workdir={folder}")
    processes = together(start, count, *settings, "--stages=1_warmup")
    deadline = time.monotonic() + 240
    while not list(folder.glob("1_warmup/seals/*.json")):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), ends(processes)
        time.sleep(0.05)
    processes[victim].kill()
    killed = time.monotonic()
    codes, written = ends(processes)
    assert time.monotonic() - killed < 60
    for i, (code, text) in enumerate(zip(codes, written, strict=True)):
        if i == victim:
            assert code == -9
        elif code == 75:
            (line,) = [line for line in text.splitlines() if line.startswith("stopped: ")]
            assert "start all processes again" in line and "Traceback" not in text
        else:  # JAX's own watch was faster, and says so
            assert code == -6 and "another task died" in text, (code, text)
    done = len(metrics(folder))
    assert 0 < done < 60 or (folder / "1_warmup/done.json").exists()
    if count == 4:  # the rest is the same
        return
    codes, written = ends(together(start, 2, *settings, "--stages=1_warmup,2_train,evaluate"))
    assert codes == [0, 0], written
    epochs = [r["epoch"] for r in metrics(folder) if r["stage"] == "1_warmup"]
    assert epochs == list(range(1, 61))
    assert {p.name for p in (folder / "results").glob("*.json")} >= {"clean.json", "paper.json", "sound.json"}
    run(*settings)  # and one process finds nothing left to do but the certificates
    assert json.loads((folder / "results/certified.json").read_text())["n"] == 60
    assert clustr_jax.load(folder).clusters is not None


@pytest.mark.slow
def test_a_signal_to_one_stops_all_with_everything_saved(start, tmp_path):
    folder = tmp_path / "run"
    settings = (*TINY, "--config.warmup.target=0.0", "--config.warmup.epochs=2000", f"--workdir={folder}")
    processes = together(start, 2, *settings, "--stages=1_warmup")
    deadline = time.monotonic() + 240
    while not list(folder.glob("1_warmup/seals/*.json")):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), ends(processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    codes, written = ends(processes)
    assert codes == [75, 75], written
    assert "stopped by a signal to another process: 1_warmup after" in written[0], written
    assert "stopped by SIGTERM: 1_warmup after" in written[1], written
    newest = max(int(path.stem) for path in folder.glob("1_warmup/seals/*.json"))
    assert newest >= metrics(folder)[-1]["step"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--num_processes=2",), "need --coordinator"),
        (("--coordinator=127.0.0.1:1",), "--num_processes=N"),
        (("--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=2"), "0 to N-1"),
        (("--coordinator=nowhere", "--num_processes=2", "--process_id=0"), "HOST:PORT"),
        (("--platform=cuda",), "--platform=cuda"),
        (("--platform=gpu",), "platform"),
    ],
)
@pytest.mark.one_in(3)
def test_mistakes_are_told_in_one_line(run, arguments, words):
    _, stderr = run(*TINY, *arguments, code=2)
    assert words in stderr and stderr.startswith("error: ") and stderr.count("\n") == 1, stderr


@pytest.mark.parametrize(
    ("variable", "value", "several"),
    [
        ("JAX_NUM_CPU_DEVICES", "3", True),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=8", True),
        ("JAX_NUM_CPU_DEVICES", "1", False),
    ],
)
def test_devices_that_the_user_asked_for_keep_to_their_threads(monkeypatch, variable, value, several):
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, value)
    processes.use_cores()
    assert ("multi_thread_eigen=false" in os.environ.get("XLA_FLAGS", "")) == several
    assert not processes.on_cores()  # a number that was asked for is used as it is
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=true")
    processes.use_cores()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_multi_thread_eigen=true"
