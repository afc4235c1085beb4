"""The tables of docs/ and of the README say what results/ says."""

import importlib
import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "experiments" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_that_of_the_results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    picture = importlib.import_module("picture")
    picture.save(tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == picture.OUT.read_bytes(), (
        "run python experiments/picture.py"
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_tables_are_those_of_the_results(path, tables):
    text = path.read_text()
    assert tables.rendered(text) == text, "run python experiments/tables.py"
    assert text.count("<!-- table:") == text.count("<!-- end -->")


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
