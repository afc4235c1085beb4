"""Eight virtual devices against one: parameters, messages, clusters, attacks and checkpoints.

The work is done by `on_devices.py` in a process of its own, for the number of devices is fixed at its start.
"""

import os
import pathlib
import subprocess
import sys

import pytest

import eight_devices
from marks import in_ci

HERE = pathlib.Path(__file__).parent
METHODS = ("nominal", "free_at", "pgd_at", "trades", "magnet", "clustr_qtrades", "clustr_trades", "clustr_at")
# Training-mode passes of one step, whose batch statistics are sent: the attack's steps (of train.attack_bn
# "batch"; its target is the clean pass), then those that are differentiated.
PASSES = {
    "nominal": 1,
    "free_at": 1,
    "pgd_at": 11,
    "trades": 2,
    "magnet": 1,
    "clustr_qtrades": 3,
    "clustr_trades": 2,
    "clustr_at": 3,
}
# Their adversaries start where the divergence is flat: in float32 some signs of the first step are rounding,
# other images are seen, and with them go the batch statistics.
FOLLOWS_ROUNDING = ("trades", "clustr_qtrades", "clustr_trades")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "tolerance"), in_ci([("float32", 1e-4), ("float64", 1e-9)], ("float32", 1e-4))
)
def test_five_steps_on_eight_devices_are_those_on_one(width, tolerance):
    """By SGD. (Adam divides tiny gradients by their own size, so that it enlarges what is only rounding.)"""
    for method, found in eight_devices.run("on_devices", width, *METHODS).items():
        assert found["params"] <= tolerance and found["moved"] >= 3e-4, (method, found)
        assert found.get("losses", 0.0) <= tolerance, (method, found)
        if width == "float64" or method not in FOLLOWS_ROUNDING:
            assert found["batch_stats"] <= tolerance, (method, found)
        assert found.get("centroids", 0.0) <= 1e-6, (method, found)
        if width == "float64":  # in float32 a label can tip over, and accuracy is among them
            assert found["totals"] <= tolerance, (method, found)
        if width == "float32":
            allowed = found["gradients"] + PASSES[method] * found["statistics"]
            allowed = 1.05 * (allowed + 4 * found["rows"] * (found["embedding"] + 1))
            assert found["gradients"] < found["sent"] <= allowed, (method, found, allowed)


@pytest.mark.slow
def test_clusters_and_checkpoints_move_between_one_and_eight_devices(tmp_path):
    found = eight_devices.run("on_devices", "other", str(tmp_path))
    assert found["kmeans"] == 0.0
    assert found["moved"] == {way: {"equal": True, "step": 10} for way in ("8 to 1", "1 to 8")}


@pytest.mark.long
def test_attacks_on_eight_devices_break_what_they_break_on_one():
    """At least 99.5 % of the outcomes; on these, neither nothing nor everything is broken."""
    for attack, found in eight_devices.run("on_devices", "attacks").items():
        assert found["equal"] >= 0.995 and 0.05 < found["broken"] < 0.95, (attack, found)


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core is one device: no collectives")
def test_collectives_in_a_queue_do_not_wait_for_each_other_forever():
    """Devices that wait for each other do not hold the threads that they wait for: one is enough."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NPROC", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    done = subprocess.run(
        [sys.executable, str(HERE / "queued_collectives.py")],
        env=kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent), "NPROC": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 1
