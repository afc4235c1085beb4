"""The notebooks of examples/: each pair agrees, and each runs from an empty folder."""

import importlib.util
import re

import nbformat
import pytest

from marks import in_ci
from runs import ROOT

# tools of Jupyter and their sockets
pytestmark = pytest.mark.filterwarnings("ignore")

_SPEC = importlib.util.spec_from_file_location("notebooks", ROOT / "examples" / "notebooks.py")
assert _SPEC is not None and _SPEC.loader is not None
notebooks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(notebooks)

MADE_BY = "make notebooks"
# What each prints in the end, when all went well.
SAYS = {
    "attack_a_model": "robust accuracy",
    "train_clustr": "sound-",
    "certify": "median radius",
    "bring_your_own_model": "rows: made for",
    "judge_any_model": "No verdict: the figure is an upper bound only",
}


def stored(name):
    return nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_every_notebook_is_listed():
    found = {path.stem for path in (ROOT / "examples").glob("*.ipynb")}
    assert found == set(notebooks.NAMES) == set(SAYS)


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_pair_agrees(name):
    assert cells(stored(name)) == cells(notebooks.source(name)), f"{name}.ipynb is old: {MADE_BY}"


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_outputs_are_stored(name):
    """GitHub shows them; small, whole, without errors and without paths of a machine."""
    notebook, path = stored(name), ROOT / "examples" / f"{name}.ipynb"
    nbformat.validate(notebook)
    assert path.stat().st_size < 300_000
    assert SAYS[name] in notebooks.text(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not re.search(r"(?<![\w.:/])/(tmp|home|root|work|Users)/", notebooks.text(notebook))


@pytest.mark.slow
@pytest.mark.parametrize("name", in_ci(notebooks.NAMES, "bring_your_own_model"))
def test_runs(name, tmp_path):
    assert SAYS[name] in notebooks.text(notebooks.execute(name, tmp_path))
