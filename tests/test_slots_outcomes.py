"""The slot scheduler: outcomes that depend on no schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.tree_util import Partial

from clustr_jax import attacks, losses
from clustr_jax.attacks import attack_losses, scheduler
from clustr_jax.attacks.scheduled_pgd import PGD
from clustr_jax.runtime.errors import UserError
from slot_attacks import (
    CLASSES,
    EASY,
    HIDDEN,
    MIXED,
    RESTARTS,
    SIZE,
    SLOTS,
    STEPS,
    network,
    pgd_attack,
    problem,
    run,
    same,
    whole,
    wrong,
)

# What an outcome is


def test_outcome_fields():
    """Successes are misclassified, inside ball and box; the rest comes back unchanged."""
    model, x, y = problem()
    found = whole()
    assert 8 < found.broken.sum() < 36 and (found.restart > 0).any() and (found.step > 1).any()
    np.testing.assert_array_equal(wrong(model, found.x_adv, y), found.broken)
    np.testing.assert_array_equal(found.x_adv[~found.broken], x[~found.broken])
    assert np.abs(found.x_adv - x).max() <= MIXED + 1e-6
    assert found.x_adv.min() >= 0 and found.x_adv.max() <= 1
    for name in ("restart", "step"):
        np.testing.assert_array_equal(getattr(found, name) >= 0, found.broken)
    assert found.restart.max() < RESTARTS and found.step.max() <= STEPS
    # each restart before the successful one ran to its end
    for i, spent in enumerate(found.spent.T):
        last = found.restart[i] if found.broken[i] else RESTARTS
        assert (spent[:last] == STEPS).all()
        if found.broken[i]:
            assert spent[last] == min(found.step[i] + 1, STEPS)
    counted = [
        s[: r + 1].sum() if b else s.sum()
        for s, r, b in zip(found.spent.T, found.restart, found.broken, strict=True)
    ]
    assert found.needed == sum(counted)


def test_step_counts_the_attacks_steps():
    """0: the start succeeded, which an attack that never moves shows."""
    model, x, y = problem()
    found = run(model, x, y, eps=EASY)
    again = run(model, x, y, attack=pgd_attack(EASY, step_size=0.0))  # the start alone
    at_start = found.broken & (found.restart == 0) & (found.step == 0)
    assert 5 < at_start.sum() < 40
    np.testing.assert_array_equal(at_start, again.broken & (again.restart == 0))


# No schedule matters


def test_outcomes_do_not_depend_on_order_or_split():
    """With ids, at fixed slots, bit for bit: other places, other neighbours, other queue lengths."""
    model, x, y = problem()
    ids = np.random.default_rng(2).permutation(1000)[:40].astype(np.int32)
    expected = run(model, x, y, ids=ids)
    assert 0 < expected.broken.mean() < 1
    order = np.random.default_rng(3).permutation(40)
    same(run(model, x[order], y[order], ids=ids[order]), expected, order)
    for part in np.array_split(np.arange(40), [1, 14, 20]):
        same(run(model, x[part], y[part], ids=ids[part]), expected, part)
    # and the ids do matter
    other = run(model, x, y, ids=ids + 1)
    assert (other.restart != expected.restart).any() and (other.x_adv != expected.x_adv).any()


def test_default_ids_count_from_zero():
    model, x, y = problem()
    same(run(model, x, y, ids=np.arange(40, dtype=np.int32)), whole())


def test_how_often_the_device_comes_back_does_not_matter(monkeypatch):
    """One iteration a call instead of many: the same outcomes at the same cost."""
    monkeypatch.setattr(scheduler, "_OPERATIONS", {"cpu": 1.0})
    calls = []
    found = run(*problem(), report=lambda outcome: calls.append(outcome.evaluations))
    same(found, whole())
    np.testing.assert_array_equal(found.spent, whole().spent)
    assert found.evaluations == whole().evaluations
    assert len(calls) > 50 and set(np.diff(calls)) <= {0, SLOTS}


@pytest.mark.slow
def test_outcomes_agree_across_slots():
    """At least 99.5 % for 7, 64 and 512 (floating-point sums differ); each difference with its margin."""
    model, x, y = problem(200)
    by_slots = {n: run(model, x, y, slots=n) for n in (7, 64, 512)}
    base = by_slots[7]
    assert 0.1 < base.broken.mean() < 0.9
    for n in (64, 512):
        differ = np.flatnonzero(by_slots[n].broken != base.broken)
        for i in differ:
            images = {k: by_slots[k].x_adv[i : i + 1] for k in (7, n)}
            print(n, i, {k: float(losses.margin(model(z), y[i : i + 1])[0]) for k, z in images.items()})
        assert len(differ) <= 0.005 * len(x)
        agree = (by_slots[n].restart == base.restart) & (by_slots[n].step == base.step)
        assert agree.mean() >= 0.98
        both = agree & base.broken
        np.testing.assert_allclose(by_slots[n].x_adv[both], base.x_adv[both], atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 6, 8])
def test_fewer_pairs_than_slots(n):
    """A single example, and sets about as small as the number of slots."""
    model, x, y = problem()
    for restarts in (1, RESTARTS):
        found = run(model, x[:n], y[:n], restarts=restarts)
        same(found, whole(restarts=restarts), slice(n))
        assert found.evaluations <= 1.05 * found.needed + SLOTS * STEPS


def test_nothing_to_attack():
    model, x, y = problem()
    found = run(model, x[:0], y[:0])
    assert found.evaluations == found.needed == 0 and found.x_adv.shape == (0, SIZE)


def test_more_restarts_never_raise_accuracy():
    """Restart r is the same whatever the number of restarts: a success stays, with its restart."""
    counts = []
    for restarts in (1, 2, RESTARTS, 10):
        found = whole(restarts=restarts)
        counts.append(found.broken.sum())
        full = whole(restarts=10)
        early = full.restart < restarts
        np.testing.assert_array_equal(found.broken, full.broken & early)
        np.testing.assert_array_equal(found.restart[found.broken], full.restart[found.broken])
        np.testing.assert_array_equal(found.x_adv[found.broken], full.x_adv[found.broken])
    assert counts == sorted(counts) and counts[0] < counts[-1]


@pytest.mark.slow
def test_slots_break_what_pgd_breaks():
    """`attacks.pgd` with select="success" has the same streams: the same examples are broken."""
    model, x, y = problem(200)
    found = run(model, x, y)
    x_adv = attacks.pgd(
        jax.random.key(0), model, x, y, eps=MIXED, step_size=MIXED / 12, steps=STEPS, restarts=RESTARTS,
        loss_fn=losses.margin,
    )  # fmt: skip
    other = wrong(model, x_adv, y)
    assert np.mean(other == found.broken) >= 0.995
    both = other & found.broken
    close = np.abs(np.asarray(x_adv) - found.x_adv).max(axis=1) < 1e-5
    assert both.sum() > 40 and close[both].mean() > 0.98


# All restarts, targets


def test_every_restart_runs_to_its_end():
    """first=False: `collect` sees each (example, restart) once, and the first success is the outcome's."""
    model, x, y = problem()
    seen, images = np.zeros((RESTARTS, 40), int), np.zeros((RESTARTS, *x.shape), np.float32)
    fooled = np.zeros((RESTARTS, 40), bool)

    def collect(example, restart, x_adv, wrong_):
        np.add.at(seen, (restart, example), 1)
        images[restart, example], fooled[restart, example] = x_adv, wrong_

    found = run(model, x, y, first=False, collect=collect)
    assert (seen == 1).all() and (found.spent > 0).all()
    for r in range(RESTARTS):
        np.testing.assert_array_equal(fooled[r], wrong(model, images[r], y))
    assert (found.spent[~fooled] == STEPS).all()
    np.testing.assert_array_equal(found.broken, fooled.any(axis=0))
    first = fooled.argmax(axis=0)
    np.testing.assert_array_equal(found.restart, np.where(found.broken, first, -1))
    expected = images[first, np.arange(40)]
    np.testing.assert_array_equal(found.x_adv[found.broken], expected[found.broken])
    assert (fooled.sum(axis=0) > 1).any() and (fooled[1:] & ~fooled[:1]).any()
    # the same as stopping early
    for name in ("broken", "restart", "step"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole(), name))
    np.testing.assert_allclose(found.x_adv, whole().x_adv, atol=1e-6)
    assert found.evaluations <= 1.05 * found.spent.sum() + SLOTS * STEPS


