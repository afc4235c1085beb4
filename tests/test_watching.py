"""A long attack in front of a user: Ctrl-C keeps what was found, a bar is drawn where somebody looks."""

import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from clustr_jax import attacks
from clustr_jax.attacks import device_loop

N, SLOTS = 40, 4
SCHEDULED = {
    "apgd": functools.partial(attacks.apgd, steps=5),
    "fab": functools.partial(attacks.fab, steps=5),
    "square": functools.partial(attacks.square, queries=20),
    "autoattack": functools.partial(attacks.autoattack, attacks=("apgd-ce", "square")),
}


def logits(x):
    z = 10 * (x.mean(axis=(1, 2, 3))[:, None] - 0.5)
    return jnp.concatenate([z, -z], axis=1)


def images():
    levels = np.random.default_rng(0).uniform(0.52, 0.9, N).astype(np.float32)
    return np.ones((N, 4, 4, 1), np.float32) * levels[:, None, None, None], np.zeros(N, np.int32)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.more] * (n != "apgd")) for n in SCHEDULED]
)
def test_ctrl_c_keeps_what_was_found(name, monkeypatch):
    """The signal comes between two calls of the device; what was broken by then is as in a whole run."""
    x, y = images()
    run = functools.partial(SCHEDULED[name], logits_fn=logits, x=x, y=y, eps=0.1, slots=SLOTS)
    whole = run(jax.random.key(0))
    calls, advance = [], device_loop.advance

    def interrupted(*args, **settings):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(*args, **settings)

    monkeypatch.setattr(device_loop, "advance", interrupted)
    with pytest.raises(attacks.Interrupted, match=r"\.found") as stopped:
        run(jax.random.key(0))
    found = stopped.value.found
    if name == "autoattack":
        assert found.notes == ("interrupted in apgd-ce",)
        assert (found.robust >= whole.robust).all() and 0 < (~found.robust).sum() < N
        whole, found = whole.x_adv, found.x_adv
    changed = (found != x).any(axis=(1, 2, 3))
    assert 0 < changed.sum() < (whole != x).any(axis=(1, 2, 3)).sum()
    if name != "autoattack":
        np.testing.assert_array_equal(found[changed], whole[changed])
    assert isinstance(stopped.value, KeyboardInterrupt)


@pytest.mark.parametrize("name", list(SCHEDULED))
@pytest.mark.parametrize("progress, terminal, drawn", [
    (None, False, False), (None, True, True), (True, False, True), (False, True, False),
])  # fmt: skip
@pytest.mark.one_in(3)
def test_a_bar_where_somebody_looks(name, progress, terminal, drawn, monkeypatch, capsys):
    made = []

    class Spy(rich.console.Console):
        def __init__(self, **settings):
            super().__init__(force_terminal=terminal, **settings)
            made.append(self)

        def print(self, *what, **settings):
            made.append("printed")
            super().print(*what, **settings)

    monkeypatch.setattr(rich.console, "Console", Spy)
    x, y = images()
    SCHEDULED[name](jax.random.key(0), logits_fn=logits, x=x, y=y, eps=0.1, slots=SLOTS, progress=progress)
    told = capsys.readouterr()
    assert told.out == "" and bool(told.err.strip()) == (drawn and terminal)
