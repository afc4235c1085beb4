"""PMA: the odds that it climbs, a slow one in NumPy, and linear models, where the answer is known."""

import decimal
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import reference_attacks
from affine_model import BOUNDS, EPS, SLOTS, N, check_inside, problem, wrong
from clustr_jax import attacks, losses
from clustr_jax.attacks import attack_losses, device_loop
from clustr_jax.attacks.pma import PMA


def logits_of_scale(scale, n=12, classes=5):
    """Rows that are right and rows that are wrong, by up to `scale`."""
    z = np.random.default_rng(0).normal(size=(n, classes)) * scale
    y = np.where(np.arange(n) < n // 2, z.argmax(axis=1), z.argmin(axis=1))
    return z.astype(np.float32), y.astype(np.int32)


def exact(z, own):
    """(log odds against y, log odds of the rival, 2 artanh(p_c - p_y)) and directions of their gradients."""
    with decimal.localcontext(**reference_attacks.EXACT):
        p = reference_attacks.softmax_exactly(z)
        rival = max((v, c) for c, v in enumerate(p) if c != own)[1]
        up_y, up_rival = (reference_attacks.probability_gradient(p, c) for c in (own, rival))
        difference = p[rival] - p[own]
        values = ((1 - p[own]) / p[own], p[rival] / (1 - p[rival]), (1 + difference) / (1 - difference))
        slopes = [np.float64(s / max(abs(s))) for s in (-up_y, up_rival, up_rival - up_y)]
        return [float(v.ln()) for v in values], slopes


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["label_odds", "rival_odds", "probability_margin"])
def test_odds_have_the_direction_of_probabilities(which, scale):
    """Values, and gradients of p_y, p_c and p_c - p_y up to a factor, however confident the model."""
    loss = (attack_losses.label_odds, attack_losses.rival_odds, attack_losses.probability_margin)[which]
    z, y = logits_of_scale(scale)
    values = loss(jnp.asarray(z), y, None)
    gradients = np.asarray(jax.grad(lambda z: jnp.sum(loss(z, y, None)))(jnp.asarray(z)))
    for row in range(len(z)):
        expected, slopes = exact(z[row], y[row])
        np.testing.assert_allclose(values[row], expected[which], rtol=2e-6, atol=2e-6 * max(scale, 1))
        found = gradients[row] / np.abs(gradients[row]).max()
        np.testing.assert_allclose(found, slopes[which], atol=3e-6 * max(scale, 1))


def test_why_the_odds_and_not_the_difference():
    """p_c - p_y has no gradient left at a margin of 30; divided by p_c + p_y it has that of the margin."""
    z, y = jnp.array([[30.0, 0.0, -1.0]]), jnp.array([0])

    def difference(z):
        p = jax.nn.softmax(z)[0]
        return p[1] - p[0]

    def ratio(z):
        p = jax.nn.softmax(z)[0]
        return (p[1] - p[0]) / (p[1] + p[0])

    assert np.abs(jax.grad(difference)(z)).max() < 1e-12
    few = jnp.array([[3.0, 0.0, -1.0]])
    slope = np.asarray(jax.grad(ratio)(few))[0]
    np.testing.assert_allclose(slope / slope[1], [-1, 1, 0], atol=1e-5)
    slope = np.asarray(jax.grad(difference)(few))[0]
    assert abs(slope[2] / slope[1]) > 0.1  # the third class has a part in it
    assert losses.probability_margin(z, y) < -29


