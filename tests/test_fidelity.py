"""The switches: presets, overrides, and the table in the docs."""

import pathlib

import pytest
from ml_collections import ConfigDict

from clustr_jax import UserError, fidelity


def config(**values):
    return ConfigDict({"preset": "", **dict.fromkeys(fidelity.SWITCHES, ""), **values})


def test_the_default_is_ours_throughout():
    assert fidelity.resolve(config()) == {name: s.ours for name, s in fidelity.SWITCHES.items()}


def test_paper_code_sets_every_switch_and_one_can_be_turned_back():
    found = fidelity.resolve(config(preset="paper_code", scores="log"))
    assert found.pop("scores") == "log"
    assert found == {name: s.authors for name, s in fidelity.SWITCHES.items() if name != "scores"}


@pytest.mark.parametrize("values", [{"preset": "paper"}, {"scores": "exponential"}])
def test_unknown_words_are_refused(values):
    with pytest.raises(UserError):
        fidelity.resolve(config(**values))


def test_docs_have_the_table():
    text = (pathlib.Path(__file__).parents[1] / "docs" / "fidelity.md").read_text()
    assert fidelity.table() in text
