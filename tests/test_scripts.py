"""The names that scripts take from the package exist: no test runs most of these scripts."""

import ast
import importlib
import pathlib
from types import ModuleType

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
NEEDS_TORCH = {"clustr_jax.doors.clustr_torch"}
SCRIPTS = sorted(p for folder in ("benchmarks", "experiments") for p in (ROOT / folder).glob("*.py"))


def _member(module: ModuleType, name: str):
    """An attribute or a module of a package; AttributeError where there is neither."""
    if not hasattr(module, name):
        try:
            return importlib.import_module(f"{module.__name__}.{name}")
        except ModuleNotFoundError:
            pass
    return getattr(module, name)


def missing(source: str) -> list[str]:
    """`MODULE.NAME` for each name of clustr_jax that a script uses and the package does not have."""
    tree = ast.parse(source)
    found, modules = [], {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "clustr_jax":
            continue
        if node.module in NEEDS_TORCH:
            continue
        package = importlib.import_module(node.module)
        for alias in node.names:
            try:
                member = _member(package, alias.name)
            except AttributeError:
                found.append(f"{node.module}.{alias.name}")
                continue
            if isinstance(member, ModuleType):
                modules[alias.asname or alias.name] = member
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    # a script's own variable may have the name of a module
    own = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    own |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is not None and node.value.id not in own and not hasattr(module, node.attr):
                found.append(f"{module.__name__}.{node.attr}")
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_scripts_use_names_that_exist(path):
    assert not missing(path.read_text())


def test_names_that_are_gone_are_found():
    source = """
from clustr_jax import attacks, losses
from clustr_jax.doors.pytorch import as_jax, to_torch
attacks.pgd, attacks.no_such_attack, losses.cross_entropy
"""
    assert missing(source) == ["clustr_jax.doors.pytorch.as_jax", "clustr_jax.attacks.no_such_attack"]
