"""What a run finds around it, and must not depend on: switches of JAX, and where its output goes.

steady    output that nobody reads any more, or that cannot hold a character, ends no run (runtime.output)
pinned    the numbers of a run are those of its config, whatever switches of JAX are set
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.output import steady as steady

# Switches of JAX that change numbers -> their value in every run: float32, the streams of random numbers that
# belong to a seed, and the promotion of types that the code was written for.
PINNED = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_default_matmul_precision": None,  # which decides the form of a convolution, too
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
        within.enter_context(jax.default_matmul_precision(None))
        for name in ("jax_random_seed_offset", "jax_high_dynamic_range_gumbel"):
            if name in other:
                jax.config.update(name, PINNED[name])
                within.callback(jax.config.update, name, other[name])
        yield
