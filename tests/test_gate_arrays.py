"""Arrays that hold something else than they say: the same words at the doors of attacks and of arrays."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from array_doors import FEATURES, LABELS, PROBABILITY_DOORS, Y, Z, refused
from clustr_jax import attacks
from gate_doors import CLASSES, DOORS, KEY, images, linear, qtrades, said

SOME = [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("pgd", "square"))) for name in DOORS]


def masked(array):
    hidden = np.zeros(array.shape, bool)
    hidden.flat[1] = True
    return np.ma.masked_array(array, mask=hidden)


def deleted(array):
    array = jnp.array(array)
    array.delete()
    return array


# what is wrong with it -> (an array that has it, what is said)
EMPTIED = {"masked": (masked, "1 masked entries"), "deleted": (deleted, "donate_argnums")}


@pytest.mark.parametrize("kind", EMPTIED)
@pytest.mark.parametrize("door", DOORS)
def test_attacks_refuse_arrays_without_values(door, kind):
    make, words = EMPTIED[kind]
    x, y = images()
    assert "x " in said(DOORS[door], KEY, linear, make(x), y)
    for text in (said(DOORS[door], KEY, linear, make(x), y), said(DOORS[door], KEY, linear, x, make(y))):
        assert words in text


@pytest.mark.parametrize("kind", EMPTIED)
@pytest.mark.parametrize("door", [*FEATURES, *LABELS])
def test_arrays_without_values_are_refused(door, kind):
    make, words = EMPTIED[kind]
    if door in FEATURES:
        assert words in refused(FEATURES[door][1], make(Z))
    if door in LABELS:
        assert words in refused(LABELS[door], make(Y))


def test_a_mask_that_hides_nothing_is_none():
    x, y = images()
    with jax.debug_key_reuse(False):
        found = attacks.fgsm(KEY, linear, np.ma.masked_array(x), np.ma.masked_array(y), eps=0.1)
        np.testing.assert_array_equal(found, attacks.fgsm(KEY, linear, x, y, eps=0.1))


@pytest.mark.parametrize("dtype", [">i4", ">i8", ">i2"])
@pytest.mark.parametrize("door", SOME)
def test_big_endian_arrays_are_what_they_say(door, dtype):
    x, y = images()
    with jax.debug_key_reuse(False):
        found = DOORS[door](KEY, linear, x.astype(">f4"), y.astype(dtype))
        expected = DOORS[door](KEY, linear, x, y)
    for a, b in zip(*(np.atleast_1d(getattr(r, "x_adv", r)) for r in (found, expected)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_big_endian_ids():
    x, y = images()
    ids = np.arange(len(x)) + 5
    with jax.debug_key_reuse(False):
        found, expected = (
            attacks.noise(KEY, linear, x, y, eps=0.1, draws=2, ids=i) for i in (ids.astype(">i4"), ids)
        )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("door", LABELS)
def test_big_endian_labels_of_arrays(door):
    found, expected = LABELS[door](Y.astype(">i4")), LABELS[door](Y)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


NO_PROBABILITIES = {
    "logits": lambda p: np.log(p + 0.1),
    "twice": lambda p: 2 * p,
    "percent": lambda p: 100 * p,
    "negative": lambda p: p * 1.3 - 0.1,
    "zero": lambda p: 0 * p,
}


@pytest.mark.parametrize("name", NO_PROBABILITIES)
def test_probabilities_are_probabilities(name):
    """At attacks as at losses."""
    x, y = images()
    made = NO_PROBABILITIES[name](np.eye(CLASSES, dtype=np.float32)[y])
    found = {said(DOORS["pgd"], KEY, linear, x, made), said(qtrades, KEY, linear, x, made)}
    assert len(found) == 1 and "jax.nn.softmax" in found.pop()
    of_losses = NO_PROBABILITIES[name](np.eye(3, dtype=np.float32)[Y])
    for door, call in PROBABILITY_DOORS.items():
        assert "jax.nn.softmax" in refused(call, of_losses), door


SETTINGS = {
    "four words": (dict(key=np.zeros(4, np.uint32)), "4 words"),
    "six words": (dict(key=jnp.zeros(6, jnp.uint32)), "6 words"),
    "a fraction": (dict(eps=Fraction(3, 100)), "float(eps)"),
    "a word for a box": (dict(bounds="01"), "bounds"),
    "half a box": (dict(bounds=(0.0, np.inf)), "finite"),
    "half a box below": (dict(bounds=(-np.inf, 1.0)), "finite"),
    "16 bits": (dict(factor=65535), "divide by 65535"),
    "-1 to 1": (dict(factor=2, less=1), "double eps"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_mean_something_else(name, door):
    settings, words = SETTINGS[name]
    settings = dict(settings)
    x, y = images()
    x = np.concatenate([np.zeros_like(x[:1]), np.ones_like(x[:1]), x[2:]])
    x = x * settings.pop("factor", 1) - settings.pop("less", 0)
    assert words in said(DOORS[door], settings.pop("key", KEY), linear, x, y, **settings)


def test_an_endless_box_is_none():
    x, y = images()
    with jax.debug_key_reuse(False):
        found, expected = (
            attacks.fgsm(KEY, linear, x, y, eps=0.1, bounds=b) for b in ((-np.inf, np.inf), None)
        )
    np.testing.assert_array_equal(found, expected)
