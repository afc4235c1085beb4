"""Families of cases of which `make test` runs a part."""

import types

import pytest

import marks


def item(name, n=None, **others):
    found = others if n is None else others | {"one_in": pytest.mark.one_in(n).mark}
    return types.SimpleNamespace(nodeid=name, get_closest_marker=found.get)


@pytest.mark.parametrize(("cases", "n", "stay"), [(12, 3, 4), (13, 3, 5), (2, 3, 1), (1, 4, 1), (5, 1, 5)])
def test_one_in_n_stays(cases, n, stay):
    family = [item(f"test_a.py::test_b[{i}]", n) for i in range(cases)]
    others = [item("test_a.py::test_c"), item("test_a.py::test_bb[0]", 1)]
    left = list(marks.beyond_one_in(family + others))
    assert len(left) == cases - stay
    assert all(one in family for one in left)


def test_the_same_stay_in_any_order():
    family = [item(f"test_a.py::test_b[{a}-{b}]", 4) for a in "pqrs" for b in "uvwxyz"]
    left = {one.nodeid for one in marks.beyond_one_in(family)}
    assert {one.nodeid for one in marks.beyond_one_in(family[::-1])} == left
    stay = [one.nodeid for one in family if one.nodeid not in left]
    assert {name[-4] for name in stay} == set("pqrs")  # no stride that meets one of them alone


@pytest.mark.parametrize("mark", ["slow", "more", "long"])
def test_cases_that_have_their_time_keep_it(mark):
    family = [item(f"test_a.py::test_b[{i}]", 3) for i in range(6)]
    others = [item(f"test_a.py::test_b[{i}]", 3, **{mark: True}) for i in range(6, 60)]
    left = list(marks.beyond_one_in(family + others))
    assert len(left) == 4 and all(one in family for one in left)
