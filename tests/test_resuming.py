"""folder=: an attack that was interrupted or killed anywhere goes on, and ends as an uninterrupted one."""

import errno
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax import attacks, losses
from clustr_jax.attacks import ensemble, lanes, records, resuming, scheduler
from clustr_jax.runtime.errors import UserError

N, SLOTS, EPS = 16, 4, 0.06
DOORS = {
    "apgd": functools.partial(attacks.apgd, steps=6, restarts=2),
    "fab": functools.partial(attacks.fab, steps=4),
    "square": functools.partial(attacks.square, queries=12, restarts=2),
    "autoattack": functools.partial(attacks.autoattack, attacks=("square", "apgd-ce", "square")),
}
WEIGHTS = np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)


def logits(x):
    return 3 * jnp.tanh(x.reshape(len(x), -1) @ WEIGHTS)


@functools.cache
def problem():
    x = np.random.default_rng(0).uniform(0.2, 0.8, (N, 4, 4, 1)).astype(np.float32)
    return x, np.asarray(logits(x)).argmax(axis=1)


def call(name, folder=None, **other):
    x, y = problem()
    settings = dict(key=jax.random.key(0), logits_fn=logits, x=x, y=y, eps=EPS, slots=SLOTS, progress=False)
    return DOORS[name](**settings | other, folder=folder)


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """The device comes back after each iteration or two; AutoAttack's attacks are short."""
    monkeypatch.setattr(scheduler, "_OPERATIONS", {"cpu": 1000.0})
    monkeypatch.setattr(ensemble, "build", functools.partial(ensemble.build, steps=4, queries=6))


_whole = {}


def whole(name):
    """The result without an interruption and without a folder."""
    if name not in _whole:
        _whole[name] = call(name)
    return _whole[name]


def same(found, wanted):
    if isinstance(wanted, attacks.AutoAttackResult):
        np.testing.assert_array_equal(found.robust, wanted.robust)
        np.testing.assert_array_equal(found.broken_by, wanted.broken_by)
        assert found.notes == wanted.notes
        found, wanted = found.x_adv, wanted.x_adv
    np.testing.assert_array_equal(found, wanted)


def files(folder):
    return sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())


class Every:
    """Wraps a function; SIGINT comes at every `period`th call, before it or after it."""

    def __init__(self, f, period, before=True):
        self.f, self.period, self.before, self.calls = f, period, before, 0

    def __call__(self, *args, **settings):
        self.calls += 1
        now = self.calls % self.period == 0
        if now and self.before:
            os.kill(os.getpid(), signal.SIGINT)
        found = self.f(*args, **settings)
        if now and not self.before:
            os.kill(os.getpid(), signal.SIGINT)
        return found


PLACES = {
    "device": (lanes, "advance", True),
    "judge": (scheduler, "misjudged", False),
    "inside": (scheduler, "verify_inside", True),
    "noted": (scheduler.Outcome, "become", False),
    "written": (records.np, "savez", False),
}


@pytest.mark.parametrize("name", list(DOORS))
@pytest.mark.parametrize("place, period", [("device", 13), ("judge", 6), ("noted", 11)])
def test_it_goes_on_bit_for_bit(name, place, period, tmp_path, monkeypatch):
    """Interrupted again and again until it ends; what was found on the way is what the whole run finds."""
    wanted = whole(name)
    owner, attribute, before = PLACES[place]
    stops = 0
    spy = Every(getattr(owner, attribute), period, before)
    monkeypatch.setattr(owner, attribute, spy if owner is not scheduler.Outcome else lambda *a: spy(*a))
    while True:
        try:
            found = call(name, tmp_path)
            break
        except attacks.Interrupted as stopped:
            stops += 1
            assert f"folder={tmp_path}" in str(stopped) and files(tmp_path)
            part = stopped.found
            if name == "autoattack":
                changed = (part.x_adv != problem()[0]).any(axis=(1, 2, 3))
                np.testing.assert_array_equal(changed, ~part.robust & (part.broken_by != "clean"))
            assert stops < 100
    assert stops > 1
    same(found, wanted)
    assert not files(tmp_path) and tmp_path.exists()


