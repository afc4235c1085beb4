"""What is around a run: paths that files can have, and cannot."""

import pathlib

import pytest

import clustr_jax
from clustr_jax import data
from clustr_jax.data import folder
from clustr_jax.report.__main__ import main as report_main
from clustr_jax.runtime import paths
from clustr_jax.runtime.errors import UserError
from clustr_jax.storage import safetensors_file
from clustr_jax.storage.workdir import Workdir
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


def test_addresses_at_the_command_lines(attempt, capsys, tmp_path):
    for name, argument in (
        ("digits", "--workdir=gs://b/run"),
        ("folder", "--config.data.dir=s3://b/x"),
        ("digits", "--config.init_from=gs://b/run"),
    ):
        code, stderr = attempt(f"--config={name}:nominal", f"--workdir={tmp_path / 'run'}", argument)
        assert code == 2 and "is an address" in stderr
        assert_one_line(stderr)
    assert report_main(["gs://b/run"]) == 2
    assert_one_line(capsys.readouterr().err)
