"""experiments/beyond.py: rows of equal passes and equal numbers of recipes, one dry row from end to end."""

import json

import numpy as np
import pytest

from clustr_jax.evaluation import intervals
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import Settings
from clustr_jax.stages import configuration, refusals
from experiment_modules import imported
from linear_problems import get_config


@pytest.fixture(scope="module")
def experiments():
    with imported("beyond", "beyond_rows", "beyond_tables") as modules:
        yield modules


@pytest.fixture
def rows(experiments):
    return experiments["beyond_rows"]


def test_as_many_recipes_of_each_and_no_two_alike(rows):
    counts = {method: len(recipes) for method, recipes in rows.RECIPES.items()}
    assert set(counts.values()) == {12}
    for recipes in rows.RECIPES.values():
        assert len({json.dumps(r, sort_keys=True) for r in recipes}) == len(recipes)
        # while a run is young its average forgets faster than it is told to, and longer ones are the same
        averages = [r["train.ema"] for r in recipes if "train.ema" in r]
        assert all(ema < (1 + 780) / (10 + 780) for ema in averages)  # the shortest: 780 steps
    assert rows.names(2) == [f"{m}-{i}" for i in (1, 2) for m in rows.RECIPES]


def test_rows_are_of_equal_passes_and_can_run(rows):
    """Within 5 % by the definition of each method's step; run.py accepts every setting."""
    for scale in ("tune", "quarter", "half", "fast", "resnet"):
        for name in rows.names(12):
            method, _ = rows.row(name)
            changes = rows.settings(name, scale)
            spent = changes["train.epochs"] * rows.gradients(method, changes)
            assert abs(spent - rows.SCALES[scale].passes) <= 0.05 * rows.SCALES[scale].passes
            config = get_config(f"{method},fast", "cifar10", **changes)  # locked: each name is a setting
            known = Settings.of(configuration.resolve(config))
            refusals.check_terms(known.training.train)
            refusals.check_magnet(known.training.magnet)
            refusals.check_recipe("train", known.recipe)


def test_all_that_is_not_in_a_recipe_is_the_same(rows):
    """Network, images, optimiser, batch, average, radius: of the first recipes of all methods."""
    kept = {}
    for method in rows.RECIPES:
        changes = rows.settings(f"{method}-1", "half")
        config = get_config(f"{method},fast", "cifar10", **changes)
        recipe = {k: config.train[k] for k in ("optimizer", "lr", "weight_decay", "schedule", "batch_size",
                                               "momentum", "nesterov", "ema", "awp", "milestones",
                                               "norm_bias_rate", "lookahead", "replays")}  # fmt: skip
        share = round(config.train.eps_ramp / config.train.epochs, 3)
        kept[method] = (config.model.to_dict(), config.data.to_dict(), recipe, config.train.attack.eps, share)
    assert all(value == kept["clustr_at"] for value in kept.values())


@pytest.mark.parametrize("name", ["clustr_at", "clustr_at-0", "clustr_at-13", "nominal-1", "clustr_at-x"])
def test_rows_that_there_are_not(rows, name):
    with pytest.raises(UserError, match="known: clustr_at-1 to -12"):
        rows.row(name)


def test_passes_that_no_epochs_make(rows):
    with pytest.raises(UserError, match="within 5%"):
        rows.settings("pgd_at-5", "dry")  # ten passes an epoch, of six


