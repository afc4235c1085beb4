"""What is said where nothing was or could be attacked: doors x settings, doors x blind models."""

import functools
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax import attacks, losses
from clustr_jax.attacks.pgd import run_pgd
from clustr_jax.evaluation import judging
from gate_doors import CLASSES, DOORS, KEY, WITHOUT_RADIUS, B, images, linear, qtrades, weights

pgd = functools.partial(attacks.pgd, eps=0.1, step_size=0.05, steps=2)
# Those that follow a gradient
GRADIENTS = {
    **{name: DOORS[name] for name in ("pgd", "fgsm", "apgd", "fab", "pma", "apgd-malt", "adaptive")},
    "pgd restarts": functools.partial(pgd, restarts=3),
    "pgd l2": functools.partial(pgd, norm="l2"),
    "pgd loss": functools.partial(pgd, select="loss", start="normal"),
    "pgd last": functools.partial(pgd, select="last"),
    "apgd l2": functools.partial(attacks.apgd, eps=0.1, steps=2, slots=B, norm="l2"),
    "apgd of few slots": functools.partial(attacks.apgd, eps=0.1, steps=2, slots=3),
    "autoattack": functools.partial(attacks.autoattack, eps=0.1, slots=B, attacks=("apgd-ce",)),
    **{name: WITHOUT_RADIUS[name] for name in ("fmn", "ddn", "fmn-malt")},
}
PACKAGE = str(pathlib.Path(attacks.__file__).parents[1])
FAR = jnp.array([[30.0, 0.0, -5.0]])  # logits that no random start changes the order of


def constant(x):
    return jnp.zeros((x.shape[0], CLASSES)) + FAR


def stopped(x):
    return FAR + 0.1 * jax.lax.stop_gradient(linear(x))


def rounded(x):
    return FAR + 0.1 * linear(jnp.round(255 * x) / 255)


def decided(x):
    return FAR + jax.nn.one_hot(linear(x).argmax(axis=1), CLASSES)


@pytest.fixture(autouse=True)
def keys():
    with jax.debug_key_reuse(False):
        yield


