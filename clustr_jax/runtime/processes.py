"""Several processes that work on one run: who writes, and what all of them have to agree on.

Every process runs the same program on the same data and takes the same turns; the work directory is on a
file system that all of them see. With one process, everything here is free of effects.
"""

import contextlib
import os
import re

import jax
import numpy as np
from jax.experimental import multihost_utils

from clustr_jax.runtime.errors import UserError, first_line

# A batch is worth sharing by so many cores.
_MOST_CORES = 8
# Devices are the parallelism: pieces of a convolution in other threads would only get in their way.
_FLAG = "--xla_cpu_multi_thread_eigen"
# A process that has not been heard of for so long is lost; the others then stop.
_HEARTBEAT_SECONDS = 30


class Lost(Exception):
    """Another process went away; says what to do."""


@contextlib.contextmanager
def joined(
    coordinator: str | None,
    num_processes: int | None = None,
    process_id: int | None = None,
    platform: str | None = None,
):
    """Join the processes of this run, at HOST:PORT or as the cluster says ("auto"); alone without one.

    UserError where they cannot be reached, or where there is no device of this platform; Lost where
    contact to another one breaks later.
    """
    if platform:
        jax.config.update("jax_platforms", platform)
    _connect(coordinator, num_processes, process_id)
    use_cores(all_of_them=coordinator is None)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # it asserts where one platform was asked for
        wanted = f"--platform={platform}" if platform else "JAX_PLATFORMS"
        raise UserError(
            f"{wanted}: JAX finds no such device; install what it needs (docs/scaling.md), or leave it out"
        ) from error
    try:
        yield
    except Exception as error:
        broken = _runtime_error(error)
        if broken is None or jax.process_count() == 1 or str(broken).startswith(_OWN_FAULTS):
            raise
        raise Lost(
            f"stopped: contact to another process is lost ({first_line(broken)}); "
            f"start all processes again with the same command to go on"
        ) from error


def use_cores(all_of_them: bool = True) -> None:
    """Make a device of every core that this process may use, unless the user has chosen a number.

    To be called before JAX looks for devices. XLA shares a convolution badly between the threads of one
    device (docs/performance.md); one device per core shares the batch instead. Of several devices, the user's
    number as well, each keeps a convolution to its own thread (XLA_FLAGS), unless that is set already.
    """
    count = _chosen()
    if count is None and all_of_them:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = min(cores, _MOST_CORES)
        # JAX that has looked already keeps its devices
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    if count is not None and count > 1:  # XLA reads them when it makes the devices
        flags = os.environ.get("XLA_FLAGS", "")
        if _FLAG not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=false".strip()


def _chosen() -> int | None:
    """How many devices of the CPU the user has asked for."""
    said = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    flags = re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return int(said) if said.isdigit() else int(flags[1]) if flags else None


def on_cores() -> bool:
    """Whether the devices are this CPU's cores, because nobody has asked for another number."""
    return jax.process_count() == 1 and jax.default_backend() == "cpu" and _chosen() is None


# How errors begin that starting again does not mend, whatever the other processes do.
_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")


def _runtime_error(error: BaseException | None):
    """The error of the devices behind this one (orbax, for one, raises its own), or None."""
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__ or error.__context__
    return error


def _connect(coordinator, num_processes, process_id):
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise UserError("--num_processes and --process_id need --coordinator=HOST:PORT")
        return
    address = None if coordinator == "auto" else coordinator
    if address is not None:
        if None in (num_processes, process_id) or not 0 <= process_id < num_processes:
            raise UserError(
                f"--coordinator={coordinator} needs --num_processes=N and --process_id=0 to N-1, "
                f"got {num_processes} and {process_id}"
            )
        if not address.rpartition(":")[2].isdigit():
            raise UserError(f"--coordinator must be HOST:PORT or auto, got {coordinator!r}")
    try:
        jax.distributed.initialize(
            address, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--coordinator={coordinator}: {first_line(error)}") from error


def leader() -> bool:
    """Whether this process writes files and speaks."""
    return jax.process_index() == 0


def wait(place: str) -> None:
    """Go on when all processes have come to `place`, and what the leader wrote before it is there."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def agree(numbers: list[int]) -> list[int]:
    """The leader's numbers: for what depends on a clock or a disk. All processes call it together."""
    if jax.process_count() == 1:
        return numbers
    found = multihost_utils.broadcast_one_to_all(np.asarray(numbers, np.int32))
    return [int(number) for number in found]


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any process. All processes call it together."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
