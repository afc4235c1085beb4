"""What a user types: configs by name or path, fractions, near misses; mutated lines are told in one.

Nothing is trained: a run stops where its first step would begin.
"""

import pathlib
import random
import string

import pytest
from ml_collections import ConfigDict

from clustr_jax import data, stages
from clustr_jax.runtime import errors
from clustr_jax.runtime.errors import UserError
from clustr_jax.stages import command_line
from configs import common
from runs import DIGITS, ROOT, assert_one_line

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

CONFIGS = ROOT / "configs"
LINES = 200
LONGEST = 500  # characters of a message


class Accepted(Exception):
    """The settings were found good; what they are."""


@pytest.fixture
def settings(program, monkeypatch):
    """settings(*arguments) -> the config and the work directory that stages.run is given."""

    def call(*arguments):
        monkeypatch.setattr(stages, "run", lambda config, workdir, *_, **__: seen.append((config, workdir)))
        seen = []
        assert program.main(["run.py", *arguments]) == 0
        return seen[0]

    return call


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (("--config.train.attack.eps=8/255",), "train.attack.eps", 8 / 255),
        (("--config.train.attack.eps", "8/255"), "train.attack.eps", 8 / 255),
        (("--config.train.attack.eps= 8 / 255 ",), "train.attack.eps", 8 / 255),
        (("--config.train.lam=-1.5e1/3",), "train.lam", -5.0),
        (("--config.eval.sweep=(2/255, 16/255)",), "eval.sweep", (2 / 255, 16 / 255)),
        (("--config.eval.sweep=2/255,16/255",), "eval.sweep", (2 / 255, 16 / 255)),
        (("--config.eval.curve=[1/4]",), "eval.curve", (0.25,)),
        (("--config.eval.curve=1/4", "--config.eval.curve=1/2"), "eval.curve", (0.25, 0.5)),
        (("--config.data.dir=1/2",), "data.dir", "1/2"),  # a path, and no number
        (("--config.init_from", "8/255"), "init_from", "8/255"),
        (("--config.eval.transfer=('a/1', 'b/2')",), "eval.transfer", ("a/1", "b/2")),
        (("--config.smoke", "--config.seed", "3"), "seed", 3),
        (("--noconfig.smoke",), "smoke", False),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) and isinstance(value[0], str) else "",
)
def test_values(arguments, name, value, settings):
    """Fractions in every numeric setting and nowhere else."""
    found, _ = settings(f"{DIGITS}:clustr", *arguments)
    for part in name.split("."):
        found = found[part]
    found = tuple(found) if isinstance(found, (tuple, list)) else found
    assert found == (pytest.approx(value, rel=1e-15) if isinstance(value, float) else value)


@pytest.mark.parametrize(
    "spec",
    ["cifar10:trades", "cifar10.py:trades", f"{CONFIGS}/cifar10.py:trades", "configs/cifar10.py:trades"],
)
def test_a_config_is_found_by_its_name_and_by_its_path(spec, settings, monkeypatch):
    if spec.startswith(("configs/", "cifar10.py")):
        monkeypatch.chdir(ROOT if spec.startswith("configs/") else CONFIGS)
    config, _ = settings(f"--config={spec}")
    assert (config.data.name, config.method) == ("cifar10", "trades")


def test_a_file_of_the_user_goes_before_a_config_of_ours(settings, tmp_path):
    (tmp_path / "digits").write_text(
        "from configs import common\ndef get_config(arg):\n    c = common.base('digits')\n    c.seed = 7\n"
        "    return common.configure(c, arg)\n"
    )
    assert settings("--config=digits:nominal")[0].seed == 7


