"""Networks whose logits are narrower or wider than float32, at the doors that run many attacks."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clustr_jax
from clustr_jax import attacks

RNG = np.random.default_rng(0)
X = RNG.uniform(size=(12, 2, 2, 3)).astype(np.float32)
WEIGHTS = RNG.normal(size=(12, 5))
EPS = 8 / 255
DOORS = {
    "targeted apgd": lambda model, y: attacks.apgd(
        jax.random.key(0), model, X, y, eps=EPS, steps=5, targeted=True
    ),
    "autoattack": lambda model, y: attacks.autoattack(jax.random.key(0), model, X, y, eps=EPS).robust,
    "judge": lambda model, y: clustr_jax.judge(model, X, y, eps=EPS).robust,
}


def answers(door, dtype):
    """What is left of the images of a linear network of this type."""
    wide = jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()
    with wide:
        weights = jnp.asarray(WEIGHTS, dtype)

        def model(x):
            return x.reshape(len(x), -1).astype(dtype) @ weights

        y = np.asarray(model(jnp.asarray(X))).argmax(axis=1)
        assert model(X).dtype == dtype
        return DOORS[door](model, y)


@pytest.mark.parametrize(
    ("door", "dtype"),
    [
        ("targeted apgd", jnp.float16),
        ("targeted apgd", np.float64),
        ("autoattack", jnp.bfloat16),
        pytest.param("autoattack", np.float64, marks=pytest.mark.more),
        pytest.param("judge", jnp.bfloat16, marks=pytest.mark.more),
        pytest.param("judge", np.float64, marks=pytest.mark.more),
    ],
)
@pytest.mark.filterwarnings("error::FutureWarning")
def test_other_types_are_attacked_as_float32_is(door, dtype):
    """To the rounding of their logits, which decides none of these images."""
    found, expected = answers(door, dtype), answers(door, np.float32)
    if door == "targeted apgd":
        assert np.asarray(found).dtype == np.float32 and np.abs(found - X).max() <= EPS + 2e-7
    else:
        np.testing.assert_array_equal(found, expected)
