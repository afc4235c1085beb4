"""Attacks of one step and of none: FGSM and noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from affine_model import EPS, N, affine, check_inside, images, problem, weights, wrong
from clustr_jax import attacks


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_is_one_step_of_length_eps(norm):
    """x + eps sign(g), or x + eps g / |g|, then the box; the key does not matter."""
    weight, bias = weights(2)
    model, eps = Partial(affine, [jnp.asarray(weight), jnp.asarray(bias)]), 0.1
    x = images(np.random.default_rng(4), 8)
    y = np.asarray(model(x)).argmax(axis=1)
    found = [np.asarray(attacks.fgsm(jax.random.key(k), model, x, y, eps=eps, norm=norm)) for k in (0, 1)]
    np.testing.assert_array_equal(*found)
    g = np.float64(weight)[:, 1 - y].T - np.float64(weight)[:, y].T
    step = np.sign(g) if norm == "linf" else g / np.linalg.norm(g, axis=1, keepdims=True)
    expected = np.clip(np.float64(x) + eps * step.reshape(x.shape), 0, 1)
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "norm"), [("uniform", "linf"), ("gaussian", "linf"), ("uniform", "l2")])
def test_noise_in_the_ball(kind, norm):
    """Inside, spread as its kind says, and the misclassified draw comes back where there is one."""
    _, _, model, x, y = problem()
    eps = 3 * EPS[norm]
    x_adv = np.asarray(
        attacks.noise(jax.random.key(0), model, x, y, eps=eps, draws=8, kind=kind, norm=norm, bounds=None)
    )
    check_inside(x_adv, x, eps, norm, None)
    once, eight = wrong(model, x, y), wrong(model, x_adv, y)
    assert (once <= eight).all() and once.sum() < eight.sum() < N
    delta = (x_adv - x).reshape(N, -1) / eps
    if norm == "linf":  # uniform: sd 1 / sqrt(3) = 0.577; N(0, 1/4) cut at 2 sd: 0.48, and some at the border
        assert abs(delta.std() - (0.577 if kind == "uniform" else 0.484)) < 0.03
        assert (np.mean(np.abs(delta) > 1 - 1e-4) > 0.01) == (kind == "gaussian")
    else:  # uniform in the ball of 36 dimensions: mean length 36/37
        assert abs(np.linalg.norm(delta, axis=1).mean() - 36 / 37) < 0.02