def test_settings_may_stand_before_the_config(settings):
    config, workdir = settings(
        "--config.seed=5", "--workdir=w", "--config", "toy2d:nominal", "--config.smoke"
    )
    assert (config.seed, config.data.name, config.smoke, workdir) == (5, "toy2d_moons", True, "w")


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("trade", common.METHODS, "trades"),
        ("clustrqtrades", common.METHODS, "clustr_qtrades"),
        ("CLUSTR", common.METHODS, "clustr"),
        ("cifar11", data.NAMES, "cifar10"),
        ("xyz", data.NAMES, ""),
        ("cup", common.VARIANTS, "cpu"),
        ("", common.METHODS, ""),
    ],
)
def test_the_nearest_name(word, known, expected):
    assert errors.nearest(word, known) == (f" (did you mean {expected}?)" if expected else "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--config=cifr10:trades",), ("cifr10", "did you mean cifar10?")),
        (("--config=configs/cifar1O.py:trades",), ("configs/cifar1O.py", "did you mean cifar10?")),
        (("--config=digits:tades",), ("tades", "did you mean trades?")),
        (("--config=digits:trades,cup",), ("cup", "did you mean cpu?")),
        (("--config=.",), (".", "folder", "digits")),
        (("--config",), ("--config needs",)),
        (("--config=",), ("--config needs",)),
        (("--config.data.name=cifar11",), ("cifar11", "did you mean cifar10?")),
        (("--config.model.name=resnet9",), ("resnet9", "did you mean resnet8?")),
        (("--config.eval.protocols=('soud',)",), ("soud", "did you mean sound?")),
        (("--stages=evalute",), ("evalute", "did you mean evaluate?")),
        (("--config.train.epochs.x=1",), ("train.epochs", "no settings")),
        (("--config.train.attack.eps=8/0",), ("train.attack.eps", "zero")),
        (("--config.eval.sweep=(1/2, 1/0)",), ("eval.sweep", "zero")),
        (("--config.train.epochs=8/2",), ("train.epochs", "8/2")),
        (("--config.model.mean[0]=1",), ("model.mean[0]", "whole")),
        (("--config.train=3",), ("--config.train", "holds settings")),
        (("--config.eval.attack={}",), ("--config.eval.attack", "holds settings")),
        (("--config.train.attack.eps=1/2/3",), ("train.attack.eps", "1/2/3")),
        ((f"--config.variant={'x' * 3000}/y",), ("variant",)),
    ],
    ids=lambda value: value[0][:40] if value[0].startswith("--") else "",
)
def test_mistakes(arguments, words, attempt):
    code, stderr = attempt(*arguments)
    assert code == 2
    assert_told(stderr, words)


