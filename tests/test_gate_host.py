"""The gate of the attacks: models with parts on the host, and models without a gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

import clustr_jax
from clustr_jax import attacks
from gate_doors import CLASSES, DOORS, KEY, images, linear, said, weights

CALLBACKS = {
    "pure_callback": functools.partial(jax.pure_callback, vmap_method="sequential"),
    "io_callback": io_callback,
}


def on_host(call, function):
    """A model whose logits NumPy computes, outside of JAX."""
    return lambda x: call(function, jax.ShapeDtypeStruct((x.shape[0], CLASSES), jnp.float32), x)


def product(w, x):
    return np.asarray(x).reshape(len(x), -1) @ w


def holders():
    """name -> a model of weights w, anew for each w."""

    def closure(w):
        return lambda x: product(w, x)

    def default(w):
        def function(x, w=w):
            return product(w, x)

        return function

    class Holder:
        def __init__(self, w):
            self.w = w

        def method(self, x):
            return product(self.w, x)

    return {
        "closure": closure,
        "deep closure": lambda w: (lambda inner: lambda x: inner(x) + 0)(closure(w)),
        "default": default,
        "partial": lambda w: functools.partial(product, w),
        "method": lambda w: Holder(w).method,
    }


@pytest.mark.parametrize("call", CALLBACKS)
@pytest.mark.parametrize("name", holders())
@pytest.mark.one_in(3)
def test_callbacks_are_those_of_now(name, call):
    x, _ = images()
    for sign in (1.0, -1.0):
        w = sign * np.asarray(weights())
        y = product(w, x).argmax(axis=1)
        model = on_host(CALLBACKS[call], holders()[name](w))
        with jax.debug_key_reuse(False):
            found = DOORS["square"](KEY, model, x, y)
            expected = DOORS["square"](KEY, lambda x, w=w: x.reshape(x.shape[0], -1) @ w, x, y)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def endless(x):
    """A loop whose length JAX does not know."""
    return lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, c[1], linear(c[1])), (0, x, linear(x)))[2]


WITHOUT = {
    "pure_callback": lambda: on_host(
        CALLBACKS["pure_callback"], functools.partial(product, np.asarray(weights()))
    ),
    "while_loop": lambda: endless,
}
EVERY_DOOR = [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in ("pgd", "apgd", "apgd-malt")))
    for name in DOORS
    if name not in ("square", "autoattack")
]


@pytest.mark.parametrize("door", EVERY_DOOR)
@pytest.mark.parametrize("name", WITHOUT)
def test_a_model_without_a_gradient_is_refused(name, door):
    x, y = images()
    text = said(DOORS[door], KEY, WITHOUT[name](), x, y)
    assert "no gradient" in text and "attacks.square" in text


@pytest.mark.parametrize("name", WITHOUT)
def test_a_model_without_a_gradient_is_not_judged(name):
    x, y = images()
    assert "no gradient" in said(clustr_jax.judge, WITHOUT[name](), x, y, eps=0.1, progress=False)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_model_without_a_gradient_is_no_obstacle_for_square(name):
    x, y = images()
    with jax.debug_key_reuse(False):
        found = attacks.square(KEY, WITHOUT[name](), x, y, eps=0.1, queries=4, slots=8)
        np.testing.assert_allclose(found, attacks.square(KEY, linear, x, y, eps=0.1, queries=4, slots=8))
