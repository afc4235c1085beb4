"""Does this compiler compute right numbers? Asked before anything is computed that somebody may believe.

jaxlib 0.10.2, for one, adds up squares wrongly on CPU for some shapes, without a word (jax-ml/jax#39103).
Every pattern of `patterns.py` is compiled and compared with NumPy in float64. A machine that has passed is
not asked again until something that could change the answer is another: see `_identity`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import platform

import jax
import numpy as np
from jaxlib.version import __version__ as jaxlib_version

from clustr_jax.runtime import patterns
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.patterns import PATTERNS, Pattern

# Of the sum of the absolute values of the terms. Rounding stays below 4e-6 on all that was tried
# (docs/performance.md); what was wrong was wrong by percents.
TOLERANCE = 2e-5


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the patterns gave: `worst` is the largest error, of `pattern` at `size`."""

    patterns: int
    programs: int
    worst: float
    pattern: str
    size: int


def check() -> Answer:
    """UserError if this compiler computes one of the patterns wrongly; the answer otherwise.

    About ten seconds where nothing is known of this machine, a millisecond later in this process or, where
    there is a cache folder, in another one.
    """
    return _answer(_identity())


@functools.cache
def _answer(identity: str) -> Answer:
    path = _cache() / f"{identity}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Answer(**json.loads(path.read_text()))
    answer = measure()
    if not answer.worst <= TOLERANCE:
        raise UserError(complaint(answer))
    with contextlib.suppress(OSError):  # then it is asked again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(dataclasses.asdict(answer)))
        part.replace(path)
    return answer


def measure(among: tuple[Pattern, ...] = PATTERNS) -> Answer:
    """Compile and compare all patterns, whatever is known of this machine."""
    found = [(error, pattern.name, size) for pattern in among for size, error in errors(pattern)]
    # NaN is an error without an end
    worst = max(found, key=lambda row: np.inf if np.isnan(row[0]) else row[0])
    return Answer(len(among), len(found), *_plain(*worst))


def _plain(error, name, size):
    return float(error) if np.isfinite(error) else float("inf"), name, int(size)


def errors(pattern: Pattern) -> list[tuple[int, float]]:
    """(size, error relative to the magnitude of the terms) of a pattern; all sizes are one program."""
    inputs = [pattern.make(np.random.default_rng(size), size) for size in pattern.sizes]
    # the program's own settings apply to what it computes, not to this
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        compiled = jax.jit(lambda *inputs: [pattern.compute(*one) for one in inputs])
        outputs = jax.device_get(compiled(*inputs))
    found = []
    for size, one, output in zip(pattern.sizes, inputs, outputs, strict=True):
        exact, magnitude = pattern.exact(*(np.asarray(value, np.float64) for value in one))
        difference = np.abs(np.asarray(output, np.float64) - exact)
        # nothing to be relative to: equality is asked for
        relative = np.where(difference > 0, np.inf, 0.0)
        np.divide(difference, magnitude, out=relative, where=np.asarray(magnitude) > 0)
        found.append((size, float(np.max(relative))))
    return found


def complaint(answer: Answer) -> str:
    """One line: which pattern, at which size, by which versions, and what to do."""
    flags = os.environ.get("XLA_FLAGS", "").strip() or "no flags"
    return (
        f"this compiler computes wrong numbers: {answer.pattern} at size {answer.size} is off by "
        f"{answer.worst:.2g} of its terms, and {TOLERANCE:g} is rounding (jax {jax.__version__}, jaxlib "
        f"{jaxlib_version}, {jax.devices()[0].device_kind}, XLA_FLAGS: {flags}); "
        f"install the versions of requirements-cpu.txt (make setup), or leave out the flags"
    )


def _identity() -> str:
    """Everything that could change the answer: the questions, compiler, flags, devices and processor."""
    source = pathlib.Path(patterns.__file__).read_text() + pathlib.Path(__file__).read_text()
    config, environment = jax.config, os.environ
    parts = [
        source,
        jax.__version__,
        jaxlib_version,
        jax.default_backend(),
        jax.devices()[0].device_kind,
        jax.local_device_count(),
        environment.get("XLA_FLAGS"),
        environment.get("LIBTPU_INIT_ARGS"),
        config.jax_default_matmul_precision,
        config.jax_disable_jit,
        _processor(),
    ]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:20]


def _processor() -> str:
    """What the compiler writes its code for."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in text.splitlines() if line.startswith(("model name", "flags", "Features"))})
    )


def _cache() -> pathlib.Path:
    """Beside the cache of compiled programs (run.py)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(base) / "clustr_jax" / "canary"