def assert_told(stderr, words):
    """One line, not long, which has these words."""
    assert_one_line(stderr)
    assert len(stderr) <= LONGEST, len(stderr)
    for word in words:
        assert word in stderr, stderr


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def get_config(arg):\n    return 1 / 0\n", ("line 2", "division")),
        ("def get_config(arg):\n    return None\n", ("NoneType", "ConfigDict")),
        ("def get_config(:\n", ("line 1",)),
        ("raise SystemExit('out')\n", ("out", "line 1")),
        ("x = 1\n", ("get_config", "configs/digits.py")),
        (
            "def get_config(arg):\n    from ml_collections import ConfigDict\n    return ConfigDict()\n",
            ("has no certify",),
        ),
        (
            "from configs import common\ndef get_config(arg):\n    c = common.base('digits')\n"
            "    c.train.epohcs = 3\n    return common.configure(c, arg)\n",
            ("train.epohcs", "did you mean epochs?"),
        ),
        (
            "from configs import common\ndef get_config(arg):\n    c = common.base('digits')\n"
            "    del c.train\n    c.train = 3\n    return c\n",
            ("train", "settings"),
        ),
        ("import nonesuch\n", ("nonesuch", "line 1")),
        ("\0", ("null",)),
    ],
)
def test_a_config_file_that_fails(body, words, attempt, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(body)
    code, stderr = attempt(f"--config={path}:nominal")
    assert code == 2
    assert_told(stderr, (*words, "mine.py"))


def test_decimals_leave_other_words_alone():
    config = ConfigDict({"eps": 0.1, "n": 3, "name": "", "many": (1,)})
    words = ["run.py", "--workdir=8/255", "8/255", "--config.name", "8/255", "--config.n=8/255", "--nope=1/2"]
    assert command_line.decimals(words, config) == words


# A fuzzer: what users, shells and editors make of a right line.

VALUES = (
    "", "x", "-1", "0", "1e9", "1e400", "nan", "inf", "None", "True", "()", "(1,)", "('a',)", "(nan,)",
    "[", "{}", "1,2",
    "8/255", "8/0", "1/2/3", "/", "../../x", "~nobody/x", "gs://b/x", "ü", "日本", "\udcff", "\0", "'",
    '"', "\\",
    "9" * 5000, "%s", "{0}", "0x10", "1_000", "8 / 255", "(2/255", "--", "-", "=", "x" * 3000, "[1/2]",
    "(((((", "lambda: 0", "__import__('os')", "1e-400", "-0", "١", "½",
)  # fmt: skip
SPECS = (
    "digits:clustr", "toy2d:nominal", "digits", "digits:", ":", "digits:clustr,cpu", "digits:clustr,",
    "digits:x",
    "DIGITS:clustr", "../configs/digits.py:clustr", "digits.py", "/", "", "gs://b/c.py:x",
    "digits:clustr:cpu", "nope",
    "common:x", "\udcff", "x" * 400,
)  # fmt: skip
FLAGS = (
    "--stages={}", "--workdir={}", "--platform={}", "--coordinator={}", "--num_processes={}",
    "--process_id={}",
    "--quiet={}", "--{}", "--config.{}=1", "{}", "--flagfile={}", "--config.data.dir={}",
    "--config.data.name={}",
    "--config.init_from={}", "--config.model.mean[0]={}", "--config.model.mean[{}]=1",
)  # fmt: skip


def leaves(config, prefix=""):
    """Names of all settings, and of the sections."""
    for name, value in config.items():
        yield f"{prefix}{name}"
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{name}.")


LETTERS = string.ascii_letters + string.digits + string.punctuation
NAMES = tuple(leaves(common.base("digits")))


def mutated(rng):
    """A line that was right before something happened to it."""
    spec = rng.choice(SPECS) if rng.random() < 0.3 else rng.choice(SPECS[:2])
    line = [f"--config={spec}", "--config.smoke", "--config.model.width=2"]
    for _ in range(rng.randint(0, 2)):
        if rng.random() < 0.7:
            line.append(f"--config.{rng.choice(NAMES)}={rng.choice(VALUES)}")
        else:
            line.append(rng.choice(FLAGS).format(rng.choice(VALUES)))
    if rng.random() < 0.4:  # a slip of the finger
        at = rng.randrange(len(line))
        word = line[at] or "-"
        i = rng.randrange(len(word))
        kind = rng.choice(("drop", "double", "swap", "split", "other"))
        line[at] = {
            "drop": word[:i] + word[i + 1 :],
            "double": word[:i] + word[i] + word[i:],
            "swap": word[:i] + word[i : i + 2][::-1] + word[i + 2 :],
            "split": word[:i] + " " + word[i:],
            "other": word[:i] + rng.choice(LETTERS) + word[i + 1 :],
        }[kind]
    if rng.random() < 0.2:
        rng.shuffle(line)
    return line


@pytest.mark.more
def test_mutated_command_lines_are_told_in_one_line(attempt, monkeypatch, tmp_path):
    """No traceback; a message is one line under 500 characters that names a setting, a flag or a file."""

    def accept(*_, **__):
        raise Accepted

    monkeypatch.setattr(stages, "_introduce", accept)  # everything was looked at, nothing computed
    # what a platform or a coordinator does to JAX would outlast the test
    monkeypatch.setattr("clustr_jax.runtime.processes.joined", lambda *_: pytest.MonkeyPatch.context())
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    rng, told, accepted, wrong = random.Random(0), 0, 0, []
    for number in range(LINES):
        line = [f"--workdir=run-{number}", *mutated(rng)]  # none is used twice
        if any(word in ("--help", "-h", "--list") for word in line):
            continue
        try:
            code, stderr = attempt(*line)
            assert code == 2
            assert_told(stderr, ())
            told += 1
        except Accepted:
            accepted += 1
        except Exception as error:  # all of them at once are easier to mend
            wrong.append((line, repr(error)[:300]))
    assert wrong == []
    assert told > LINES / 2 and accepted > 5
    outside = [path for path in pathlib.Path.cwd().iterdir() if ":" in path.name]
    assert outside == []


def test_read_without_a_check_takes_any_config(tmp_path):
    """For other programs: names are compared only where they are given."""
    path = tmp_path / "any.py"
    path.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'a': 1})\n"
    )
    assert command_line.read(str(path), CONFIGS).a == 1
    with pytest.raises(UserError, match="has no certify"):
        command_line.read(str(path), CONFIGS, common.base("digits"))
