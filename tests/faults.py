"""How many faults are put in, and the table of what happened in docs/reliability.md."""

import os

import pytest

from runs import ROOT

ALL = os.environ.get("FAULTS") == "all"
KILLS, FILES, INPUTS = (30, 200, 300) if ALL else (5, 20, 50)
# Where the table goes in docs/reliability.md.
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
ROWS = 11
# One unlucky run meets so many kills before it is left alone.
KILLS_PER_RUN = 5
# SIGTERM to exit: what schedulers grant is 30 s.
LIMIT_SECONDS = 20.0


@pytest.fixture(scope="session")
def table():
    """Rows (what was injected, how often, what happened), written to the docs after a whole run."""
    rows = []
    yield rows
    if ALL and len(rows) == ROWS:  # a part of it, or a failure, is no table
        path = ROOT / "docs" / "reliability.md"
        before, _, rest = path.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        lines = [f"| {what} | {count} | {outcome} |" for what, count, outcome in rows]
        text = "\n".join(["", "| injected | times | what happened |", "|---|---:|---|", *lines, ""])
        path.write_text(before + BEGIN + text + END + after)
