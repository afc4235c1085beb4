"""The commands of experiments/campaign.py: configs that exist, methods at equal passes."""

import importlib
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from clustr_jax.evaluation import intervals
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import Recipe, TrainingSettings
from clustr_jax.stages import configuration
from clustr_jax.training import cost
from clustr_jax.training.objectives import METHODS
from configs import cifar10

ROOT = pathlib.Path(__file__).parents[1]
# ClusTR and QTRADES start from `nominal` and come on top of it.
COMPARED = ("trades", "fast_at", "free_at", "pgd_at", "at_pretrain", "nominal", "magnet", "clustr+half")


@pytest.fixture(scope="module")
def campaign():
    spec = importlib.util.spec_from_file_location("campaign", ROOT / "experiments" / "campaign.py")
    module = sys.modules["campaign"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config_of(monkeypatch):
    """The config that a command line makes."""

    def config_of(arguments):
        argv = ["run.py", *(argument for argument in arguments if argument.startswith("--config"))]
        argv[1] = argv[1].replace("--config=", f"--config={ROOT}/")
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for the overrides
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=values)
        values(argv)
        return configuration.resolve(values.config)

    return config_of


def passes(config):
    """Gradient passes per training image, of both stages."""
    count = config.train.epochs * config.train.replays * gradients(config.method, config)
    warmup = METHODS[config.method].warmup
    return count + (config.warmup.epochs * gradients(warmup, config, config.warmup) if warmup else 0)


def gradients(method, config, recipe=None):
    """Of a step; `recipe`: config.train, unless it is the warm-up's."""
    return cost.gradients(method, TrainingSettings.of(config), Recipe.of(recipe or config.train))


@pytest.mark.parametrize("dataset", ["svhn_cropped", "cifar10", "cifar100"])
def test_methods_take_equal_passes(dataset, campaign, config_of):
    budget = campaign.SCALES[dataset].passes
    for name in campaign.NAMES:
        config = config_of(campaign.run(dataset, name, 1))
        assert config.seed == 1 and config.data.name == dataset, name
        if name in COMPARED:
            assert 0.95 * budget <= passes(config) <= 1.1 * budget, (name, passes(config))
    ours = config_of(campaign.run(dataset, "clustr_trades", 0))
    assert passes(ours) == 0 and ours.init_from.endswith("trades-0/model.safetensors")


@pytest.mark.parametrize("name", ["nominal", "trades"])
def test_kept_weights_are_evaluated_as_they_are(name, campaign, config_of):
    command = campaign.run("cifar10", name, 1, kept=True)
    config, trained = config_of(command), config_of(campaign.run("cifar10", name, 1))
    assert passes(config) == 0 and config.init_from.endswith(f"cifar10/{name}-1/model.safetensors")
    assert config.eval == trained.eval and config.data == trained.data
    assert f"--workdir=runs/campaign/cifar10/{name}-1-kept" in command


def test_other_results_have_names_and_settings_of_their_own(campaign):
    found = campaign.wanted("clustr_qtrades", 0)
    assert set(campaign.MAIN) < set(found) and len(set(map(str, found.values()))) == len(found)
    assert campaign.wanted("clustr_qtrades", 1) == campaign.MAIN
    assert set(campaign.wanted("fast_at", 0)) - set(campaign.MAIN) == {"pgd100"}


@pytest.mark.parametrize(
    ("method", "number"),
    [
        ("nominal", 1),
        ("free_at", 1),
        ("fast_at", 2),
        ("pgd_at", 11),
        ("qtrades", 3),
        ("trades", 12),
        ("magnet", 1),
    ],
)
def test_gradient_passes_are_those_of_the_definitions(method, number):
    """PGD-AT: ten of the input and one of the parameters; TRADES: ten and two."""
    assert gradients(method, cifar10.get_config(method)) == number


def test_gradient_passes_of_a_stage_and_of_awp():
    """AWP differentiates twice; a stage is counted by its own recipe."""
    config = cifar10.get_config("clustr_trades")
    config.train.awp, config.train.attack.steps, config.train.attack_bn = 0.005, 10, "batch"
    assert gradients("clustr_trades", config) == 14 and gradients("pgd_at", config) == 12
    assert gradients("trades", config, config.warmup) == 12
    passes = cost.passes("trades", TrainingSettings.of(config), Recipe.of(config.train))
    assert passes["forward_train"] == 1  # the target, in a pass of its own
    config.warmup.replays = 4
    assert gradients("nominal", config, config.warmup) == 1 and gradients("trades", config) == 14


