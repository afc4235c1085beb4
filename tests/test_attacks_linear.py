"""The attacks of AutoAttack on linear models, whose robust accuracy is known exactly."""

import functools

import numpy as np
import pytest

import reference_attacks
from affine_model import BOUNDS, CLASSES, EPS, N, attacked, check_inside, pairs, problem, wrong


def check_linear(name, norm, share, bounds="default"):
    """Robust ones survive; of those that break within 97 % of the radius, `share` are broken."""
    weight, bias, model, x, y = problem()
    bounds = BOUNDS[norm] if bounds == "default" else bounds
    x_adv = attacked(name, norm, bounds)
    exact = functools.partial(reference_attacks.linear_robust, x, y, weight, bias, norm=norm, bounds=bounds)
    robust, easy = exact(eps=EPS[norm]) > 1e-5, exact(eps=0.97 * EPS[norm]) < 0
    right, broken = ~wrong(model, x, y), wrong(model, x_adv, y)
    assert (right & robust).sum() >= 10 and (right & easy).sum() >= 10
    assert (right & ~robust & ~easy).sum() <= 4  # so near to the radius that either would do
    assert not broken[robust].any()
    assert np.mean(broken[right & easy]) >= share
    check_inside(x_adv, x, EPS[norm], norm, bounds)


# DLR's and cross entropy's gradients bend with the logits, Square guesses: bounds, not exact answers.
SHARES = {"apgd-t": 1.0, "fab": 1.0, "pma": 1.0, "pgd": 0.8, "square": 0.7, "apgd-ce": 0.8}


@pytest.mark.parametrize(("name", "norm"), pairs("apgd-t", "fab", "pma", "pgd", "square"))
def test_linear_models_have_a_known_answer(name, norm):
    """linf in the box: each coordinate moves as far as it can; l2: margin / |w_y - w_c|_2."""
    check_linear(name, norm, SHARES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apgd-t", "fab", "pgd", "square", "apgd-ce", "apgd-dlr"])
def test_linear_models_without_a_box(name):
    """linf: robust iff z_y - z_c > eps |w_y - w_c|_1."""
    check_linear(name, "linf", SHARES.get(name, 0.6), None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_untargeted_apgd_on_linear_models(name, norm):
    check_linear(name, norm, 0.6)


def test_far_from_the_box_the_l1_norm_decides():
    """The linf answer of the images in the middle, by the formula without a box."""
    weight, bias, model, x, y = problem()
    middle = np.arange(N) >= N // 2
    exact = functools.partial(reference_attacks.linear_robust, x, y, weight, bias)
    w, eps = np.float64(weight), EPS["linf"]
    z = np.float64(x).reshape(N, -1) @ w + bias
    for i in np.flatnonzero(middle):
        slack = [
            z[i, y[i]] - z[i, c] - eps * np.abs(w[:, y[i]] - w[:, c]).sum()
            for c in range(CLASSES)
            if c != y[i]
        ]
        np.testing.assert_allclose(exact(eps=eps)[i], min(slack), atol=1e-9)
    middle &= ~wrong(model, x, y)
    for name in ("apgd-t", "fab"):
        broken = wrong(model, attacked(name, "linf", BOUNDS["linf"]), y)
        assert not broken[middle & (exact(eps=eps) > 1e-5)].any()
        assert broken[middle & (exact(eps=0.97 * eps) < 0)].all()
