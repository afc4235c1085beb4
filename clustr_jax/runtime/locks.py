"""One process at a time works on a folder."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator

try:
    import fcntl
except ImportError:  # not on Windows: no lock there
    fcntl = None

from clustr_jax.runtime import processes
from clustr_jax.runtime.errors import UserError, shown


@contextlib.contextmanager
def held(
    folder: pathlib.Path,
    what: str = "",
    other: str = "folder",
    say: Callable[[str], None] = print,
    *,
    leave: bool = True,
) -> Iterator[None]:
    """Hold `folder` for this process (the leader of several); UserError if another one does.

    Some network file systems know no locks: `say` is told so, and the work goes on without one. `what` the
    folder is, and the `other` setting that names another one, are for messages. The file of the lock is
    left there, or with `leave=False` removed at the end.
    """
    if fcntl is None or not processes.leader():
        yield
        return
    path = folder / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"cannot write to {what}{shown(folder, 200)}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{shown(folder, 200)} is in use by process {file.read().strip() or 'unknown'}; wait for it, "
                f"stop it, or use another {other}"
            ) from error
        except OSError as error:
            say(f"warning: no lock on {folder} ({error.strerror}); see that one process works on it")
        if not _same(file, path):  # its holder has removed it between our opening and our locking it
            raise UserError(f"{shown(folder, 200)} was in use until now; run the same command again")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield  # closing the file, or the end of the process however it comes, frees it
        finally:
            if not leave:
                path.unlink(missing_ok=True)


def _same(file, path):
    """Whether the open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
