"""folder=: records of another attack, damaged records, folders that cannot be used."""

import errno
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax import attacks, losses
from clustr_jax.attacks import device_loop, records, resuming, scheduler
from clustr_jax.runtime.errors import UserError
from resumed_attacks import (
    DOORS,
    EPS,
    SLOTS,
    Every,
    N,
    call,
    files,
    logits,
    often,  # noqa: F401  autouse fixture
    problem,
    same,
    whole,
)

# Another attack


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """The folder of an interrupted attack."""
    folder = tmp_path_factory.mktemp("left")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "_OPERATIONS", {"cpu": 1000.0})
        patch.setattr(device_loop, "advance", Every(device_loop.advance, 8))
        with pytest.raises(attacks.Interrupted):
            call("apgd", folder)
    return folder


@jax.custom_vjp
def blunt(x):
    return x


blunt.defvjp(lambda x: (x, None), lambda _, g: (g / 2,))


def nudged():
    x, _ = problem()
    x = x.copy()
    x[-1, 0, 0, 0] = np.nextafter(x[-1, 0, 0, 0], np.float32(1))
    return x


OTHERS = {
    "images": lambda: dict(x=nudged()),
    "labels": lambda: dict(y=np.roll(problem()[1], 1)),
    "ids": lambda: dict(ids=np.arange(N) + 1),
    "key": lambda: dict(key=jax.random.key(1)),
    "settings": lambda: dict(eps=EPS * 1.0001),
    "settings: norm": lambda: dict(norm="l2"),
    "settings: steps": lambda: dict(steps=7),
    "settings: restarts": lambda: dict(restarts=1),
    "settings: targeted": lambda: dict(targeted=True),
    "settings: slots": lambda: dict(slots=SLOTS + 1),
    "gradients or loss": lambda: dict(loss_fn=losses.margin),
    "gradients or loss: of the model": lambda: dict(logits_fn=lambda x: logits(blunt(x))),
    "model": lambda: dict(logits_fn=lambda x: logits(x) * jnp.float32(1.00001)),
    "versions or device": lambda: {},
}


@pytest.mark.parametrize("what", list(OTHERS))
def test_records_of_another_attack_are_left_alone(what, left, tmp_path, monkeypatch):
    """It is said what is different, nothing of theirs is taken up, and theirs goes on afterwards."""
    shutil.copytree(left, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in files(tmp_path)}
    assert before
    begun = []

    def run(*args, outcome, **settings):
        begun.append(outcome)
        return outcome

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "run", run)
        with pytest.warns(attacks.RecordWarning) as told, monkeypatch.context() as older:
            if what == "versions or device":
                older.setattr(resuming.provenance, "versions", lambda: {"jax": "0"})
            call("apgd", tmp_path, **OTHERS[what]())
        (line,) = [str(warning.message) for warning in told if warning.category is attacks.RecordWarning]
        assert f"(different: {what.split(':')[0]})" in line and str(tmp_path) in line and len(line) < 500
        assert not begun[0].spent.any() and not begun[0].broken.any() and begun[0].flight is None
        assert {path: path.read_bytes() for path in files(tmp_path)} == before
        call("apgd", tmp_path)
        assert begun[1].spent.any() and begun[1].flight
    assert not files(tmp_path)


def test_a_damaged_record_is_told_and_begun_again(left, tmp_path):
    shutil.copytree(left, tmp_path, dirs_exist_ok=True)
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(attacks.RecordWarning, match="is damaged: APGD starts again"):
        same(call("apgd", tmp_path), whole("apgd"))
    assert not files(tmp_path)


def test_a_bit_that_flips_is_no_result(left, tmp_path):
    """Whatever numpy and zip make of it: the same result, or a warning and the same result."""
    (path,) = files(left)
    content, folder = path.read_bytes(), tmp_path / "partial"
    folder.mkdir()
    x, _ = problem()
    intact = records.Records(left, path.stem.removesuffix("-APGD"), images=True).load("APGD", x, 2)[0]
    found = records.Records(tmp_path, "me", images=True)
    for place in np.random.default_rng(0).integers(0, len(content), 150):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        found.path("APGD").write_bytes(damaged)
        outcome, _ = found.load("APGD", x, 2)
        if outcome is not None:
            assert intact is not None
            np.testing.assert_array_equal(outcome.spent, intact.spent)
            np.testing.assert_array_equal(outcome.x_adv, intact.x_adv)
            for a, b in zip(outcome.flight, intact.flight, strict=True):
                np.testing.assert_array_equal(a, b)


# The folder


def no_folder(kind, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "partial").write_text("")
    return {
        "a file": file, "below a file": file / "below", "null": f"{tmp_path}/a\0b", "empty": "",
        "bytes": b"runs", "number": 5, "long": tmp_path / ("a" * 300), "partial": tmp_path / "taken",
        "home": "~nobody-here/runs", "address": "gs://bucket/run",
    }[kind]  # fmt: skip


@pytest.mark.parametrize("name", list(DOORS))
@pytest.mark.parametrize(
    "kind",
    ["a file", "below a file", "null", "empty", "bytes", "number", "long", "partial", "home", "address"],
)
def test_a_folder_that_cannot_be(name, kind, tmp_path):
    def never(x):
        pytest.fail("it was computed")

    with pytest.raises(UserError, match="folder") as told:
        call(name, no_folder(kind, tmp_path), logits_fn=never)
    assert len(str(told.value)) < 500 and "\n" not in str(told.value)


def test_a_folder_that_is_read_only(tmp_path, monkeypatch):
    def refuse(**settings):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(resuming.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"cannot write records there \(Permission denied\); give a folder"):
        call("square", tmp_path)


def test_a_disk_that_fills_up_ends_no_attack(tmp_path, monkeypatch):
    """It is said once; Ctrl-C says that there is nothing to go on from."""
    wanted = whole("square")
    monkeypatch.setattr(records, "_RECORD_SECONDS", 0.0)

    def full(*args, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(records.np, "savez", full)
    with pytest.warns(attacks.RecordWarning, match="No space left on device.*goes on") as told:
        same(call("square", tmp_path), wanted)
    assert len(told) == 1 and not files(tmp_path)
    monkeypatch.setattr(records, "_RECORD_SECONDS", 100.0)
    monkeypatch.setattr(device_loop, "advance", Every(device_loop.advance, 3))
    with pytest.raises(attacks.Interrupted, match="cannot write records .No space left"):
        call("square", tmp_path)
