"""The gate of the attacks: no number is of an old loss function, and none of an old function elsewhere."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax import attacks, lipschitz, losses
from gate_doors import CLASSES, KEY, images, linear, said, weights

DOORS = {
    "pgd": functools.partial(attacks.pgd, eps=0.1, step_size=0.05, steps=2, select="last"),
    "pgd restarts": functools.partial(attacks.pgd, eps=0.02, step_size=0.01, steps=2, restarts=2),
    "fgsm": functools.partial(attacks.fgsm, eps=0.1),
    "apgd": functools.partial(attacks.apgd, eps=0.5, steps=3, slots=8),
}


@pytest.fixture(autouse=True)
def keys():
    with jax.debug_key_reuse(False):
        yield


class Weighted:
    """An object with an attribute."""

    def __init__(self, w):
        self.w = w

    def __call__(self, logits, y):
        return losses.cross_entropy(logits * self.w[None], y)

    def method(self, logits, y):
        return self(logits, y)


def holders():
    """name -> (put a weight of the classes, the loss as it is called now)."""
    cell, number, held, array = {}, {}, Weighted(None), np.ones(CLASSES, np.float32)

    def captured(logits, y):
        return losses.cross_entropy(logits * cell["w"][None], y)

    def scaled(logits, y):
        return losses.cross_entropy(logits * number["s"], y)

    part = functools.partial(
        lambda w, logits, y: losses.cross_entropy(logits * jnp.asarray(w)[None], y), array
    )
    return {
        "a captured array": (lambda w: cell.update(w=w), captured),
        "a captured number": (lambda w: number.update(s=float(w[0])), scaled),
        "an attribute": (lambda w: setattr(held, "w", w), held),
        "a method": (lambda w: setattr(held, "w", w), held.method),
        "a NumPy array changed in place": (lambda w: array.__setitem__(slice(None), np.asarray(w)), part),
    }


@pytest.mark.parametrize("door", list(DOORS))
@pytest.mark.parametrize("name", list(holders()))
@pytest.mark.one_in(3)
def test_the_loss_is_that_of_now(name, door, compilations):
    """As a function that is new finds it; and one that has not changed compiles nothing."""
    put, loss = holders()[name]
    x, y = images()
    found = []
    for sign in (1.0, -1.0, 1.0):
        put(sign * jnp.ones(CLASSES))
        attacked = np.asarray(DOORS[door](KEY, linear, x, y, loss_fn=loss))
        fresh = DOORS[door](KEY, linear, x, y, loss_fn=lambda z, y, s=sign: losses.cross_entropy(z * s, y))
        np.testing.assert_allclose(attacked, fresh, atol=2e-6)
        found.append(attacked)
    assert np.abs(found[0] - found[1]).max() > 0.01
    with compilations() as count:
        DOORS[door](KEY, linear, x, y, loss_fn=loss)
    assert not count


def test_a_jit_inside_that_keeps_old_arrays_is_refused():
    cell = {"w": jnp.ones(CLASSES)}
    loss = jax.jit(lambda z, y: losses.cross_entropy(z * cell["w"][None], y))
    x, y = images()
    for door in DOORS.values():
        door(KEY, linear, x, y, loss_fn=loss)
    cell["w"] = -jnp.ones(CLASSES)
    found = {said(door, KEY, linear, x, y, loss_fn=loss) for door in DOORS.values()}
    assert len(found) == 1 and "jax.clear_caches()" in found.pop()


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (None, r"must be a function \(logits \[B, Y\], y\)"), ("ce", "must be a function"),
        (lambda z, y: losses.cross_entropy(z, y).mean(), "leave out the mean"),
        (lambda z, y: z, r"must return the loss of each image, \[B\]"),
        (lambda z, y: (losses.cross_entropy(z, y), z), r"must return the loss of each image, \[B\]"),
        (lambda z: z[:, 0], "loss_fn fails on logits of shape"),
        (lambda z, y: np.asarray(z).sum(axis=1), "loss_fn fails on logits of shape"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("door", list(DOORS))
def test_what_is_no_loss_of_each_image_is_refused(loss, text, door):
    """A mean would be compared between restarts as if it were each image's own."""
    assert re.search(text, said(DOORS[door], KEY, linear, *images(), loss_fn=loss))


def test_a_loss_of_each_images_own_weight_is_taken():
    x, y = images()
    share = jnp.arange(len(x)) / len(x)
    DOORS["pgd"](KEY, linear, x, y, loss_fn=lambda z, y: share * losses.cross_entropy(z, y))


def test_a_jacobian_is_that_of_now():
    cell = {"w": weights()}

    def f(x):
        return x.reshape(x.shape[0], -1) @ cell["w"]

    x, _ = images()
    before = lipschitz.jacobian_norm(f, jnp.asarray(x))
    cell["w"] = 3 * weights()
    np.testing.assert_allclose(lipschitz.jacobian_norm(f, jnp.asarray(x)), 3 * before, rtol=1e-5)
