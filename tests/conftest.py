"""Settings and fixtures shared by all tests.

Compiled programs are kept between sessions (compiled.py). Rank promotion raises, so a forgotten axis cannot
broadcast silently; a PRNG key used twice raises (tests that repeat a call on purpose say so with
`jax.random.clone`). Hypothesis is derandomised: a red run is red again.
"""

import contextlib
import gc
import os
import pathlib
import signal

import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest

import compiled
import marks
import shapes  # noqa: F401  before clustr_jax is imported
from clustr_jax.runtime import canary
from clustr_jax.runtime.errors import UserError
from faults import table  # noqa: F401  one for all files of faults
from runs import ROOT, attempt, program, reference, run, shared, start  # noqa: F401  fixtures, for all files

jax.config.update("jax_compilation_cache_dir", str(compiled.PROGRAMS))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=15, database=None
)
hypothesis.settings.load_profile("repeatable")

NO_CIFAR10 = (
    "no prepared TFDS CIFAR-10 (looked for cifar10/*/dataset_info.json in $TFDS_DATA_DIR "
    "or ~/tensorflow_datasets)"
)


def pytest_sessionstart():
    """No test says anything where the compiler computes wrong numbers."""
    try:
        canary.check()
    except UserError as error:
        pytest.exit(str(error), returncode=2)


def _data_dir():
    """The TFDS folder if it holds a prepared CIFAR-10, else None."""
    folder = os.environ.get("TFDS_DATA_DIR") or pathlib.Path.home() / "tensorflow_datasets"
    prepared = any(pathlib.Path(folder).glob("cifar10/*/dataset_info.json"))
    return str(folder) if prepared else None


def pytest_configure(config):
    config.addinivalue_line("markers", "needs_cifar10: skipped without a prepared TFDS CIFAR-10")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # as a background job of a shell: the runs that tests send it to would inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before -m looks
def pytest_collection_modifyitems(items):
    for item in marks.beyond_one_in(items):
        item.add_marker(pytest.mark.more)
    for item in items:
        if item.get_closest_marker("long") or item.get_closest_marker("more"):
            item.add_marker(pytest.mark.slow)
    if _data_dir() is None:
        for item in items:
            if item.get_closest_marker("needs_cifar10"):
                item.add_marker(pytest.mark.skip(reason=NO_CIFAR10))


# A compiled program holds memory mappings, of which Linux gives a process 65,530. Where they run out,
# jaxlib dies of a segmentation fault as it reads or writes its cache. A slow test can take 6,000.
_MAPPINGS, _EVERY = 25_000, 40


@pytest.fixture(autouse=True)
def _mappings(request):
    """Programs are forgotten in time; what is needed again comes from the cache on disk."""
    yield
    request.config.tests_run = getattr(request.config, "tests_run", 0) + 1
    due = request.config.tests_run % _EVERY == 0 or request.node.get_closest_marker("slow")
    maps = pathlib.Path("/proc/self/maps")
    if due and maps.exists() and maps.read_bytes().count(b"\n") > _MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def _shapes(request):
    """Annotations are not checked where wrong arrays are handed over on purpose."""
    jaxtyping.config.update("jaxtyping_disable", request.node.get_closest_marker("wrong_arrays") is not None)


@pytest.fixture
def importable(monkeypatch):
    """The configs are files beside the package, not part of it."""
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture
def data_dir():
    """Folder of the prepared data sets; skips the test, saying why, if there is none."""
    folder = _data_dir()
    if folder is None:
        pytest.skip(NO_CIFAR10)
    return folder


@pytest.fixture
def key():
    """A fresh key per test; single use, so split it or clone it."""
    return jax.random.key(0)


@pytest.fixture
def rng():
    """NumPy generator with a fixed seed, for test data."""
    return np.random.default_rng(0)


@pytest.fixture
def compilations():
    """A context that collects what XLA compiles in it: `with compilations() as found: ...; len(found)`."""

    @contextlib.contextmanager
    def collect():
        found = []

        def note(event, seconds, **_):
            if event == "/jax/core/compile/backend_compile_duration":
                found.append(seconds)

        jax.monitoring.register_event_duration_secs_listener(note)
        try:
            yield found
        finally:
            jax.monitoring.unregister_event_duration_listener(note)

    return collect
