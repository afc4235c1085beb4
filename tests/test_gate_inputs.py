"""The gate of the attacks: every door gives the same answer to the same input.

Doors x inputs: one table of each. What the libraries' models do is in test_gate_libraries.py.
"""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax import attacks
from gate_doors import (
    CLASSES,
    DOORS,
    KEY,
    SHAPE,
    WITHOUT_RADIUS,
    B,
    images,
    linear,
    qtrades,
    said,
    weights,
)

# What is refused, with a piece of the text that helps.


def one_image(x):
    return x.reshape(-1) @ weights()


def inputs():
    x, y = images()
    return {
        "levels": (dict(x=255 * x), "divide by 255"),
        "uint8": (dict(x=(255 * x).astype(np.uint8)), "divide by 255"),
        "dark uint8": (dict(x=np.zeros((B, *SHAPE), np.uint8)), "divide by 255"),
        "minus one to one": (dict(x=2 * x - 1), r"\(x \+ 1\) / 2"),
        "nan": (dict(x=np.where(np.arange(B)[:, None, None, None] == 3, np.nan, x)), "x has values"),
        "words": (dict(x=np.full((B, *SHAPE), "a")), "x must be an array of numbers"),
        "complex": (dict(x=x + 1j), "x must be an array of numbers"),
        "one image": (dict(x=x[0], y=y[0]), r"give x\[None\] and y\[None\]"),
        "no pixels": (dict(x=x[:, :0]), "without pixels"),
        "one-hot": (dict(y=np.eye(CLASSES, dtype=int)[y]), r"give y.argmax\(axis=1\)"),
        "bool one-hot": (dict(y=np.eye(CLASSES, dtype=bool)[y]), r"give y.argmax\(axis=1\)"),
        "column": (dict(y=y[:, None]), r"give y\[:, 0\]"),
        "from one": (dict(y=np.resize(np.arange(CLASSES) + 1, B)), "labels from 1 want y - 1"),
        "far label": (dict(y=np.full(B, 7)), r"y must lie in 0\.\.2"),
        "float labels": (dict(y=y.astype(float)), "y must hold integer labels"),
        "fewer labels": (dict(y=y[:-1]), r"x must be \[B, \.\.\.\] and y \[B\]"),
        "int key": (dict(key=7), r"jax.random.key\(7\)"),
        "zero key": (dict(key=0), r"jax.random.key\(0\)"),
        "no key": (dict(key=None), "key must be a JAX key"),
        "many keys": (dict(key=jax.random.split(jax.random.key(5))), "key must be one key"),
        "float key": (dict(key=np.zeros(2)), "key must be a JAX key"),
        "eps per image": (dict(eps=np.full(B, 0.1)), "eps must be one number for all images"),
        "eps of text": (dict(eps="8/255"), "8 / 255 without quotes"),
        "no eps": (dict(eps=None), "eps must be a number"),
        "infinite eps": (dict(eps=np.inf), "eps must be >= 0"),
        "nan eps": (dict(eps=np.nan), "eps must be >= 0"),
        "complex eps": (dict(eps=0.1j), "eps must be a number"),
        "boolean eps": (dict(eps=True), "eps must be a number"),
        "negative eps": (dict(eps=-0.1), "eps must be >= 0"),
        "box": (dict(bounds=(1.0, 0.0)), "low < high"),
        "box of one": (dict(bounds=1.0), r"bounds must be \(low, high\)"),
        "tuple": (dict(f=lambda x: (linear(x), x)), r"lambda x: model\(x\)\[0\]"),
        "dict": (dict(f=lambda x: {"loss": x, "logits": linear(x)}), r"model\(x\)\['logits'\]"),
        "nothing": (dict(f=lambda x: None), "must return an array of logits"),
        "one column": (dict(f=lambda x: linear(x)[:, :1]), "at least 2 classes"),
        "no axis": (dict(f=lambda x: linear(x)[:, 0]), r"logits_fn must return \[B, Y\]"),
        "too many axes": (dict(f=lambda x: linear(x)[:, None]), r"logits_fn must return \[B, Y\]"),
        "classes": (dict(f=lambda x: jnp.round(linear(x)).astype(int)), "real numbers"),
        "softmax": (dict(f=lambda x: jax.nn.softmax(linear(x))), "probabilities"),
        "nan logits": (dict(f=lambda x: linear(x) / 0), "not finite"),
        "single images": (dict(f=one_image), r"jax.vmap\(logits_fn\)"),
        "other images": (dict(f=lambda x: x.reshape(B, 7) @ weights()), "logits_fn fails on images of shape"),
        "NumPy": (dict(f=lambda x: np.asarray(x).reshape(B, -1) @ np.asarray(weights())), "jax.numpy"),
        "no function": (dict(f=weights()), "logits_fn must be a function"),
        "batch norm": (dict(f=lambda x: linear(x) - linear(x).mean(axis=0)[None]), "in another batch"),
        "batch norm, and a class that is ruled out": (
            dict(f=lambda x: (linear(x) - linear(x).mean(axis=0)[None]).at[:, 2].set(-1e9)),
            "in another batch",
        ),
        "largest of the batch": (dict(f=lambda x: linear(x) / jnp.max(linear(x))), "in another batch"),
        "first of the batch": (dict(f=lambda x: linear(x) + linear(x)[:1]), "in another batch"),
        "sorted": (dict(f=lambda x: jnp.sort(linear(x), axis=0)), "in another batch"),
        "neighbours": (dict(f=lambda x: linear(x) + jnp.roll(linear(x), 1, 0)), "in another batch"),
        "noise by place": (dict(f=noisy), "in another batch"),
        "chance": (dict(f=by_chance), "a second time"),
        "NumPy's chance": (dict(f=lambda x: linear(x) + np.random.normal()), "each time it is traced"),
    }


