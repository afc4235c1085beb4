"""Mistakes of a user of run.py: each is told in one line."""

import importlib.util
import sys

import jax
import pytest

from clustr_jax import stages
from clustr_jax.data import toy
from clustr_jax.report.record import read as read_record
from clustr_jax.runtime.errors import UserError
from clustr_jax.storage import loading
from clustr_jax.training import train
from runs import DIGITS, ROOT, assert_one_line, metrics, read
from smoke_runs import toy2d

# orbax and ml_collections use outdated calls of their own libraries.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")
]


@pytest.fixture
def mistake(attempt, monkeypatch):
    """mistake(*arguments) -> the one line that run.main prints to stderr when it returns 2."""
    monkeypatch.setattr(train, "run_steps", lambda *_: pytest.fail("it began to train"))

    def message(*arguments):
        code, stderr = attempt(*arguments)
        assert code == 2
        assert_one_line(stderr)
        return stderr[len("error: ") : -1]

    return message


DIGITS_METHOD = f"{DIGITS}:clustr_qtrades"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((f"{DIGITS}:trade",), ("unknown method 'trade'", "clustr_qtrades")),
        ((f"{DIGITS}:clustr,gpu",), ("unknown variant 'gpu'", "cpu")),
        ((DIGITS_METHOD, "--config.train.epohcs=5"), ("epohcs", "epochs")),
        ((DIGITS_METHOD, "--confg.train.epochs=5"), ("confg.train.epochs",)),
        ((DIGITS_METHOD, "--config.train.attack.steps=5.5"), ("steps", "5.5")),
        ((DIGITS_METHOD, "--config.eval.attack.steps=5.5"), ("steps", "5.5")),
        ((DIGITS_METHOD, "--config.eval.attack.eps=-0.1"), ("eps must be >= 0", "-0.1")),
        ((DIGITS_METHOD, "--config.train.attack.eps=-0.1"), ("eps must be >= 0", "-0.1")),
        ((DIGITS_METHOD, "--config.eval.attack.eps=8//255"), ("eps", "8//255")),
        ((DIGITS_METHOD, "--config.magnet.k=200"), ("class", "k=200", "magnet.k")),
        ((DIGITS_METHOD, "--config.magnet.clusters=21"), ("magnet.clusters is 21", "20 clusters")),
        ((DIGITS_METHOD, "--stages=2_trian"), ("unknown stage '2_trian'", "2_train")),
        ((DIGITS_METHOD, "--stages="), ("--stages names no stage", "2_train")),
        ((f"{DIGITS}:nominal", "--stages=1_warmup"), ("nominal has no 1_warmup", "2_train")),
        (("--config=digit.py:clustr",), ("digit.py",)),
        ((f"--config={ROOT}/configs/digit.py:clustr",), ("digit.py",)),
        ((DIGITS_METHOD, "--config.model.name=resnet50"), ("unknown model 'resnet50'", "resnet18")),
        ((DIGITS_METHOD, "--config.model.name=mlp"), ("mlp takes points",)),
        ((DIGITS_METHOD, "--config.data.name=mnist"), ("unknown data set 'mnist'", "cifar10")),
        ((DIGITS_METHOD, "clustr"), ("unexpected argument 'clustr'",)),
        ((DIGITS_METHOD, "--stages", "evaluate", "2_train"), ("unexpected argument '2_train'",)),
        ((DIGITS_METHOD, "--stages=evaluate"), ("2_train is not finished",)),
        ((DIGITS_METHOD, "--stages=2_train"), ("2_train needs 1_warmup",)),
        ((DIGITS_METHOD, "--config.init_from=nowhere"), ("no finished stage in", "nowhere")),
        ((DIGITS_METHOD, "--config.fidelity.preset=paper"), ("fidelity.preset", "paper_code")),
        ((DIGITS_METHOD, "--config.eval.protocols=('autoattac',)"), ("unknown 'autoattac'", "sound")),
        # found only after the training if nobody looks before
        ((DIGITS_METHOD, "--config.eval.n=400"), ("400", "359")),
        ((DIGITS_METHOD, "--config.warmup.milestones=('a',)"), ("milestones",)),
        ((f"{DIGITS}:nominal", "--config.data.val_size=0.9999"), ("val_size",)),
    ],
    ids=lambda value: value[-1].rpartition("/")[2] if value[0].startswith("--") else "",
)
def test_mistakes_are_told_in_one_line(arguments, words, mistake, tmp_path):
    """Exit code 2, one line that starts with error: and names what is wrong; nothing was trained."""
    message = mistake(*arguments, f"--workdir={tmp_path / 'run'}")
    for word in words:
        assert word in message
    assert not list(tmp_path.glob("run/*/checkpoints/*"))


