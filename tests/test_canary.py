"""The compiler's canary: right programs pass, and each wrong one is noticed and named."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from clustr_jax.runtime import canary
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.patterns import PATTERNS
from runs import DIGITS, assert_one_line

NAMES = [pattern.name for pattern in PATTERNS]


def wrong(pattern, change):
    """The pattern at its largest two sizes of at most 33, with another result."""
    sizes = tuple(size for size in pattern.sizes if size <= 33)[-2:]
    return dataclasses.replace(pattern, sizes=sizes, compute=lambda *a: change(pattern.compute(*a)))


def last_row_off(values):
    """As jaxlib 0.10.2: only what is left over after the last whole block is wrong."""
    return values.at[-1].set(values[-1] + jnp.asarray(1 + 0.01 * jnp.abs(values[-1]), values.dtype))


@pytest.fixture
def empty(monkeypatch, tmp_path):
    """Nothing is known of this machine, by this process or by a file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    canary._answer.cache_clear()
    yield tmp_path / "cache" / "clustr_jax" / "canary"
    canary._answer.cache_clear()


def test_this_machine_passes():
    """The whole set: some dozens of kinds, hundreds of sizes, and rounding far below the limit."""
    answer = canary.check()
    assert answer.patterns == len(set(NAMES)) >= 30 and answer.programs >= 250
    assert 0 < answer.worst <= canary.TOLERANCE / 4


@pytest.mark.parametrize("pattern", PATTERNS, ids=NAMES)
def test_one_wrong_row_is_noticed(pattern):
    """In every kind of program."""
    assert canary.measure((wrong(pattern, last_row_off),)).worst > canary.TOLERANCE


def test_nan_is_noticed():
    """A comparison with NaN is false: it must not pass for that."""
    answer = canary.measure((PATTERNS[0], wrong(PATTERNS[1], lambda values: values * jnp.nan), PATTERNS[2]))
    assert answer.worst == float("inf") and answer.pattern == PATTERNS[1].name


def test_the_magnitudes_are_no_excuse():
    """What an error is relative to is of the size of the values: within a factor of 300 of their largest."""
    for pattern in PATTERNS:
        arrays = pattern.make(np.random.default_rng(0), 33)
        values, magnitude = pattern.exact(*(np.asarray(a, np.float64) for a in arrays))
        assert np.shape(values) == np.shape(magnitude), pattern.name
        assert np.max(magnitude) <= 300 * np.max(np.abs(values)), pattern.name


@pytest.fixture
def broken(empty, monkeypatch):
    """A compiler that gets the first pattern wrong."""
    measured = canary.measure((wrong(PATTERNS[0], last_row_off),))
    monkeypatch.setattr(canary, "measure", lambda: measured)
    return empty


def test_a_wrong_number_ends_the_program(broken, attempt):
    """run.py: one line with pattern, size, versions and what to do, before anything is written as done."""
    code, stderr = attempt(f"{DIGITS}:nominal", "--config.smoke=True", "--workdir=here")
    assert code == 2
    assert_one_line(stderr)
    for part in (PATTERNS[0].name, "size 33", jax.__version__, jaxlib.__version__, "make setup"):
        assert part in stderr
    assert len(stderr) < 500
    assert not list(broken.glob("*.json"))  # what failed is asked again


@pytest.mark.wrong_arrays
def test_every_door_of_an_evaluation_asks(broken):
    """Without run.py as well."""
    from clustr_jax.evaluation import certificates, protocols

    for door in (
        lambda: protocols.run_clean(None, None, None),
        lambda: protocols.run("sound", None, None, None, None, None),
        lambda: certificates.run(None, None, None, None, None, None, None, slots=1),
    ):
        with pytest.raises(UserError, match="wrong numbers"):
            door()


def test_an_answer_is_kept(empty, monkeypatch):
    """In a file for other processes; another set of flags is another question; a damaged file is none."""
    few = canary.measure(PATTERNS[:1])
    asked = []
    monkeypatch.setattr(canary, "measure", lambda: asked.append(1) or few)
    for _ in range(2):
        canary._answer.cache_clear()
        assert canary.check() == few
    (file,) = empty.glob("*.json")
    assert len(asked) == 1 and json.loads(file.read_text()) == dataclasses.asdict(few)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    canary.check()
    assert len(asked) == 2 and len(list(empty.glob("*.json"))) == 2
    monkeypatch.delenv("XLA_FLAGS")
    file.write_text("{")
    canary._answer.cache_clear()
    assert canary.check() == few and len(asked) == 3


def test_without_a_folder_to_write_to_it_is_asked_each_time(monkeypatch, tmp_path):
    """A read-only home is no reason to end."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    few = canary.measure(PATTERNS[:1])
    monkeypatch.setattr(canary, "measure", lambda: few)
    canary._answer.cache_clear()
    try:
        assert canary.check().patterns == 1
    finally:
        canary._answer.cache_clear()