@pytest.mark.parametrize("name, place", [("apgd", "inside"), ("square", "written")])
def test_other_places(name, place, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_RECORD_SECONDS", 0.0)
    test_it_goes_on_bit_for_bit(name, place, 6, tmp_path, monkeypatch)


@pytest.mark.parametrize("part, stops", [("", 4), ("_take", 6)])
def test_any_line_of_it(part, stops, tmp_path, monkeypatch):
    """KeyboardInterrupt on lines spread over the whole call, and over the noting of what the device found."""
    wanted = whole("square")
    monkeypatch.setattr(records, "_RECORD_SECONDS", 0.0)
    ours = {module.__file__ for module in (scheduler, ensemble, records, resuming)}

    def lines(stop):
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            if frame.f_code.co_filename not in ours or part not in frame.f_code.co_name:
                return None
            if event == "line":
                count += 1
                if count == stop:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            call("square", tmp_path)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        return count

    call("square", tmp_path)
    total = lines(None)  # nothing is compiled
    for stop in np.linspace(1, total - 1, stops).astype(int):
        assert lines(int(stop)) >= stop
        same(call("square", tmp_path), wanted)
        assert not files(tmp_path)


def test_a_half_noted_call_is_made_again(tmp_path, monkeypatch):
    """Restarts that began and ended in one call of the device: their counts are never kept without them."""
    wanted, judged = whole("apgd"), []
    monkeypatch.setattr(scheduler, "_OPERATIONS", {"cpu": 1e12})

    def flatnonzero(a):
        """Ctrl-C where the first success is noted, after what was spent."""
        found = nonzero(a)
        if a.dtype == bool and a.ndim == 1 and sys._getframe(1).f_code.co_name == "_take" and judged:
            judged.clear()
            raise KeyboardInterrupt
        return found

    def verify(*args):
        judged.append(1)
        return inside(*args)

    nonzero, inside = np.flatnonzero, scheduler.verify_inside
    monkeypatch.setattr(scheduler, "verify_inside", verify)
    monkeypatch.setattr(scheduler.np, "flatnonzero", flatnonzero)
    with pytest.raises(attacks.Interrupted):
        call("apgd", tmp_path)
    monkeypatch.setattr(scheduler.np, "flatnonzero", nonzero)
    same(call("apgd", tmp_path), wanted)


def test_the_second_attack_of_the_ensemble(tmp_path, monkeypatch):
    """The first one is not run again, and the calls of the device are as many as without an interruption."""
    wanted = whole("autoattack")
    device = Every(lanes.advance, 10**9)
    monkeypatch.setattr(lanes, "advance", device)
    call("autoattack")
    needed, device.calls = device.calls, 0
    stopped = None
    for at in range(needed // 2 - 1, needed):
        device.calls, device.period = 0, at
        try:
            call("autoattack", tmp_path / str(at))
        except attacks.Interrupted as caught:
            if caught.found.notes == ("interrupted in apgd-ce",):
                stopped = caught
                break
    assert stopped is not None
    folder = tmp_path / str(at)
    assert [path.name.split("-", 2)[2] for path in files(folder)] == ["0-square.npz", "1-apgd-ce.npz"]
    assert (stopped.found.broken_by == "square").any()
    device.calls, device.period = 0, 10**9
    same(call("autoattack", folder), wanted)
    assert device.calls == needed - at + 1
    assert not files(folder)


# Another attack


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """The folder of an interrupted attack."""
    folder = tmp_path_factory.mktemp("left")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "_OPERATIONS", {"cpu": 1000.0})
        patch.setattr(lanes, "advance", Every(lanes.advance, 8))
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
    monkeypatch.setattr(lanes, "advance", Every(lanes.advance, 3))
    with pytest.raises(attacks.Interrupted, match="cannot write records .No space left"):
        call("square", tmp_path)


def test_a_process_that_is_killed(tmp_path, monkeypatch):
    """Its records are another process's to go on from."""
    wanted = whole("apgd")
    code = (
        "import os, test_resuming as t\n"
        "t.scheduler._OPERATIONS, t.records._RECORD_SECONDS = {'cpu': 1000.0}, 0.0\n"
        "advance, calls = t.lanes.advance, []\n"
        "def killed(*args, **settings):\n"
        "    calls.append(1)\n"
        "    return os._exit(7) if len(calls) == 9 else advance(*args, **settings)\n"
        "t.lanes.advance = killed\n"
        f"t.call('apgd', {str(tmp_path)!r})\n"
    )
    here = pathlib.Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    env = os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": "3", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr
    device = Every(lanes.advance, 10**9)
    monkeypatch.setattr(lanes, "advance", device)
    call("apgd")
    needed, device.calls = device.calls, 0
    same(call("apgd", tmp_path), wanted)
    assert device.calls == needed - 8 and not files(tmp_path)
