"""Paths as users give them."""

import pathlib
import re

from clustr_jax.runtime.errors import UserError

# "gs://bucket/run", and what pathlib makes of it
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local(path: str | pathlib.Path, what: str) -> pathlib.Path:
    """The path with its ~ filled in; UserError, naming `what`, for one that no file can have.

    >>> str(paths.local("runs/digits", "--workdir"))
    'runs/digits'
    >>> paths.local("gs://bucket/run", "--workdir")
    Traceback (most recent call last):
    clustr_jax.runtime.errors.UserError: --workdir=gs://bucket/run is an address, ...
    """
    text = str(path)
    shown = f"{what}={ascii(text)[1:-1] if not text.isprintable() else text}"
    shown = shown if len(shown) <= 200 else f"{shown[:200]} ..."
    if text.startswith("file:/"):
        raise UserError(f"{shown} is an address; give the path without file://")
    if _ADDRESS.match(text):
        raise UserError(
            f"{shown} is an address, and this program reads and writes files: mount the bucket or copy "
            f"it, and give that folder"
        )
    if "\0" in text:
        raise UserError(f"{shown} has a null character in it, which no path can have")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{shown} is no UTF-8 text; use a path of plain letters, or set PYTHONUTF8=1 if the locale is why"
        ) from error
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:  # no HOME, or ~somebody who is not known here
        raise UserError(
            f"{shown}: there is no such home folder ({error}); set HOME, or give the whole path"
        ) from error
