"""The scripts of experiments/ as modules that import each other by their bare names, as they do when run."""

import contextlib
import importlib
import pathlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "experiments"


@contextlib.contextmanager
def imported(*names: str) -> Iterator[dict[str, ModuleType]]:
    """Name -> module; forgotten afterwards, for their names are nobody's outside of experiments/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        patch.syspath_prepend(str(FOLDER))
        yield {name: importlib.import_module(name) for name in names}
    for name, module in list(sys.modules.items()):
        if pathlib.Path(getattr(module, "__file__", None) or "").parent == FOLDER:
            del sys.modules[name]