def tanh_model(params, x):
    """Class 0 always wins, by its bias."""
    return params[2] * (jnp.tanh(x @ params[0]) @ params[1] + jnp.array([[12.0, 0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("scale", [1.0, 25.0])
@pytest.mark.parametrize("norm, steps", [("linf", 9), ("l2", 8)])
def test_pma_matches_a_slow_one(norm, steps, scale):
    """Iterates of 8 examples, of both kinds of restarts, from the same start; margins of 5 and of 150."""
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(8, 10)).astype(np.float32), rng.normal(size=(10, 4)).astype(np.float32)
    model = Partial(tanh_model, [jnp.asarray(first), jnp.asarray(second), jnp.float32(scale)])
    x, y = rng.uniform(0, 1, (8, 8)).astype(np.float32), np.zeros(8, np.int32)
    eps, bounds = (0.8, None) if norm == "l2" else (0.3, (0.0, 1.0))
    attack = PMA(eps=jnp.float32(eps), steps=np.int32(steps), norm=norm, bounds=bounds)
    number = np.arange(8, dtype=np.int32)
    work = device_loop.fill(jax.random.key(0), number, number, number % 2, x, y, number)
    state, update = jax.jit(PMA.init)(attack, work), jax.jit(PMA.update)
    path = [np.asarray(state.candidate)]
    for step in range(steps):
        state = update(attack, model, work, state, jnp.full(8, step, jnp.int32))
        path.append(np.asarray(state.candidate))
    a, b = np.float64(first), np.float64(second)

    def logits(z):
        return scale * (np.tanh(z @ a) @ b + [12, 0, 0, 0])

    def jacobian(z):
        return scale * (a @ ((1 - np.tanh(z @ a) ** 2)[:, None] * b)).T

    for i in range(8):
        expected = reference_attacks.pma(
            path[0][i], np.float64(x[i]), logits, jacobian, 0, eps=eps, steps=steps, odd=i % 2 == 1,
            norm=norm, bounds=bounds,
        )  # fmt: skip
        np.testing.assert_allclose([p[i] for p in path], expected, atol=3e-5)
        assert np.abs(expected[-1] - expected[0]).max() > 0.05


@pytest.mark.parametrize("steps, opening", [(1, 1), (2, 1), (5, 3), (100, 50)])
def test_both_halves_begin_with_two_eps(steps, opening):
    attack = PMA(eps=jnp.float32(0.5), steps=np.int32(steps), norm="linf", bounds=None)
    sizes = np.asarray(attack.step_size(jnp.arange(steps)))
    assert attack.opening_steps == opening
    assert sizes[0] == 1.0 and (sizes >= 0).all() and (np.diff(sizes[:opening]) <= 0).all()
    if steps > 1:
        assert sizes[opening] == 1.0 and (np.diff(sizes[opening:]) < 0).all()
    if steps == 100:
        np.testing.assert_allclose(
            sizes[[1, 2, 49, 50, 75, 99]], [1, 0.99901, 0.00394, 1, 0.5, 0.00099], atol=1e-5
        )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_linear_models_of_two_classes_are_exact(norm):
    """It breaks those whose distance is below eps, and no others."""
    weight, bias, model, x, y = problem(2)
    eps = 2 * EPS[norm]
    x_adv = attacks.pma(
        jax.random.key(3), model, x, y, eps=eps, norm=norm, bounds=BOUNDS[norm], steps=20, slots=SLOTS
    )
    slack = functools.partial(
        reference_attacks.linear_robust, x, y, weight, bias, norm=norm, bounds=BOUNDS[norm]
    )
    right, broken = ~wrong(model, x, y), wrong(model, x_adv, y)
    robust, within = slack(eps=eps) > 1e-5, slack(eps=0.9999 * eps) < 0
    assert (right & robust).sum() >= 10 and (right & within).sum() >= 10
    assert not (right & ~robust & ~within).any()
    np.testing.assert_array_equal(broken[right], within[right])
    check_inside(x_adv, x, eps, norm, BOUNDS[norm])


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_scale_of_the_logits_costs_nothing(scale):
    """Cross entropy is blind at 1e4; a linear model of two classes has the same answer at every scale."""
    weight, bias, model, x, y = problem(2)

    def scaled(x):
        return scale * model(x)

    def run(f):
        return attacks.pma(jax.random.key(3), f, x, y, eps=EPS["linf"], steps=20, slots=SLOTS)

    np.testing.assert_array_equal(wrong(model, run(scaled), y), wrong(model, run(model), y))
    assert len(x) == N


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("door", [
    functools.partial(attacks.pma, eps=EPS["linf"], steps=10), functools.partial(attacks.fmn, steps=20),
    functools.partial(attacks.ddn, steps=20), functools.partial(attacks.fmn, steps=20, targeted=True),
    functools.partial(attacks.adaptive_restarts, eps=EPS["linf"], steps=5, most=3),
])  # fmt: skip
@pytest.mark.one_in(3)
def test_logits_of_half_precision(door, dtype):
    """They are attacked, and what is returned is misclassified with them."""
    _, _, model, x, y = problem(5)

    def half(x):
        return model(x).astype(dtype)

    y = np.asarray(half(x)).argmax(axis=1)
    found = door(jax.random.key(3), half, x, y, slots=SLOTS)
    x_adv = getattr(found, "x_adv", found)
    broken = (x_adv != x).any(axis=(1, 2, 3))
    assert broken.sum() >= 10
    np.testing.assert_array_equal(wrong(half, x_adv, y), broken)
