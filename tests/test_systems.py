"""experiments/systems.py: rows of equal passes that run.py accepts, and verdicts from files made by hand."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from clustr_jax.evaluation import protocols
from clustr_jax.settings import EvalSettings, Recipe, Settings, TrainingSettings
from clustr_jax.stages import configuration, refusals
from clustr_jax.training import cost
from experiment_modules import imported
from linear_problems import get_config
from project_configs import parse

MODULES = (
    "child",
    "collapse",
    "systems",
    "system_tables",
    "campaign",
    "levers",
    "lever_tables",
    "beyond_rows",
    "result_tables",
)


@pytest.fixture(scope="module")
def experiments():
    with imported(*MODULES) as modules:
        yield modules


def _passes(row):
    """Gradient passes per image of a row's own training, by the definition of its method's step."""
    config = configuration.resolve(get_config(f"{row.method},fast", row.config, **row.settings))
    known = Settings.of(config)
    refusals.check_terms(known.training.train)
    refusals.check_magnet(known.training.magnet)
    refusals.check_recipe("train", known.recipe)
    recipe = Recipe.of(config.train)
    return (
        config.train.epochs * recipe.replays * cost.gradients(row.method, TrainingSettings.of(config), recipe)
    )


def test_baselines_have_as_many_passes_as_clustr_qtrades_in_all(experiments):
    rows = experiments["systems"].ROWS
    whole = _passes(rows["nominal"]) + _passes(rows["clustr_qtrades"])
    assert whole == experiments["systems"].PASSES
    for name in ("magnet", "trades", "pgd_at", "fast_at", "free_at"):
        assert abs(_passes(rows[name]) - whole) <= 0.05 * whole, name
    assert _passes(rows["nominal"]) + _passes(rows["qtrades"]) == whole
    assert _passes(rows["clustr"]) < _passes(rows["clustr_qtrades"])


def test_short_rows_have_as_many_passes_after_one_start(experiments):
    systems = experiments["systems"]
    start = _passes(systems.ROWS["nominal"])
    short = {name: row for name, row in systems.ROWS.items() if name.endswith("-short")}
    assert {"magnet", "clustr", "qtrades", "trades", "pgd_at", "fast_at", "free_at"} <= {
        row.method for row in short.values()
    }
    for name, row in short.items():
        lever = experiments["levers"].ROWS.get(row.lever, {})
        before = start if row.start or row.lever else 0  # a lever starts from the kept weights as well
        assert before + _passes(dataclasses.replace(row, settings=row.settings | lever)) == start + 6, name


def test_what_starts_from_a_row_has_its_network(experiments, tmp_path, monkeypatch):
    """The commands of the source come first where it is not trained, and both describe the same layers."""
    systems = experiments["systems"]
    monkeypatch.setattr(systems, "ROOT", tmp_path)
    kept = experiments["levers"].START
    for name, row in systems.ROWS.items():
        if not row.start:
            continue
        source = systems.ROWS[row.start]
        first = name if row.start == "nominal" else row.start  # the kept weights need no training
        weights = kept if row.start == "nominal" else systems.workdir(row.start, 1) / "2_train"
        assert systems.commands(name, 1, ())[0] == systems.training(first, 1)
        assert f"--config.init_from={weights}" in systems.training(name, 1)
        networks = {
            get_config(f"{one.method},fast", one.config, **one.settings).model.name for one in (row, source)
        }
        assert len(networks) == 1 and row.config == source.config, name


def test_other_data_sets_make_as_many_updates(experiments):
    rows = experiments["systems"].ROWS
    images = {"svhn": round(8001 * 0.98), "cifar100": round(20_000 * 0.98)}  # 2 % are held out
    for config, trained in images.items():
        found = get_config("clustr_qtrades,fast", config, **rows[f"{config}-clustr_qtrades"].settings)
        updates = found.train.epochs * (trained // ((found.magnet.clusters or 12) * found.magnet.samples))
        assert 6000 <= updates <= 6240, config
        assert found.data.val_size == 0.02


def test_rows_that_start_from_the_kept_weights_count_their_passes(experiments, tmp_path, monkeypatch):
    """As the finished rows have it, which were made while the work directory of the weights was there."""
    systems = experiments["systems"]
    root = systems.ROOT
    monkeypatch.setattr(systems, "ROOT", tmp_path)
    recorded = json.loads((root / systems.RESULTS / "clustr-0.json").read_text())["gradient_passes"]
    assert systems.spent("clustr", 0) == {"nominal 2_train": recorded["nominal 2_train"]}
    assert systems.spent("nominal", 0) == systems.spent("clustr_qtrades", 0) == systems.spent("clustr", 0)
    assert systems.spent("nominal", 1) == {}  # trained by itself, and not yet
    about = (root / experiments["levers"].START).read_bytes()[:4096]
    assert b"seed 0, 752 updates" in about and recorded["nominal 2_train"] == 752 * 1024


def test_levers_are_accepted_and_make_the_updates_that_their_names_say(experiments):
    levers = experiments["levers"]
    assert len(levers.ROWS) >= 20
    for name, settings in levers.ROWS.items():
        config = configuration.resolve(get_config("clustr_qtrades,fast", "cifar10", **settings))
        batch = (config.magnet.clusters or 12) * config.magnet.samples
        updates = config.train.epochs * (49_000 // batch)
        if name == "12x20-short":  # as many images as its siblings
            updates *= batch / 96
        expected = 510 if name.endswith("-510") else 1020 if name.endswith("-short") else 6120
        if expected == 6120:  # whole epochs, of which one more may be needed
            assert 6000 <= updates <= 6000 + 49_000 // batch, (name, updates)
        else:
            assert abs(updates - expected) <= 0.04 * expected, (name, updates)
        assert levers.warm(name) in levers.WARM
    assert levers.start("exp", 1) == levers.START and levers.START.exists()
    assert levers.start("warm-8-short", 1) == levers.RUNS / "warm-8-1" / "2_train"
    assert levers.start("after-magnet-short", 1) == levers.RUNS / "lam-0-short-1" / "2_train"
    assert levers.warm("warm-8-short") == "warm-8" and levers.warm("text") == "warm"


def _resolved(words):
    """The config that run.py makes of a command, refused where run.py refuses it."""
    (config,) = (word.partition("=")[2] for word in words if word.startswith("--config="))
    path, _, method = config.partition(":")
    changes = [word for word in words if word.startswith("--config.")]
    found = configuration.resolve(parse(pathlib.Path(path).stem, *changes, method=method))
    protocols.check_config(EvalSettings.of(found.eval))
    return found


def test_an_evaluation_says_each_setting_once(experiments):
    systems = experiments["systems"]
    for name in systems.ROWS:
        for words in (
            systems.evaluation(name, 0, settings) for settings in ({}, systems.PAPER, systems.LONG)
        ):
            names = [word.partition("=")[0] for word in words]
            assert len(set(names)) == len(names)
            assert "--config.eval.n=1000" in words and "--config.eval.quick=False" in words
            assert set(systems.training(name, 0)[:3]) <= set(words)  # the same config in the same directory
            config = _resolved(words)
            assert config.eval.n == 1000 and config.eval.attack.restarts == 10


def test_other_radii_are_evaluated_with_one_setting_changed(experiments):
    systems = experiments["systems"]
    (*commands, last) = systems.further("clustr_qtrades", 0).values()
    deployed = _resolved(systems.evaluation("clustr_qtrades", 0)).eval
    for protocol, words in commands:
        names = [word.partition("=")[0] for word in words]
        assert len(set(names)) == len(names)
        found = _resolved(words).eval
        assert found.protocols == (protocol,) and found.n == deployed.n
        assert (found.nearest, found.attack.eps) != (deployed.nearest, deployed.attack.eps)
    assert _resolved(last[1]).eval.protocols == ()
    same = {"n", "quick", "nearest", "slots"}
    assert all(_resolved(last[1]).eval[key] == deployed[key] for key in same)


def test_an_evaluation_that_was_left_out_is_made_later(experiments, tmp_path):
    systems, target = experiments["systems"], tmp_path / "row.json"
    asked = {"paper": [systems.PAPER], "sound": [{}], "long": [{}, systems.LONG]}

    def lacking():
        return [key for key, settings in asked.items() if systems.lacking(target, settings)]

    assert lacking() == ["paper", "sound", "long"]
    target.write_text(json.dumps({"paper": {"pgd20": 0.4}, "sound": None}))
    assert lacking() == ["sound", "long"]
    target.write_text(json.dumps({"paper": {"pgd20": 0.4}, "sound": 0.0}))
    assert lacking() == ["long"]
    target.write_text(json.dumps({"paper": {"pgd20": 0.4, "pgd100": 0.4}, "sound": 0.0}))
    assert lacking() == []


def test_rows_of_the_campaign_say_the_form_that_was_their_default(experiments):
    for said in ("--config.fidelity.scores=log", "--config.fidelity.epoch_statistics=keep"):
        for name in experiments["campaign"].NAMES:
            assert (said in experiments["campaign"].run("cifar10", name, 0)) == (name == "clustr_qtrades")


def test_levers_say_which_statistics_they_are_deployed_with(experiments):
    """The first ones of the images seen last; the authors' preset has its own."""
    levers = experiments["levers"]
    for name, settings in levers.ROWS.items():
        said = [w for w in levers.command(name, 0) if "epoch_statistics" in w]
        if "fidelity.preset" in settings:
            assert not said
        else:
            value = "clean" if "clean-statistics" in name else "keep"
            assert said == [f"--config.fidelity.epoch_statistics={value}"], name


