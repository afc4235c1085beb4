"""Small JSON files: read with one clear line where damaged, written in one piece."""

import json
import pathlib

from clustr_jax.runtime import processes
from clustr_jax.runtime.errors import UserError


def read_json(path: pathlib.Path) -> dict:
    """A JSON file of the work directory; UserError naming it where it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_json(path: pathlib.Path, content: dict) -> None:
    """Write in one piece: a reader sees the old file or the new one, never half of it.

    Of several processes the leader writes.
    """
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """As `write_json`, any content."""
    if not processes.leader():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
