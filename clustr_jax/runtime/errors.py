"""The one exception that means "the user can fix this": shown as one line, exit code 2."""

import difflib
import pathlib
import warnings
from collections.abc import Iterable

# Characters of a message: more is no line to read.
LONGEST = 500
_ENDING = " ..."
_PACKAGE = str(pathlib.Path(__file__).parents[1])


class UserError(ValueError):
    """What was given, what was expected and what to do, in one line."""


def warn_caller(text: str, category: type[Warning]) -> None:
    """A warning about the line of the user's own code that called into this package."""
    warnings.warn(text, category, stacklevel=2, skip_file_prefixes=(_PACKAGE,))


def first_line(error: BaseException, at_most: int = 300) -> str:
    """The first line of its text that says something, else its type; `at_most` so many characters."""
    while len(error.args) == 1 and isinstance(error.args[0], Exception):  # ml_collections wraps them so
        error = error.args[0]
    text = str(error)
    if isinstance(error, KeyError) and text:  # str() of one is the key as Python would write it
        text = "no such key: " + " ".join(str(error.args[0]).split())
    line = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= at_most else f"{line[:at_most]} ..."


def shown(name: object, at_most: int = 110) -> str:
    r"""A name or path as a message can hold it: what cannot be printed is escaped, and a long one loses its
    middle.

    shown("train/a\nb")     # 'train/a\\nb'
    """
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))
    if len(text) <= at_most:
        return text
    head = at_most // 3
    return f"{text[:head]}...{text[len(text) - (at_most - head - 3) :]}"


def cut(message: str, at_most: int = LONGEST - 1) -> str:
    """A message with its end left out where it is longer than a line can be."""
    return message if len(message) <= at_most else message[: at_most - len(_ENDING)] + _ENDING


def listed(names: Iterable[object], most: int = 3, at_most: int = 60) -> str:
    """ "a, b, c and 7 more"."""
    names = list(names)
    text = ", ".join(shown(name, at_most) for name in names[:most])
    return f"{text} and {len(names) - most:,} more" if len(names) > most else text


def nearest(word: str, known: Iterable[str]) -> str:
    """ " (did you mean WORD?)" where one of the `known` words is close to what was typed, else ""."""
    lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(str(word).lower(), lower, n=1, cutoff=0.6)
    return f" (did you mean {lower[found[0]]}?)" if found else ""
