"""The one exception that means "the user can fix this": shown as one line, exit code 2."""


class UserError(ValueError):
    """What was given, what was expected and what to do, in one line."""


def first_line(error: BaseException) -> str:
    """The first line of its text that says something, else its type."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
