"""What a run finds around it, and must not depend on: switches of JAX, and where its output goes.

steady    output that nobody reads any more, or that cannot hold a character, ends no run
pinned    the numbers of a run are those of its config, whatever switches of JAX are set
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

from clustr_jax.runtime.errors import UserError

# Switches of JAX that change numbers -> their value in every run: float32, the streams of random numbers that
# belong to a seed, and the promotion of types that the code was written for.
PINNED = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
}
# Switches under which a run cannot end, each with the reason.
_IMPOSSIBLE = {
    "jax_disable_jit": "a run is compiled loops, which would take hours one operation at a time",
    "jax_check_tracer_leaks": "JAX takes its own shard_map for a leak",
    "jax_debug_infs": "attacks hold infinities on purpose, for what they have not found yet",
    "jax_no_execution": "nothing would be computed",
    "jax_no_tracing": "nothing would be compiled",
}
_GUARDS = ("", "_host_to_device", "_device_to_host", "_device_to_device")
# ASCII for what tables and paths draw with; any other character becomes its number.
_PLAIN = {"\u2026": "~", "\u2013": "-", "\u2264": "<=", "\u2265": ">=", "\u00b7": "-"}


def _setting(name: str) -> Any:
    return getattr(jax.config, name, None)


def check() -> None:
    """UserError for a switch of JAX under which nothing could be computed."""
    found = {name: why for name, why in _IMPOSSIBLE.items() if _setting(name)}
    for guard in _GUARDS:
        if str(_setting(f"jax_transfer_guard{guard}")).startswith("disallow"):
            found[f"jax_transfer_guard{guard}"] = "images and results move between host and device"
    for name, why in found.items():
        raise UserError(f"{name.upper()} is set, and {why}; unset it for this command")


@contextlib.contextmanager
def pinned(say: Callable[[str], None] | None = None) -> Iterator[None]:
    """A block in which `PINNED` holds; `say` is told, in a line, what of it was set to something else.

    UserError for switches under which nothing could be computed.
    """
    check()
    other = {name: _setting(name) for name, value in PINNED.items() if _setting(name) != value}
    if other and say is not None:
        told = ", ".join(f"{name.upper()}={value}" for name, value in other.items())
        say(f"not followed, for a run's numbers are those of its config and seed: {told}")
    # what a `with` of the caller has set is seen in this thread only, what the environment has set in all
    within = contextlib.ExitStack()
    with within:
        within.enter_context(jax.enable_x64(False))
        within.enter_context(jax.numpy_dtype_promotion("standard"))
        within.enter_context(jax.default_prng_impl("threefry2x32"))
        within.enter_context(jax.threefry_partitionable(True))
        for name in ("jax_random_seed_offset", "jax_high_dynamic_range_gumbel"):
            if name in other:
                jax.config.update(name, PINNED[name])
                within.callback(jax.config.update, name, other[name])
        yield


class Output:
    """A text stream that never ends a program: what cannot be written is left out.

    `lost` is told once, what the trouble is (a closed pipe, a full disk); nothing is written after it.
    """

    def __init__(self, stream: Any, lost: Callable[[Exception], None]):
        self._open = stream is not None
        if isinstance(stream, Output):  # of a block around this one: what gets lost in here is told here
            stream, self._open = stream.stream, stream._open
        self.stream, self._lost = stream, lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """All of it is taken, whether it can be shown or not."""
        self._try(lambda: self.stream.write(self._shown(text)))
        return len(text)

    def flush(self) -> None:
        """As far as there is anybody to read it."""
        self._try(lambda: self.stream.flush())

    def isatty(self) -> bool:
        """Whether somebody may be looking."""
        return self._open and self.stream.isatty()

    def _shown(self, text: str) -> str:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        try:
            text.encode(encoding, getattr(self.stream, "errors", None) or "strict")
        except UnicodeEncodeError:
            plain = "".join(_PLAIN.get(c, c) for c in text)
            return plain.encode(encoding, "backslashreplace").decode(encoding)
        return text

    def _try(self, action: Callable[[], Any]) -> None:
        if not self._open:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: of a file that was closed
            self._open = False
            with contextlib.suppress(OSError, ValueError):
                # what is left in its buffer would fail once more when Python ends
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)
            self._lost(error)


@contextlib.contextmanager
def steady(consequence: str = "") -> Iterator[None]:
    """A block whose printing ends nothing: a closed pipe, a full disk, characters that cannot be shown.

    Where stdout is lost, stderr is told so once, with the `consequence`; of a closed pipe without one nothing
    is said, for whoever closed it (head, less) had seen enough.
    """
    before = sys.stdout, sys.stderr

    def lost(error):
        if consequence or not isinstance(error, BrokenPipeError):
            what = [getattr(error, "strerror", None) or str(error), consequence]
            print("stdout: " + "; ".join(filter(None, what)), file=sys.stderr)

    sys.stdout = Output(before[0], lost)
    sys.stderr = Output(before[1], lambda error: None)
    mine = sys.stdout, sys.stderr
    try:
        yield
        sys.stdout.flush()
    finally:
        if sys.stdout is mine[0]:
            sys.stdout = before[0]
        if sys.stderr is mine[1]:
            sys.stderr = before[1]
