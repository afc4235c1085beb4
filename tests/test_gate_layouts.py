"""wrap(model, layout="NCHW"): a model of channels first is attacked with images of channels last."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax import attacks
from clustr_jax.runtime.errors import UserError

SHAPE = (4, 6, 3)


def first(x):
    """[B, 3, 4, 6] -> [B, 2]: where the red of the upper half is, and the blue of the lower one."""
    assert x.shape[1:] == (3, 4, 6), x.shape
    z = x[:, 0, :2].mean(axis=(1, 2)) - x[:, 2, 2:].mean(axis=(1, 2))
    return jnp.stack([z, -z], axis=1)


def last(x):
    z = x[:, :2, :, 0].mean(axis=(1, 2)) - x[:, 2:, :, 2].mean(axis=(1, 2))
    return jnp.stack([z, -z], axis=1)


def images():
    x = np.random.default_rng(0).uniform(size=(12, *SHAPE)).astype(np.float32)
    return x, np.asarray(last(x)).argmax(axis=1)


def test_its_own_call_takes_images_of_channels_last():
    x, _ = images()
    np.testing.assert_allclose(attacks.wrap(first, layout="NCHW")(x), last(x), atol=1e-6)


@pytest.mark.more
@pytest.mark.parametrize(
    "door",
    [
        lambda key, f, x, y: attacks.pgd(key, f, x, y, eps=0.05, step_size=0.02, steps=4),
        lambda key, f, x, y: attacks.apgd(key, f, x, y, eps=0.05, steps=4, slots=12),
        lambda key, f, x, y: attacks.square(key, f, x, y, eps=0.05, queries=8, slots=12),
        lambda key, f, x, y: jax.jit(lambda f, x: attacks.fgsm(key, f, x, y, eps=0.05))(f, x),
    ],
)
def test_attacks_are_those_on_the_transposed_model(door):
    x, y = images()
    found = door(jax.random.key(0), attacks.wrap(first, layout="NCHW"), x, y)
    wanted = door(jax.random.key(0), attacks.wrap(last), x, y)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.more
def test_weights_that_it_captures_are_arguments():
    x, y = images()
    weights = {"w": 0.1 * jnp.ones((72, 2)) * jnp.array([[1.0, -1.0]])}  # no softmax saturates

    def model(v):
        return v.reshape(len(v), -1) @ weights["w"] - jnp.array([[3.6, -3.6]])

    wrapped = attacks.wrap(model, layout="NCHW")
    first_of_all = attacks.fgsm(jax.random.key(0), wrapped, x, y, eps=0.05)
    weights["w"] = -weights["w"]
    found = attacks.fgsm(jax.random.key(0), wrapped, x, y, eps=0.05)
    assert (found != first_of_all).any()
    jax.clear_caches()
    np.testing.assert_array_equal(found, attacks.fgsm(jax.random.key(0), wrapped, x, y, eps=0.05))


def test_other_layouts_are_refused():
    with pytest.raises(UserError, match="layout must be NHWC or NCHW"):
        attacks.wrap(first, layout="CHW")
