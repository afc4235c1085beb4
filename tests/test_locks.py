"""runtime/locks.py: one process at a time, and whether the file of the lock stays."""

import pytest

from clustr_jax.runtime import locks
from clustr_jax.runtime.errors import UserError


@pytest.mark.parametrize("leave", [True, False])
def test_one_at_a_time_whatever_happens(leave, tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locks.held(tmp_path, leave=leave):
            with pytest.raises(UserError, match="in use by process [0-9]+; .* use another folder"):
                with locks.held(tmp_path, leave=leave):
                    pass
            raise ZeroDivisionError
        assert (tmp_path / "lock").exists() == leave


def test_a_file_that_was_removed_meanwhile_locks_nothing(tmp_path, monkeypatch):
    """Its last holder unlinks it when another process has opened it: a third one would make a new file."""
    flock = locks.fcntl.flock

    def late(file, how):
        (tmp_path / "lock").unlink()
        flock(file, how)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    with pytest.raises(UserError, match="was in use until now"), locks.held(tmp_path, leave=False):
        pass
