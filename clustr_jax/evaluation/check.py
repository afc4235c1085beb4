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


@dataclasses.dataclass(frozen=True)
class Measure:
    """One of several numbers that a check looks at; `otherwise` is the status where it is not good."""

    value: float | None
    good: bool
    limit: str
    what: str = ""
    otherwise: str = FAIL


def decided(number: int, name: str, *measures: Measure, note: str = "") -> Check:
    """The check whose status is the worst of its measures; that one's number and limit are shown."""
    bad = [measure for measure in measures if not measure.good]
    failed = [measure for measure in bad if measure.otherwise == FAIL]
    shown = (failed or bad or list(measures))[0]
    told = "; ".join(filter(None, (shown.what, note)))
    return Check(number, name, shown.otherwise if bad else PASS, shown.value, shown.limit, told)
