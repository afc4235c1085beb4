"""Is a checkpoint whole? A seal lists the SHA-256 of each of its files; it is written last.

So a folder without a seal was not finished, and one that differs from its seal was damaged since, or
put there by somebody else. Folders are kept beside their seals: <root>/<step> and <seals>/<step>.json.
"""

import hashlib
import json
import pathlib
import shutil

from clustr_jax.storage.files import write_json

UNFINISHED = "it was not finished"


def _digests(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def seal(folder: pathlib.Path, path: pathlib.Path, identity: str) -> None:
    """Write the seal of a finished folder; `identity` says which training it belongs to."""
    write_json(path, {"identity": identity, "files": _digests(folder)})


def problem(folder: pathlib.Path, path: pathlib.Path, identity: str) -> str | None:
    """What is wrong with `folder`, in words, or None."""
    if not path.exists():
        return UNFINISHED
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        wanted, owner = content["files"], content["identity"]
        found = _digests(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its seal or a file of it cannot be read: {error}"
    if owner != identity:
        return "it belongs to another training"
    for name in sorted(set(wanted) | set(found)):
        if name not in found:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} was added"
        if found[name] != wanted[name]:
            return f"{name} has changed"
    return None


def set_aside(folder: pathlib.Path, path: pathlib.Path, place: pathlib.Path) -> pathlib.Path:
    """Move a bad folder and its seal into `place`, under a name that is free there."""
    place.mkdir(parents=True, exist_ok=True)
    target, count = place / folder.name, 1
    while target.exists():
        target, count = place / f"{folder.name}-{count}", count + 1
    shutil.move(folder, target)
    if path.exists():
        shutil.move(path, target.with_name(target.name + ".json"))
    return target
