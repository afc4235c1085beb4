"""Where a number comes from: versions, the commit, and short hashes of JSON values."""

import functools
import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "clustr-jax")


def sha(content: Any) -> str:
    """Short hash of a JSON value, independent of the order of keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of what decides a number."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@functools.cache
def commit() -> str:
    """The commit of this package's source, "-dirty" where it was changed since; "" where it is not known."""
    here = pathlib.Path(__file__)
    told = []
    # an installed package can lie in a folder of somebody else's repository
    for command in (("ls-files", "--error-unmatch", here.name), ("describe", "--always", "--dirty")):
        try:
            done = subprocess.run(
                ["git", *command], cwd=here.parent, capture_output=True, text=True, timeout=5
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        if done.returncode:
            return ""
        told.append(done.stdout.strip())
    return told[-1]
