"""The process of a benchmark: where `configs` is found, and what has to be set before Python starts."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


def restart(**environment: str) -> None:
    """Start this script again with these variables, unless they are set already."""
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.environ |= environment
        os.execv(sys.executable, [sys.executable, *sys.argv])
