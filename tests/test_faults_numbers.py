"""Faults put in on purpose: numbers that are none, a clock that jumps."""

import jax
import numpy as np
import pytest

import clustr_jax
from runs import ROOT, TOY, arrays, assert_one_line, metrics

pytestmark = [
    pytest.mark.slow,
    # orbax and ml_collections use outdated calls of their own libraries
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning"
    ),
]


@pytest.mark.parametrize("method", ["nominal", "qtrades"])  # one whose adversary runs inside the objective
def test_a_loss_that_is_not_finite(method, attempt, tmp_path, table):
    """The run ends with the step and the batch, and can pass over such steps instead."""
    arguments = (
        f"{TOY}:{method}", "--config.smoke=true", "--stages=2_train", "--config.train.optimizer=sgd",
        "--config.train.schedule=multistep", "--config.train.lr=1e9", "--config.train.weight_decay=1e9",
    )  # fmt: skip
    code, stderr = attempt(*arguments, f"--workdir={tmp_path / 'stop'}")
    assert code == 2 and "not finite at step" in stderr and "nonfinite=skip" in stderr
    assert_one_line(stderr)
    kept = arrays(tmp_path / "stop" / "2_train" / "nonfinite.npz")
    assert kept["x"].shape[0] == kept["y"].shape[0] == kept["ids"].shape[0] and np.isfinite(kept["x"]).all()
    assert not (tmp_path / "stop" / "metrics.jsonl").exists()
    code, stderr = attempt(*arguments, "--config.train.nonfinite=skip", f"--workdir={tmp_path / 'skip'}")
    assert code == 0 and stderr == ""
    (record,) = metrics(tmp_path / "skip")
    assert record["skipped"] >= 1 and np.isfinite(record["loss"])
    variables = clustr_jax.load(tmp_path / "skip").variables
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
    if method != "nominal":
        assert kept["x_adv"].shape == kept["x"].shape
        return
    table.append(
        (
            "a loss that is not finite",
            2,
            "stopped with its step and batch; or passed over and counted",
        )
    )


def test_no_duration_comes_from_the_wall_clock(table):
    """A clock that jumps changes nothing: none of those that can is read."""
    clocks = ("time.time", "time_ns", "import time as", "from time import", "datetime.now", "utcnow")
    texts = {p.name: p.read_text() for p in sorted((ROOT / "clustr_jax").rglob("*.py"))}
    used = {name: [c for c in clocks if c in text] for name, text in texts.items()}
    assert {name: found for name, found in used.items() if found} == {}
    table.append(("a clock that jumps", 1, "no code reads the wall clock"))
