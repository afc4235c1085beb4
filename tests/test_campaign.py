"""The commands of experiments/campaign.py: configs that exist, methods at equal passes."""

import importlib
import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from clustr_jax import cost, settings
from clustr_jax.objectives import METHODS
from configs import cifar10

ROOT = pathlib.Path(__file__).parents[1]
# ClusTR and QTRADES start from `nominal` and come on top of it.
COMPARED = ("trades", "fast_at", "free_at", "pgd_at", "at_pretrain", "nominal", "magnet")


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
        return settings.resolve(values.config)

    return config_of


def passes(config):
    """Gradient passes per training image, of both stages."""
    count = config.train.epochs * config.train.replays * cost.gradients(config.method, config)
    warmup = METHODS[config.method].warmup
    return count + (config.warmup.epochs * cost.gradients(warmup, config) if warmup else 0)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections
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


def test_other_results_have_names_and_settings_of_their_own(campaign):
    found = campaign.wanted("clustr_qtrades", 0)
    assert set(campaign.MAIN) < set(found) and len(set(map(str, found.values()))) == len(found)
    assert campaign.wanted("clustr_qtrades", 1) == campaign.MAIN


@pytest.mark.parametrize(
    ("method", "gradients"),
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
def test_gradient_passes_are_those_of_the_definitions(method, gradients):
    """PGD-AT: ten of the input and one of the parameters; TRADES: ten and two."""
    assert cost.gradients(method, cifar10.get_config(method)) == gradients


def test_pairs_and_passes_are_counted_by_hand(campaign, tmp_path, monkeypatch):
    """Ours survives on three images of four, TRADES on two of them: +25 points, at equal passes."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    tables = importlib.import_module("result_tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for name, robust, count in (("trades", [1, 1, 0, 0], 90), ("clustr_trades", [1, 1, 1, 0], 0)):
        folder = tmp_path / "campaign" / "cifar10" / f"{name}-0"
        folder.mkdir(parents=True)
        np.savez(folder / "sound.npz", ids=np.arange(4), robust=np.asarray(robust, bool))
        training = {"seed": 0, "stages": {"2_train": {"gradient_passes": count}}}
        (folder / "training.json").write_text(json.dumps(training))
    row = tables.paired().splitlines()[2]
    half = 1.96 * 0.5 / 2  # the differences 0, 0, 1, 0 have the standard deviation 0.5
    assert row == f"| CIFAR-10 | +25.0 | +25.0 [{25 - 100 * half:+.1f}, {25 + 100 * half:+.1f}] | 4 | 1.00 |"
