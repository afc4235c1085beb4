"""The slot scheduler: few wasted evaluations, a smaller program at the end, few compilations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from clustr_jax.attacks import attack_losses, device_loop, registry, scheduler
from slot_attacks import (
    CLASSES,
    EASY,
    HIDDEN,
    MIXED,
    RESTARTS,
    ROBUST,
    SIZE,
    SLOTS,
    STEPS,
    TRACES,
    pgd_attack,
    problem,
    random_network,
    run,
    same,
    whole,
)

# Cost


@pytest.mark.parametrize("restarts", [1, RESTARTS, 10])
@pytest.mark.parametrize("eps", [EASY, MIXED, ROBUST], ids=["easy", "mixed", "robust"])
def test_few_evaluations_are_wasted(eps, restarts):
    """Slots x iterations, idle ones included, against what no schedule could leave out."""
    found = whole(eps, 200, restarts)
    share = found.broken.mean()
    assert (share > 0.95) if eps == EASY else (share == 0) if eps == ROBUST else (0.1 < share < 0.9)
    assert found.needed <= found.evaluations <= 1.05 * found.needed + SLOTS * STEPS
    if eps == ROBUST:
        assert found.needed == 200 * restarts * STEPS


@pytest.mark.slow
def test_cost_with_many_slots():
    """The tail is slots x steps at most, also where the set hardly fills them."""
    model, x, y = problem(200)
    for n, restarts in ((200, 1), (200, 10), (30, 4)):
        found = run(model, x[:n], y[:n], slots=64, restarts=restarts)
        assert found.needed <= found.evaluations <= 1.05 * found.needed + 64 * STEPS


# The smaller program at the end


def whole_numbers(params, x):
    """Integer weights on pixels rounded to 1/1024: exact in float32, so the same in any batch."""
    x = x + jax.lax.stop_gradient(jnp.round(x * 1024) / 1024 - x)
    return jax.nn.relu((x - 0.5) @ params[0]) @ params[1]


@pytest.mark.slow
def test_shrinking_changes_no_outcome(monkeypatch):
    """When few slots are busy the rest moves to a program of a quarter of the slots, and costs less."""
    rng = np.random.default_rng(5)
    params = [rng.integers(-3, 4, (6, 8)).astype(np.float32), rng.integers(-3, 4, (8, 3)).astype(np.float32)]
    model = Partial(whole_numbers, [jnp.asarray(p) for p in params])
    x = rng.uniform(0, 1, (18, 6)).astype(np.float32)
    y = np.asarray(model(x)).argmax(axis=1).astype(np.int32)
    slots = []

    def watch(outcome):
        slots.append(len(outcome.flight.active))

    full = run(model, x, y, eps=0.1, slots=16, restarts=1, report=watch)
    assert set(slots) == {16} and 0 < full.broken.mean() < 1
    monkeypatch.setattr(scheduler, "_WORTH", 0)
    slots.clear()
    small = run(model, x, y, eps=0.1, slots=16, restarts=1, report=watch)
    assert set(slots) == {16, 4}
    same(small, full)
    np.testing.assert_array_equal(small.spent, full.spent)
    assert small.needed == full.needed and small.evaluations < full.evaluations


# Compilation


def test_radii_steps_aims_and_models_share_a_program():
    """Nothing is traced again for another eps, step size, loss of the same options, number of steps or of
    restarts, or for other parameters."""
    model, x, y = problem()
    whole()
    before = len(TRACES)
    for eps, step_size, loss in ((0.01, 0.1, attack_losses.cross_entropy), (0.3, 0.0, attack_losses.margin)):
        run(model, x, y, attack=pgd_attack(eps, step_size=step_size, loss=loss))
    run(random_network(5), x, y, attack=pgd_attack(0.1, steps=3), restarts=2)
    run(model, x[:9], y[:9])
    assert len(TRACES) == before


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "pma"])
def test_an_attack_is_one_program_however_often_it_comes_back(name, monkeypatch):
    """Its slots have the same types when they are empty and when they come back from the device."""
    monkeypatch.setattr(scheduler, "_OPERATIONS", {"cpu": 1.0})  # after every iteration

    def model(x):
        return jnp.tanh(x.reshape(x.shape[0], -1) @ random_network().args[0][0]) @ weights

    weights = jnp.asarray(np.random.default_rng(0).normal(size=(HIDDEN, CLASSES)), jnp.float32)
    x = np.random.default_rng(1).uniform(0, 1, (20, 2, SIZE // 2, 1)).astype(np.float32)
    y = np.asarray(model(x)).argmax(axis=1).astype(np.int32)
    attack = registry.build(name, registry.Budget(eps=0.05, steps=6, queries=6))
    targets = (y[None] + 1) % CLASSES if registry.ATTACKS[name].targets else None
    model = Partial(model)
    before, calls = device_loop.advance._cache_size(), []
    scheduler.run(attack, jax.random.key(0), model, x, y, slots=SLOTS, targets=targets, report=calls.append)
    assert len(calls) > 5 and device_loop.advance._cache_size() - before == 1
