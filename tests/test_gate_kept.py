"""The gate of the attacks: what JAX keeps from a function's first call does not pass for what it is now."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from clustr_jax import attacks, lipschitz, losses
from gate_doors import CLASSES, DOORS, KEY, images, said, weights

CELL = {}


def flat(x):
    return x.reshape(x.shape[0], -1)


def plain(x):
    return CELL["scale"] * (flat(x) @ CELL["w"])


def per_row(row):
    return CELL["scale"] * (row @ CELL["w"])


def scanned():
    def step(carry, row):
        return carry, per_row(row)

    return lambda x: lax.scan(step, 0.0, flat(x))[1]


def while_loop():
    def step(carry):
        i, x, _ = carry
        return i + 1, x, plain(x)

    def more(carry):
        return carry[0] < 1

    return lambda x: lax.while_loop(more, step, (0, x, jnp.zeros((x.shape[0], CLASSES))))[2]


def branch():
    yes, no = (lambda row: per_row(row)), (lambda row: 2 * per_row(row))
    return lambda x: jax.vmap(lambda row: lax.cond(row.sum() > -1.0, yes, no, row))(flat(x))


def switched():
    cases = [lambda x: plain(x), lambda x: 2 * plain(x)]
    return lambda x: lax.switch(jnp.int32(x.sum() < -1.0), cases, x)


def inside(wrapper):
    inner = wrapper(lambda x: plain(x))
    return lambda x: inner(x) * 1.0


# What JAX answers from its caches: called outside of an attack as well
KEPT = {
    "jit": lambda: jax.jit(lambda x: plain(x)),
    "jit inside": lambda: inside(jax.jit),
    "jit of vmap": lambda: jax.jit(lambda x: jax.vmap(per_row)(flat(x))),
    "checkpoint": lambda: jax.checkpoint(lambda x: plain(x)),
    "checkpoint inside": lambda: inside(jax.checkpoint),
    "scan": scanned,
    "while": while_loop,
    "cond under vmap": branch,
    "switch": switched,
}


def ruled_jvp():
    found = jax.custom_jvp(lambda x: plain(x))
    found.defjvp(lambda primals, tangents: (plain(*primals), plain(*tangents)))
    return found


def ruled_vjp():
    found = jax.custom_vjp(lambda x: plain(x))
    found.defvjp(
        lambda x: (plain(x), x.shape),
        lambda shape, g: ((CELL["scale"] * (g @ CELL["w"].T)).reshape(shape),),
    )
    return found


def ruled_gradient():
    return jax.custom_gradient(
        lambda x: (plain(x), lambda g: (CELL["scale"] * (g @ CELL["w"].T)).reshape(x.shape))
    )


# What JAX traces every time, with derivatives that hold the arrays themselves
RULED = {"custom_jvp": ruled_jvp, "custom_vjp": ruled_vjp, "custom_gradient": ruled_gradient}
CHANGES = {"arrays": {"w": -1.0}, "numbers": {"scale": -1.0}}
SOME = [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("pgd", "square"))) for name in DOORS]


def changed(change):
    """What the function captures, and then another."""
    for factor in (1.0, -1.0):
        w = factor * weights() if change == "arrays" else weights() * 1.0
        CELL.update(w=w, scale=factor if change == "numbers" else 1.0)
        yield np.asarray(plain(images()[0])).argmax(axis=1)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", KEPT)
@pytest.mark.one_in(3)
def test_what_is_kept_and_old_is_refused(name, change):
    x, _ = images()
    model = KEPT[name]()
    labels = changed(change)
    y = next(labels)
    # the door that takes no gradient, for a while_loop has none
    run = functools.partial(DOORS["square"], KEY, model, x)
    with jax.debug_key_reuse(False):
        run(y=y)
        assert "jax.jit inside" in said(run, y=next(labels))


def test_what_is_kept_is_current_without_the_caches():
    x, _ = images()
    model = scanned()
    for y in changed("numbers"):
        jax.clear_caches()
        with jax.debug_key_reuse(False):
            attacks.noise(KEY, model, x, y, eps=0.1, draws=1)


@pytest.mark.parametrize("door", SOME)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", RULED)
@pytest.mark.one_in(3)
def test_rules_of_derivatives_are_current(name, change, door):
    x, _ = images()
    model = RULED[name]()
    for y in changed(change):
        w = CELL["scale"] * CELL["w"]
        with jax.debug_key_reuse(False):
            found = DOORS[door](KEY, model, x, y)
            expected = DOORS[door](KEY, lambda x, w=w: flat(x) @ w, x, y)
        for a, b in zip(*(np.atleast_1d(getattr(r, "x_adv", r)) for r in (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("name", ["jit", "checkpoint", "cond"])
def test_a_loss_that_is_kept_and_old_is_refused(name):
    x, y = images()
    CELL.update(scale=1.0)

    def own(z, y):
        return CELL["scale"] * losses.cross_entropy(z, y)

    def per_image(z, y):
        return CELL["scale"] * jax.nn.logsumexp(z) - z[y]

    made = {
        "jit": lambda: jax.jit(own),
        "checkpoint": lambda: jax.checkpoint(own),
        "cond": lambda: jax.vmap(lambda z, y: lax.cond(z[0] > -1e9, per_image, per_image, z, y)),
    }[name]()
    run = functools.partial(attacks.fgsm, KEY, lambda x: flat(x) @ weights(), x, y, eps=0.1)
    with jax.debug_key_reuse(False):
        run(loss_fn=made)
        CELL.update(scale=-1.0)
        assert "jax.jit inside" in said(run, loss_fn=made)


def test_the_derivative_of_a_loss_is_current():
    x, y = images()

    @jax.custom_jvp
    def own(z, y):
        return losses.cross_entropy(z, y)

    def rule(primals, tangents):
        value, slope = jax.jvp(lambda z: losses.cross_entropy(z, primals[1]), primals[:1], tangents[:1])
        return value, CELL["scale"] * slope

    own.defjvp(rule)
    found = []
    for scale in (1.0, -1.0, 1.0):
        CELL.update(scale=jnp.float32(scale))
        with jax.debug_key_reuse(False):
            found.append(
                attacks.pgd(
                    KEY, lambda x: flat(x) @ weights(), x, y, eps=0.1, step_size=0.1, steps=1, loss_fn=own,
                    select="last",
                )
            )  # fmt: skip
    np.testing.assert_array_equal(found[0], found[2])
    assert not np.array_equal(found[0], found[1])


def test_what_is_kept_and_current_is_attacked(compilations):
    """Loops over arrays that are arguments: nothing is refused, and nothing is compiled anew."""
    x, y = images()

    def step(z, w):
        return jax.checkpoint(lambda z, w: jnp.tanh(z @ w))(z, w), None

    @jax.jit
    def model(layers, head, x):
        return lax.scan(step, flat(x), layers)[0] @ head

    counts = []
    for factor in (1.0, -1.0, 0.5):
        layers, head = factor * jnp.eye(36)[None] * jnp.ones((2, 1, 1)), factor * weights()
        with jax.debug_key_reuse(False), compilations() as found:
            attacks.pgd(
                KEY, jax.tree_util.Partial(model, layers, head), x, y, eps=0.1, step_size=0.05, steps=2
            )
        counts.append(len(found))
    assert counts[1:] == [0, 0], counts


@pytest.mark.parametrize("name", ["jit inside", "checkpoint inside", "scan"])
def test_a_lipschitz_constant_is_that_of_now(name):
    x, _ = images()
    model, found = KEPT[name](), []
    for scale in (1.0, 3.0):
        CELL.update(w=weights(), scale=scale)
        with jax.debug_key_reuse(False):
            found.append(lipschitz.jacobian_norm(model, x))
    np.testing.assert_allclose(found[1], 3 * found[0], rtol=1e-3)