def test_names_that_no_row_has_are_one_line(experiments, capsys):
    """For every experiment with --only."""
    chosen = experiments["child"].chosen
    assert chosen("", {"a": 1, "b": 2}) == ["a", "b"] and chosen("b", {"a": 1, "b": 2}) == ["b"]
    with pytest.raises(SystemExit) as left:
        chosen("a,c", {"a": 1, "b": 2})
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: --only: unknown 'c'; known: a, b\n"


def test_rows_of_the_collapse_differ_by_the_form_alone(experiments):
    collapse = experiments["collapse"]
    (first, text), (again, exp) = (collapse.commands(name, 0) for name in collapse.ROWS)
    assert first == again
    assert set(text) ^ set(exp) == {
        f"--{key}={value}"
        for name, form in (("text", "log"), ("exp", "exp"))
        for key, value in (("workdir", f"runs/collapse/{name}-0"), ("config.fidelity.scores", form))
    }
    config = configuration.resolve(get_config("clustr_qtrades,cpu", "cifar10", **collapse.SETTINGS))
    paper = {"alpha": 12.5, "k": 2, "samples": 20}
    assert {key: config.magnet[key] for key in paper} == paper
    assert config.train.lam == 8.0 and config.train.attack.steps == 1 and config.train.epochs == 1


