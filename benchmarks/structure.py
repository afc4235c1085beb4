"""The import structure of clustr_jax as a Mermaid graph: which room uses which, read off the sources.

    python benchmarks/structure.py                      print it
    python benchmarks/structure.py --write              put it into docs/architecture.md
    python benchmarks/structure.py --commit 9fd55a1     print it as it was then (needs git)

A room is a folder of the package, or a file that lies flat in it. Arrows that follow from others are left
out: where A uses B and B uses C, an arrow from A to C would only hide the order.
"""

import argparse
import ast
import io
import pathlib
import re
import subprocess
import tarfile
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "clustr_jax"
PAGE = ROOT / "docs" / "architecture.md"


def room_of(module: str) -> str:
    """The folder or flat file that a module below the package is in."""
    return module.split(".")[0]


def module_of(path: pathlib.Path, package: pathlib.Path) -> str:
    """attacks.pgd; a room's __init__ is the room, the package's own is __init__."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)


def imports(path: pathlib.Path, modules: set[str]) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            base = (node.module or "").removeprefix(PACKAGE).removeprefix(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".removeprefix(".")
                found.add(name if name in modules else base or "__init__")
    return found


def structure(package: pathlib.Path) -> tuple[set[str], set[tuple[str, str]]]:
    """(rooms, arrows (user, used) between them)."""
    files = {module_of(path, package): path for path in sorted(package.rglob("*.py"))}
    arrows = set()
    for module, path in files.items():
        room = room_of(module)
        arrows |= {(room, room_of(name)) for name in imports(path, set(files)) if room_of(name) != room}
    return {room_of(module) for module in files}, arrows


def reachable(arrows: set[tuple[str, str]], start: str, without: tuple[str, str] | None = None) -> set[str]:
    """What can be reached from a room along the arrows, but for one of them."""
    found, todo = set(), [start]
    while todo:
        here = todo.pop()
        for arrow in arrows:
            if arrow[0] == here and arrow != without and arrow[1] not in found:
                found.add(arrow[1])
                todo.append(arrow[1])
    return found


def cycles(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that lie on a cycle."""
    return {(a, b) for a, b in arrows if a in reachable(arrows, b)}


def necessary(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Without those that follow from others; arrows on a cycle are kept."""
    kept = set(arrows)
    for a, b in sorted(arrows - cycles(arrows)):
        if b in reachable(kept, a, without=(a, b)):
            kept.remove((a, b))
    return kept


def mermaid(package: pathlib.Path) -> str:
    """The graph, from what uses to what is used."""
    rooms, arrows = structure(package)
    drawn = necessary(arrows)
    alone = rooms - {room for arrow in drawn for room in arrow}
    return "\n".join(
        ["graph TD", *sorted(f"    {a}" for a in alone), *sorted(f"    {a} --> {b}" for a, b in drawn)]
    )


def written(page: str, graph: str) -> str:
    """The page with this graph in place of the one that it has."""
    return re.sub(r"(```mermaid\n).*?(\n```)", lambda found: found[1] + graph + found[2], page, flags=re.S)


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--commit", help="of this repository; default: the files as they are")
    parser.add_argument("--write", action="store_true", help="into docs/architecture.md")
    args = parser.parse_args()
    if args.commit is None:
        graph = mermaid(ROOT / PACKAGE)
        if args.write:
            PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), graph), encoding="utf-8")
        else:
            print(graph)
        return
    archive = subprocess.run(
        ["git", "archive", args.commit, PACKAGE], cwd=ROOT, check=True, stdout=subprocess.PIPE
    ).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        print(mermaid(pathlib.Path(folder) / PACKAGE))


if __name__ == "__main__":
    main()
