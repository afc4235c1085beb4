"""APGD as the paper writes it: its checkpoints, its start, and a slow one in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import reference_attacks
from clustr_jax.attacks import attack_losses, device_loop
from clustr_jax.attacks.apgd import APGD, windows


def test_checkpoints_are_the_papers():
    """At 100 steps p_j = 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99."""
    at = reference_attacks.checkpoints(100)
    assert at == [22, 41, 57, 70, 80, 87, 93, 99]
    found = windows(100)
    np.testing.assert_array_equal(np.flatnonzero(found), at)
    np.testing.assert_array_equal(found[found > 0], [22, 19, 16, 13, 10, 7, 6, 6])


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 14, 30, 50, 200, 1000])
def test_windows_for_any_number_of_steps(steps):
    """A window is the distance to the checkpoint before; the first is 22 % of the steps, rounded down."""
    found = windows(steps)
    at = np.flatnonzero(found)
    assert len(found) == steps and found[0] == 0
    np.testing.assert_array_equal(np.diff(at, prepend=0), found[at])
    if steps > 1:
        assert at[0] == max(int(0.22 * steps), 1)
        assert (np.diff(found[at]) <= 0).all()
        assert steps - at[-1] <= max(found[at[-1]] - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    if steps % 100 == 0:
        np.testing.assert_array_equal(at, reference_attacks.checkpoints(steps))


def tanh_model(params, x):
    """Class 0 always wins, by its bias."""
    return jnp.tanh(x @ params[0]) @ params[1] + jnp.array([[30.0, 0.0, 0.0]])


@pytest.mark.parametrize(("norm", "steps"), [("linf", 14), pytest.param("l2", 10, marks=pytest.mark.slow)])
def test_apgd_matches_a_slow_one(norm, steps):
    """Iterates and step sizes of 16 examples on a network, from the same start (no ties with these steps)."""
    rng = np.random.default_rng(2)
    params = [rng.normal(size=(8, 10)).astype(np.float32), rng.normal(size=(10, 3)).astype(np.float32)]
    model = Partial(tanh_model, [jnp.asarray(p) for p in params])
    x, y = rng.uniform(0, 1, (16, 8)).astype(np.float32), np.zeros(16, np.int32)
    eps, bounds = 1.0 if norm == "l2" else 0.4, (0.0, 1.0)
    attack = APGD(
        eps=jnp.float32(eps),
        steps=steps,
        norm=norm,
        bounds=bounds,
        loss=attack_losses.one(attack_losses.margin_targeted),
    )
    number = np.arange(16, dtype=np.int32)
    target = 1 + number % 2
    work = device_loop.fill(jax.random.key(0), number, number, 0 * number, x, y, target)
    state, update = jax.jit(APGD.init)(attack, work), jax.jit(APGD.update)
    path, sizes = [np.asarray(state.candidate)], []
    for step in range(steps):
        state = update(attack, model, work, state, jnp.full(16, step, jnp.int32))
        path.append(np.asarray(state.candidate))
        sizes.append(np.asarray(state.step_size))

    first, second = np.float64(params[0]), np.float64(params[1])
    halvings = 0
    for i in range(16):
        gap = second[:, target[i]] - second[:, 0]

        def value(z, gap=gap):
            return np.tanh(z @ first) @ gap - 30

        def gradient(z, gap=gap):
            return first @ ((1 - np.tanh(z @ first) ** 2) * gap)

        iterates, expected = reference_attacks.apgd(
            path[0][i], np.float64(x[i]), value, gradient, list(np.flatnonzero(windows(steps))),
            eps=eps, steps=steps, norm=norm, bounds=bounds,
        )  # fmt: skip
        np.testing.assert_allclose([s[i] for s in sizes], expected, rtol=1e-6)
        np.testing.assert_allclose([p[i] for p in path], iterates, atol=2e-5)
        halvings += expected[-1] < expected[0]
    assert halvings >= 8
    assert len({float(s) for s in sizes[-1]}) > 1  # they were not all halved alike


@pytest.mark.slow
def test_apgd_starts_at_the_border_of_the_ball():
    """x + eps t / |t|: a uniform draw scaled by its largest entry, a Gaussian by its length."""
    x = np.full((4, 50), 0.5, np.float32)
    number = np.arange(4, dtype=np.int32)
    work = device_loop.fill(jax.random.key(0), number, number, 0 * number, x, number, number)
    for norm, size in (("linf", lambda d: np.abs(d).max(1)), ("l2", lambda d: np.linalg.norm(d, axis=1))):
        attack = APGD(
            eps=jnp.float32(0.1),
            steps=5,
            norm=norm,
            bounds=None,
            loss=attack_losses.one(attack_losses.cross_entropy),
        )
        delta = np.asarray(attack.init(work).candidate) - x
        np.testing.assert_allclose(size(delta), 0.1, rtol=1e-5)
        assert np.ptp(delta, axis=1).min() > 0.05 and not np.allclose(delta[0], delta[1])
