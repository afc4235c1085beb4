"""From examples/NAME.py to NAME.ipynb, outputs included: python examples/notebooks.py [NAME ...].

The .py files (jupytext's percent format) are what is edited; the .ipynb beside each is generated, for
GitHub and for those who have no jupytext. Each is executed in an empty folder that looks like a clone,
so that it is seen to need nothing else.
"""

import os
import pathlib
import sys
import tempfile

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = pathlib.Path(__file__).resolve().parent
NAMES = ("attack_a_model", "train_clustr", "certify", "bring_your_own_model", "judge_any_model")
# For one cell: none takes a minute on a free core.
_TIMEOUT = 900


def source(name: str) -> nbformat.NotebookNode:
    """The notebook of examples/NAME.py, without outputs; the same text gives the same bytes."""
    notebook = jupytext.read(HERE / f"{name}.py")
    notebook.metadata.pop("jupytext", None)
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", nbformat.NotebookNode()
    return notebook


def execute(name: str, folder: pathlib.Path) -> nbformat.NotebookNode:
    """Run it in folder/examples, `folder` being empty; raises where a cell raises."""
    (folder / "examples").mkdir()
    (folder / "configs").symlink_to(HERE.parent / "configs")
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # this clone's package
    notebook = source(name)
    place = {"metadata": {"path": str(folder / "examples")}}
    NotebookClient(
        notebook, timeout=_TIMEOUT, kernel_name="python3", record_timing=False, resources=place
    ).execute()
    return notebook


def text(notebook: nbformat.NotebookNode) -> str:
    """All that its cells printed, without pictures."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs
    )


def main(names: list[str]) -> None:
    """Execute these, or all, and write their .ipynb."""
    for name in names or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(name, pathlib.Path(folder))
            if folder in text(notebook) or str(HERE) in text(notebook):
                sys.exit(f"{name} prints a path of this machine")
        nbformat.write(notebook, HERE / f"{name}.ipynb")
        print(f"{name}.ipynb: {(HERE / f'{name}.ipynb').stat().st_size / 1000:.0f} kB")
        print(text(notebook))


if __name__ == "__main__":
    main(sys.argv[1:])