@pytest.fixture
def tables(campaign, tmp_path, monkeypatch):
    """The tables of what a test writes under tmp_path."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    module = importlib.import_module("result_tables")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def cells(table, row=0):
    """The cells of one row of a Markdown table."""
    return [cell.strip() for cell in table.splitlines()[2 + row].strip("|").split("|")]


def test_effect_is_a_difference_with_newcombes_interval(tables, tmp_path):
    """His example: 56 of 70 against 48 of 80 is +20.0 points, 95 % interval 5.2 to 33.4.

    Of the paper's protocol PGD^20 counts, and not what PGD^100 leaves as well.
    """
    for name, right, n in (("clustr_qtrades", 56, 70), ("qtrades", 48, 80)):
        folder = tmp_path / "campaign" / "cifar10" / f"{name}-1"
        folder.mkdir(parents=True)
        found = {"seed": 1, "robust": right / n, "robust_interval": intervals.wilson(right, n)}
        (folder / "sound.json").write_text(json.dumps(found))
        other = {"seed": 1, "n": n, "attacks": {"pgd20": right / n}, "robust": 0.1, "robust_interval": [0, 1]}
        (folder / "paper.json").write_text(json.dumps(other))
    expected = ["80.0", "60.0", "+20.0 [+5.2, +33.4]"]
    assert cells(tables.effect()) == ["CIFAR-10, seed 1", *expected, *expected]


def test_training_times_are_passes_times_seconds(tables, tmp_path):
    """TRADES: 4 passes of 1 ms an image; Magnet: 2 of 3 ms, so 1.5 times as long."""
    (tmp_path / "benchmarks").mkdir()
    passes = dict.fromkeys(others := ("free_at", "qtrades", "clustr", "clustr_qtrades"), 1e6)
    passes |= {"trades": 4e6, "magnet": 2e6}
    rows = [{"dataset": "cifar10", "method": name, "gradient_passes": n} for name, n in passes.items()]
    rows += [{**row, "dataset": "svhn", "gradient_passes": 2 * row["gradient_passes"]} for row in rows]
    (tmp_path / "fullsize.json").write_text(json.dumps({"rows": rows}))
    step = {"batch": 100, "passes": {"parameter_gradient": 2, "forward_eval": 1}}
    steps = [step | {"method": name, "step_seconds": 0.2} for name in (*others, "trades")]
    steps.append(step | {"method": "magnet", "step_seconds": 0.6})
    (tmp_path / "benchmarks" / "steps.json").write_text(json.dumps({"rows": steps}))
    found = tables.times().splitlines()
    # 106 / 534 minutes in the paper on CIFAR-10
    assert "| Magnet | 3.00 | 2.0 | 1.50 | 0.20 | 4.0 | 1.50 | 0.20 |" in found
    assert "| TRADES | 1.00 | 4.0 | 1.00 | 1.00 | 8.0 | 1.00 | 1.00 |" in found


def test_warm_start_counts_epochs_of_both_stages(tables, tmp_path):
    """Magnet's best, 80 %, comes in its fourth epoch; with a warm-up of two in the first after that."""
    curves = {
        "magnet": {"2_train": [0.2, 0.5, 0.75, 0.8]},
        "clustr+half": {"1_warmup": [0.7, 0.9], "2_train": [0.85, 0.7]},
    }
    for name, stages in curves.items():
        folder = tmp_path / "campaign" / "cifar10" / f"{name}-0"
        folder.mkdir(parents=True)
        training = {stage: {"val_accuracy": curve, "epochs": len(curve)} for stage, curve in stages.items()}
        (folder / "training.json").write_text(json.dumps({"seed": 0, "stages": training}))
    row = cells(tables.warm_start())
    assert row == ["CIFAR-10, seed 0", "80.0", "3", "3", "4", "3", "2", "80.0", "70.0"]


