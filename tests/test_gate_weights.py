"""The gate of the attacks: no number is of old weights."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from clustr_jax import attacks
from gate_doors import CLASSES, DOORS, KEY, images, linear, said, weights


@flax.struct.dataclass
class Tree:
    w: jax.Array

    def logits(self, x):
        return x.reshape(x.shape[0], -1) @ self.w

    def __call__(self, x):
        return self.logits(x)


class Holder:
    """An object with an attribute."""

    def __init__(self, w):
        self.w = w

    def __call__(self, x):
        return x.reshape(x.shape[0], -1) @ self.w

    def method(self, x):
        return self(x)

    def deep(self, x):
        """Where loops and inner functions capture it."""

        def step(z, _):
            return z + 0.5 * (x.reshape(x.shape[0], -1) @ self.w), None

        return jax.lax.scan(step, jnp.zeros((x.shape[0], CLASSES)), None, length=2)[0]

    def normed(self, x):
        return jax.lax.cond(True, lambda: self(x), lambda: -self(x))


def holders():
    """name -> (w -> something that holds it, how it is called now, whether it may be compiled anew)."""

    def held(call, numpy=False):
        holder = Holder(None)

        def put(w):
            holder.w = np.asarray(w) if numpy else w

        return put, lambda: call(holder)

    cell = {}

    def captured(x):
        return x.reshape(x.shape[0], -1) @ cell["w"]

    return {
        "a captured array": ((lambda w: cell.update(w=w)), lambda: captured),
        "an attribute": held(lambda h: h),
        "a method": held(lambda h: h.method),
        "a loop": held(lambda h: h.deep),
        "a branch": held(lambda h: h.normed),
        "a lambda": held(lambda h: lambda x: h(x)),
        "vmap": held(lambda h: jax.vmap(lambda x: x.reshape(-1) @ h.w)),
        "a pytree's method": held(lambda h: Tree(h.w).logits),
        "a pytree": held(lambda h: Tree(h.w)),
        "Partial": held(lambda h: Partial(lambda w, x: x.reshape(x.shape[0], -1) @ w, h.w)),
        "Partial of a function that captures": held(lambda h: Partial(lambda s, x: s * h(x), 1.0)),
        "wrap": held(lambda h: attacks.wrap(h)),
        "NumPy": held(lambda h: h, numpy=True),
    }


# the other doors open a model by the same line
EVERY_DOOR = [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in ("pgd", "square"))) for name in DOORS
]


@pytest.mark.parametrize("door", EVERY_DOOR)
@pytest.mark.parametrize("name", list(holders()))
@pytest.mark.one_in(3)
def test_current_weights_are_attacked(name, door, compilations):
    """As a model that never was anything else; and nothing is compiled for them, but for NumPy's arrays."""
    put, model = holders()[name]
    x, _ = images()
    counts = []
    for w in (weights(), -weights(), weights()[:, ::-1]):
        put(w)
        y = np.asarray(Holder(w)(x)).argmax(axis=1)
        with jax.debug_key_reuse(False):
            with compilations() as found:
                attacked = DOORS[door](KEY, model(), x, y)
            expected = DOORS[door](KEY, Tree(w).logits, x, y)
        counts.append(len(found))
        for a, b in zip(*(np.atleast_1d(getattr(r, "x_adv", r)) for r in (attacked, expected)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    if name != "NumPy":
        assert counts[1:] == [0, 0], counts


def test_numpy_arrays_that_change_in_place():
    x, _ = images()
    w = np.array(weights())
    model = Holder(w)
    run = functools.partial(attacks.pgd, eps=0.3, step_size=0.1, steps=5)
    for _ in range(2):
        y = np.asarray(model(x)).argmax(axis=1)
        with jax.debug_key_reuse(False):
            expected = run(KEY, Tree(jnp.asarray(w)).logits, x, y)
            np.testing.assert_allclose(run(KEY, model, x, y), expected, atol=1e-6)
        w *= -1


def test_numbers_and_branches_are_current_too():
    x, y = images()
    settings = {"scale": 1.0, "sign": 1}

    def model(x):
        return settings["scale"] * linear(x) if settings["sign"] > 0 else -linear(x)

    found = []
    for change in ({}, {"scale": -1.0}, {"scale": 1.0, "sign": -1}, {"sign": 1}):
        settings.update(change)
        with jax.debug_key_reuse(False):
            found.append(np.asarray(attacks.fgsm(KEY, model, x, y, eps=0.05)))
    np.testing.assert_array_equal(found[0], found[3])
    np.testing.assert_array_equal(found[1], found[2])
    assert not np.array_equal(found[0], found[1])


def test_a_derivative_of_ones_own_is_current_too():
    """The forward pass is the same: only its rule holds the array that changes."""
    cell = {"slope": jnp.float32(1.0)}

    @jax.custom_vjp
    def same(x):
        return x

    same.defvjp(lambda x: (x, None), lambda _, g: (g * cell["slope"],))
    x, y = images()
    found = []
    for slope in (1.0, -1.0, 1.0):
        cell["slope"] = jnp.float32(slope)
        with jax.debug_key_reuse(False):
            f = lambda x: linear(same(x))  # noqa: E731
            found.append(attacks.pgd(KEY, f, x, y, eps=0.1, step_size=0.1, steps=1, select="last"))
    np.testing.assert_array_equal(found[0], found[2])
    assert not np.array_equal(found[0], found[1])


def test_a_jit_with_old_arrays_inside_is_refused():
    """Its answers are old ones outside of an attack as well, and its object says otherwise."""

    class Compiled(Holder):
        @functools.partial(jax.jit, static_argnums=0)
        def __call__(self, x):
            return x.reshape(x.shape[0], -1) @ self.w

    x, y = images()
    model = Compiled(weights())
    with jax.debug_key_reuse(False):  # the context is a part of what jit compares
        attacks.fgsm(KEY, model, x, y, eps=0.1)
    model.w = -model.w
    for name, door in DOORS.items():
        assert "jax.jit inside" in said(door, KEY, model, x, y), name


def test_inside_jit_models_are_taken_as_they_are():
    """Training steps call `pgd` with arrays that are being traced."""
    x, y = images()

    @jax.jit
    def run(w, x):
        return attacks.pgd(jax.random.key(0), lambda x: Holder(w)(x), x, y, eps=0.1, step_size=0.05, steps=2)

    for w in (weights(), -weights()):
        expected = attacks.pgd(jax.random.key(0), Tree(w).logits, x, y, eps=0.1, step_size=0.05, steps=2)
        np.testing.assert_allclose(run(w, x), expected, atol=1e-6)
