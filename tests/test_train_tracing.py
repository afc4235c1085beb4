"""What is traced: a step once, equal trainers are one program."""

import jax
import numpy as np
import pytest

from clustr_jax.training import refit, train
from small_training import problem


@pytest.mark.more
@pytest.mark.parametrize("method", ["nominal", "free_at", "trades", "clustr_qtrades"])
@pytest.mark.parametrize("sampler", ["floor", "stale"])
def test_three_epochs_trace_a_step_once(method, sampler, rng, monkeypatch):
    """Every kind of sampler: the metrics' names and the loop share one trace, later epochs need none."""
    traces, original = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: traces.append(1) or original(*a))
    changes = {"train.batch_size": 8, "train.lr": 0.0123, "fidelity.sampler": sampler}
    p = problem(method, rng, **changes | ({"train.replays": 3} if method == "free_at" else {}))
    state = p.state
    for _ in range(3):
        state = p.run(state, p.trainer.steps_per_epoch)
        if p.trainer.magnet:
            state = refit.refit(p.trainer, state, p.train_set, jax.random.key(9))
        state = train.reset_totals(state)
        assert not any(float(value) for value in state.totals.values())
    assert len(traces) == 1


@pytest.mark.more
def test_equal_trainers_are_one_program(rng):
    """A trainer is its settings: made again it compiles nothing, with another setting it does."""
    p = problem("clustr", rng, **{"train.lr": 0.0321})
    p.run(p.state, 1)
    before = train.run_steps._cache_size()
    again = problem("clustr", np.random.default_rng(0), **{"train.lr": 0.0321})
    assert again.trainer is not p.trainer and again.trainer == p.trainer
    again.run(again.state, 1)
    assert train.run_steps._cache_size() == before
    other = problem("clustr", np.random.default_rng(0), **{"train.lr": 0.0322})
    assert other.trainer != p.trainer
    other.run(other.state, 1)
    assert train.run_steps._cache_size() == before + 1
