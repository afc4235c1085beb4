"""Steps, chunks and epochs: order, totals, streams of randomness."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax.training import adversaries, objectives, train, train_state
from runs import assert_same_arrays
from small_training import STEPS, assert_close, ids_of, problem, spy


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("nominal", {}),
        ("free_at", {"train.replays": 3}),
        ("clustr_qtrades", {"train.ema": 0.9}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.one_in(3)
def test_the_length_of_a_chunk_changes_nothing(method, changes, rng):
    """5 steps at once, 1 + 4, and five times 1: the same state to the last bit, and one compilation."""
    # a learning rate of its own: compiled by no other test before
    p = problem(method, rng, **{"train.batch_size": 8, "train.lr": 0.0234, **changes})
    before = train.run_steps._cache_size()
    whole = p.run(p.state, STEPS)
    assert int(whole.step) == STEPS
    assert_same_arrays(p.run(p.run(p.state, 1), STEPS - 1), whole)
    state = p.state
    for _ in range(STEPS):
        state = p.run(state, 1)
    assert_same_arrays(state, whole)
    assert train.run_steps._cache_size() == before + 1
    assert_same_arrays(p.run(p.state, 0), p.state)


def test_totals_are_sums_over_the_steps(rng):
    """`totals` adds up the metrics of single steps (float32, in order)."""
    p = problem("trades", rng)
    state, expected = p.state, dict.fromkeys(p.state.totals, 0.0)
    step = jax.jit(lambda state: p.step(state))
    for _ in range(3):
        state, metrics = step(state)
        expected = {name: expected[name] + metrics[name] for name in expected}
    found = p.run(p.state, 3).totals
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("size", [1, 10, 1437])
def test_epoch_order_is_a_permutation(size, key):
    orders = [np.asarray(train.epoch_order(jax.random.clone(key), size, epoch)) for epoch in (0, 1, 0)]
    for order in orders:
        assert order.dtype == np.int32
        np.testing.assert_array_equal(np.sort(order), np.arange(size))
    np.testing.assert_array_equal(orders[0], orders[2])
    assert size == 1 or (orders[0] != orders[1]).any()
    assert size == 1 or (orders[0] != np.arange(size)).any()


@pytest.mark.parametrize(
    "method",
    [
        "trades",
        "clustr_qtrades",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("qtrades", "clustr_trades")),
    ],
)
@pytest.mark.parametrize("attack_bn", ["batch", "eval"])
@pytest.mark.one_in(4)
def test_a_shared_clean_pass_changes_nothing(method, attack_bn, rng):
    """The adversary that starts from the objective's clean outputs is the one that makes its own."""
    p = problem(method, rng, **{"train.attack_bn": attack_bn, "train.lr": 0.1})
    assert adversaries.shares_clean(p.trainer.method, p.trainer.settings) == (attack_bn == "batch")
    own, step = spy(p)
    expected = step(own.state)[0].params
    after = jax.jit(p.step)(p.state)[0].params
    assert_close(after, expected)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), after, p.state.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize(("method", "replays"), [("nominal", 1), ("free_at", 4)])
def test_an_epoch_sees_each_image_once(method, replays, rng):
    """90 images in batches of 16: five batches of different images, shuffled, each `replays` times."""
    p, step = spy(problem(method, rng, **{"train.batch_size": 16, "train.replays": replays}))
    assert p.trainer.steps_per_epoch == 5 * replays
    state, drawn = p.state, []
    for _ in range(5 * replays):
        state, metrics = step(state)
        drawn.append(ids_of(p, metrics["batch"].x))
    for i in range(0, 5 * replays, replays):
        for again in drawn[i : i + replays]:
            np.testing.assert_array_equal(again, drawn[i])
    once = np.concatenate(drawn[::replays])
    np.testing.assert_array_equal(once, np.asarray(p.order)[:80])


@pytest.mark.more
def test_a_step_has_separate_streams_of_randomness(rng, monkeypatch):
    """Drawing, augmenting and attacking use different keys, and other ones at the next step."""
    p, keys = problem("clustr_qtrades", rng), []

    def note(key):
        keys.append(bytes(np.asarray(jax.random.key_data(key))))

    def adversary(net, variables, batch, clusters, key, settings, strength=1.0):
        note(key)
        return batch.x, {}

    def objective(net, variables, batch, adversarial, clusters, settings):
        aux = objectives.Aux({}, jnp.zeros(len(batch.y)), {})
        return sum(jnp.sum(w) for w in jax.tree.leaves(variables["params"])), aux

    method = dataclasses.replace(p.trainer.method, objective=objective, adversary=adversary)
    p = dataclasses.replace(p, trainer=dataclasses.replace(p.trainer, method=method))
    for owner, name, position in ((train.sampling, "draw", 0), (train_state.TrainSet, "batch", 2)):
        original = getattr(owner, name)

        def wrapper(*args, original=original, position=position, **kwargs):
            note(args[position])
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)
    state, _ = p.step()
    p.step(state)
    assert len(keys) == 6
    assert len(set(keys)) == 6
