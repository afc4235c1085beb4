"""The attacks stay inside ball and box, and leave what is wrong already."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affine_model import BOUNDS, SLOTS, attacked, call, check_inside, images, pairs, problem, wrong

INSIDE = settings(max_examples=5)


def check_radius(name, norm, eps, seed, bounds="default"):
    _, _, model, _, _ = problem()
    bounds = BOUNDS[norm] if bounds == "default" else bounds
    x = images(np.random.default_rng(seed), SLOTS)
    if bounds is not None:  # into another box as well
        x = np.clip(x, *np.float32(bounds))
    y = np.asarray(model(x)).argmax(axis=1)
    x_adv = call(name, jax.random.key(seed), model, x, y, eps=eps, norm=norm, bounds=bounds)
    assert x_adv.shape == x.shape and x_adv.dtype == np.float32
    check_inside(x_adv, x, eps, norm, bounds)
    if eps == 0:
        np.testing.assert_array_equal(x_adv, x)


@pytest.mark.parametrize(("name", "norm"), pairs("apgd-t", "fab", "square"))
@pytest.mark.filterwarnings("ignore::clustr_jax.attacks.UnitWarning")
@pytest.mark.filterwarnings("ignore::clustr_jax.attacks.UnattackedWarning")
@INSIDE
@given(eps=st.one_of(st.just(0.0), st.floats(1e-4, 1.5)), seed=st.integers(0, 99))
def test_inside_the_ball_and_the_box(name, norm, eps, seed):
    """For any radius; eps = 0 changes nothing. (attacks.pgd: test_pgd.py.)"""
    check_radius(name, norm, eps, seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::clustr_jax.attacks.UnitWarning")
@pytest.mark.filterwarnings("ignore::clustr_jax.attacks.UnattackedWarning")
@pytest.mark.parametrize("name", ["apgd-ce", "fab", "square"])
@INSIDE
@given(
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.one_of(st.just(0.0), st.floats(1e-4, 3.0)),
    seed=st.integers(0, 99),
)
def test_inside_another_box(name, norm, eps, seed):
    check_radius(name, norm, eps, seed, (0.1, 0.9))


@pytest.mark.filterwarnings("ignore::clustr_jax.attacks.UnattackedWarning")
@pytest.mark.parametrize("name", ["apgd-t", "fab", "square"])
def test_zero_radius_breaks_nothing(name):
    _, _, model, x, y = problem()
    x_adv = call(name, jax.random.key(0), model, x, y, eps=0.0)
    np.testing.assert_array_equal(x_adv, x)


@pytest.mark.parametrize("name", ["apgd-t", "fab", "square"])
def test_what_is_wrong_already_comes_back_unchanged(name):
    _, _, model, x, y = problem()
    clean = wrong(model, x, y)
    assert clean.sum() == len(y[::9])
    np.testing.assert_array_equal(attacked(name, "linf", BOUNDS["linf"])[clean], x[clean])