def one_way_out():
    """Class 2 is reached by moving five coordinates together, class 1 never: only one target succeeds."""
    first, second = np.zeros((SIZE, HIDDEN)), np.zeros((HIDDEN, CLASSES))
    first[np.arange(HIDDEN), np.arange(HIDDEN)] = 1.0
    second[0, 1], second[1:6, 2] = 1.0, 1.0
    bias = np.array([2.2, -10.0, 0.0, -20.0])
    return Partial(network, [jnp.asarray(p, jnp.float32) for p in (first, second, bias)])


def test_each_target_has_its_restarts():
    """T targets x R restarts, target by target: restart t R + r goes for targets[t]."""
    model, x, y = one_way_out(), np.full((9, SIZE), 0.3, np.float32), np.zeros(9, np.int32)
    attack = pgd_attack(0.2, step_size=0.1, loss=attack_losses.margin_targeted)
    for order in ((1, 2), (2, 1), (3, 1)):
        targets = np.repeat(np.array(order, np.int32)[:, None], 9, axis=1)
        found = run(model, x, y, attack=attack, targets=targets, restarts=3)
        assert found.spent.shape == (6, 9)
        if 2 not in order:
            assert not found.broken.any() and (found.spent == STEPS).all()
            continue
        assert found.broken.all() and (found.restart == 3 * order.index(2)).all()
        assert (found.spent[: 3 * order.index(2)] == STEPS).all()
    # per example
    targets = np.array([[1, 2, 3] * 3, [2, 3, 1] * 3], np.int32)
    found = run(model, x, y, attack=attack, targets=targets, restarts=1)
    np.testing.assert_array_equal(found.restart, [1, 0, -1] * 3)


