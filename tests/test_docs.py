"""docs/: what the pages name exists, and conf.py's own conversions."""

import importlib
import importlib.util
import re

import pytest

from clustr_jax import Classifier, Clusters
from clustr_jax.storage import results
from configs import common
from runs import ROOT

GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def conf():
    spec = importlib.util.spec_from_file_location("docs_conf", ROOT / "docs" / "conf.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exists(name):
    """Whether `name` is a setting, a method, or an attribute of a module or class of the package."""
    first, _, rest = name.partition(".")
    setting = common.base("digits")
    for part in name.split("."):
        setting = setting[part] if hasattr(setting, "keys") and part in setting else None
    if setting is not None:
        return True
    if first in ("Classifier", "Clusters"):
        owner = {"Classifier": Classifier, "Clusters": Clusters}[first]
        return hasattr(owner, rest) or rest in owner.__dataclass_fields__
    module = f"clustr_jax.{first}"
    return importlib.util.find_spec(module) is not None and hasattr(importlib.import_module(module), rest)


def test_exists():
    assert exists("train.attack.eps") and exists("Clusters.variance") and exists("losses.kl")
    assert not exists("train.attack.epsilon") and not exists("Clusters.sigma") and not exists("losses.magnet")


def test_names_of_the_glossary_exist():
    """Everything with a dot in backticks, files aside."""
    names = set(re.findall(r"`([A-Za-z]\w*(?:\.\w+)+)`", GLOSSARY))
    names -= {name for name in names if name.endswith(".py")}
    assert len(names) > 30
    assert {name for name in names if not exists(name)} == set()
    methods = re.findall(r"methods? ((?:`\w+`(?:, )?)+)", GLOSSARY)
    mentioned = {name for group in methods for name in re.findall(r"`(\w+)`", group)}
    assert mentioned and mentioned <= set(common.METHODS)


def test_versions_are_the_current_ones():
    for name in ("paper", "sound"):
        assert f"`{results.PROTOCOLS[name]}`" in GLOSSARY


def test_links_of_pages():
    """Relative links are files, as they have to be on GitHub."""
    for page in [page for folder in (".", "api") for page in (ROOT / "docs" / folder).glob("*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" in link:
                continue
            assert (page.parent / link).resolve().exists(), f"{page.name}: {link}"


def test_pictures_of_the_gallery(monkeypatch):
    """Each has a sentence with a link to the page that explains it; those of results are drawn from them."""
    text = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    pictures = re.findall(r"^!\[([^\]]+)\]\((figures/[^)]+)\)\n\n([^\n]*(?:\n[^\n]+)*)", text, re.MULTILINE)
    assert len(pictures) == text.count("![") >= 7
    for alt, name, said in pictures:
        assert (ROOT / "docs" / name).is_file() and len(alt) > 20 and "](" in said
        for page, anchor in re.findall(r"\]\((\w+\.md)(?:#([\w-]+))?\)", said):
            headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
            assert not anchor or anchor in anchors
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    drawn = importlib.import_module("gallery").drawings()
    shown = {name.removeprefix("figures/"): alt for alt, name, _ in pictures}
    assert {name for name in shown if name.startswith("digits-")} == set(drawn)
    for name, drawing in drawn.items():
        alt = re.findall(r"[\d.]+(?= %)", shown[name])
        assert set(alt) <= set(re.findall(r"[\d.]+(?= %)", drawing.alt)), name
        there = (ROOT / "docs/figures" / name).read_bytes()
        assert points(there) == points(drawing.svg), f"{name}: python experiments/gallery.py"


def points(svg):
    """What a drawing says, and where its marks are, to a tenth of a pixel."""
    said = re.findall(rb"<text[^>]*>([^<]*)", svg)
    return said, re.findall(rb'<use [^>]*x="(\d+\.?\d?)\d*" y="(\d+\.?\d?)', svg)


def test_docstrings_become_restructured_text(conf):
    lines = ["|a|^2 of `x` and y_", "", "    code = 1 * 2", "    more", "", ">>> f(*x)", "[1 *]", "", "End."]
    assert conf.restructured(lines) == [
        r"\|a\|^2 of ``x`` and y\_", "", "::", "", "    code = 1 * 2", "    more", "", ">>> f(*x)",
        "[1 *]", "", "End.",
    ]  # fmt: skip


def test_sections_of_docstrings_keep_their_form(conf):
    args = ["Args:", "    step_size: of `x_y` and a_b,", "        2 * a.", ""]
    lines = ["Text.", "", *args, "Returns:", "    [B] x_adv", "", "More:", "", ">>> f(*x)"]
    assert conf.restructured(lines) == [
        "Text.", "", "Args:", r"    step_size: of ``x_y`` and a\_b,", r"        2 \* a.", "", "Returns:",
        r"    [B] x\_adv", "", "More:", "", ">>> f(*x)",
    ]  # fmt: skip


def test_links_out_of_docs(conf, monkeypatch):
    place = conf.pathlib.PurePath("")
    assert conf.links("[README.md](../README.md)", place) == "{download}`README.md </../README.md>`"
    assert conf.links("[`a` b](../run.py#c)", place) == "{download}`a b </../run.py>`"
    assert conf.links("[tests](../tests)", place) == "`tests`"  # a folder
    assert conf.links("[the glossary](glossary.md)", place) == "[the glossary](glossary.md)"
    assert conf.links("[n](../examples/certify.ipynb)", place) == "[n](/tutorials/certify.md)"
    monkeypatch.setattr(conf, "SOURCE", "https://example.org/blob/main")
    assert conf.links("[a](../README.md)", place) == "[a](https://example.org/blob/main/README.md)"


def test_notebooks_open_in_colab_where_the_source_is_on_github(conf, monkeypatch, tmp_path):
    cell = {"cell_type": "markdown", "source": "# Title", "metadata": {}}
    assert "colab" not in conf.page({"cells": [cell]}, "certify", tmp_path)
    monkeypatch.setattr(conf, "SOURCE", "https://github.com/me/it/blob/main")
    said = conf.page({"cells": [cell]}, "certify", tmp_path)
    assert "(https://colab.research.google.com/github/me/it/blob/main/examples/certify.ipynb)" in said
    assert '"clustr_jax[all] @ git+https://github.com/me/it@main"' in said


def test_the_source_is_known_on_github(conf):
    there = {"GITHUB_REPOSITORY": "me/it", "GITHUB_REF_NAME": "v1"}
    assert conf.source({}) == ""
    assert conf.source(there) == "https://github.com/me/it/blob/v1"
    assert conf.source(there | {"DOCS_SOURCE": "https://example.org"}) == "https://example.org"
