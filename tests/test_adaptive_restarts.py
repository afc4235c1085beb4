"""Adaptive restarts: which images have one, when they end, and that each is what it would have been."""

import functools

import jax
import numpy as np
import pytest

from clustr_jax import attacks
from clustr_jax.attacks import adaptive, attack_losses, scheduler
from clustr_jax.runtime.errors import UserError
from slot_attacks import MIXED, SLOTS, pgd_attack, problem
from slot_attacks import run as run_all

MOST = 6


def spend(*, key=0, eps=MIXED, index=None, **more):
    model, x, y = problem()
    attack = pgd_attack(eps)
    index = np.arange(len(x)) if index is None else index
    settings = dict(most=MOST, slots=SLOTS, ids=index) | more
    return adaptive.run(attack, jax.random.key(key), model, x[index], y[index], **settings)


@functools.cache
def each_restart(eps=MIXED, key=0):
    """([MOST, N] fooled, [MOST, N] margins at the end) of every restart, none given up."""
    model, x, y = problem()
    fooled, margins = np.zeros((MOST, len(x)), bool), np.zeros((MOST, len(x)))

    def collect(example, restart, found, broken):
        fooled[restart, example] = broken
        for e, r, image in zip(example, restart, found, strict=True):
            z = np.float64(model(image[None]))[0]
            margins[r, e] = np.delete(z, y[e]).max() - z[y[e]]

    run_all(
        model, x, y, eps=eps, key=key, restarts=MOST, first=False, collect=collect, attack=pgd_attack(eps)
    )
    return fooled, margins


def slow(share, patience, eps=MIXED, key=0):
    """The rule, written down: ([(images attacked, broken)], round that broke each or -1)."""
    fooled, margins = each_restart(eps, key)
    left, broken_in, rounds = list(range(fooled.shape[1])), np.full(fooled.shape[1], -1), []
    best = np.full(fooled.shape[1], -np.inf)
    for number in range(MOST):
        if not left or (number >= patience and all(b == 0 for _, b in rounds[-patience:])):
            break
        nearest = sorted(left, key=lambda i: -best[i])
        chosen = nearest if number == 0 else nearest[: int(np.ceil(share * len(left)))]
        for i in chosen:
            best[i] = max(best[i], margins[number, i])
            if fooled[number, i]:
                broken_in[i] = number
        left = [i for i in left if broken_in[i] < 0]
        rounds.append((len(chosen), int(sum(broken_in[i] == number for i in chosen))))
    return rounds, broken_in


@pytest.mark.parametrize("share, patience", [(1.0, MOST), (0.5, MOST), (0.3, 1), (0.3, 2)])
def test_the_rule(share, patience):
    """Images and successes of each round, and the restart that broke each, as written down slowly."""
    found = spend(share=share, patience=patience)
    rounds, broken_in = slow(share, patience)
    assert list(zip(found.attacked, found.broken, strict=True)) == rounds
    np.testing.assert_array_equal(found.outcome.restart, broken_in)
    np.testing.assert_array_equal(found.outcome.broken, broken_in >= 0)
    assert found.broken[0] > 3 and len(rounds) > 1
    if patience == 1:
        assert found.broken[-1] == 0 and len(rounds) < MOST


def test_all_restarts_of_all_images_are_the_plain_run():
    """share=1 and no end before the last: bit for bit what the scheduler does with so many restarts."""
    found = spend(share=1.0, patience=MOST).outcome
    plain = run_all(*problem(), restarts=MOST, attack=pgd_attack(MIXED))
    for name in ("broken", "restart", "step", "x_adv"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name), err_msg=name)
    assert found.spent.shape == (MOST, len(problem()[1])) and (found.spent >= 0).all()
    needed = np.where(found.broken, found.restart, MOST - 1)
    np.testing.assert_array_equal((found.spent > 0).sum(axis=0), needed + 1)  # none in vain


def test_few_restarts_are_spent():
    found = spend(share=0.25, patience=2)
    assert (found.outcome.spent > 0).sum() < 0.6 * (spend(share=1.0, patience=MOST).outcome.spent > 0).sum()
    assert found.outcome.evaluations >= found.outcome.spent.sum()
    assert (np.isfinite(found.margins) == (found.outcome.spent > 0)).all()


