"""Faults put in on purpose: mutated command lines and config files."""

import random
import shutil

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from clustr_jax.training import train
from configs import digits
from faults import INPUTS
from runs import DIGITS, assert_one_line

pytestmark = [
    pytest.mark.slow,
    # orbax and ml_collections use outdated calls of their own libraries
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning"
    ),
]


class Accepted(Exception):
    """The settings were found good, training began."""


def leaves(config, prefix=""):
    """Names of all settings."""
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


NAMES = tuple(leaves(digits.get_config("clustr_qtrades")))
WORDS = st.sampled_from((
    "", "x", "-1", "0", "1", "2", "1e9", "-0.5", "0.5", "1e-30", "nan", "inf", "-inf", "None", "True", "()",
    "(1,)", "(0,)", "(-1,)", "('a',)", "(nan,)", "[", "{}", "1,2", "../../x", "/", "a b", "ü", "'", '"', "\\",
    "1" * 40, "cifar10", "sound", "('sound', 'sound')", "digits", "cnn", "mlp", "\t", "%s", "$HOME", "0x10",
))  # fmt: skip
METHODS = st.sampled_from((
    "clustr_qtrades", "nominal", "free_at", "at_pretrain", "clustr_trades", "clustr,cpu", "clustr,", ",", "",
    "clustr_qtrades,cpu,cpu", "CLUSTR", "clustr ", "../x", "nominal_certified",
))  # fmt: skip


STRAYS = ("--stages=", "--stages=evaluate,,", "--nope", "stray", "--config.train=3")


@st.composite
def commands(draw):
    """A mutated command line: an unknown method, strange values for real settings, strange flags."""
    arguments = [f"{DIGITS}:{draw(METHODS)}"] if draw(st.booleans()) else [f"{DIGITS}:clustr_qtrades"]
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(NAMES))
        if draw(st.integers(0, 9)) == 0:
            name = name[::-1]
        arguments.append(f"--config.{name}={draw(WORDS)}")
    if draw(st.integers(0, 5)) == 0:
        arguments.append(draw(st.sampled_from(STRAYS)))
    return tuple(arguments)


def assert_told(attempt, arguments, counts):
    """Either the settings are good enough to start training, or it is one line and exit code 2."""
    try:
        code, stderr = attempt(*arguments)
    except Accepted:
        counts["accepted"] += 1
        return
    assert code == 2, (arguments, code, stderr)
    assert_one_line(stderr)
    counts["told"] += 1


@pytest.fixture
def counts():
    return {"accepted": 0, "told": 0}


def _accept(*_):
    raise Accepted


def test_mutated_command_lines(attempt, monkeypatch, tmp_path, counts, table):
    """What is not refused gets as far as its first training step."""
    monkeypatch.setattr(train, "run_steps", _accept)
    number = 0

    @settings(
        max_examples=INPUTS,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(commands())
    def each(arguments):
        nonlocal number
        number += 1
        folder = tmp_path / f"run-{number}"
        small = ("--config.data.train_size=200", "--config.model.width=2", "--config.magnet.n_init=1")
        assert_told(attempt, (arguments[0], *small, *arguments[1:], f"--workdir={folder}"), counts)
        shutil.rmtree(folder, ignore_errors=True)

    each()
    table.append(
        (
            "mutated command lines",
            counts["accepted"] + counts["told"],
            f"{counts['told']} told in one line with exit code 2, {counts['accepted']} valid; no traceback",
        )
    )


GOOD = (
    "from configs import common\n\n\ndef get_config(arg='nominal'):\n"
    "    c = common.base('digits')\n    c.model.name = 'cnn'\n    c.eval.attack.eps = 0.2\n"
    "    return common.configure(c, arg)\n"
)


def test_mutated_config_files(attempt, monkeypatch, tmp_path, counts, table):
    """Characters lost, doubled or replaced in a config file."""
    monkeypatch.setattr(train, "run_steps", _accept)
    rng = random.Random(4)
    for number in range(INPUTS // 3):
        text = GOOD
        for _ in range(rng.randint(1, 2)):
            i = rng.randrange(len(text))
            text = text[:i] + rng.choice(("", text[i] * 2, "\0", "'", "(", " ", "7", "\n")) + text[i + 1 :]
        path = tmp_path / f"config_{number}.py"
        path.write_text(text)
        folder = tmp_path / f"run-{number}"
        assert_told(attempt, (f"--config={path}:nominal", f"--workdir={folder}"), counts)
        shutil.rmtree(folder, ignore_errors=True)
    table.append(
        (
            "mutated config files",
            counts["accepted"] + counts["told"],
            f"{counts['told']} told in one line with exit code 2, {counts['accepted']} valid; no traceback",
        )
    )