def test_verdicts_come_from_intervals_of_the_same_images(experiments, tmp_path, monkeypatch):
    tables = experiments["system_tables"]
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    rng = np.random.default_rng(0)
    ids, differences = np.arange(1000), []
    for seed in (0, 1):
        low, high = rng.random(1000) < 0.2, rng.random(1000) < 0.4
        np.savez(tmp_path / f"magnet-short-{seed}.npz", ids=ids, pgd20=low, sound=low)
        np.savez(tmp_path / f"clustr-short-{seed}.npz", ids=ids, pgd20=high, sound=low)
        differences.append(high.mean() - low.mean())
        for name, left in (("magnet", low), ("clustr", high)):
            row = {
                "row": f"{name}-short", "method": name, "seed": seed, "n": 1000, "clean": 0.9, "sound": 0.2,
                "paper": {"pgd20": float(left.mean())}, "gradient_passes": {"2_train": 1_000_000},
            }  # fmt: skip
            (tmp_path / f"{name}-short-{seed}.json").write_text(json.dumps(row))
    first, *others = tables.claims().splitlines()[2:]
    assert "ClusTR above Magnet" in first and "| holds |" in first and "| equal within 0.3 |" in first
    assert "| 1.00 |" in first
    assert all("not run" in line for line in others)
    value, lowest, highest = tables.difference("clustr-short", "magnet-short", "pgd20")
    assert lowest < value < highest and value == pytest.approx(np.mean(differences))
    assert tables.difference("magnet-short", "clustr-short", "pgd20")[2] < 0
    assert tables.verdict(-0.2, -0.1) == "does not hold"
    assert tables.verdict(-0.0038, 0.0038) == "equal within 0.4"  # none of 1,000 images in both rows
    assert tables.verdict(-0.02, 0.0038) == tables.verdict(-0.0038, 0.02) == "undecided"
    np.savez(tmp_path / "magnet-short-1.npz", ids=ids[::-1], pgd20=low, sound=low)
    with pytest.raises(ValueError, match="same images"):
        tables.difference("clustr-short", "magnet-short", "pgd20")
    np.savez(tmp_path / "magnet-short-1.npz", ids=ids, pgd20=low, sound=low)
    claimed = "83.1 / 23.7 / 22.5"  # of a whole training, not of a short one
    assert claimed not in tables.systems() and "1.00" in tables.systems()
    row = json.loads((tmp_path / "magnet-short-0.json").read_text()) | {"row": "magnet"}
    (tmp_path / "magnet-0.json").write_text(json.dumps(row))
    assert tables.systems().count(claimed) == 1
