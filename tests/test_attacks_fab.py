"""FAB's projection onto a hyperplane in the box."""

import numpy as np
import pytest

import reference_attacks
from clustr_jax.attacks.fab import onto_hyperplane


def hyperplanes(seed, n=8, size=7, spread=1.0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 1, (n, size)).astype(np.float32)
    x[0] = np.round(x[0])
    w = rng.normal(size=(n, size)).astype(np.float32)
    w[1, :3] = 0
    offset = (-np.sum(w * x, axis=1) + spread * rng.normal(size=n)).astype(np.float32)
    return x, w, offset


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)], ids=["no_box", "box"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_onto_a_hyperplane(norm, bounds):
    """On it, in the box, and as near as the solver's point."""
    x, w, offset = hyperplanes(0)
    move = np.float64(onto_hyperplane(x, w, offset, norm, bounds))
    feasible = 0
    for i in range(len(x)):
        best = reference_attacks.onto_hyperplane_linf(np.float64(x[i]), np.float64(w[i]), offset[i], bounds)
        if best is None:
            continue
        feasible += 1
        if norm == "l2":
            best = reference_attacks.onto_hyperplane_l2(np.float64(x[i]), np.float64(w[i]), offset[i], bounds)
        z = x[i] + move[i]
        assert abs(w[i] @ z + offset[i]) < 1e-5
        size = np.abs(move[i]).max() if norm == "linf" else np.linalg.norm(move[i])
        np.testing.assert_allclose(size, best, atol=2e-5)
        if bounds:
            assert z.min() >= -1e-7 and z.max() <= 1 + 1e-7
    assert feasible >= 5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_hyperplane_out_of_reach(norm):
    """As far as it goes: the corner that comes nearest; pixels without a weight stay."""
    x, w, _ = hyperplanes(1)
    for sign in (1.0, -1.0):
        move = np.asarray(onto_hyperplane(x, w, np.full(len(x), sign * 1e3, np.float32), norm, (0.0, 1.0)))
        corner = np.where(w == 0, x, np.where(sign * w > 0, 0.0, 1.0))
        np.testing.assert_allclose(x + move, corner, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_of_many_pixels_nearly_out_of_reach(norm):
    """3,072 pixels, most of them stopped by the box: Newton's iteration has to pass all those pieces."""
    rng = np.random.default_rng(3)
    x = rng.uniform(0, 1, (4, 3072)).astype(np.float32)
    w = (rng.normal(size=x.shape) * rng.exponential(size=x.shape) ** 2).astype(np.float32)
    capacity = np.sum(np.where(w > 0, w * x, -w * (1 - x)), axis=1)
    share = np.array([0.5, 0.9, 0.99, 0.999])
    offset = (-np.sum(w * x, axis=1) + share * capacity).astype(np.float32)
    move = np.float64(onto_hyperplane(x, w, offset, norm, (0.0, 1.0)))
    left = np.abs(np.sum(w * (x + move), axis=1) + offset)
    assert (left <= 1e-4 * capacity).all(), left / capacity


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("power", [-100, -60, 60])
def test_the_size_of_the_weights_does_not_matter(norm, power):
    """2^p times the weights and the offset are the same hyperplane, to the bit."""
    x, w, offset = hyperplanes(5)
    move = np.asarray(onto_hyperplane(x, w, offset, norm, (0.0, 1.0)))
    scale = np.float32(2.0**power)
    scaled = np.asarray(onto_hyperplane(x, scale * w, scale * offset, norm, (0.0, 1.0)))
    np.testing.assert_array_equal(scaled, move)
    assert np.isfinite(move).all() and (move != 0).any()
    nothing = onto_hyperplane(x, np.zeros_like(w), offset, norm, (0.0, 1.0))
    np.testing.assert_array_equal(nothing, np.zeros_like(x))
