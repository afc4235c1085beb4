"""What is around a run: streams that are closed, full, or of another encoding."""

import errno
import io
import sys
import warnings

import pytest

from clustr_jax import attacks
from clustr_jax.runtime import surroundings

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
)


class Broken(io.StringIO):
    """Takes some characters, then nothing more."""

    def __init__(self, error, room=0, encoding="utf-8"):
        super().__init__()
        self._error, self._room, self._encoding = error, room, encoding

    @property
    def encoding(self):
        return self._encoding

    def write(self, text):
        text.encode(self._encoding)
        if self.tell() + len(text) > self._room:
            raise self._error
        return super().write(text)


TROUBLE = [
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"),
    ValueError("I/O operation on closed file."),
]


@pytest.mark.parametrize("error", TROUBLE, ids=lambda e: type(e).__name__ + str(getattr(e, "errno", "")))
def test_output_that_is_lost_is_told_once_and_ends_nothing(error, monkeypatch):
    stdout, stderr = Broken(error, room=4), io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    with surroundings.steady("the rest is in a file"):
        print("one")
        print("two")
        with surroundings.steady("unheard"):
            print("three", flush=True)
    assert sys.stdout is stdout and sys.stderr is stderr
    assert stdout.getvalue() == "one\n"
    assert stderr.getvalue().count("\n") == 1 and stderr.getvalue().endswith("; the rest is in a file\n")


@pytest.mark.parametrize("error", TROUBLE[:2], ids=["pipe", "disk"])
def test_whoever_closes_a_pipe_has_seen_enough(error, monkeypatch):
    """Of a screen that is not a run's, only a disk is worth a word."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Broken(error))
    monkeypatch.setattr(sys, "stderr", stderr)
    with surroundings.steady():
        print("usage")
    assert stderr.getvalue() == ("" if error is TROUBLE[0] else "stdout: No space left on device\n")


@pytest.mark.parametrize("stdout", [None, Broken(TROUBLE[0])], ids=["closed", "broken"])
@pytest.mark.parametrize("stderr", [None, Broken(TROUBLE[0])], ids=["closed", "broken"])
def test_nothing_to_write_to(stdout, stderr, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    with surroundings.steady("so"):
        print("one", flush=True)
        print("two", file=sys.stderr, flush=True)
        assert not sys.stdout.isatty()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("text", ["a", "…", "≤ –", "┏━┓", "réseau/日本", "\udcff", "🙂"])
def test_any_character_can_be_printed(encoding, text, monkeypatch):
    """What the stream has no letter for is written in ASCII; what it has is left alone."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    with surroundings.steady():
        print(text)
    found = stream.buffer.getvalue().decode(encoding).rstrip("\r\n")
    try:
        text.encode(encoding)
        assert found == text
    except UnicodeEncodeError:
        found.encode(encoding)
        assert found and found != text


def test_a_warning_of_ours_is_one_sentence():
    """The line of our code below it says nothing to a user. Warnings of others are as they were."""
    before = warnings.formatwarning
    with surroundings.steady():
        with surroundings.steady():
            ours = warnings.formatwarning("eps is\n  wide", attacks.UnitWarning, "user.py", 3)
            from_here = warnings.formatwarning("bounded scores", UserWarning, attacks.__file__, 3)
            foreign = warnings.formatwarning("overflow", RuntimeWarning, "numpy/core.py", 3)
        assert warnings.formatwarning("a", attacks.UnitWarning, "user.py", 3) == "warning: a\n"
    assert (ours, from_here) == ("warning: eps is wide\n", "warning: bounded scores\n")
    assert foreign == before("overflow", RuntimeWarning, "numpy/core.py", 3)
    assert warnings.formatwarning is before
