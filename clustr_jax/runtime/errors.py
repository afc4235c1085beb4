"""The one exception that means "the user can fix this": shown as one line, exit code 2."""


class UserError(ValueError):
    """What was given, what was expected and what to do, in one line."""


def first_line(error: BaseException, at_most: int = 300) -> str:
    """The first line of its text that says something, else its type; `at_most` so many characters."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= at_most else f"{line[:at_most]} ..."