# What must not happen


class Leaving(PGD):
    """PGD whose images are moved by `shift` in the end."""

    shift: jax.Array = struct.field(default=None)

    def update(self, model, work, state, step):
        state = super().update(model, work, state, step)
        return state.replace(candidate=work.x + self.shift)


def test_an_attack_that_leaves_ball_or_box_is_caught():
    """A broken attack must not make a number."""
    model, x, y = problem()
    for eps, shift, what in ((0.1, 0.11, "linf ball"), (1.0, 0.9, "box"), (1.0, -0.9, "box")):
        attack = pgd_attack(eps, kind=Leaving, shift=jnp.float32(shift))
        with pytest.raises(AssertionError, match=f"attack left the {what}"):
            run(model, x, y, attack=attack)


def test_logits_that_are_not_finite_end_the_run():
    """They would count as misclassified: 3e38 overflows where the attack takes it."""
    first, second = np.zeros((SIZE, HIDDEN)), np.zeros((HIDDEN, CLASSES))
    first[0, :2], first[1, :2], second[:2, 1] = 3.0, -3.0, 3e38
    model = Partial(network, [jnp.asarray(p, jnp.float32) for p in (first, second, np.zeros(CLASSES))])
    x = np.tile(np.float32([0.3, 0.5] + [0.5] * 10), (20, 1))
    assert np.isfinite(model(x)).all() and not wrong(model, x, np.zeros(20)).any()
    with pytest.raises(UserError, match="logits_fn returned non-finite logits"):
        run(model, x, np.zeros(20, np.int32), attack=pgd_attack(0.3, step_size=0.3))