def noisy(x):
    return linear(x) + jax.random.normal(jax.random.key(3), (x.shape[0], CLASSES))


def by_chance(x):
    shape = jax.ShapeDtypeStruct((x.shape[0], CLASSES), jnp.float32)
    return linear(x) + jax.pure_callback(
        lambda x: np.random.normal(size=(len(x), CLASSES)).astype(np.float32), shape, x
    )


@pytest.mark.wrong_arrays
@pytest.mark.parametrize("case", list(inputs()))
def test_every_door_says_the_same(case):
    """One line of at most 500 characters, the same at every door, with what to do."""
    change, text = inputs()[case]
    x, y = images()
    change = dict(key=KEY, f=linear, x=x, y=y) | change
    key, f, x, y = (change.pop(name) for name in ("key", "f", "x", "y"))
    doors = DOORS if "labels" in case or "label" in case else DOORS | {"qtrades": qtrades}
    if "eps" not in change:
        doors = doors | WITHOUT_RADIUS
    found = {name: said(door, key, f, x, y, **change) for name, door in doors.items() if takes(name, case)}
    # by how much it differed is chance itself
    assert len({re.sub(r"\(by .*? classes\)", "", text) for text in found.values()}) == 1, found
    assert re.search(text, next(iter(found.values()))), found


def takes(name, case):
    """QTRADES takes probabilities where the others take labels; a ranking of targets needs no key."""
    if name == "malt":
        return "key" not in case
    return name != "qtrades" or case not in ("one-hot", "bool one-hot", "column", "from one")


@pytest.mark.parametrize("name", ["pgd", "noise", "apgd", "fab", "square", "pma", "adaptive"])
@pytest.mark.parametrize("value", [5.9, 5.0, "5", None])
def test_counts_are_whole_numbers(name, value):
    count = {"noise": "draws", "square": "queries"}.get(name, "steps")
    assert said(DOORS[name], KEY, linear, *images(), **{count: value}) == (
        f"{count} must be a whole number, got {value!r}"
    )


@pytest.mark.parametrize("door", [n for n in DOORS if n != "autoattack"])
@pytest.mark.parametrize(
    "norms", [("linf", "Linf", "inf", np.inf, float("inf"), "L_inf"), ("l2", "L2", 2, 2.0)]
)
@pytest.mark.one_in(3)
def test_spellings_of_norms(door, norms):
    x, y = images()
    found = [np.asarray(DOORS[door](jax.random.clone(KEY), linear, x, y, norm=norm)) for norm in norms]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("door", list(DOORS))
def test_no_images_are_no_attack(door):
    x, y = images()
    found = DOORS[door](jax.random.clone(KEY), linear, x[:0], y[:0])
    assert getattr(found, "x_adv", found).shape == (0, *SHAPE)


@pytest.mark.parametrize("attacks_", [(), [], "square", ""])
def test_an_ensemble_of_nothing_is_refused(attacks_):
    """It would leave the clean accuracy."""
    text = said(DOORS["autoattack"], KEY, linear, *images(), attacks=attacks_)
    assert "attacks must name one or more" in text


