"""Faults put in on purpose: damaged and missing files, a full disk."""

import json
import os
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest

import clustr_jax
from clustr_jax import stages
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import ModelSettings
from clustr_jax.storage import loading, results, workdir
from clustr_jax.storage.checkpoints import Checkpoints
from clustr_jax.storage.files import read_json
from configs import digits
from faults import FILES
from runs import DIGITS, ROOT, TOY, assert_one_line, assert_same_arrays

pytestmark = [
    pytest.mark.slow,
    # orbax and ml_collections use outdated calls of their own libraries
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning"
    ),
]


@pytest.fixture(scope="module")
def stage(reference_stage, tmp_path_factory):
    """stage() -> a fresh copy of a work directory with a finished first stage of two checkpoints."""
    count = 0

    def copy():
        nonlocal count
        count += 1
        target = tmp_path_factory.mktemp("damage") / f"run-{count}"
        shutil.copytree(reference_stage, target)
        return target

    return copy


@pytest.fixture(scope="module")
def reference_stage(tmp_path_factory):
    """A work directory: three epochs of a small network, made in this process."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    stages.run(small_config(), str(folder), ("1_warmup",))
    return folder


def small_config():
    """Of reference_stage."""
    config = digits.get_config("clustr_qtrades")
    config.model.width, config.data.train_size, config.data.test_size = 4, 200, 60
    config.warmup.epochs, config.warmup.target, config.data.val_size = 3, 0.0, 0.2
    config.eval.n = 20
    return config


def below(folder):
    """All files in it, in a fixed order."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


KINDS = ("flip", "truncate", "delete", "zero", "append", "swap", "add")


def damage(rng, files):
    """Do something to one of `files`; returns what."""
    path, kind = rng.choice(files), rng.choice(KINDS)
    content = path.read_bytes()
    if kind == "flip" and content:
        position = rng.randrange(len(content))
        flipped = content[position] ^ (1 << rng.randrange(8))
        path.write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
    elif kind == "truncate" and content:
        path.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "zero" and any(content):
        path.write_bytes(bytes(len(content)))
    elif kind == "append":
        path.write_bytes(content + b"\0")
    elif kind == "swap" and (others := [p for p in files if p.read_bytes() != content]):
        path.write_bytes(rng.choice(others).read_bytes())
    elif kind == "add":
        path.with_name(path.name + ".bak").write_bytes(content)
    else:
        kind = "delete"
        path.unlink()
    return kind


def test_damaged_checkpoints(stage, table, capsys):
    """Whoever reads refuses the damaged one and names it; whoever trains says so and takes the one before."""
    rng, kinds = random.Random(2), {}
    net = None
    for _ in range(FILES):
        root = stage()
        folder = root / "1_warmup"
        newest, before = sorted((int(p.name) for p in (folder / "checkpoints").iterdir()), reverse=True)[:2]
        if rng.random() < 0.85:
            kind = damage(rng, below(folder / "checkpoints" / str(newest)))
        else:
            kind = damage(rng, [folder / "seals" / f"{newest}.json"])
            if kind == "add":  # beside the seal a file is no damage
                (folder / "seals" / f"{newest}.json").unlink()
        kinds[kind] = kinds.get(kind, 0) + 1
        with pytest.raises(UserError, match=f"checkpoint {newest} in"):
            clustr_jax.load(folder)
        identity = workdir.training_sha(read_json(root / "config.json"))
        reader = Checkpoints(folder / "checkpoints", identity)
        assert reader.latest == before
        if net is None:
            config = digits.get_config("clustr_qtrades")
            config.model.width = 4
            net = loading.build_net(
                ModelSettings.of(config.model), clustr_jax.data.load_split("digits", "train")
            )
        abstract = jax.eval_shape(net.init, jax.random.key(0))
        expected = reader.model(abstract)
        reader.close()
        said = []
        mended = Checkpoints(folder / "checkpoints", identity, mend=True, say=said.append)
        assert mended.latest == before and len(said) == 1
        assert f"checkpoint {newest} is not used" in said[0] and str(folder / "damaged") in said[0]
        assert_same_arrays(mended.model(abstract), expected)
        mended.close()
        shutil.rmtree(root)
    table.append(
        (
            "damaged checkpoint files (" + ", ".join(f"{v} x {k}" for k, v in sorted(kinds.items())) + ")",
            FILES,
            "0 accepted silently; each named, and the checkpoint before it used",
        )
    )