def test_a_config_file_without_get_config(mistake, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # it would be executed into
    message = mistake(f"--config={ROOT}/clustr_jax/runtime/errors.py:clustr", f"--workdir={tmp_path / 'run'}")
    assert "no function get_config" in message and "configs/digits.py" in message


@pytest.mark.parametrize("name", ["cifar10", "svhn_cropped"])
def test_a_data_set_that_is_not_prepared(name, mistake, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "tensorflow" else find_spec(n, *a)
    )
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "empty"))
    message = mistake(
        f"--config={ROOT}/configs/{name.partition('_')[0]}.py:clustr", f"--workdir={tmp_path / 'run'}"
    )
    assert f"{name} is not prepared" in message and str(tmp_path / "empty") in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("--config.train.lr=0.5", "train.lr: 0.001 there, 0.5 now"),
        ("--config.seed=3", "seed: 0 there, 3 now"),
        ("--config.data.train_size=500", "data.train_size: 0 there, 500 now"),
        ("--config.model.width=8", "model.width"),
        ("--config.fidelity.hinge=eps", "fidelity.hinge"),
    ],
)
def test_a_work_directory_of_another_training(change, what, mistake, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert "nothing to evaluate" in mistake(DIGITS_METHOD, "--stages=evaluate", workdir)
    config = (tmp_path / "run" / "config.json").read_bytes()
    message = mistake(DIGITS_METHOD, "--stages=evaluate", workdir, change)
    assert what in message and str(tmp_path / "run") in message
    assert (tmp_path / "run" / "config.json").read_bytes() == config
    # evaluation settings may change
    assert "nothing to evaluate" in mistake(
        DIGITS_METHOD, "--stages=evaluate", workdir, "--config.eval.attack.eps=0.1"
    )


def test_a_work_directory_of_other_images(mistake, tmp_path, monkeypatch):
    """A prepared set is known by its name only: another one of that name has other images."""
    workdir = f"--workdir={tmp_path / 'run'}"
    mistake(DIGITS_METHOD, "--stages=evaluate", workdir)
    before = (tmp_path / "run" / "environment.json").read_bytes()
    original = toy.digits
    monkeypatch.setattr(toy, "digits", lambda split: original(split).take(slice(None, None, -1), ""))
    message = mistake(DIGITS_METHOD, "--stages=evaluate", workdir)
    assert "images of digits" in message and "data.dir" in message
    assert (tmp_path / "run" / "environment.json").read_bytes() == before
    monkeypatch.undo()
    assert read(tmp_path / "run" / "environment.json")["images"]["data"] in message


@pytest.mark.parametrize("name", ["exp[lr=0.1]", "what?", "a*b"])
def test_a_work_directory_that_orbax_takes_for_a_pattern(name, mistake, tmp_path):
    """It would write checkpoints that it does not find again."""
    message = mistake(DIGITS_METHOD, "--stages=evaluate", f"--workdir={tmp_path / name / 'run'}")
    assert name in message and "*, ? or [" in message
    assert not list((tmp_path / name).glob("run/config.json"))


def test_a_full_device_is_told_in_one_line(mistake, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.")

    monkeypatch.setattr(stages, "run", full)
    message = mistake(DIGITS_METHOD)
    assert "memory is full" in message and "17 bytes" in message and "eval.slots" in message


def test_a_run_without_held_out_images(tmp_path):
    """No accuracy of theirs in the metrics, and the training goes to its end."""
    config = toy2d("nominal")
    config.data.val_size = 0.0
    stages.run(config, str(tmp_path / "run"), ("2_train",), quiet=True)
    assert [record["val_accuracy"] for record in metrics(tmp_path / "run")] == [None]
    assert (tmp_path / "run" / "2_train" / "done.json").exists()


def test_a_work_directory_of_another_method(mistake, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    mistake(DIGITS_METHOD, "--stages=evaluate", workdir)
    assert "method: 'clustr_qtrades' there, 'clustr' now" in mistake(
        f"{DIGITS}:clustr", "--stages=evaluate", workdir
    )


@pytest.mark.parametrize(
    ("setting", "right"), [("--config.train.epoch=5", "epochs"), ("--config.trian.epochs=3", "train")]
)
def test_a_mistyped_setting_of_the_default_config(setting, right, mistake):
    """Without --config= its file is read, and settings are given to it, before the flags are parsed."""
    assert f"did you mean {right}?" in mistake(setting)


@pytest.mark.parametrize("look", [loading.load, read_record], ids=["load", "report"])
def test_a_config_of_something_else(look, tmp_path):
    (tmp_path / "2_train").mkdir()
    (tmp_path / "2_train" / "done.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="config.json .*'method'"):
        look(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '"text"'])
def test_a_damaged_config_in_the_work_directory(content, mistake, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    assert "config.json" in mistake(DIGITS_METHOD, "--stages=evaluate", f"--workdir={tmp_path / 'run'}")


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_a_work_directory_that_cannot_be_written(below, mistake, tmp_path):
    """At or under a regular file."""
    (tmp_path / "file").write_text("mine")
    message = mistake(DIGITS_METHOD, "--stages=evaluate", f"--workdir={tmp_path / 'file' / below}")
    assert str(tmp_path / "file") in message
    assert (tmp_path / "file").read_text() == "mine"


def test_a_variant_is_part_of_a_folder_name(mistake):
    """It names the default work directory."""
    message = mistake(DIGITS_METHOD, "--config.variant=a/b")
    assert "variant" in message and "a/b" in message


def test_without_a_config_the_default_is_clustr_qtrades_on_digits(mistake, tmp_path):
    mistake("--stages=evaluate")
    config = read(tmp_path / "runs" / "digits-clustr_qtrades" / "config.json")
    assert config["method"] == "clustr_qtrades" and config["data"]["name"] == "digits"


@pytest.mark.parametrize(
    "arguments",
    [(f"{DIGITS}:trade",), (DIGITS_METHOD, "oops"), (DIGITS_METHOD, "--config.magnet.k=200")],
    ids=["method", "argument", "k"],
)
def test_mistakes_at_the_command_line(arguments, run):
    """The same from outside: exit code 2, stderr is that line and nothing else."""
    stdout, stderr = run(*arguments, code=2)
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert "Traceback" not in stdout + stderr
