"""What is around a run: paths that files can have, and cannot."""

import pathlib

import pytest

import clustr_jax
from clustr_jax import data
from clustr_jax.command.judge import main as judge_main
from clustr_jax.data import folder
from clustr_jax.data.mend import main as mend_main
from clustr_jax.doors.pytorch import main as pytorch_main
from clustr_jax.report.__main__ import main as report_main
from clustr_jax.runtime import paths
from clustr_jax.runtime.errors import UserError
from clustr_jax.storage import safetensors_file
from clustr_jax.storage.workdir import Workdir
from clustr_jax.verify import main as verify_main
from runs import assert_one_line

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
)


DOORS = {
    "--workdir": Workdir,
    "load": clustr_jax.load,
    "load, a file": lambda path: safetensors_file.load(path),
    "own images": folder.read,
    "a prepared set": lambda path: data.load_split("cifar10", "test", path),
    "TFDS_DATA_DIR": lambda path: data.load_split("cifar10", "test"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gs://bucket/run", "gs://bucket/run is an address"),
        ("s3://b/x.safetensors", "is an address"),
        ("hdfs:///x", "is an address"),
        ("file:///tmp/run", "without file://"),
        ("~nobody_here/run", "no such home"),
        ("a\udcff", "UTF-8"),
        ("a\0b", "null"),
    ],
    ids=lambda value: ascii(value),
)
def test_a_path_that_no_file_can_have(door, path, words, monkeypatch, tmp_path):
    """Before anything is written: no folder is called gs:."""
    monkeypatch.chdir(tmp_path)
    if door == "TFDS_DATA_DIR" and "\0" in path or "\udcff" in path and door == "TFDS_DATA_DIR":
        pytest.skip("no variable of an environment can hold it")
    monkeypatch.setenv("TFDS_DATA_DIR", path if door == "TFDS_DATA_DIR" else str(tmp_path))
    with pytest.raises(UserError, match=words) as refused:
        DOORS[door](path)
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["run", "./a:b", "C:", "a b", "ü", "x/y:z", "http:", "~"])
def test_paths_that_files_can_have(path):
    assert paths.local(path, "it") == pathlib.Path(path).expanduser()


ELSEWHERE = ["gs://b/run", "s3://b/model.safetensors", "file:///tmp/run", "~nobody_here/run"]


@pytest.mark.parametrize("path", ELSEWHERE)
@pytest.mark.parametrize(
    ("config", "setting"),
    [
        ("digits", "--workdir={}"),
        ("folder", "--config.data.dir={}"),
        ("digits", "--config.data.dir={}"),
        ("digits", "--config.pretrain.dir={}"),
        ("digits", "--config.init_from={}"),
        ("digits", "--config.eval.transfer=('{}',)"),
    ],
)
def test_addresses_at_the_command_lines(config, setting, path, program, monkeypatch, capsys, tmp_path):
    """Refused before anything is computed, printed or written, whether the run would come to it or not."""
    argv = ["run.py", f"--config={config}:nominal", f"--workdir={tmp_path / 'run'}", setting.format(path)]
    monkeypatch.setattr("sys.argv", argv)
    assert program.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and list(tmp_path.iterdir()) == []
    assert any(words in err for words in ("is an address", "no such home folder")) and path in err
    assert_one_line(err)


@pytest.mark.parametrize("path", ["nowhere", "nowhere.safetensors"])
def test_a_start_that_is_not_there(path, program, monkeypatch, capsys, tmp_path):
    argv = [
        "run.py",
        "--config=digits:nominal",
        f"--workdir={tmp_path / 'run'}",
        f"--config.init_from={path}",
    ]
    monkeypatch.setattr("sys.argv", argv)
    assert program.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and list(tmp_path.iterdir()) == [] and path in err
    assert_one_line(err)


PROGRAMS = {
    "report": (report_main, "{}"),
    "report --out": (report_main, "a b --out={}"),
    "pytorch": (pytorch_main, "{}"),
    "pytorch --out": (pytorch_main, "run --out={}"),
    "mend": (mend_main, "{} out"),
    "mend OUT": (mend_main, "images {}"),
    "verify": (verify_main, "{}"),
    "judge --folder": (judge_main, "run --data=digits --eps=.1 --folder={}"),
    "judge --data": (judge_main, "math:sqrt --data={} --eps=.1"),
}


@pytest.mark.parametrize("path", ["gs://b/run", "file:///tmp/run"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_addresses_at_the_other_programs(name, path, monkeypatch, capsys, tmp_path):
    """One line, and nothing is read or written."""
    monkeypatch.chdir(tmp_path)
    main, arguments = PROGRAMS[name]
    assert main(arguments.format(path).split()) == 2
    err = capsys.readouterr().err
    assert "is an address" in err and path in err and list(tmp_path.iterdir()) == []
    assert_one_line(err)
