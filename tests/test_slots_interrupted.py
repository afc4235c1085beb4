"""The slot scheduler: runs that can go on."""

import numpy as np
import pytest

from clustr_jax.attacks import scheduler
from clustr_jax.evaluation import resume
from slot_attacks import COUNTS, RESTARTS, problem, run, whole


class Stop(Exception):
    pass


def interrupted(records, after, **more):
    """Run and stop after so many device calls, each of them recorded."""
    calls = []

    def report(outcome):
        records.save("pgd", outcome)
        calls.append(1)
        if len(calls) == after:
            raise Stop

    try:
        return run(*problem(), report=report, **more)
    except Stop:
        return None


@pytest.fixture
def often(monkeypatch):
    """The device comes back after each iteration, and every record is written."""
    monkeypatch.setattr(scheduler, "_OPERATIONS", {"cpu": 1.0})
    monkeypatch.setattr("clustr_jax.attacks.records._RECORD_SECONDS", 0.0)


@pytest.mark.parametrize("stops", [(1,), (5,), (60,), (3, 30)])
def test_an_interrupted_run_goes_on(stops, often, tmp_path):
    """Records on disk, another process's Records: the same outcomes for the same evaluations in all."""
    _, x, _ = problem()
    outcome = None
    for stop in stops:
        assert interrupted(resume.Records(tmp_path, "me"), stop, outcome=outcome) is None
        outcome, extra = resume.Records(tmp_path, "me").load("pgd", x, RESTARTS)
        assert extra == {} and outcome is not None
        assert outcome.flight and 0 < outcome.evaluations < whole().evaluations
    found = run(*problem(), outcome=outcome)
    for name in COUNTS:
        np.testing.assert_array_equal(getattr(found, name), getattr(whole(), name), err_msg=name)
    assert found.evaluations == whole().evaluations and found.needed == whole().needed


def test_a_finished_record_is_not_run_again(often, tmp_path):
    """`now` writes the end: going on from it costs nothing."""
    records = resume.Records(tmp_path, "me")
    records.save("pgd", whole(), now=True)
    outcome, _ = resume.Records(tmp_path, "me").load("pgd", problem()[1], RESTARTS)
    found = run(*problem(), outcome=outcome, report=lambda outcome: pytest.fail("it ran"))
    for name in COUNTS:
        np.testing.assert_array_equal(getattr(found, name), getattr(whole(), name))
    assert found.evaluations == whole().evaluations


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9, 0.999])
def test_a_record_cut_off_by_a_crash_starts_again(share, often, tmp_path):
    """The attack is run from its beginning instead of failing, or worse, going on from half of it."""
    interrupted(resume.Records(tmp_path, "me"), 5)
    (path,) = tmp_path.rglob("*.npz")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert resume.Records(tmp_path, "me").load("pgd", problem()[1], RESTARTS) == (None, {})


def test_records_of_another_evaluation_are_left_alone(often, tmp_path):
    """Another identity, name, number of restarts or of examples."""
    _, x, _ = problem()
    records = resume.Records(tmp_path, "me")
    interrupted(records, 5)
    assert resume.Records(tmp_path, "me").load("pgd", x, RESTARTS)[0] is not None
    assert resume.Records(tmp_path, "you").load("pgd", x, RESTARTS) == (None, {})
    assert records.load("apgd", x, RESTARTS) == (None, {})
    assert records.load("pgd", x, RESTARTS + 1) == (None, {})
    assert records.load("pgd", x[:-1], RESTARTS) == (None, {})
    resume.Records(tmp_path, "you").clear()
    assert records.load("pgd", x, RESTARTS)[0] is not None
    records.clear()
    assert not list(tmp_path.rglob("*.npz"))


def test_records_are_throttled(tmp_path):
    records = resume.Records(tmp_path, "me")
    records.save("pgd", whole())
    assert not list(tmp_path.rglob("*"))
    records.save("pgd", whole(), {"loss": np.arange(3)}, now=True)
    _, extra = records.load("pgd", problem()[1], RESTARTS)
    np.testing.assert_array_equal(extra["loss"], np.arange(3))
