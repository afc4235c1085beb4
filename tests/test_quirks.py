"""Which departure of the authors' protocol buys how many points: the table, and the command."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from centroid_classifiers import (
    bounded_problem,
    eval_config,
    eval_settings,
    linear_classifier,
    points,
    silent,
)
from clustr_jax import attacks, data
from clustr_jax.attacks import scheduler
from clustr_jax.classifier import Classifier
from clustr_jax.evaluation import protocols, quirks, resume

STEPS, RESTARTS = 6, 3
NAMES = ["none", "exp_scores", "mean_loss", "max_loss", "start_outside", "all"]


@pytest.fixture(scope="module")
def small():
    """40 points in the unit box about 5 x 2 clusters in a linear feature space."""
    weight, centroids, variance, x, y = bounded_problem(np.random.default_rng(0), n=40)
    clf = linear_classifier(weight, centroids, variance, bounds=(0.0, 1.0))
    config = eval_settings(**{"eval.attack.eps": 0.1, "eval.attack.step_size": 0.025, "eval.slots": 16})
    return clf, points(x, y), config


def recorded(small, on=None):
    """(rows or outcome, what each attack was): with an attack that returns what its settings decide."""
    seen = []

    def largest_loss(key, model, attack, examples, *, restarts, slots):
        seen.append((model.func.__name__, attack, restarts))
        robust = np.arange(len(examples)) < 30 - len(seen)
        return {"robust": robust, "any_restart": robust & (np.arange(len(examples)) != 0)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quirks, "largest_loss", largest_loss)
        reports = []
        rows = quirks.table(jax.random.key(2), *small, steps=STEPS, restarts=RESTARTS, report=reports.append)
    assert len(reports) == len(rows) == len(seen)
    return rows, seen


def test_each_row_switches_one_departure_off(small):
    """All on, each off in turn, all off: what the attack is given, and which outcome counts."""
    rows, seen = recorded(small)
    assert [row["off"] for row in rows] == NAMES == ["none", *quirks.QUIRKS, "all"]
    settings = {
        name: (
            f == "scores",
            attack.loss.options == protocols.PAPER_LOSS.options,
            attack.clip_start,
            restarts,
        )
        for name, (f, attack, restarts) in zip(NAMES, seen, strict=True)
    }
    assert settings == {
        "none": (True, True, False, RESTARTS),
        "exp_scores": (False, True, False, RESTARTS),
        "mean_loss": (True, False, False, RESTARTS),
        "max_loss": (True, True, False, RESTARTS),
        "start_outside": (True, True, True, RESTARTS),
        "all": (False, False, True, RESTARTS),
    }
    clf, examples, _ = small
    right = np.asarray(clf.predict(examples.x)) == examples.y
    assert not right[:24].all()
    for name, row, i in zip(NAMES, rows, range(6), strict=True):
        survivors = right & (np.arange(40) < 29 - i)  # as the image is, it has to be right in every row
        if name in ("max_loss", "all"):  # any restart that succeeds counts
            survivors &= np.arange(40) != 0
        assert row["robust"] == survivors.mean()
        assert row["points"] == pytest.approx(
            100 * (survivors.mean() - (right & (np.arange(40) < 29)).mean())
        )
    for _, attack, _ in seen:
        assert float(attack.eps) == np.float32(0.1) and float(attack.step_size) == np.float32(0.025)
        assert attack.steps == STEPS and attack.bounds == (0.0, 1.0) and attack.start == "uniform"
    json.dumps(rows)


def test_the_aims_of_the_rows(rng):
    """Cross entropy, or a 64th of it: the gradient of the mean over the authors' batch."""
    logits, y = rng.normal(size=(6, 4)).astype(np.float32), np.arange(6) % 4
    expected = reference.cross_entropy(logits, y)
    reference.close(quirks._EXP_LOSS(logits, y, y), expected, 1e-5)
    reference.close(protocols.PAPER_LOSS(logits, y, y), expected / 64, 1e-5)


def paper(small, **changes):
    clf, examples, _ = small
    settings = dict(eps=0.1, step_size=0.025, steps=STEPS, restarts=RESTARTS, slots=16, report=silent)
    return protocols.paper_pgd(jax.random.key(2), clf, examples, **settings | changes)


def survivors(small, on):
    return quirks.evaluate(jax.random.key(2), *small, frozenset(on), steps=STEPS, restarts=RESTARTS)


def test_with_all_departures_it_is_the_papers_protocol(small):
    """And without the rule of the largest loss the same attack, judged by any restart that succeeds."""
    found = paper(small)
    everything = set(quirks.QUIRKS)
    clf, examples, _ = small
    right = np.argmax(clf.scores(examples.x), axis=1) == examples.y
    np.testing.assert_array_equal(survivors(small, everything), right & found["robust"])
    np.testing.assert_array_equal(survivors(small, everything - {"max_loss"}), right & found["any_restart"])
    assert 0 < found["robust"].mean() < 1
    assert (found["any_restart"] <= found["robust"]).all() and found["any_restart"].sum() > 0


def test_an_interrupted_paper_protocol_goes_on(small, tmp_path, monkeypatch):
    """The largest losses so far are recorded with the restarts: the same outcomes, nothing run twice."""
    expected = paper(small)
    monkeypatch.setattr(scheduler, "_OPERATIONS", {"cpu": 1.0})
    monkeypatch.setattr("clustr_jax.attacks.records._RECORD_SECONDS", 0.0)
    for stop in (3, 12):
        calls = []

        def report(unbroken, calls=calls, stop=stop):
            calls.append(unbroken)
            if len(calls) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            paper(small, report=report, records=resume.Records(tmp_path, "me"))
    found = paper(small, records=resume.Records(tmp_path, "me"))
    for name in ("robust", "any_restart", "fooled_outside_box", "evaluations", "needed"):
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    again = paper(small, records=resume.Records(tmp_path, "me"))
    np.testing.assert_array_equal(again["robust"], expected["robust"])
    assert again["evaluations"] == expected["evaluations"]


