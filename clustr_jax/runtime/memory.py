"""How much memory there is, so that a set that does not fit is refused before it is read.

Linux says what is free, and what a control group or a limit of the process leaves of it; elsewhere only the
size of the machine is known, or nothing.
"""

import contextlib
import os
import pathlib

import jax

from clustr_jax.runtime.errors import UserError

_CGROUPS = pathlib.Path("/sys/fs/cgroup")
# (limit, usage) of a control group: version 2, version 1
_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def available() -> int | None:
    """Bytes that can still be taken without swapping; None where the system does not say."""
    known = [found for found in (_machine(), _groups(), _limit()) if found is not None]
    return min(known) if known else None


def total() -> int | None:
    """Bytes that this process may ever take, whatever is in use now; None where the system does not say."""
    known = [found for found in (_whole_machine(), _groups(limits=True), _limit(left=False)) if found]
    return min(known) if known else None


def of_device() -> int | None:
    """Bytes of one device that JAX may take, of the CPU those of this process; None where it is not told."""
    if jax.default_backend() == "cpu":
        return total()
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def check(needed: int, what: str, remedy: str) -> None:
    """UserError where `needed` bytes are more than there are; `what` needs them, `remedy` is what to do."""
    found = available()
    if found is not None and needed > found:
        raise UserError(f"{what}, {gigabytes(needed)} in all, and {gigabytes(found)} are free; {remedy}")


def gigabytes(size: int) -> str:
    """ "1.3 GB"."""
    return f"{size / 1e9:,.2f} GB" if size < 1e10 else f"{size / 1e9:,.0f} GB"


def _machine():
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return _whole_machine()


def _whole_machine():
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _groups(limits=False):
    """The least that the control groups of this process leave; or that they allow in all (`limits`)."""
    left = []
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root = _CGROUPS / controllers
            place = root / path.lstrip("/")
            for group in (place, *place.parents):
                left += _left(group, limits)
                if group == root:
                    break
    return min(left) if left else None


def _left(group, limits=False):
    for limit, usage in _FILES:
        with contextlib.suppress(OSError, ValueError):  # the file says "max" where there is no limit
            most = int((group / limit).read_text())
            if limits:
                return [most]
            return [max(0, most - int((group / usage).read_text()) + _reclaimable(group))]
    return []


def _reclaimable(group):
    """Bytes of files that are kept in memory and given up when it is asked for."""
    with contextlib.suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    return 0


def _limit(left=True):
    """What a limit on the address space (ulimit -v) leaves, or allows in all."""
    with contextlib.suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        if most != resource.RLIM_INFINITY:
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) if left else 0
            return max(0, most - pages * os.sysconf("SC_PAGE_SIZE"))
    return None
