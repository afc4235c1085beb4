"""What a newcomer types first works, or is answered with what to type instead.

Twelve guesses; fractions, names of configs and near misses have more rows in test_command_line.py.
"""

import doctest
import re
import shutil
import subprocess

import pytest

from clustr_jax import command, stages
from clustr_jax.command import completion, guesses
from configs import common
from runs import DIGITS, ROOT, assert_one_line

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture
def accepted(program, monkeypatch):
    """accepted(*arguments) -> the config that a run would begin with."""

    def call(*arguments):
        seen = []
        monkeypatch.setattr(stages, "run", lambda config, *_, **__: seen.append(config))
        assert program.main(["run.py", *arguments]) == 0
        return seen[0]

    return call


def test_what_works(accepted):
    """1 a fraction, 2 a config by its name, 3 settings before --config."""
    config = accepted("--config.train.attack.eps=8/255", "--config.seed=3", "--config=cifar10:trades")
    assert config.train.attack.eps == 8 / 255 and config.seed == 3
    assert (config.data.name, config.method) == ("cifar10", "trades")


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (("--config=cifra10:trades",), "did you mean cifar10?"),  # 4 to 7: data set, method, variant, setting
        (("--config=digits:trade",), "did you mean trades?"),
        (("--config=digits:trades,cpuu",), "did you mean cpu?"),
        ((DIGITS, "--config.train.epoch=3"), "did you mean epochs?"),
        (("cifar10",), "--config=cifar10"),  # 8: python run.py cifar10
        (("cifar10.py:trades",), "--config=cifar10.py:trades"),
        (("configs/cifar10.py",), "--config=configs/cifar10.py"),
        (("trades",), "--config=digits:trades"),
        (("report",), "clustr-jax report"),
        (("train.epochs=3",), "--config.train.epochs=3"),
        (("configs",), "--workdir=configs"),
        (("sifar10",), "did you mean cifar10?"),
        (("--epochs=3",), "--config.train.epochs"),  # 9: a setting without its --config
        (("--train.epochs=3",), "the setting is --config.train.epochs"),
        (("--dataset=cifar10", "--method=trades"), "--config=cifar10:trades"),
        (("--workdri=x",), "did you mean workdir?"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_what_is_answered_with_the_remedy(arguments, remedy, attempt, monkeypatch):
    if arguments == ("configs",):
        monkeypatch.chdir(ROOT)
    code, stderr = attempt(*arguments)
    assert code == 2 and remedy in stderr
    assert_one_line(stderr)
    assert len(stderr) <= 500


@pytest.mark.parametrize("word", ["x" * 4000, "a\0b", "=", "\udcff", "..", "-"])
def test_any_word_gets_one_line(word, attempt):
    code, stderr = attempt(word)
    assert code == 2 and len(stderr) <= 500
    assert_one_line(stderr)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"]])
def test_help_anywhere(words, program, capsys):
    """10."""
    assert program.main(["run.py", *words]) == 0 and "--config.KEY=VALUE" in capsys.readouterr().out
    assert command.main(words) == 0 and "clustr-jax train" in capsys.readouterr().out
    assert program.main(["run.py", "--config=digits", "--help"]) == 0


def test_the_command(capsys, monkeypatch, tmp_path):
    """11 clustr-jax without arguments, report without a directory, a near miss, a config in its place."""
    monkeypatch.chdir(tmp_path)
    assert command.main([]) == 2
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in command.COMMANDS)
    assert max(map(len, listed.splitlines())) <= 80
    for words, remedy in (
        (["report"], "`clustr-jax train` makes one"),
        (["quirks"], "`clustr-jax train` makes one"),
        (["trian"], "did you mean train?"),
        (["cifar10:trades"], "clustr-jax train --config=cifar10:trades"),
        (["completion"], "bash, zsh, fish"),
        (["compare", "a", "b"], "clustr-jax report DIR DIR"),
        (["run"], "clustr-jax train"),
        (["--list"], "clustr-jax train --list"),
        (["attack"], "clustr-jax judge module:function"),
    ):
        assert command.main(words) == 2
        said = capsys.readouterr().err
        assert remedy in said
        assert_one_line(said)
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert command.main(["report"]) == 2 and "runs/mine" in capsys.readouterr().err
    assert command.main(["--version"]) == 0 and "jax 0." in capsys.readouterr().out


def test_make_alone():
    """12: the targets in groups, one line each, in 80 columns."""
    said = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^  make ([\w-]+) ", said, flags=re.MULTILINE)
    assert targets[:2] == ["setup", "run"] and said.startswith("To begin\n")
    assert max(map(len, said.splitlines())) <= 80
    (phony,) = re.findall(r"^\.PHONY: help (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert sorted(phony.split()) == sorted(targets)


def test_examples():
    assert not doctest.testmod(guesses, extraglobs={"guesses": guesses}).failed


SETTINGS = list(guesses.names(common.base("digits")))


def script(shell):
    return completion.script(
        shell, ["cifar10", "digits"], list(common.METHODS), list(common.VARIANTS), SETTINGS
    )


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("breaks", [" \t\n\"'><=;|&(:", " \t\n"], ids=["usual breaks", "none"])
@pytest.mark.parametrize(
    ("line", "offered", "left_out"),
    [
        ("clustr-jax ", "train report completion", "bash"),
        ("clustr-jax tr", "train", "report"),
        ("clustr-jax train --conf", "--config= --config.seed=", "--workdir="),
        ("clustr-jax train --config=", "--config=cifar10 --config=digits", "--config=trades"),
        ("clustr-jax train --config=ci", "--config=cifar10", "--config=digits"),
        ("clustr-jax train --config=digits:qtr", "--config=digits:qtrades", "--config=digits:trades"),
        ("clustr-jax train --config=a:b,c", "--config=a:b,cpu", "--config=a:b,fast"),
        ("clustr-jax train --config.train.attack.e", "--config.train.attack.eps=", "--config.train.epochs="),
        ("clustr-jax completion ", "bash zsh fish", "train"),
    ],
)
def test_bash_completes(line, offered, left_out, breaks, tmp_path):
    """As readline would have it: what is offered replaces the word after its last break."""
    (tmp_path / "script").write_text(script("bash"))
    code = 'source "$1"; COMP_WORDBREAKS=$3 COMP_LINE=$2 COMP_POINT=${#2}; _clustr_jax'
    code += '; printf "%s\\n" "${COMPREPLY[@]}"'
    words = ["bash", "--norc", "-c", code, "bash", tmp_path / "script", line, breaks]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    word = line.rpartition(" ")[2]
    kept = word[: max(word.rfind("="), word.rfind(":")) + 1] if ":" in breaks else ""
    found = {kept + reply for reply in done.stdout.splitlines()}
    assert found >= set(offered.split()) and not found & set(left_out.split())


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_script_has_every_name(shell):
    text = script(shell)
    for name in (*command.COMMANDS, *common.METHODS, *common.VARIANTS, "config.train.epochs", "workdir"):
        assert name in text
    assert "@" not in text.replace("${(@f)", "").replace("[@]", "")
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=text, capture_output=True, text=True).returncode == 0
