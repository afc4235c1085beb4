"""The guard: what is an alarm and what is not, which term it names, and what follows in a run."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from clustr_jax.report import record, words
from clustr_jax.stages import guarding
from clustr_jax.storage import additions
from clustr_jax.storage.workdir import Workdir, config_dict, training_sha
from clustr_jax.training import guard
from clustr_jax.training.guard import Health
from runs import TINY
from small_training import get_config, problem

GOOD = Health(accuracy=0.9, largest_class=0.11, feature_spread=0.5)


def with_(**changes):
    return dataclasses.replace(GOOD, **changes)


@pytest.mark.parametrize(
    ("now", "totals", "updates", "expected"),
    [
        (with_(accuracy=0.281), {}, 100, {guard.ACCURACY}),  # docs: 84.8 -> 28.1 in one epoch
        (with_(accuracy=0.61), {}, 100, set()),  # the run of paper_code that ends at 63.5
        (with_(accuracy=0.59), {}, 100, {guard.ACCURACY}),
        (with_(largest_class=0.51), {}, 100, {guard.CLASS}),
        (with_(largest_class=0.5), {}, 100, set()),
        (with_(feature_spread=0.0049), {}, 100, {guard.FEATURES}),
        (with_(feature_spread=0.0051), {}, 100, set()),
        (GOOD, {"hinge_active": 1.0}, 200, {guard.HINGES}),
        (GOOD, {"hinge_active": 1.0}, 199, set()),  # all runs begin so
        (GOOD, {"hinge_active": 0.99}, 500, set()),
        (GOOD, {"single_step_accuracy": 0.9, "multi_step_accuracy": 0.6}, 1, {guard.OVERFITTING}),
        (GOOD, {"single_step_accuracy": 0.9, "multi_step_accuracy": 0.75}, 1, set()),
    ],
)
def test_alarms(now, totals, updates, expected):
    assert set(guard.alarms(GOOD, now, totals, updates=updates)) == expected


def test_without_held_out_images_hinges_are_seen(tmp_path):
    """What a stage notes there, and what is made of it: the one rule that needs no images."""
    net = types.SimpleNamespace(val_split=(), workdir=Workdir(tmp_path))
    guarding.note_handed(net, "2_train", object())
    handed = guarding.handed(net, "2_train")
    assert handed == guard.UNSEEN and guarding.health(net, None) is None
    assert set(guard.alarms(handed, None, {"hinge_active": 1.0}, updates=500)) == {guard.HINGES}
    assert guard.alarms(handed, None, {"hinge_active": 0.9}, updates=500) == {}
    guarding.note_handed(net, "2_train", None)
    assert guarding.handed(net, "2_train") is None


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ([], [guard.HINGES], False),
        ([guard.HINGES], [guard.HINGES], True),
        ([guard.ACCURACY], [guard.HINGES], False),
        ([], [guard.HINGES, guard.CLASS], True),
        ([], [guard.FEATURES], True),
        ([guard.OVERFITTING], [guard.OVERFITTING], False),
    ],
)
def test_open_hinges_are_no_collapse_before_they_last(before, now, expected):
    assert guarding.collapses(now, before) == expected
    assert guarding.hurts(now) == (now != [guard.OVERFITTING])


def test_a_stage_from_random_parameters_was_handed_nothing():
    """Adversarial training predicts one class for many epochs before it learns."""
    bad = Health(accuracy=0.1, largest_class=1.0, feature_spread=1e-6)
    assert guard.alarms(None, bad, {"hinge_active": 1.0}, updates=1000) == {}


@pytest.mark.parametrize(
    ("before", "after", "alarm"), [(0.7, 0.8, False), (0.5, 0.7, False), (0.5, 0.8, True)]
)
def test_few_classes(before, after, alarm):
    """Of two classes one always has half of the predictions: a quarter more than before is too much."""
    found = guard.alarms(with_(largest_class=before), with_(largest_class=after), {}, updates=1)
    assert set(found) == ({guard.CLASS} if alarm else set())


def test_health_against_numpy(rng):
    predictions, labels = rng.integers(0, 4, 50), rng.integers(0, 4, 50)
    z = rng.normal(size=(50, 7)) + 3
    found = guard.health(predictions, labels, z)
    assert found.accuracy == np.mean(predictions == labels)
    assert found.largest_class == max(np.mean(predictions == c) for c in range(4))
    spread = np.trace(np.cov(z.T, bias=True)) / np.mean(np.linalg.norm(z, axis=1) ** 2)
    np.testing.assert_allclose(found.feature_spread, spread, rtol=1e-10)
    scaled = guard.health(predictions, labels, 1e-3 * z)  # the Magnet loss does not see the scale
    np.testing.assert_allclose(scaled.feature_spread, spread, rtol=1e-10)
    assert guard.health(predictions, labels, np.ones((50, 7))).feature_spread == 0.0
    assert guard.health(predictions, labels, np.zeros((50, 7))).feature_spread == 0.0


@pytest.mark.more
@pytest.mark.parametrize(
    ("method", "weight"), [("clustr_qtrades", "lam"), ("trades", "beta"), ("clustr", "xent_lam")]
)
def test_the_gradient_of_a_term_grows_with_its_weight(method, weight, rng):
    """Twice the weight, twice its gradient; that of the rest stays."""
    found = {}
    for value in (1.0, 2.0):
        p = problem(method, np.random.default_rng(0), **{f"train.{weight}": value})
        found[value] = guard.term_gradients(p.trainer, p.state, p.train_set, p.order, jax.random.clone(p.key))
        assert set(found[value]) == {"", weight}
    np.testing.assert_allclose(found[2.0][weight], 2 * found[1.0][weight], rtol=1e-3)
    np.testing.assert_allclose(found[2.0][""], found[1.0][""], rtol=1e-5)


def test_the_remedy_names_the_setting():
    weights = {"lam": 8.0, "xent_lam": 0.0}
    assert "train.lam=8" in guard.remedy({"": 1.0, "lam": 5.2}, weights, 1e-4, "train")
    assert "5.2 times" in guard.remedy({"": 1.0, "lam": 5.2}, weights, 1e-4, "train")
    assert "train.lr=0.0001" in guard.remedy({"": 1.0, "lam": 0.2}, weights, 1e-4, "train")
    assert "train.lr=0.0001" in guard.remedy({}, weights, 1e-4, "train")


# Runs. A consistency term that nothing holds against makes all features one.

BROKEN = (
    "--config.train.lr=0.1",
    "--config.train.lam=1000.0",
    "--config.warmup.epochs=3",
    "--config.train.epochs=3",
)


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "code"), [("warn", 0), ("stop", 3), ("restore", 0)])
def test_a_run_that_collapses(answer, code, run, tmp_path):
    """Said at once; then the run goes on, ends with a code of its own, or goes back to what it was handed."""
    workdir = tmp_path / "run"
    arguments = [
        "--config=digits:clustr_qtrades",
        *BROKEN,
        f"--config.train.on_collapse={answer}",
        f"--workdir={workdir}",
    ]
    stdout, stderr = run(*arguments, "--stages=1_warmup,2_train", code=code)
    assert "warning: after epoch 1 accuracy lost" in stdout
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    stage = [m for m in metrics if m["stage"] == "2_train"]
    assert guard.ACCURACY in stage[0]["alarms"] and not any("alarms" in m for m in metrics if m not in stage)
    assert len(stage) == (3 if answer == "warn" else 1)
    if answer == "stop":
        assert "on_collapse" in stderr and not (workdir / "2_train" / "done.json").exists()
        again = run(*arguments, "--stages=1_warmup,2_train", code=3)[1]  # and is not walked past
        assert again == stderr
        run(*arguments, "--config.train.on_collapse=warn", "--stages=1_warmup,2_train")
        return
    left = json.loads((workdir / "2_train" / "done.json").read_text())
    handed = json.loads((workdir / "2_train" / "handed.json").read_text())
    assert handed["accuracy"] > 0.8
    if answer == "restore":
        assert left["step"] == 0 and left["reason"].startswith("collapsed")
    assert words.alarms(record.read(workdir))[0].startswith("2_train: accuracy lost after epoch 1")


@pytest.mark.slow
def test_the_curve_over_updates(run, tmp_path):
    """train.probe: held-out images attacked after each epoch; the training stays the same."""
    found = {}
    for probe in (0, 20):
        workdir = tmp_path / f"run-{probe}"
        run(*TINY, f"--config.train.probe={probe}", f"--workdir={workdir}", "--stages=1_warmup,2_train")
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        found[probe] = [line for line in lines if line["stage"] == "2_train"]
    assert [line["loss"] for line in found[0]] == [line["loss"] for line in found[20]]
    for line in found[20]:
        assert 0 <= line["quick_accuracy"] <= 1 and line["paper_accuracy"] * 20 == round(
            line["paper_accuracy"] * 20
        )
    assert not any("paper_accuracy" in line for line in found[0])


def test_the_answer_is_no_part_of_the_training():
    """A run that was stopped goes on with another one."""
    one, other = (config_dict(get_config("clustr", **{"train.on_collapse": a})) for a in ("stop", "warn"))
    assert one != other and training_sha(one) == training_sha(other)
    assert additions.fixed("train", one["train"]) == additions.fixed("train", other["train"])
