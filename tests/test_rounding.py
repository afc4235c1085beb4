"""What rounding may add to a change is in proportion to the pixel that is rounded."""

import dataclasses

import numpy as np
import pytest

from checked_classifiers import by_number, probe
from clustr_jax.attacks import scheduler
from clustr_jax.runtime import rounding


@pytest.mark.parametrize("unit", [1.0, 255.0, 1e-3, 1e4])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_allowance_goes_with_the_unit(unit, norm):
    """x + delta in float32 is inside; a change that is a hundredth larger is not."""
    rng = np.random.default_rng(0)
    x = (unit * rng.uniform(size=(64, 8, 8, 3))).astype(np.float32)
    delta = rng.choice([-1.0, 1.0], size=x.shape)
    eps = 0.03 * unit * (1.0 if norm == "linf" else np.sqrt(x[0].size))
    for scale, inside in ((1.0, True), (1.01, False)):
        x_adv = x + (scale * 0.03 * unit * delta).astype(np.float32)
        assert (rounding.outside(x_adv, x, eps, norm) <= 0).all() == inside
        if inside:
            scheduler.verify_inside(x_adv, x, eps, norm, None)
        else:
            with pytest.raises(AssertionError, match=f"left the {norm} ball"):
                scheduler.verify_inside(x_adv, x, eps, norm, None)


def test_a_large_pixel_does_not_excuse_a_small_one():
    x = np.array([[1e6, 0.0]], np.float32)
    assert rounding.outside(x + np.float32([[0.0, 0.5]]), x, 0.1, "linf")[0] > 0.3


def test_the_check_has_the_same_allowance(monkeypatch):
    """Pixels of 0..255, rounded: 1e-5 beyond eps is no failure, and a hundredth of eps is one."""
    found = probe()
    outcome = found._pgd(steps=1)
    found.examples = dataclasses.replace(found.examples, x=(200 + found.examples.x).astype(np.float32))
    for beyond, status in ((1e-5, "PASS"), (1e-2 * found.eps, "FAIL")):
        outcome.x_adv = (found.examples.x + np.float32(found.eps + beyond)).astype(np.float32)
        monkeypatch.setattr(found, "_pgd", lambda **how: outcome)
        assert by_number(found.effort())[1][0].status == status
