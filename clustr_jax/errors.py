"""The one exception that means "the user can fix this": shown as one line, exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What was given, what was expected and what to do, in one line."""


def first_line(error: BaseException, at_most: int = 300) -> str:
    """The first line of its text that says something, else its type; `at_most` so many characters."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= at_most else f"{line[:at_most]} ..."


def nearest(word: str, known: Iterable[str]) -> str:
    """ " (did you mean WORD?)" where one of the `known` words is close to what was typed, else ""."""
    lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(str(word).lower(), lower, n=1, cutoff=0.6)
    return f" (did you mean {lower[found[0]]}?)" if found else ""
