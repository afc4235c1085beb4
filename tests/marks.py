"""Which of the slow tests CI runs; those that it has no time for are run by hand (`make test-long`)."""

import pytest


def in_ci(values, *kept):
    """Parameters of a test, of which all but `kept` are marked long (and so slow: conftest.py)."""
    values = list(values)
    missing = [value for value in kept if value not in values]
    assert not missing, f"{missing} not among {values}"
    return [
        pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=[] if v in kept else [pytest.mark.long])
        for v in values
    ]
