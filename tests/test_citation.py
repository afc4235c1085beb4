"""CITATION.cff: the fields that its format requires, and what must agree with the package."""

import tomllib

import yaml

import clustr_jax
from runs import ROOT

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def named(author):
    """A person has family-names, an entity a name; nothing else says who it is."""
    return bool(author.get("name")) != bool(author.get("family-names"))


def test_required_fields():
    assert CITATION["cff-version"] == "1.2.0" and CITATION["type"] == "software"
    assert CITATION["message"] and CITATION["title"] and all(map(named, CITATION["authors"]))
    for reference in CITATION["references"]:
        assert reference["type"] and reference["title"] and all(map(named, reference["authors"]))


def test_agrees_with_the_package():
    assert CITATION["version"] == PROJECT["version"] == clustr_jax.__version__
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["title"] == clustr_jax.__name__


def test_cites_the_paper():
    paper = CITATION["references"][0]
    assert paper["title"] == "ClusTR: Clustering Training for Robustness"
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Alfarra", "Pérez", "Bibi", "Thabet", "Arbeláez", "Ghanem"]
    assert paper["url"] == "https://arxiv.org/abs/2006.07682"