def test_command_line(experiments, capsys):
    main = experiments["beyond"].main
    assert main(["--list", "--recipes=1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    for words, told in (
        (["--recipes=13"], "--recipes must be from 1 to 12"),
        (["--only=nothing-1"], "there is no row"),
        (["--final", "--only=nominal"], "--only: unknown"),
        (["--final", "--recipe=trades-1", "--attacked=0"], "--attacked >= 1"),
    ):
        assert main(words) == 2
        assert told in capsys.readouterr().err


def finished(folder, row, seed, robust, ids, screened=False, **more):
    """A row's two files."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "row": row, "method": row.rpartition("-")[0], "settings": {"train.lr": 0.1}, "seed": seed,
        "n": len(ids),
        "on": "test", "clean": 0.5, "robust": float(np.mean(robust)), "passes_per_image": 60.0,
        "robust_interval": intervals.wilson(int(np.sum(robust)), len(ids)), "training_seconds": 60.0,
        "alarms": [], "judgement": {"failed": []},
    }  # fmt: skip
    (folder / f"{row}-{seed}.json").write_text(json.dumps(found | more))
    outcomes = {"ids": np.asarray(ids), "robust": np.asarray(robust)}
    screen = (
        {"screen_ids": outcomes["ids"][::2], "screen_robust": ~outcomes["robust"][::2]} if screened else {}
    )
    np.savez(folder / f"{row}-{seed}.npz", **outcomes, **screen)


def test_differences_are_those_of_the_same_images(experiments, tmp_path, rng):
    """Of one seed Newcombe's interval over the images that both have; of two an image is one observation."""
    tables = experiments["beyond_tables"]
    ours, theirs = rng.random((2, 200)) < 0.5, rng.random((2, 200)) < 0.4
    finished(tmp_path / "half", "clustr_at-1", 0, ours[0], np.arange(200))
    finished(tmp_path / "half", "linear_at-1", 0, theirs[0][50:], np.arange(50, 200))
    (line,) = tables.differences(tmp_path / "half").splitlines()[2:]
    value, low, high = intervals.paired(ours[0][50:], theirs[0][50:])
    points = intervals.points
    assert f"| {points(value)} | {points(low)}, {points(high)} |" in line and "| 150 | 1 |" in line
    finished(tmp_path / "half", "linear_at-1", 0, theirs[0], np.arange(200))
    for name, found in (("clustr_at-1", ours), ("linear_at-1", theirs)):
        finished(tmp_path / "half", name, 1, found[1], np.arange(200))
    (line,) = tables.differences(tmp_path / "half").splitlines()[2:]
    by_image = np.mean(ours.astype(float) - theirs.astype(float), axis=0)
    half = 1.96 * np.std(by_image, ddof=1) / np.sqrt(200)
    assert f"{points(by_image.mean() - half)}, {points(by_image.mean() + half)} |" in line
    assert "| 200 | 2 |" in line and "AutoAttack" in line
    for name, found in (("clustr_at-1", ours), ("linear_at-1", theirs)):
        finished(tmp_path / "half", name, 1, found[1], np.arange(200), screened=True)
    _, line = tables.differences(tmp_path / "half").splitlines()[2:]
    value, low, high = intervals.paired(~ours[1][::2], ~theirs[1][::2])
    assert f"PMA | {points(value)} | {points(low)}, {points(high)} |" in line and "| 100 | 1 |" in line
    assert "linear_at-1" in tables.tables(tmp_path)


def test_best_is_by_held_out_images(experiments, tmp_path, monkeypatch):
    """And of equal ones the one that was tried first."""
    beyond = experiments["beyond"]
    monkeypatch.setattr(beyond, "ROOT", tmp_path)
    folder = tmp_path / beyond.RESULTS / "tune"
    with pytest.raises(UserError, match="has not been tuned"):
        beyond.best("trades")
    for number, robust in ((1, [True, False]), (3, [True, True]), (12, [True, True])):
        finished(folder, f"trades-{number}", 0, robust, [0, 1])
    assert beyond.best("trades") == "trades-3"
    finished(folder, "pgd_at-1", 0, [True, True], [0, 1])
    with pytest.raises(UserError, match="trades 3, pgd_at 1; run --recipes=3 first"):
        beyond.check_budgets(["trades", "pgd_at"])
    beyond.check_budgets(["trades"])


def test_rows_are_made_again_for_other_images(experiments):
    """And never mistaken for figures of another kind."""
    asked = experiments["beyond"].asked
    found = {"row": "trades-1", "scale": "half", "on": "test", "n": 1000, "screen": {"n": 10_000}}
    sizes = {"attacked": 1000, "screened": 10_000, "judged": 0}
    assert asked(found, sizes) and asked(found, sizes | {"screened": 50_000})
    assert not asked(found, sizes | {"attacked": 10_000}) and not asked(found, sizes | {"judged": 200})
    with pytest.raises(UserError, match="are of images test, not held out"):
        asked(found, None)
    with pytest.raises(UserError, match="are of images held out, not test"):
        asked(found | {"on": "held out"}, sizes)
    assert asked(found | {"on": "held out"}, None)


@pytest.mark.slow
@pytest.mark.needs_cifar10
@pytest.mark.parametrize("name", ["clustr_at-1", "fast_at-1"])
def test_a_dry_row_from_end_to_end(experiments, tmp_path, monkeypatch, name):
    """Trained by run.py, attacked, judged, written; asked again, nothing is done."""
    beyond = experiments["beyond"]
    monkeypatch.setattr(beyond, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(beyond, "RESULTS", tmp_path / "results")
    words = ["--final", "--scale=dry", f"--recipe={name}", "--attacked=10", "--judged=0", "--screened=20"]
    assert beyond.main(words) == 0
    target = tmp_path / "results" / "dry" / f"{name}-0.json"
    found = json.loads(target.read_text())
    assert found["passes_per_image"] == pytest.approx(6, rel=0.2) and found["n"] == 10
    with np.load(target.with_suffix(".npz")) as outcomes:
        assert outcomes["robust"].mean() == found["robust"] and len(outcomes["ids"]) == 10
        assert outcomes["screen_robust"].mean() == found["screen"]["robust"] and found["screen"]["n"] == 20
    before = target.stat().st_mtime_ns
    assert beyond.main(words) == 0 and target.stat().st_mtime_ns == before
    assert beyond.main(["--scale=dry", f"--only={name.replace('at-1', 'at-2')}"]) == 0  # tuning
    assert beyond.main(["--scale=dry", f"--only={name}"]) == 2  # of a row that is final there
    assert name in beyond.beyond_tables.tables(tmp_path / "results")
