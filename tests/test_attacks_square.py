"""Square: the schedule of its squares, where they lie, and its first queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference_attacks
from clustr_jax import attacks
from clustr_jax.attacks import device_loop, registry, scheduler
from clustr_jax.attacks.registry import Budget
from clustr_jax.attacks.square import sides


@pytest.mark.parametrize(("queries", "height", "width"), [(10_000, 32, 32), (5000, 28, 28), (1000, 8, 8)])
def test_squares_shrink_as_in_the_paper(queries, height, width):
    """Side round(sqrt(p H W)): compared between the halvings, where no off-by-one of the counting matters."""
    found = sides(queries, (height, width, 3), 1, False)
    assert len(found) == queries and (np.diff(found) <= 0).all() and found.min() >= 1
    for at in (5, 30, 125, 350, 750, 1500, 3000, 5000, 7000, 9000, 9999):
        i = at * queries // 10_000
        share = reference_attacks.square_share(at, 10_000)
        assert found[i] == max(1, round(np.sqrt(share * height * width))), at
    assert sides(20, (1, 8, 1), 1, False).min() == 1  # images one pixel high have squares as well
    # l2: odd and at least 3
    found = sides(queries, (height, width, 3), 3, True)
    assert (found % 2 == 1).all() and found.min() == 3 and found.max() <= min(height, width)


@pytest.mark.parametrize(("norm", "smallest", "odd"), [("linf", 1, False), ("l2", 3, True)])
def test_the_schedule_of_autoattack_is_that_of_10000_queries(norm, smallest, odd):
    """resc_schedule=False: share 0.8 until proposal 10, halved after 10, 50, 200 ...: 3 pixels at 5,000."""
    found = sides(5000, (32, 32, 3), smallest, odd, False)
    for at in (0, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2000, 2001, 4000, 4001, 4999):
        side = max(round(np.sqrt(reference_attacks.square_share(at, 10_000) * 32 * 32)), smallest)
        assert found[at] == (side + 1 - side % 2 if odd else side), at
    assert found[-1] == 3 and sides(5000, (32, 32, 3), 1, False)[-1] == 1
    # of 10,000 queries both are one, and beyond them AutoAttack starts over
    np.testing.assert_array_equal(*(sides(10_000, (32, 32, 3), smallest, odd, r) for r in (True, False)))
    assert (sides(10_100, (32, 32, 3), smallest, odd, False)[10_001:] == found[0]).all()


@pytest.mark.parametrize("rescale", [True, False])
def test_where_squares_lie(rescale):
    """Everywhere; with AutoAttack's schedule where its own do: never in the last row and column."""
    attack = registry.build("square", Budget(eps=0.1, rescale_schedule=rescale))

    def corners(*size):
        return jax.vmap(lambda key: attack._corner(key, *size))(jax.random.split(jax.random.key(0), 2000))

    rows, columns = corners(3, 8, 6)
    assert (int(rows.max()), int(columns.max())) == ((5, 3) if rescale else (4, 2))
    assert int(rows.min()) == int(columns.min()) == 0
    assert not np.any(corners(8, 8, 8))  # a square that is the whole image has one place


def test_which_schedule_is_whose(monkeypatch):
    """AutoAttack's by default in the ensemble, Square's own in `square`, and each has the other's."""
    seen = []

    def run(attack, key, model, x, y, **more):
        seen.append(attack.rescale)
        return scheduler.Outcome.fresh(x, 1)

    monkeypatch.setattr(scheduler, "run", run)
    x, y = np.full((2, 4, 4, 1), 0.9, np.float32), np.zeros(2, int)

    def model(x):
        z = x.mean(axis=(1, 2, 3))[:, None] - 0.5
        return jnp.concatenate([z, -z], axis=1)

    for chosen in ({}, {"rescale_schedule": True}, {"rescale_schedule": False}):
        attacks.square(jax.random.key(0), model, x, y, eps=0.1, queries=3, **chosen)
        attacks.autoattack(jax.random.key(0), model, x, y, eps=0.1, attacks=("square",), **chosen)
    assert seen == [True, False, True, True, False, False]


@pytest.mark.slow
def test_square_starts_with_stripes_and_paints_one_square_a_query():
    """linf: each column +-eps; then a square of at most the scheduled side at +-eps, per channel."""
    x, number = np.full((4, 8, 8, 3), 0.5, np.float32), np.arange(4, dtype=np.int32)
    attack = registry.build("square", Budget(eps=0.1, queries=100))
    work = device_loop.fill(jax.random.key(0), number, number, 0 * number, x, number, number)
    state = attack.init(work)
    first = np.asarray(state.candidate) - x
    np.testing.assert_allclose(np.abs(first), 0.1, atol=1e-6)
    assert np.ptp(first, axis=1).max() < 1e-6 and np.ptp(first, axis=2).max() > 0.1

    def model(z):  # always right, by the mean of the first channel
        return jnp.stack([jnp.ones(len(z)), *[z[..., 0].mean(axis=(1, 2)) / 10] * 3], axis=1)

    y = np.zeros(4, np.int32)
    for step in (0, 3, 60):
        state = attack.update(model, work.replace(y=y), state, jnp.full(4, step, jnp.int32))
        delta = np.asarray(state.candidate) - x
        np.testing.assert_allclose(np.abs(delta), 0.1, atol=1e-6)
        changed = np.any(np.abs(np.asarray(state.candidate - state.best)) > 1e-6, axis=3)
        side = sides(100, (8, 8, 3), 1, False)[step]
        for mask in changed:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if len(rows):
                assert np.ptp(rows) < side and np.ptp(columns) < side
    assert not bool(state.fooled.any())
