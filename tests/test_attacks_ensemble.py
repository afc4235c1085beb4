"""AutoAttack's ensemble: what broke each image, few classes, nothing to attack."""

import functools

import jax
import numpy as np
import pytest

import reference_attacks
from affine_model import CLASSES, EPS, QUERIES, SHAPE, SLOTS, STEPS, N, check_inside, problem, wrong
from clustr_jax import attacks
from clustr_jax.attacks import ensemble
from clustr_jax.runtime.errors import UserError


def few_steps(monkeypatch):
    """`autoattack` with the steps of the other tests, whose programs it then shares."""
    monkeypatch.setattr(ensemble, "STEPS", STEPS)
    monkeypatch.setattr(ensemble, "QUERIES", QUERIES)


def check_ensemble(result, weight, bias, model, x, y, eps, names):
    right, broken = ~wrong(model, x, y), wrong(model, result.x_adv, y)
    assert result.robust.dtype == bool and result.robust.shape == (len(x),)
    np.testing.assert_array_equal(result.robust, right & ~broken)
    np.testing.assert_array_equal(result.robust, result.broken_by == "")
    np.testing.assert_array_equal(result.broken_by == "clean", ~right)
    assert set(result.broken_by) <= {"", "clean", *names}
    unchanged = ~right | result.robust
    np.testing.assert_array_equal(result.x_adv[unchanged], x[unchanged])
    exact = functools.partial(reference_attacks.linear_robust, x, y, weight, bias, bounds=(0.0, 1.0))
    assert result.robust[right & (exact(eps=eps) > 1e-5)].all()
    assert not result.robust[exact(eps=0.97 * eps) < 0].any()
    check_inside(result.x_adv, x, eps, "linf", (0.0, 1.0))


def test_the_ensemble_and_what_broke_each_image(monkeypatch):
    """`broken_by` names the first attack that succeeds; each attack gets what the ones before left."""
    few_steps(monkeypatch)
    weight, bias, model, x, y = problem()
    names = ("square", "apgd-t", "fab-t")
    result = attacks.autoattack(jax.random.key(3), model, x, y, eps=EPS["linf"], slots=SLOTS, attacks=names)
    check_ensemble(result, weight, bias, model, x, y, EPS["linf"], names)
    assert (result.broken_by == "square").any() and (result.broken_by == "apgd-t").any()
    cost, left = result.cost, int(result.robust.sum())
    assert list(cost) == list(names)
    assert cost["square"]["gradient_evaluations"] == 0 < cost["square"]["forward_evaluations"]
    for name, least in (
        ("square", QUERIES),
        ("apgd-t", STEPS * (CLASSES - 1)),
        ("fab-t", STEPS * (CLASSES - 1)),
    ):
        assert cost[name]["evaluations_needed"] >= least * left
    # the order is decided by the ids, not by the place
    order = np.random.default_rng(0).permutation(N)
    moved = attacks.autoattack(
        jax.random.key(3), model, x[order], y[order], eps=EPS["linf"], slots=SLOTS, attacks=names,
        ids=order.astype(np.int32),
    )  # fmt: skip
    np.testing.assert_array_equal(moved.broken_by, result.broken_by[order])
    np.testing.assert_allclose(moved.x_adv, result.x_adv[order], atol=1e-6)


@pytest.mark.slow
def test_two_classes_have_one_target(monkeypatch):
    """The targeted attacks fall back to the plain margin, which is exact."""
    few_steps(monkeypatch)
    names = ("apgd-t", "fab-t")
    weight, bias, model, x, y = problem(2)
    result = attacks.autoattack(jax.random.key(3), model, x, y, eps=0.06, slots=SLOTS, attacks=names)
    check_ensemble(result, weight, bias, model, x, y, 0.06, names)
    assert (result.broken_by == "apgd-t").sum() >= 5 and result.robust.sum() >= 5
    with pytest.raises(UserError, match="apgd-dlr needs at least 3 classes"):
        attacks.autoattack(jax.random.key(3), model, x, y, eps=0.06, slots=SLOTS, attacks=("apgd-dlr",))


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3])
def test_the_standard_ensemble_with_few_classes(classes):
    """All four attacks as they are by default: 100 steps, 5,000 queries."""
    weight, bias, model, x, y = problem(classes)
    eps = 0.05
    result = attacks.autoattack(jax.random.key(3), model, x, y, eps=eps)
    check_ensemble(result, weight, bias, model, x, y, eps, ensemble.STANDARD)


def test_nothing_to_attack():
    """All labels wrong: nothing is run and the images come back; no images: no images."""
    _, _, model, x, y = problem()
    false = (np.asarray(model(x)).argmax(axis=1) + 1) % CLASSES
    result = attacks.autoattack(jax.random.key(0), model, x, false, eps=0.1, slots=SLOTS)
    assert (result.broken_by == "clean").all() and not result.robust.any()
    np.testing.assert_array_equal(result.x_adv, x)
    empty = attacks.autoattack(jax.random.key(0), model, x[:0], y[:0], eps=0.1, slots=SLOTS)
    assert empty.x_adv.shape == (0, *SHAPE) and empty.robust.shape == empty.broken_by.shape == (0,)


def test_an_attack_that_is_named_twice_has_two_costs(monkeypatch):
    """And two names in `broken_by`."""
    few_steps(monkeypatch)
    _, _, model, x, y = problem()
    result = attacks.autoattack(
        jax.random.key(3), model, x, y, eps=0.2 * EPS["linf"], slots=SLOTS, attacks=("apgd-ce", "apgd-ce")
    )
    assert list(result.cost) == ["apgd-ce", "apgd-ce-2"]
    assert all(cost["gradient_evaluations"] > 0 for cost in result.cost.values())
    assert set(result.broken_by) <= {"", "clean", "apgd-ce", "apgd-ce-2"}


def test_the_gradients_of_a_ranking_are_counted(monkeypatch):
    """MALT's: one for each image and candidate, of all images."""
    few_steps(monkeypatch)
    _, _, model, x, y = problem()
    seen = {}
    for name in ("apgd-t", "apgd-malt"):
        result = attacks.autoattack(jax.random.key(3), model, x, y, eps=1e-4, slots=SLOTS, attacks=(name,))
        (seen[name],) = result.cost.values()
    more = seen["apgd-malt"]["gradient_evaluations"] - seen["apgd-t"]["gradient_evaluations"]
    assert more == len(x) * (CLASSES - 1)