def test_picture_shows_the_mean_of_complete_seeds(tables, tmp_path):
    """Seed 1 has no sound result yet: its figure by the paper's protocol alone is left out."""
    for seed, found in ((0, {"paper": 0.2, "sound": 0.1}), (1, {"paper": 0.9})):
        folder = tmp_path / "campaign" / "cifar10" / f"trades-{seed}"
        folder.mkdir(parents=True)
        for what, robust in found.items():
            content = {"seed": seed, "n": 10, "robust": robust, "attacks": {"pgd20": robust}}
            (folder / f"{what}.json").write_text(json.dumps(content))
    picture = importlib.import_module("picture")
    assert picture.points("cifar10") == [("trades", 10.0, 20.0)]
    (axes,) = picture.draw().axes
    assert axes.get_title() == "CIFAR-10" and [text.get_text() for text in axes.get_yticklabels()] == [
        "TRADES"
    ]
    (line,) = axes.lines
    assert line.get_xdata().tolist() == [10.0, 20.0]


def test_pairs_and_passes_are_counted_by_hand(tables, tmp_path):
    """Ours survives on three images of every four, TRADES on two of them: +25 points, at equal passes."""
    robust = {"trades": [1, 1, 0, 0], "clustr_trades": [1, 1, 1, 0], "clustr_trades+kmeans": [1, 1, 0, 0]}

    def write(seed):
        for name, outcome in robust.items():
            folder = tmp_path / "campaign" / "cifar10" / f"{name}-{seed}"
            folder.mkdir(parents=True)
            np.savez(folder / "sound.npz", ids=np.arange(40), robust=np.asarray(outcome * 10, bool))
            count = 90 if name == "trades" else 0
            training = {"seed": seed, "stages": {"2_train": {"gradient_passes": count}}}
            (folder / "training.json").write_text(json.dumps(training))

    write(0)
    half = 1.96 * np.sqrt(0.25 * 0.75 * 40 / 39 / 40)  # a quarter of the differences are 1
    interval = f"+25.0 [{25 - 100 * half:+.1f}, {25 + 100 * half:+.1f}]"
    found = tables.paired()
    assert cells(found) == ["clustr_trades, linear head, CIFAR-10", "+25.0", interval, "40", "1.00"]
    # no difference in n pairs: less than 3 / n of all pairs differ
    assert cells(found, 1)[2:4] == ["+0.0 [-7.5, +7.5]", "40"]
    # a second seed that errs on the same images says nothing new of the images
    write(1)
    assert cells(tables.paired())[1:4] == ["+25.0, +25.0", interval, "40"]


def test_sets_of_other_sizes_are_refused(campaign, monkeypatch):
    """Those of a user with the official sets are other images than the rows that are there."""
    sizes = dict(zip(("train", "test"), campaign.SCALES["cifar10"].images, strict=True))
    monkeypatch.setattr(campaign.data, "load_split", lambda name, part: range(sizes[part]))
    campaign.check_images("cifar10")
    with pytest.raises(UserError, match=r"svhn_cropped is prepared with \(50000, 10000\)"):
        campaign.check_images("svhn_cropped")


def test_a_run_that_failed_is_the_exit_code(campaign, tmp_path, monkeypatch):
    """And the next one is run all the same."""
    begun = []
    monkeypatch.setattr(campaign, "ROOT", tmp_path)
    monkeypatch.setattr(campaign, "check_images", lambda dataset: None)
    monkeypatch.setattr(campaign, "start", lambda command: begun.append(command) is not None)
    monkeypatch.setattr(sys, "argv", ["campaign.py", "--runs=nominal,fast_at"])
    with pytest.raises(SystemExit, match="did not end well: nominal, fast_at"):
        campaign.main()
    assert len(begun) == 2


# Takes a second to save when it is told to stop.
SAVES = """
import pathlib, signal, sys, time

def stop(*_):
    time.sleep(1)
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(75)

signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_experiment_lets_its_run_save(number, tmp_path):
    """Ctrl-C goes to both of them, SIGTERM to the experiment alone."""
    program = "import sys, child; sys.exit(child.run(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "-c", SAVES, str(tmp_path / "work")],
        cwd=ROOT / "experiments",
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        assert process.wait(30) == 75
    assert (tmp_path / "work").read_text() == "saved"


def test_a_set_leaves_out_what_it_cannot_run(campaign, capsys, monkeypatch):
    for dataset, count in (("cifar10", 16), ("cifar100", 15)):
        monkeypatch.setattr(sys, "argv", ["campaign.py", f"--dataset={dataset}", "--list"])
        campaign.main()
        assert len(capsys.readouterr().out.splitlines()) == count
