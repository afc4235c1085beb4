"""The house: imports go down from room to room, and what must stand in one place stands there alone."""

import ast
import graphlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "clustr_jax"
# From the ground up. An import may only go down; those of a file that lies flat are a room of their own.
ROOMS = (
    "runtime", "reference", "settings", "losses", "kmeans", "clusters", "certify", "lipschitz", "attacks",
    "models", "classifier", "data", "training", "storage", "evaluation", "doors", "report", "judge", "verify",
    "stages", "command", "__init__", "prepare", "quirks", "fidelity",
)  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def label(path):
    return str(path.relative_to(PACKAGE))


def module(path):
    """The dotted name below the package: attacks.pgd; a room's __init__ is the room."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)


MODULES = {module(path) for path in FILES}


def imports(path):
    """Names of the package's modules that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "clustr_jax":
            base = node.module.removeprefix("clustr_jax").removeprefix(".")
            for name in (f"{base}.{alias.name}".removeprefix(".") for alias in node.names):
                found.add(name if name in MODULES else base or "__init__")
    return found


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_go_down(path):
    own = ROOMS.index(module(path).split(".")[0])
    up = {name for name in imports(path) if ROOMS.index(name.split(".")[0]) > own}
    assert not up


def test_there_are_no_cycles():
    """Nor within a room."""
    graph = {module(path): imports(path) - {module(path)} for path in FILES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("path", FILES, ids=label)
def test_configs_stay_at_the_doors(path):
    """Other rooms take the dataclasses of `settings`."""
    lines = [ast.unparse(n) for n in code(path) if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert module(path).split(".")[0] in ("stages", "command") or not any(
        "ml_collections" in line for line in lines
    )


def test_no_file_is_long():
    """Above 400 lines a file holds two things."""
    lengths = {label(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_few_things_lie_flat():
    assert len(list(PACKAGE.glob("*.py"))) <= 12


def code(path):
    """The nodes of a file but for its docstrings."""
    tree = ast.parse(path.read_text())
    texts = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [node for node in ast.walk(tree) if id(node) not in texts]


def public(node):
    """The functions and methods that others may call: no underscore in their name, nor in their class's."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and child.name.startswith("_"):
            continue
        if isinstance(child, ast.FunctionDef):
            yield child
        else:
            yield from public(child)


@pytest.mark.parametrize("path", FILES, ids=label)
def test_every_public_parameter_has_a_type(path):
    """Any only where a gate has to take anything."""
    for function in public(ast.parse(path.read_text())):
        given = [n for n in ast.iter_child_nodes(function.args) if isinstance(n, ast.arg)]
        untyped = {n.arg for n in given if n.annotation is None} - {"self", "cls"}
        assert not untyped, function.name


@pytest.mark.parametrize("path", FILES, ids=label)
def test_stage_names_and_streams_stand_in_one_place(path):
    """runtime.stage_names and runtime.streams have them."""
    for node in code(path):
        if isinstance(node, ast.Constant) and module(path) != "runtime.stage_names":
            assert node.value not in ("1_warmup", "2_train"), f"line {node.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("random.fold_in"):
            number = node.args[1]
            assert not isinstance(number, ast.Constant) or ast.unparse(node) == (
                "jax.random.fold_in(jax.random.fold_in(key, i), 0)"  # an example's first restart
            ), f"line {node.lineno}"