@pytest.mark.slow
def test_without_any_departure_it_is_plain_pgd(small):
    """Cross entropy of log scores, a start in the box, any restart that succeeds: as `attacks.pgd`."""
    clf, examples, _ = small
    x_adv = attacks.pgd(
        jax.random.key(2), clf.logits, examples.x, examples.y, eps=0.1, step_size=0.025, steps=STEPS,
        restarts=RESTARTS, ids=examples.ids,
    )  # fmt: skip
    robust = np.asarray(clf.logits(x_adv)).argmax(axis=1) == examples.y
    np.testing.assert_array_equal(survivors(small, ()), robust)
    assert 0.1 < robust.mean() < 0.9


@pytest.mark.slow
def test_the_table_of_a_small_classifier(small):
    """Counting any success never raises accuracy; the rows are those of `evaluate`, and they differ."""
    rows = quirks.table(jax.random.key(2), *small, steps=STEPS, restarts=RESTARTS)
    robust = {row["off"]: row["robust"] for row in rows}
    assert list(robust) == NAMES and len(set(robust.values())) > 1
    assert robust["max_loss"] <= robust["none"] and robust["all"] <= robust["none"]
    assert robust["none"] == paper(small)["robust"].mean()
    assert robust["start_outside"] == survivors(small, set(quirks.QUIRKS) - {"start_outside"}).mean()


# The command


def one_line(capsys):
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_a_missing_work_directory_is_one_line(tmp_path, capsys):
    assert quirks.main([str(tmp_path / "none")]) == 2
    assert "no finished stage" in one_line(capsys)


def test_a_linear_head_is_refused(tmp_path, capsys, monkeypatch, small):
    monkeypatch.setattr(quirks.loading, "load", lambda path: small[0].replace(clusters=None))
    assert quirks.main([str(tmp_path)]) == 2
    assert "has a linear head" in one_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--n=0", "must be at least 1"),
        ("--steps=0", "must be at least 1"),
        ("--restarts=-1", "must be at least 1"),
        ("--eps=-0.1", "must be above 0"),
        ("--step_size=0", "must be above 0"),
    ],
)
def test_numbers_that_are_too_small_are_refused(flag, message, tmp_path, capsys, monkeypatch, small):
    monkeypatch.setattr(quirks.loading, "load", lambda path: small[0])
    (tmp_path / "config.json").write_text(eval_config().to_json_best_effort())
    assert quirks.main([str(tmp_path), flag]) == 2
    assert message in one_line(capsys)


@pytest.mark.slow
def test_the_command_prints_and_writes_the_table(tmp_path, capsys, monkeypatch):
    """On digits with the class means as centroids."""
    x, y = data.load("digits", "train")
    means = np.stack([x[y == c].reshape(-1, 64).mean(axis=0) for c in range(10)])[:, None]
    clf = linear_classifier(np.eye(64), means, 1.0)
    assert isinstance(clf, Classifier) and clf.bounds == (0.0, 1.0)
    # What another evaluation left behind: neither its D nor its radius is the table's.
    config = eval_config(**{"eval.attack.eps": 0.7, "eval.attack.step_size": 0.7, "eval.nearest": 1})
    clf = clf.replace(nearest=1)
    (tmp_path / "config.json").write_text(config.to_json_best_effort())
    monkeypatch.setattr(quirks.loading, "load", lambda path: clf)
    budget = ["--n=20", "--steps=3", "--restarts=2", "--eps=0.1", "--step_size=0.025"]
    assert quirks.main([str(tmp_path), *budget]) == 0
    shown = capsys.readouterr().out
    found = json.loads((pathlib.Path(tmp_path) / "results" / "quirks.json").read_text())
    assert [row["off"] for row in found["rows"]] == NAMES
    assert found["n"] == 20 and found["protocol"] == "quirks-4" and found["dataset"] == "digits"
    assert found["robust"] == found["rows"][-1]["robust"] <= found["clean"]
    assert (found["eps"], found["nearest"]) == (0.1, 0)
    assert found["attack"] == {"steps": 3, "restarts": 2, "step_size": 0.025}
    for name in quirks.QUIRKS:
        assert name in shown
    outcomes = np.load(tmp_path / "results" / "quirks.npz")
    assert len(outcomes["ids"]) == 20
    np.testing.assert_array_equal(jnp.asarray(data.load("digits", "test")[1])[outcomes["ids"]], outcomes["y"])
    # all that was spent, and the result cannot be written: the table was printed, and it is said in a line
    capsys.readouterr()
    shutil.rmtree(tmp_path / "results")
    (tmp_path / "results").touch()
    assert quirks.main([str(tmp_path), *budget]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and told.err.count("\n") == 1 and "exp_scores" in told.out


def test_the_hinge_of_the_adaptive_attack_is_flat(small):
    """Without a margin the hinged loss has no gradient at a correct example: only the starts are left."""
    found = {}
    for alpha in (0.0, 100.0):
        found[alpha] = quirks.adaptive(jax.random.key(1), *small, alpha=alpha, steps=STEPS, restarts=RESTARTS)
    assert found[0.0]["unhinged"] == found[100.0]["unhinged"] == found[100.0]["hinged"]
    assert found[0.0]["hinged"] > found[0.0]["unhinged"] > 0