def test_advice_for_a_damaged_last_checkpoint(stage, reference_stage):
    """Of a finished stage: what the message says to delete makes the next call train it to the same end."""
    root = stage()
    folder = root / "1_warmup"
    newest = max(int(path.name) for path in (folder / "checkpoints").iterdir())
    (folder / "seals" / f"{newest}.json").write_text("{}")
    with pytest.raises(UserError, match=f"checkpoint {newest} in .* to train the stage again") as refused:
        clustr_jax.load(folder)
    pathlib.Path(str(refused.value).rpartition("delete ")[2]).unlink()
    stages.run(small_config(), str(root), ("1_warmup",))
    again, first = clustr_jax.load(folder), clustr_jax.load(reference_stage / "1_warmup")
    assert_same_arrays(again.variables, first.variables)


def test_no_checkpoint_is_whole(stage, attempt, table):
    """One line; nothing is deleted."""
    root = stage()
    (root / "1_warmup" / "done.json").unlink()
    for folder in (root / "1_warmup" / "checkpoints").iterdir():
        damage(random.Random(3), below(folder))
    config = ("--config.model.width=4", "--config.data.train_size=200", "--config.data.test_size=60",
              "--config.warmup.epochs=3", "--config.warmup.target=0.0", "--config.data.val_size=0.2",
              "--config.eval.n=20")  # fmt: skip
    code, stderr = attempt(f"{DIGITS}:clustr_qtrades", *config, "--stages=1_warmup", f"--workdir={root}")
    assert code == 2 and "no whole checkpoint" in stderr
    assert_one_line(stderr)
    assert len([p for p in (root / "1_warmup" / "damaged").iterdir() if p.is_dir()]) >= 2
    table.append(("all checkpoints of a stage damaged", 1, "one line that names them and where they are now"))


def test_a_checkpoint_of_another_training(stage):
    """Copied over from a run with another seed."""
    root = stage()
    content = read_json(root / "config.json")
    (root / "config.json").write_text(json.dumps(content | {"seed": 5}))
    with pytest.raises(UserError, match="belongs to another training"):
        clustr_jax.load(root / "1_warmup")


@pytest.mark.parametrize("damaged", ["clean.json", "clean.npz"])
def test_a_damaged_result(damaged, tmp_path):
    """No number is shown that is not what was written: not even one whose digits were exchanged."""
    results.save(tmp_path, "clean", {"robust": 0.25, "config_sha": "x"}, {"robust": np.arange(5) % 2 == 0})
    found = results.load(tmp_path, "clean")
    assert found is not None and found["robust"] == 0.25
    path = tmp_path / damaged
    content = path.read_bytes()
    changes = [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in range(0, len(content), 3)]
    for change in (*changes, content[:-10], b""):
        path.write_bytes(change)
        with pytest.raises(UserError, match=damaged):
            results.load(tmp_path, "clean")


def test_a_data_file_that_went_away(attempt, data_dir, tmp_path, table):
    """Deleted, and cut off in the middle."""
    for damage in ("deleted", "cut off"):
        folder = tmp_path / damage
        shutil.copytree(f"{data_dir}/cifar10", folder / "cifar10", copy_function=os.link)
        (path,) = folder.rglob("*-train*")
        content = path.read_bytes() if damage == "cut off" else None
        path.unlink()
        if content is not None:
            path.write_bytes(content[: len(content) // 2])
        code, stderr = attempt(
            f"--config={ROOT}/configs/cifar10.py:nominal",
            f"--config.data.dir={folder}",
            f"--workdir={tmp_path / 'run'}",
        )
        assert code == 2 and "cannot read cifar10/train" in stderr
        assert_one_line(stderr)
    table.append(("a data file deleted, and cut off", 2, "one line that names it"))


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
sys.path.insert(0, sys.argv.pop(1))
import run
run._prepare_process()
sys.exit(run.main(sys.argv))
"""


def test_files_that_cannot_be_written_any_more(start, run, tmp_path, table):
    """As on a full disk: one line, and with room again the run goes on."""
    folder = tmp_path / "run"
    arguments = (f"{TOY}:nominal", "--config.smoke=true", "--stages=2_train", f"--workdir={folder}")
    process = start(
        *arguments,
        program=("-c", LIMITED, "3000", str(ROOT)),
        GLIBC_TUNABLES="glibc.malloc.hugetlb=1",
        JAX_ENABLE_COMPILATION_CACHE="false",
    )
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 2, stdout + stderr
    assert "error: " in stderr and "Traceback" not in stderr
    assert "too large" in stderr.lower() or "cannot write" in stderr, stderr
    run(*arguments)
    assert (folder / "2_train" / "done.json").exists()
    table.append(("no room for files (RLIMIT_FSIZE)", 1, "one line; with room again the run goes on"))
