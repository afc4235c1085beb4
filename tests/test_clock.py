"""stages/clock.py: the seconds of an epoch, however often its training was stopped."""

import pytest

from clustr_jax.stages import clock


@pytest.fixture
def now(monkeypatch):
    """A clock that is set by hand, and starts anywhere in each run."""
    hand = {"at": 100.0}
    monkeypatch.setattr(clock.time, "monotonic", lambda: hand["at"])
    return hand


def test_an_epoch_that_was_stopped_twice_has_all_its_seconds(tmp_path, now):
    path = tmp_path / "clock.json"
    first = clock.EpochClock(path)
    assert first.start(20, 20) == 20
    now["at"] += 7
    first.note(23)
    now["at"] += 50  # lost: after the checkpoint
    again = clock.EpochClock(path)
    assert again.start(23, 20) == 20
    now["at"] += 5
    again.note(26)
    now["at"] = 3.0  # another machine
    last = clock.EpochClock(path)
    assert last.start(26, 20) == 20
    now["at"] += 2
    assert last.seconds() == 14
    assert last.start(30, 30) == 30  # the next epoch begins at nought
    now["at"] += 1
    assert last.seconds() == 1


def test_an_older_checkpoint_has_its_own_seconds(tmp_path, now):
    path = tmp_path / "clock.json"
    first = clock.EpochClock(path)
    first.start(20, 20)
    now["at"] += 7
    first.note(23)
    now["at"] += 7
    first.note(26)
    again = clock.EpochClock(path)
    assert again.start(23, 20) == 20 and again.seconds() == 7


@pytest.mark.parametrize("left", [None, "{", "{}", '{"22": 1.0}'])
def test_of_unknown_seconds_only_the_steps_since_count(tmp_path, now, left):
    """Work directories of before have no such file; nothing is guessed, and nothing wrong is handed on."""
    path = tmp_path / "clock.json"
    if left is not None:
        path.write_text(left)
    found = clock.EpochClock(path)
    assert found.start(23, 20) == 23
    now["at"] += 4
    assert found.seconds() == 4
    found.note(26)
    assert clock.EpochClock(path).start(26, 20) == 26
