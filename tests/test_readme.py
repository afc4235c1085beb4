"""README.md does what it says: its commands are run here, its links lead somewhere.

The blocks are those that a reader copies. Training is shrunk by --config.smoke=True; `make test` would run
itself; what downloads a data set is only looked up. Everything happens in a folder that looks like a clone
to relative paths, with the work directory where README.md has it.
"""

import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

import test_prose as prose
from marks import in_ci
from runs import ROOT

README = (ROOT / "README.md").read_text()
SMOKE = "--config.smoke=True"
# Not run, and why: see the module docstring.
DOWNLOADS = re.compile(r"`(make prepare-tf) && \.venv/bin/python -m ([\w.]+) (\w+)`")
PREPARED = {"svhn": "svhn_cropped"}


def blocks(language):
    """The fenced blocks of this language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands():
    """Every line of the sh blocks as a list of words, comments taken off."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def dataset(command):
    """The prepared data set that a command needs, or None."""
    found = [re.fullmatch(r"--config=configs/(cifar10|cifar100|svhn)\.py.*", word) for word in command]
    names = [match[1] for match in found if match]
    return PREPARED.get(names[0], names[0]) if names else None


def make(*arguments):
    """What make would do: the words of the last command."""
    # The tests are themselves started by make, and by a make of a make in CI: a nested one adds
    # "Entering directory" and "Leaving directory".
    inherited = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    printed = subprocess.run(
        ["make", "-n", *arguments], cwd=ROOT, env=inherited, capture_output=True, text=True, check=True
    ).stdout
    return shlex.split(printed.splitlines()[-1])


@pytest.fixture
def clone(tmp_path):
    """The folder that the commands are run in: configs/ is there, runs/ is not."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


@pytest.fixture
def execute(clone, run):
    """Run one command of README.md, or code, as a reader would; training is shrunk, into `workdir`."""

    def do(command, workdir):
        if command[0] == "make":
            assert len(command) == 2, f"teach this test {shlex.join(command)}"
            command = make(command[1])
        command = [pathlib.PurePath(command[0]).name, *command[1:]]
        if command[:2] == ["python", "run.py"]:
            return run(*command[2:], SMOKE, f"--workdir={workdir}")
        assert command[:2] in (["python", "-m"], ["python", "-c"]), f"teach this test {shlex.join(command)}"
        return run(program=command[1:], PYTHONPATH=str(ROOT))

    return do


HERE = [c for c in commands() if c != ["make", "test"] and dataset(c) is None]
ON_IMAGES = [c for c in commands() if dataset(c) is not None]


def test_all_blocks_are_known():
    """A block of another language would be run by nobody."""
    assert set(re.findall(r"^```(\w+)", README, flags=re.MULTILINE)) == {"sh", "python"}
    assert (
        HERE[0] == ["make", "run"] and len(HERE) >= 3 and len(ON_IMAGES) >= 3 and len(blocks("python")) >= 2
    )
    assert [*commands()].count(["make", "test"]) == 1 and make("test")[1:3] == ["-m", "pytest"]


@pytest.mark.slow
def test_digits_commands_and_code(execute):
    """`make run`, the Python blocks in one process, and whatever else looks at that run, in this order."""
    workdir = "runs/digits-clustr_qtrades"
    stdout, _ = execute(HERE[0], workdir)
    assert "paper" in stdout and "sound" in stdout and "robust accuracy" in stdout
    code = "".join(blocks("python"))
    assert workdir in code
    stdout, _ = execute(["python", "-c", code], workdir)
    assert "robust accuracy" in stdout and "checks: " in stdout  # of clustr_jax.judge, the first block
    clean_and_robust, autoattack = stdout.splitlines()[-2:]
    clean, robust = map(float, clean_and_robust.split())
    assert 0 <= robust < clean <= 1
    assert 0 <= float(autoattack.split()[0]) < clean and "apgd-ce" in autoattack
    for command in HERE[1:]:
        stdout, _ = execute(command, workdir)
        assert stdout, shlex.join(command)


@pytest.mark.slow
@pytest.mark.needs_cifar10
@pytest.mark.parametrize("command", in_ci(ON_IMAGES), ids=lambda command: command[2].partition("/")[2])
def test_commands_on_images(execute, command, data_dir):
    if not any(pathlib.Path(data_dir).glob(f"{dataset(command)}/*/dataset_info.json")):
        pytest.skip(f"no prepared {dataset(command)} in {data_dir}")
    stdout, _ = execute(command, "runs/images")
    assert "results: " in stdout


ROWS, COLUMNS = 60, 100  # of a first screen
MOST_WORDS = 180


def first_screen():
    """As many lines of README.md as a screen of ROWS rows shows, each of as many rows as it is long."""
    shown, rows = [], 0
    for line in README.splitlines():
        rows += max(1, -(-len(line) // COLUMNS))
        if rows > ROWS:
            break
        shown.append(line)
    return "\n".join(shown)


def test_the_first_screen():
    """A picture with a text, two commands, five lines of Python, the claim with our table; few words."""
    screen = first_screen()
    paragraphs = [
        sentence
        for _, paragraph in prose.paragraphs(re.sub(r"!\[[^\]]*\]\([^)]*\)", "", screen))
        if not paragraph.startswith("#")
        for sentence in prose.sentences(paragraph)
    ]
    assert sum(len(prose.words(sentence)) for sentence in paragraphs) <= MOST_WORDS
    assert re.search(r"!\[[^\]]{40,}\]\(docs/figures/verdict\.svg\)", screen)
    (sh,) = re.findall(r"^```sh\n(.*?)^```$", screen, flags=re.MULTILINE | re.DOTALL)
    (python,) = re.findall(r"^```python\n(.*?)^```$", screen, flags=re.MULTILINE | re.DOTALL)
    assert len(sh.splitlines()) == 2 and len([line for line in python.splitlines() if line]) == 5
    assert "clustr_jax.judge(" in python
    assert "74.04" in screen and "0.00 % under" in screen and "<!-- table: digits -->" in screen
    for reader in ("attack", "train", "certify", "reproduce"):
        assert re.search(rf"^\| {reader}.*\]\(", screen, flags=re.MULTILINE)


def test_downloads_exist():
    """The one command that downloads: its target, its module, and the data set that it is given."""
    (target, module, name), *others = DOWNLOADS.findall(README)
    assert not others
    assert any("tensorflow" in word for word in make(target.split()[1]))
    assert importlib.util.find_spec(module) is not None
    usage = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, cwd=ROOT)
    assert name in usage.stderr


def test_links():
    """Every relative link is a file of the repository, and every notebook is there as both."""
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_names_in_backticks():
    """Methods of the table are those that exist, and so are the data sets."""
    from configs import common

    rows = README.split("| method | what |")[1].split("\n\n")[0]
    listed = set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in rows.splitlines()[2:])))
    assert listed == set(common.METHODS)
    names = re.search(r"^Configs: (.*)\. Methods:$", README, flags=re.MULTILINE)
    assert names is not None
    for name in re.findall(r"`(\w+)`", names[1]):
        assert (ROOT / "configs" / f"{name}.py").is_file(), name
