"""The one exception that means "the user can fix this": shown as one line, exit code 2."""


class UserError(ValueError):
    """What was given, what was expected and what to do, in one line."""
