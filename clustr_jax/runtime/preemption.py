"""SIGTERM and SIGINT: what is under way is finished and saved, then the run leaves with a code of its own.

Long work asks `check` between its pieces, after saving them. A piece can take longer than whoever sent the
signal will wait: the compilation of a large network, say. A thread then ends the process from outside. That
costs what came after the newest checkpoint and nothing else, for files are only ever replaced whole.
"""

import contextlib
import os
import signal
import socket
import sys
import threading

from clustr_jax.runtime import processes

# sysexits.h, EX_TEMPFAIL: not a failure of the run; start it again.
EXIT_CODE = 75
# SLURM gives 30 s between SIGTERM and SIGKILL, Kubernetes as well.
GRACE_SECONDS = 12.0

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_requested: str | None = None


class Preempted(Exception):
    """Raised by `check` once a signal has arrived; says where the run stands."""


def requested() -> bool:
    """Whether a signal has arrived, here or at another process (all call this together): save now."""
    return processes.any_of(_requested is not None)


def check(where: str) -> None:
    """Raise Preempted if a signal has arrived. Call it when everything is saved."""
    if requested():
        raise Preempted(message(where))


def message(where: str) -> str:
    """The line that a preempted run ends with."""
    signal_name = _requested or "a signal to another process"
    return f"stopped by {signal_name}: {where}; run the same command again to go on"


@contextlib.contextmanager
def guard(grace: float = GRACE_SECONDS):
    """Take over SIGTERM and SIGINT in this block (main thread); a second one ends the process at once."""
    global _requested
    _requested = None
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # Python's handlers wait for the main thread to come back to Python; this socket is written without it
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    woken = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, grace), daemon=True).start()
    for number in _SIGNALS:
        signal.signal(number, _note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        writer.close()


def _note(number, frame):
    global _requested
    _requested = signal.Signals(number).name


def _watch(reader, grace):
    """Ends the process when a second signal comes, or a first one has not been heeded for `grace` seconds."""
    global _requested
    numbers = {int(s) for s in _SIGNALS}
    with reader:
        while (first := reader.recv(1)) and first[0] not in numbers:
            pass
        if not first:
            return  # the block was left
        _requested = signal.Signals(first[0]).name
        reader.settimeout(grace)
        try:
            if not reader.recv(1):
                return
        except TimeoutError:
            pass
    print(message("in the middle of a piece of work; what was saved before it is intact"), file=sys.stderr)
    sys.stderr.flush()
    os._exit(EXIT_CODE)
