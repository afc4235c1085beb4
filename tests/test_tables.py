"""The tables of docs/ and of the README say what results/ says."""

import importlib
import importlib.util
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "results").glob("*/README.md")),
]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "experiments" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "draw"), [("protocols", "draw"), ("levers", "draw_curves")])
def test_the_pictures_are_those_of_the_results(tmp_path, monkeypatch, name, draw):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    picture = importlib.import_module("picture")
    picture.save(tmp_path / "again.svg", getattr(picture, draw))
    kept = (picture.FIGURES / f"{name}.svg").read_bytes()
    assert (tmp_path / "again.svg").read_bytes() == kept, "run python experiments/picture.py"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_are_those_of_the_results(path, tables):
    text = path.read_text()
    assert tables.rendered(text) == text, "run python experiments/tables.py"
    assert text.count("<!-- table:") == text.count("<!-- end -->")


def test_the_verdict_card_is_that_of_the_results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    card = importlib.import_module("verdict_card")
    card.save(tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == card.OUT.read_bytes(), (
        "run python experiments/verdict_card.py"
    )
    robust = [
        json.loads((ROOT / "results" / "digits" / f"{n}.json").read_text())["robust"]
        for n in ("paper", "sound")
    ]
    alternative = re.findall(r"!\[([^\]]*)\]\(docs/figures/verdict.svg\)", (ROOT / "README.md").read_text())[
        0
    ]
    assert re.findall(r"\d+\.\d+", alternative) == [f"{100 * value:.2f}" for value in robust]


def test_versions_are_never_mixed(tables, tmp_path, monkeypatch):
    found = tables.result_tables
    found.check_versions()
    for name, protocol in (("a/quirks", "quirks-2"), ("b/quirks", "quirks-3"), ("a/sound", "sound-2-quick")):
        (tmp_path / "campaign" / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "campaign" / "set" / f"{name}.json").write_text(json.dumps({"protocol": protocol}))
    monkeypatch.setattr(found, "RESULTS", tmp_path)
    found.check_versions()
    (tmp_path / "campaign" / "set" / "b" / "sound.json").write_text('{"protocol": "sound-1"}')
    with pytest.raises(ValueError, match=r"b/sound.json is sound-1, others sound-2"):
        found.check_versions()
    for folder, version in (("a", "0.10.2"), ("b", "0.12.0.1")):
        content = {"protocol": "clean-1", "versions": {"jax": version}}
        (tmp_path / "campaign" / "set" / folder / "clean.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"b/clean.json is of jax 0.12.0.1, others of jax 0.10.2"):
        found.check_versions()


def test_every_table_stands_somewhere(tables):
    """A table that no document shows is a figure that nobody reads; a marker without one raises."""
    shown = set(re.findall(r"<!-- table: ([\w-]+) -->", "".join(path.read_text() for path in DOCUMENTS)))
    assert shown == set(tables.TABLES)


def test_a_changed_figure_is_noticed(tables):
    for path in DOCUMENTS:
        text = path.read_text()
        for marked in re.findall(r"<!-- table: [\w-]+ -->\n(.*?)<!-- end -->", text, re.DOTALL):
            figure = re.findall(r"\d+(?:\.\d+)?", marked)[-1]
            changed = text.replace(marked, marked.replace(figure, figure + "1"))
            assert tables.rendered(changed) == text
