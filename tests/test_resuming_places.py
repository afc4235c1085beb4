"""folder=: an attack that was interrupted or killed anywhere goes on, and ends as an uninterrupted one."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from clustr_jax import attacks
from clustr_jax.attacks import calls, device_loop, ensemble, records, resuming, scheduler
from resumed_attacks import (
    DOORS,
    PLACES,
    Every,
    call,
    files,
    often,  # noqa: F401  autouse fixture
    problem,
    same,
    whole,
)


@pytest.mark.more
@pytest.mark.parametrize("name", list(DOORS))
@pytest.mark.parametrize("place, period", [("device", 13), ("judge", 6), ("noted", 11)])
def test_it_goes_on_bit_for_bit(name, place, period, tmp_path, monkeypatch):
    """Interrupted again and again until it ends; what was found on the way is what the whole run finds."""
    wanted = whole(name)
    owner, attribute, before = PLACES[place]
    stops = 0
    if name == "fmn" and place == "judge":
        period *= 15  # what one run found is brought in by some 60 calls, and that is noted as a whole
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


@pytest.mark.more
@pytest.mark.parametrize("part, stops", [("", 4), ("_take", 6)])
def test_any_line_of_it(part, stops, tmp_path, monkeypatch):
    """KeyboardInterrupt on lines spread over the whole call, and over the noting of what the device found."""
    wanted = whole("square")
    monkeypatch.setattr(records, "_RECORD_SECONDS", 0.0)
    ours = {module.__file__ for module in (scheduler, calls, ensemble, records, resuming)}

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
    device = Every(device_loop.advance, 10**9)
    monkeypatch.setattr(device_loop, "advance", device)
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


def test_a_process_that_is_killed(tmp_path, monkeypatch):
    """Its records are another process's to go on from."""
    wanted = whole("apgd")
    code = (
        "import os, resumed_attacks as t\n"
        "t.scheduler._OPERATIONS, t.records._RECORD_SECONDS = {'cpu': 1000.0}, 0.0\n"
        "advance, calls = t.device_loop.advance, []\n"
        "def killed(*args, **settings):\n"
        "    calls.append(1)\n"
        "    return os._exit(7) if len(calls) == 9 else advance(*args, **settings)\n"
        "t.device_loop.advance = killed\n"
        f"t.call('apgd', {str(tmp_path)!r})\n"
    )
    here = pathlib.Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    env = os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": "3", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr
    device = Every(device_loop.advance, 10**9)
    monkeypatch.setattr(device_loop, "advance", device)
    call("apgd")
    needed, device.calls = device.calls, 0
    same(call("apgd", tmp_path), wanted)
    assert device.calls == needed - 8 and not files(tmp_path)
