"""A model that hides what it is gets no number: a check fails, or it is refused. Honest ones get theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clustr_jax
from clustr_jax.attacks import calls
from clustr_jax.data import Examples
from clustr_jax.evaluation import robustbench, subject
from clustr_jax.evaluation.probes import Probe
from clustr_jax.runtime.errors import UserError
from judged import small
from sabotaged import EPS, HONEST, SABOTAGES, N, honest, problem, straight_through

# What tells (of the checks that look at the model alone), or a part of the refusal.
TOLD = {
    "exp scores": 28, "logits x 1e4": 26, "logits x 1e-4": 26, "quantised": 4, "bounded": 28, "table": 27,
    "nearest in a table": 4, "constant beyond a radius": 4, "batch norm in training mode": "in another batch",
    "noise when traced": "each time it is traced", "noise when run": "a second time",
    "stale weights": "answers with old ones", "detached": 30, "detached, casts": 30, "ripple": 30,
    "another when traced": 2,
}  # fmt: skip
REFUSED = [name for name, told in TOLD.items() if isinstance(told, str)]
PARTS = {
    2: "outputs", 4: "gradients", 5: "precision", 26: "outputs", 27: "black_box", 28: "gradients",
    30: "slopes",
}  # fmt: skip
pytestmark = [pytest.mark.filterwarnings("ignore:logits_fn returned bounded scores")]


def judged(model):
    _, _, x, y = problem()
    return clustr_jax.judge(model, x, y, eps=EPS, slots=N, progress=False, settings=small(EPS))


def test_all_of_them_are_tried():
    assert TOLD.keys() == SABOTAGES.keys() and len(SABOTAGES) >= 9


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_is_no_function_of_its_image_is_refused(name):
    with pytest.raises(UserError, match=TOLD[name]):
        judged(SABOTAGES[name]())


def part_of(model, number, classes=None):
    """The checks of one part of the probe; `classes`: on images of the first so many."""
    _, _, x, y = problem()
    if classes is not None:
        x, y = x[y < classes], y[y < classes]
    given, logits = calls.prepare(
        jax.random.key(0), model, x, y, eps=EPS, norm="linf", bounds=(0.0, 1.0), ids=None, slots=N
    )
    right = np.flatnonzero(logits.argmax(axis=1) == y)
    examples = Examples(given.x, given.y, given.ids).take(right)
    probe = Probe(
        jax.random.key(1), subject.of_model(model, given, N), examples, small(EPS), np.zeros(len(right), bool)
    )
    return {check.number: check.status for check in getattr(probe, PARTS[number])()}


@pytest.mark.parametrize("name", [name for name in TOLD if name not in REFUSED])
def test_the_check_that_tells(name):
    assert part_of(SABOTAGES[name](), TOLD[name])[TOLD[name]] == "FAIL"


@pytest.mark.parametrize("number", sorted(PARTS))
def test_an_honest_model_passes_those_checks(number):
    assert "FAIL" not in part_of(honest("trades"), number).values()


@pytest.mark.parametrize("number", [2, 4, 5, 30])
def test_a_model_that_rounds_its_pixels_and_passes_gradients_on_is_honest(number):
    assert part_of(straight_through(), number)[number] in ("PASS", "SKIP")


@pytest.mark.parametrize("kind", HONEST)
def test_the_gradient_of_an_honest_model_is_its_own(kind):
    assert part_of(honest(kind), 30) == {30: "PASS"}


@pytest.mark.parametrize("name", ["reference class", "one score"])
def test_a_score_that_is_the_same_of_all_images_hides_nothing(name):
    """The same classifiers, given by their differences to one class: its own score has no gradient."""
    model = honest("trades")
    same = {
        "reference class": lambda x: model(x) - model(x)[:, :1],
        "one score": lambda x: jnp.stack([0 * model(x)[:, 0], model(x)[:, 1] - model(x)[:, 0]], axis=1),
    }[name]
    found = part_of(same, 28, classes=2 if name == "one score" else None)
    assert found[28] == "PASS" and found[4] != "FAIL"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TOLD if name not in REFUSED])
def test_what_hides_is_not_believed(name):
    found = judged(SABOTAGES[name]())
    assert not found.believable and TOLD[name] in found.content["failed"]
    assert found.verdict.startswith(("No verdict", "Not robust"))
    assert robustbench.model_info(found.content | {"protocol": "sound-3"})["unreliable"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*HONEST, "straight-through"])
def test_honest_models_are_believed(kind):
    found = judged(straight_through() if kind == "straight-through" else honest(kind))
    assert found.believable, [c for c in found.checks if c["status"] == "FAIL"]
    assert 0.2 < found.robust < found.clean