def test_the_order_of_images_does_not_matter():
    """But for equal margins; ids decide the randomness."""
    order = np.random.default_rng(0).permutation(len(problem()[1]))
    found, moved = spend(share=0.4), spend(share=0.4, index=order)
    np.testing.assert_array_equal(moved.outcome.restart, found.outcome.restart[order])
    assert moved.attacked == found.attacked


@pytest.mark.parametrize("stops", [(1,), (4, 3), (9, 2, 6)])
def test_it_goes_on_from_where_it_was_interrupted(stops, monkeypatch):
    """In this process; test_resuming_places.py interrupts the door, and goes on from records."""
    whole = spend(share=0.5)
    monkeypatch.setattr(scheduler, "_OPERATIONS", {"cpu": 1.0})

    class Stop(Exception):
        pass

    progress = None
    for stop in stops:
        calls = []

        def report(so_far, outcome, calls=calls, stop=stop):
            calls.append(so_far)
            if len(calls) == stop:
                raise Stop

        with pytest.raises(Stop):
            spend(share=0.5, progress=progress, report=report)
        progress = calls[-1]
    found = spend(share=0.5, progress=progress)
    for name in ("broken", "restart", "step", "spent", "x_adv"):
        np.testing.assert_array_equal(getattr(found.outcome, name), getattr(whole.outcome, name))
    assert (found.attacked, found.broken) == (whole.attacked, whole.broken)


def test_targets_have_a_restart_each_in_every_round():
    """A round of 3 targets is 3 rows; what one of them broke has no other round."""
    model, x, y = problem()
    targets = np.stack([(y + k) % 4 for k in (1, 2, 3)]).astype(np.int32)
    attack = pgd_attack(MIXED, loss=attack_losses.margin_targeted)
    found = adaptive.run(
        attack, jax.random.key(0), model, x, y, targets=targets, most=3, share=0.5, patience=3, slots=SLOTS
    )
    assert found.margins.shape == found.outcome.spent.shape == (9, len(x))
    spent = found.outcome.spent.reshape(3, 3, len(x)) > 0  # [target, restart, image]
    assert (spent.any(axis=0)[0]).all() and found.attacked[0] == len(x)
    for number in (1, 2):
        held = ~found.outcome.broken | (found.outcome.restart % 3 >= number)
        attacked = spent.any(axis=0)[number]
        assert attacked.sum() == found.attacked[number] and not attacked[~held].any()
        unbroken = attacked & ~found.outcome.broken
        assert spent[:, number, unbroken].all()


@pytest.mark.parametrize("name", ["pma", "apgd-ce", "apgd-t", "fab-t"])
def test_the_door(name):
    """It breaks what one restart of the attack breaks, and returns verified images or x."""
    model, x, y = problem()
    call = functools.partial(
        attacks.adaptive_restarts,
        jax.random.key(0),
        model,
        x,
        y,
        eps=MIXED,
        attack=name,
        steps=6,
        slots=SLOTS,
    )
    one, more = call(most=1), call(most=4, share=0.5)
    first, all_ = ((np.asarray(model(z)).argmax(axis=1) != y) for z in (one, more))
    assert (all_ >= first).all() and first.any() and not all_.all()
    np.testing.assert_array_equal(more[~all_], x[~all_])
    assert np.abs(more - x).max() <= MIXED + 1e-6 and more.min() >= 0 and more.max() <= 1


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(attack="pgd"), "attack must be one of apgd-ce, .*pma"),
        (dict(share=0.0), "share must be above 0"),
        (dict(share=1.5), "share must be above 0"),
        (dict(share="half"), "share must be above 0"),
        (dict(patience=0), "patience must be at least 1"),
        (dict(most=2.5), "most must be a whole number"),
    ],
)
def test_settings_that_are_refused(change, text):
    with pytest.raises(UserError, match=text):
        attacks.adaptive_restarts(jax.random.key(0), *problem(), eps=0.1, **change)


@pytest.mark.parametrize("attack", ["fmn", "ddn"])
def test_attacks_that_draw_nothing_are_refused(attack):
    """Their restarts are one and the same, so that none breaks anything new."""
    x = np.full((2, 4), 0.5, np.float32)
    with pytest.raises(UserError, match="draws nothing"):
        attacks.adaptive_restarts(
            jax.random.key(0), lambda x: x[:, :2], x, np.zeros(2, int), eps=0.1, norm="l2", attack=attack
        )