@pytest.mark.parametrize("door", list(DOORS))
@pytest.mark.parametrize("norm, eps", [("linf", 8.0), ("linf", 2), ("l2", 128)])
def test_a_radius_in_other_units_is_warned_about(door, norm, eps):
    with pytest.warns(attacks.UnitWarning, match=f"eps={eps:g} is more than the box is wide.*{eps:g} / 255"):
        DOORS[door](jax.random.clone(KEY), linear, *images(), eps=eps, norm=norm)


@pytest.mark.parametrize("door", list(DOORS))
@pytest.mark.parametrize(
    ("norm", "eps", "told"),
    [("linf", 8 / 255, "half a level, .* 8 rather"), ("l2", 0.5, "a few levels of one pixel, .* 128 rather")],
)
@pytest.mark.one_in(3)
def test_a_radius_of_unit_pixels_for_levels_is_warned_about(door, norm, eps, told):
    """It would leave the clean accuracy."""
    x, y = images()
    with pytest.warns(attacks.UnitWarning, match=f"less than {told}"):
        model = jax.tree_util.Partial(lambda x: linear(x / 255))
        DOORS[door](jax.random.clone(KEY), model, 255 * x, y, eps=eps, norm=norm, bounds=(0, 255))


def test_a_step_in_other_units_is_warned_about_and_wide_boxes_are_not():
    x, y = images()
    with pytest.warns(attacks.UnitWarning, match="step_size=2"):
        attacks.pgd(KEY, linear, x, y, eps=8 / 255, step_size=2, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        levels = jax.tree_util.Partial(lambda x: linear(x / 255))
        attacks.pgd(jax.random.clone(KEY), levels, 255 * x, y, eps=8, step_size=2, steps=1, bounds=(0, 255))
        attacks.pgd(jax.random.clone(KEY), linear, x, y, eps=8, step_size=2, steps=1, bounds=None)
        attacks.pgd(jax.random.clone(KEY), linear, x, y, eps=1.0, step_size=2.5, steps=1)


# Keys


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("door", [n for n in DOORS if n not in ("fgsm", "autoattack")])
def test_randomness_is_an_examples_own_for_every_kind_of_key(door, impl):
    """Half of a batch, with its ids, is attacked as in the whole one."""
    x, y = images()
    ids = np.arange(B) + 5
    part = [6, 1, 3]
    with jax.debug_key_reuse(False):
        key = jax.random.key(11, impl=impl)
        whole = np.asarray(DOORS[door](key, linear, x, y, ids=ids))
        half = np.asarray(DOORS[door](key, linear, x[part], y[part], ids=ids[part]))
        again = np.asarray(DOORS[door](jax.random.key(11, impl=impl), linear, x, y, ids=ids))
    np.testing.assert_array_equal(again, whole)
    np.testing.assert_allclose(half, whole[part], atol=2e-7)  # two roundings of a pixel


def test_old_style_keys_are_the_same_keys():
    x, y = images()
    with jax.debug_key_reuse(False):
        old, new = (
            attacks.pgd(key, linear, x, y, eps=0.1, step_size=0.1, steps=1)
            for key in (jax.random.PRNGKey(4), jax.random.key(4))
        )
    np.testing.assert_array_equal(old, new)


# Models that may be unsteady


@pytest.mark.parametrize("door", list(DOORS))
@pytest.mark.one_in(3)
def test_randomised_models_are_attacked_when_that_is_said(door):
    x, y = images()
    with pytest.warns(attacks.UnsteadyWarning, match="in another batch"):
        found = DOORS[door](jax.random.clone(KEY), attacks.wrap(noisy, steady=False), x, y)
    if door == "autoattack":
        assert len(found.notes) == 1 and "in another batch" in found.notes[0]
        assert (
            attacks.autoattack(
                jax.random.clone(KEY), linear, x, y, eps=0.1, slots=B, attacks=("square",)
            ).notes
            == ()
        )


@pytest.mark.filterwarnings("ignore::clustr_jax.attacks.UnattackedWarning")  # logits of 1e4 saturate
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.one_in(3)
def test_rounding_is_not_chance(dtype, scale):
    """A deep network, whose rows round by their place; logits of any size."""
    rng = np.random.default_rng(5)
    layers = [jnp.asarray(rng.normal(size=(36, 36)) / 6, dtype) for _ in range(20)]

    def model(x):
        z = x.reshape(x.shape[0], -1).astype(dtype)
        for w in layers:
            z = jnp.tanh(1.5 * z @ w)
        return (scale * z[:, :CLASSES].astype(jnp.float32)).astype(jnp.float32 if scale > 1 else dtype)

    x, _ = images()
    y = np.asarray(model(x)).argmax(axis=1)
    attacks.fgsm(jax.random.clone(KEY), model, x, y, eps=0.05)
