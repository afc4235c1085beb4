"""docs/architecture.md: the drawing is that of the sources, and what it names is there."""

import importlib
import importlib.util
import re

import pytest

from runs import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def structure():
    spec = importlib.util.spec_from_file_location("structure", ROOT / "benchmarks" / "structure.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drawing_is_that_of_the_sources(structure):
    """python benchmarks/structure.py --write renews it."""
    assert structure.written(PAGE, structure.mermaid(ROOT / "clustr_jax")) == PAGE


def test_what_is_drawn(structure, tmp_path):
    """Arrows that follow from others are left out, those of a circle never."""
    files = {
        "a.py": "from clustr_jax import b\nfrom clustr_jax.c import x",
        "b.py": "def f():\n    from clustr_jax.room.inner import y",
        "c.py": "",
        "room/__init__.py": "from clustr_jax.c import x",
        "room/inner.py": "from clustr_jax.room import z",
        "d.py": "from clustr_jax.e import x\nfrom clustr_jax import c",
        "e.py": "import os\nfrom clustr_jax import d, c",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    rooms, arrows = structure.structure(tmp_path)
    assert rooms == {"a", "b", "c", "d", "e", "room"}
    assert structure.cycles(arrows) == {("d", "e"), ("e", "d")}
    drawn = structure.necessary(arrows)
    assert ("a", "c") in arrows and ("a", "c") not in drawn
    assert drawn == {("a", "b"), ("b", "room"), ("room", "c"), ("d", "e"), ("e", "d"), ("e", "c")}


def exists(name):
    """Whether the package has it: room.module.name, or a field of a dataclass there."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            owner = importlib.import_module(".".join(["clustr_jax", *parts[:count]]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            fields = getattr(owner, "__dataclass_fields__", {})
            if not hasattr(owner, part) and part not in fields:
                return False
            owner = getattr(owner, part, None)
        return True
    return False


def test_what_it_names_exists():
    names = set(re.findall(r"`([a-z_]+\.[A-Za-z_.]+)`", PAGE))
    assert len(names) > 20 and exists("settings.AdversarySettings.eps") and not exists("attacks.gpd")
    assert {name for name in names if not exists(name)} == set()
