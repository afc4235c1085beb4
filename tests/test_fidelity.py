"""The switches: presets, overrides, and the table in the docs."""

import importlib
import pathlib

import pytest
from ml_collections import ConfigDict

from clustr_jax import UserError
from clustr_jax.reference import switches
from clustr_jax.stages import configuration
from clustr_jax.training.objectives import METHODS
from configs import cifar10, digits


def config(**values):
    return ConfigDict({"preset": "", **dict.fromkeys(switches.SWITCHES, ""), **values})


def test_the_default_is_ours_throughout():
    assert switches.resolve(config()) == {name: s.ours for name, s in switches.SWITCHES.items()}


def test_a_method_has_values_of_its_own_which_the_authors_go_before():
    own = {method for switch in switches.SWITCHES.values() for method in switch.of}
    assert own == {"clustr_qtrades"} <= set(METHODS)
    assert switches.resolve(config(), "clustr_qtrades")["epoch_statistics"] == "clean"
    assert switches.resolve(config(epoch_statistics="keep"), "clustr_qtrades")["epoch_statistics"] == "keep"
    theirs = switches.resolve(config(preset="paper_code"), "clustr_qtrades")
    assert theirs["epoch_statistics"] == "leak_test"
    for method in set(METHODS) - own:
        assert switches.resolve(config(), method) == switches.resolve(config())
    for data in (cifar10, digits):
        found = configuration.resolve(data.get_config("clustr_qtrades")).fidelity
        assert found.epoch_statistics == "clean"


def test_paper_code_sets_every_switch_and_one_can_be_turned_back():
    found = switches.resolve(config(preset="paper_code", scores="log"))
    assert found.pop("scores") == "log"
    assert found == {name: s.authors for name, s in switches.SWITCHES.items() if name != "scores"}


@pytest.mark.parametrize(
    ("values", "known"),
    [
        ({"preset": "paper"}, "empty or paper_code"),
        ({"scores": "exponential"}, "must be log or exp"),
        ({"epoch_statistics": "test"}, "must be keep, leak_test or clean"),
    ],
)
def test_unknown_words_are_refused(values, known):
    with pytest.raises(UserError, match=known):
        switches.resolve(config(**values))


@pytest.mark.parametrize(("method", "epochs"), [("nominal", 90), ("clustr_qtrades", 25), ("magnet", 120)])
def test_the_authors_epochs_are_those_of_fine_tuning(method, epochs):
    """A schedule of a method without it, cut short, would end before its rate ever falls."""
    settled = cifar10.get_config(method)
    settled.fidelity.preset = "paper_code"
    assert configuration.resolve(settled).train.epochs == epochs


def test_docs_have_the_table():
    text = (pathlib.Path(__file__).parents[1] / "docs" / "fidelity.md").read_text()
    assert switches.table() in text


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "svhn", "folder", "digits", "toy2d"])
def test_which_form_of_the_consistency_term_each_config_takes(data):
    """clustr_qtrades the authors', but where the settings are ours; other methods the text's."""
    module = importlib.import_module(f"configs.{data}")
    ours = data in ("digits", "toy2d")
    variants = [""] if ours else ["", ",cpu"] + [",fast"] * (data != "folder")
    for variant in variants:
        forms = {
            method: switches.resolve(module.get_config(f"{method}{variant}").fidelity)["scores"]
            for method in ("clustr_qtrades", "clustr", "magnet", "clustr_trades")
        }
        assert forms.pop("clustr_qtrades") == ("log" if ours else "exp")
        assert set(forms.values()) == {"log"}