def told(call) -> list[str]:
    """What an UnattackedWarning says, each text once; any other warning is an error."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    assert {w.category for w in found} <= {attacks.UnattackedWarning}, [str(w.message) for w in found]
    assert not any(w.filename.startswith(PACKAGE) for w in found)  # where the user's own code is
    return list(dict.fromkeys(str(w.message) for w in found))


@pytest.mark.more
@pytest.mark.parametrize("model", [constant, stopped, rounded, decided])
def test_every_door_says_that_nothing_could_be_attacked(model):
    """In the same words, with how many images; they come back as robust as they were."""
    x, _ = images()
    y, said = np.zeros(B, np.int32), set()
    for name, door in GRADIENTS.items():
        (text,) = told(lambda door=door: door(KEY, model, x, y))
        assert text.removeprefix("apgd-ce: ").startswith("nothing could be attacked on 8 of 8 images"), name
        assert len(text) < 500
        said.add(text.removeprefix("apgd-ce: "))
    assert len(said) == 1


def test_an_ensemble_keeps_it_with_its_result():
    x, _ = images()
    with pytest.warns(attacks.UnattackedWarning, match="^apgd-ce: nothing could be attacked"):
        found = attacks.autoattack(
            KEY, constant, x, np.zeros(B, np.int32), eps=0.1, slots=B, attacks=("apgd-ce", "square")
        )
    assert len(found.notes) == 1 and found.notes[0].startswith("apgd-ce: nothing could")
    assert found.robust.all()


def test_what_one_attack_cannot_see_another_one_may():
    """A saturated cross entropy is a note of the result, and no warning: the margins of APGD-T are none."""
    x, y = images()
    run = functools.partial(attacks.autoattack, KEY, lambda x: 1e5 * linear(x), x, y, eps=1e-4, slots=B)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (note,) = run(attacks=("apgd-ce", "apgd-t")).notes
    assert note.startswith("apgd-ce: nothing could")
    with pytest.warns(attacks.UnattackedWarning, match="apgd-ce"):
        run(attacks=("apgd-ce",))


@pytest.mark.parametrize("door", ["fmn", "ddn"])
def test_the_nearest_ones_keep_it_with_their_result(door):
    x, _ = images()
    with pytest.warns(attacks.UnattackedWarning):
        found = WITHOUT_RADIUS[door](KEY, constant, x, np.zeros(B, np.int32))
    assert len(found.notes) == 1 and "nothing could be attacked" in found.notes[0]


@pytest.mark.more
@pytest.mark.parametrize("door", list(GRADIENTS))
@pytest.mark.parametrize("y", ["right", "wrong", "some wrong"])
def test_a_model_with_a_gradient_is_no_warning(door, y):
    """However little it moves, and where everything or nothing is fooled."""
    x, labels = images()
    labels = (labels + {"right": 0, "wrong": 1, "some wrong": np.arange(B) % 2}[y]) % CLASSES
    assert told(lambda: GRADIENTS[door](KEY, linear, x, labels)) == []
    assert told(lambda: GRADIENTS[door](KEY, lambda x: 0.01 * FAR + 1e-4 * linear(x), x, 0 * labels)) == []


@pytest.mark.parametrize("door", ["pgd", "fgsm", "apgd", "pma"])
def test_black_and_white_images_are_no_warning(door):
    """The box holds half of the pixels where they are."""
    x = np.round(images()[0])
    y = np.asarray(linear(x)).argmax(axis=1)
    assert told(lambda: DOORS[door](KEY, linear, x, y)) == []


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("alive", "said"), [(0, True), (1, True), (20, True), (21, False), (40, False)])
@pytest.mark.parametrize(
    "door", ["pgd", "pgd restarts", "fgsm", "apgd", "apgd of few slots", "pma", "adaptive"]
)
@pytest.mark.one_in(4)
def test_it_is_judged_over_all_images(door, alive, said, first):
    """Of forty, whichever come first; and those that are misclassified already do not count."""
    x = np.random.default_rng(2).uniform(0.2, 0.8, size=(50, 6, 6, 1)).astype(np.float32)
    x[:, 0, 0, 0] = 0.0
    x[:alive, 0, 0, 0] = 1.0
    wrong = np.arange(50) >= 40
    x, wrong = (x, wrong) if first else (x[::-1], wrong[::-1])

    def model(x):
        seen = (x[:, :1, :1] > 0.5) & jnp.ones(x.shape, bool)
        return 0.1 * FAR + 0.1 * linear(jnp.where(seen, x, jax.lax.stop_gradient(x)))

    settings = {"eps": 1e-3} | ({"step_size": 1e-3} if door.startswith("pgd") else {})
    settings |= {"slots": 40} if door in ("apgd", "pma", "adaptive") else {}
    y = (np.asarray(model(x)).argmax(axis=1) + wrong) % CLASSES
    found = told(lambda: GRADIENTS[door](KEY, model, x, y, **settings))
    assert bool(found) == said, found
    if said:
        assert f"on {40 - alive} of 40 images" in found[0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("door", ["pgd", "apgd", "apgd of few slots", "pma", "fab"])
@pytest.mark.one_in(4)
def test_half_precision_with_a_gradient_is_no_warning(door, dtype):
    x, y = images()
    narrow = weights().astype(dtype)

    def model(x):
        return (x.reshape(x.shape[0], -1).astype(dtype) @ narrow).astype(jnp.float32)

    y = np.asarray(model(x)).argmax(axis=1)
    assert told(lambda: GRADIENTS[door](KEY, model, x, y)) == []


@pytest.mark.parametrize("door", ["pgd", "fgsm", "apgd"])
def test_a_loss_that_is_flat_is_no_attack(door):
    x, y = images()
    more = {"step_size": 1e-4} if door == "pgd" else {}
    (text,) = told(
        lambda: DOORS[door](KEY, linear, x, y, eps=1e-4, loss_fn=lambda z, y: 0.0 * z[:, 0], **more)
    )
    assert "nothing could be attacked" in text


def test_a_saturated_cross_entropy_is_told_and_the_margin_sees_it():
    """In float32 exp(-1e5) is 0."""
    x, y = images()
    run = functools.partial(
        attacks.pgd, KEY, lambda x: 1e5 * linear(x), x, y, eps=1e-4, step_size=1e-4, steps=2
    )
    assert "nothing could be attacked" in told(run)[0]
    assert told(functools.partial(run, loss_fn=losses.margin)) == []


@pytest.mark.parametrize("door", ["noise", "square", "autoattack"])  # of Square alone
def test_black_boxes_are_no_warning(door):
    x, _ = images()
    assert told(lambda: DOORS[door](KEY, constant, x, np.zeros(B, np.int32))) == []


# Settings


@pytest.mark.parametrize("door", [*DOORS, "qtrades"])
@pytest.mark.parametrize("kind", [float, int, np.float32, jnp.float32])
def test_a_radius_of_nothing_is_told(door, kind):
    x, y = images()
    (text,) = told(lambda: (DOORS | {"qtrades": qtrades})[door](KEY, linear, x, y, eps=kind(0)))
    assert text == "eps=0: nothing is tried, and what is left says nothing of robustness"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(steps=0), "steps=0: nothing but random starts is tried"),
        (dict(step_size=0.0), "step_size=0: nothing but random starts is tried"),
        (dict(steps=0, start="zero"), "steps=0: nothing is tried"),
        (dict(steps=0, restarts=5), "steps=0: nothing but random starts is tried"),
        (dict(step_size=0.0, norm="l2"), "step_size=0: nothing but random starts is tried"),
        (dict(eps=0.0, steps=0), "eps=0: nothing is tried"),
    ],
    ids=str,
)
def test_steps_of_nothing_are_told(settings, words):
    x, y = images()
    (text,) = told(lambda: DOORS["pgd"](KEY, linear, x, y, **settings))
    assert text.startswith(words)


@pytest.mark.parametrize(("name", "tiny"), [("eps", 1e-10), ("step_size", 1e-12)])
def test_what_float32_cannot_add_is_nothing(name, tiny):
    x, y = images()
    (text,) = told(lambda: DOORS["pgd"](KEY, linear, x, y, **{name: tiny}))
    assert text.startswith(f"{name}={tiny:g}, which float32 cannot add to a pixel of 1: nothing")
    assert told(lambda: DOORS["pgd"](KEY, linear, x, y, **{name: 1e-7})) == []


def test_a_judgement_of_nothing_says_so():
    x, y = images()
    settings = dict(norm="linf", protocol="sound-3", bounds=(0.0, 1.0), ids=None, settings=None, slots=B)
    with pytest.warns(attacks.UnattackedWarning, match="eps=0: nothing is tried"):
        judging.prepare(linear, x, y, eps=0.0, seed=0, **settings)


def test_nothing_is_said_inside_jit_of_no_images_and_by_protocols():
    x, y = images()
    blind = functools.partial(attacks.pgd, KEY, constant, y=0 * y, eps=0.1, step_size=0.1, steps=2)
    nothing = functools.partial(attacks.pgd, KEY, linear, y=y, eps=0.0, step_size=0.1, steps=2)
    assert told(lambda: jax.jit(lambda x: (blind(x=x), nothing(x=x)))(x)) == []
    assert told(lambda: jax.jit(lambda: (blind(x=x), nothing(x=x)))()) == []
    for door in DOORS.values():
        assert told(lambda door=door: door(KEY, linear, x[:0], y[:0], eps=0.0)) == []
    found = run_pgd(KEY, constant, x, 0 * y, eps=0.1, step_size=0.1, steps=2)  # warnings are errors here
    with pytest.warns(attacks.UnattackedWarning, match=re.escape("attacks.square needs no gradient")):
        np.testing.assert_array_equal(blind(x=x), found)  # the same numbers
