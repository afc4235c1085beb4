"""The small files of a work directory where the machine, or an earlier process, did not behave."""

import errno
import importlib.metadata
import io
import json
import types

import jax
import pytest
from rich.console import Console

from clustr_jax.report import terminal
from clustr_jax.runtime import locks
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.profiling import Profiler
from clustr_jax.storage import workdir
from clustr_jax.storage.workdir import Workdir
from configs import digits


def failing(code):
    """flock on a file system that answers with this error."""

    def flock(*_):
        raise OSError(code, "no such thing here")

    return types.SimpleNamespace(flock=flock, LOCK_EX=0, LOCK_NB=0)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_worked_on_all_the_same(code, tmp_path, monkeypatch):
    """And it is said: two processes at once would not be noticed."""
    monkeypatch.setattr(locks, "fcntl", failing(code))
    said = []
    with Workdir(tmp_path).locked(said.append):
        pass
    assert len(said) == 1 and said[0].startswith(f"warning: no lock on {tmp_path} (no such thing here)")


def test_a_directory_in_use_is_refused(tmp_path, monkeypatch):
    with Workdir(tmp_path).locked(), pytest.raises(UserError, match="in use by process [0-9]+"):
        with Workdir(tmp_path).locked():
            pass
    monkeypatch.setattr(locks, "fcntl", failing(errno.EAGAIN))
    with pytest.raises(UserError, match="in use"), Workdir(tmp_path).locked():
        pass


def test_a_damaged_line_of_metrics_ends_them(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe{"step": 2}\n{"step": 3}\n')
    assert Workdir(tmp_path).records() == [{"step": 1}]


def test_every_machine_that_worked_on_a_directory_is_kept(tmp_path, monkeypatch):
    """What a network was trained on is not forgotten when another machine evaluates it."""
    for kind in ("cpu", "NVIDIA H200", "cpu"):
        found = workdir.environment() | {"devices": [kind], "platform": "Linux"}
        monkeypatch.setattr(workdir, "environment", lambda found=found: found)
        Workdir(tmp_path).open(digits.get_config("clustr"))
        monkeypatch.undo()
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written["machines"] == ["cpu on Linux", "NVIDIA H200 on Linux"] and written["devices"] == ["cpu"]
    older = {"devices": ["TPU v6"], "platform": "Linux"}  # of a version that kept the last one alone
    (tmp_path / "environment.json").write_text(json.dumps(older))
    Workdir(tmp_path).open(digits.get_config("clustr"))
    first, second = json.loads((tmp_path / "environment.json").read_text())["machines"]
    assert first == "TPU v6 on Linux" != second


@pytest.mark.parametrize("content", ["", "[]", '{"commands": null, "images": null}', '"text"'])
def test_a_damaged_environment_is_written_anew(content, tmp_path):
    (tmp_path / "environment.json").write_text(content)
    Workdir(tmp_path).open(digits.get_config("nominal"), "a command", {"data": "a sha"})
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written["commands"] == ["a command"] and written["images"] == {"data": "a sha"}


def test_images_of_stages_that_are_finished_stay_on_record(tmp_path):
    """A set to pre-train on is not read again once that is done."""
    config = digits.get_config("at_pretrain")
    Workdir(tmp_path).open(config, "", {"data": "a", "pretrain": "b"})
    Workdir(tmp_path).open(config, "", {"data": "a"})
    with pytest.raises(UserError, match=r"\(b then, c now\): set pretrain.dir"):
        Workdir(tmp_path).open(config, "", {"data": "a", "pretrain": "c"})


def test_images_that_moved_are_the_same_images(tmp_path):
    """By their digest, which decides; checkpoints go by where they were when they were trained on."""
    config = digits.get_config("nominal")
    place = Workdir(tmp_path)
    place.open(config, "", {"data": "a"})
    trained = place.identity(workdir.config_dict(config))
    assert trained == workdir.training_sha(workdir.config_dict(config))
    for moved in ("elsewhere", "and/on"):
        config.data.dir = moved
        place.open(config, "", {"data": "a"})
        assert place.identity(workdir.config_dict(config)) == trained
        assert json.loads((tmp_path / "config.json").read_text())["data"]["dir"] == moved
    for images in ({"data": "b"}, {}):
        config.data.dir = "others"
        with pytest.raises(UserError, match="data.dir"):
            place.open(config, "", images)
    config.data.dir, config.data.train_size = "elsewhere", 7
    with pytest.raises(UserError, match="data.train_size"):
        place.open(config, "", {"data": "a"})


def test_a_package_without_a_name_is_passed_over(monkeypatch):
    """As a broken uninstallation leaves it."""
    made = [types.SimpleNamespace(metadata=m, version="1") for m in ({"Name": None}, {"Name": "x"}, None)]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: made)
    monkeypatch.setattr(workdir.provenance, "versions", dict)
    assert workdir.environment()["packages"] == {"x": "1"}


def test_names_are_printed_as_they_are():
    """[...] in the name of a set is not an instruction to the terminal."""
    result = {
        "dataset": "birds[bold]",
        "subset": "[/red] of it",
        "method": "nominal",
        "n": 10,
        "clean": 0.5,
        "robust": 0.5,
    }
    check = dict(number=1, name="a check", status="WARN", value=0.5, limit="[0, 1]", note="[/b] see x[y]")
    console = Console(file=io.StringIO(), width=200)
    quick = {**result, "protocol": "quick-1", "eps": 0.2, "robust": 0.3}
    console.print(terminal.side_by_side({"clean": result, "quick": quick}))
    console.print(terminal.checks_text({"checks": [check]}))
    assert isinstance(console.file, io.StringIO)
    for text in ("birds[bold]", "[/red] of it", "[0, 1]", "[/b] see x[y]", "quick-1, eps 0.2", "30.00"):
        assert text in console.file.getvalue()


def test_each_kind_of_work_has_a_trace_of_its_own(tmp_path, monkeypatch):
    """Also where the kind before it had one piece only."""
    made = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: made.append(folder.name))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append("stop"))
    profiler = Profiler(tmp_path)
    for what in ("paper", "sound", "sound", "sound"):
        profiler.tick(what)
    profiler.close()
    assert made == ["paper", "stop", "sound", "stop"]
