"""One check of an evaluation: its status, the number that decides and the limit it is held against."""

import dataclasses

PASS, WARN, FAIL, SKIP = "PASS", "WARN", "FAIL", "SKIP"


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the verdict: `value` is the number that was compared with `limit`."""

    number: int
    name: str
    status: str
    value: float | None
    limit: str  # in the unit of the value
    note: str = ""
    advice: str = ""  # what to do, of a WARN and of a FAIL


def at_most(limit: float) -> str:
    """A limit as it is compared."""
    return f"<= {100 * limit:.2g} points"


def status_of(good: bool, otherwise: str = FAIL) -> str:
    """PASS, or what it is otherwise."""
    return PASS if good else otherwise
