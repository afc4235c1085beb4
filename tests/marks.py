"""Which tests are run when: slow ones that CI has no time for are run by hand (`make test-long`).

Of a family of cases that is marked `one_in(n)`, `make test` runs one in n.
"""

import collections
import zlib

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


def beyond_one_in(items):
    """The cases of families marked `one_in(n)` that are left to `make test-more`; one stays at least.

    The hash of its name decides which case stays, so that no argument of a product is left out as a whole.
    """
    families = collections.defaultdict(list)
    for item in items:
        mark, own = item.get_closest_marker("one_in"), ("slow", "more", "long")
        if mark and not any(map(item.get_closest_marker, own)):  # those have their time
            families[item.nodeid.partition("[")[0], *mark.args].append(item)
    for (_, n), cases in families.items():
        cases.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        yield from cases[-(-len(cases) // n) :]
