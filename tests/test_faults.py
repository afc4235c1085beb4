"""Faults put in on purpose: kills, damaged files, a full disk, mutated input, numbers that are none.

A part of it runs with the slow tests; `make faults` (FAULTS=all) runs all and writes what happened to
docs/reliability.md. Every outcome is either right or one clear line.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import clustr_jax
from clustr_jax import stages
from clustr_jax.runtime import preemption
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import ModelSettings
from clustr_jax.storage import loading, results, workdir
from clustr_jax.storage.checkpoints import Checkpoints
from clustr_jax.storage.files import read_json
from clustr_jax.training import train
from configs import digits
from runs import (
    DIGITS,
    ROOT,
    TINY,
    TOY,
    arrays,
    assert_one_line,
    assert_same_arrays,
    assert_same_run,
    metrics,
)

pytestmark = [
    pytest.mark.slow,
    # orbax and ml_collections use outdated calls of their own libraries
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning"
    ),
]

ALL = os.environ.get("FAULTS") == "all"
KILLS, FILES, INPUTS = (30, 200, 300) if ALL else (5, 20, 50)
# Where the table goes in docs/reliability.md.
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
ROWS = 11
# One unlucky run meets so many kills before it is left alone.
KILLS_PER_RUN = 5
# SIGTERM to exit: what schedulers grant is 30 s.
LIMIT_SECONDS = 20.0


@pytest.fixture(scope="session")
def table():
    """Rows (what was injected, how often, what happened), written to the docs after a whole run."""
    rows = []
    yield rows
    if ALL and len(rows) == ROWS:  # a part of it, or a failure, is no table
        path = ROOT / "docs" / "reliability.md"
        before, _, rest = path.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        lines = [f"| {what} | {count} | {outcome} |" for what, count, outcome in rows]
        text = "\n".join(["", "| injected | times | what happened |", "|---|---:|---|", *lines, ""])
        path.write_text(before + BEGIN + text + END + after)


# Signals


def test_kills_at_random_moments(reference, start, run, tmp_path, table):
    """SIGKILL, SIGTERM and SIGINT in turns, in any stage; left alone, the run ends as if undisturbed."""
    rng = random.Random(0 if not ALL else 1)
    kinds, longest = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT), {}
    kills = chain = 0
    while kills < KILLS:
        chain += 1
        folder = tmp_path / f"run-{chain}"
        for i in range(min(KILLS_PER_RUN, KILLS - kills)):
            kind = kinds[kills % len(kinds)]
            process = start(*TINY, f"--workdir={folder}")
            while not (folder / "config.json").exists() and process.poll() is None:
                time.sleep(0.01)
            # past the start-up, which costs most of these seconds; further and further along the run
            time.sleep(rng.uniform(2.0, 6.0 + 3.0 * i))
            if process.poll() is not None:
                break  # it got through: the next chain goes on
            started = time.monotonic()
            process.send_signal(kind)
            stdout, stderr = process.communicate(timeout=60)
            if process.returncode == 0:
                continue  # it had just finished: not a kill
            kills += 1
            if kind == signal.SIGKILL:
                assert process.returncode == -signal.SIGKILL
                continue
            longest[kind.name] = max(longest.get(kind.name, 0.0), time.monotonic() - started)
            # while it still imports, signals end it as they end any program, without a traceback
            assert process.returncode in (preemption.EXIT_CODE, -kind), stdout + stderr
            assert "Traceback" not in stderr
            if process.returncode == preemption.EXIT_CODE:
                assert f"stopped by {kind.name}" in stderr and "run the same command again" in stderr
        run(*TINY, f"--workdir={folder}")
        assert_same_run(folder, reference)
        shutil.rmtree(folder)
    assert max(longest.values()) < LIMIT_SECONDS
    seconds = ", ".join(f"{name} to exit at most {s:.1f} s" for name, s in sorted(longest.items()))
    table.append((
        "SIGKILL, SIGTERM, SIGINT at random moments over all stages (digits)", kills,
        f"all resumed: parameters, clusters, metrics and results bit-identical; {seconds}",
    ))  # fmt: skip


@pytest.mark.long
def test_sigterm_while_a_larger_network_trains(start, data_dir, tmp_path, table):
    """resnet8 on CIFAR-10: first during the compilation, then during training."""
    arguments = (
        f"--config={ROOT}/configs/cifar10.py:nominal,cpu", "--config.data.train_size=1000",
        "--config.data.test_size=100", "--config.eval.n=20", f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    taken = []
    for wanted in (tmp_path / "run" / "config.json", tmp_path / "run" / "metrics.jsonl"):
        process = start(*arguments)
        while not wanted.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        time.sleep(1.0)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
        taken.append(time.monotonic() - started)
        assert process.returncode == preemption.EXIT_CODE and "stopped by SIGTERM" in stderr
    assert max(taken) < LIMIT_SECONDS
    table.append((
        "SIGTERM in compilation and in training (resnet8, CIFAR-10)", 2,
        f"exit code {preemption.EXIT_CODE} after {taken[0]:.1f} and {taken[1]:.1f} s",
    ))  # fmt: skip


def test_ctrl_c_is_not_lost_while_modules_are_imported(start, tmp_path):
    """As a KeyboardInterrupt it was: a library caught it, and the run went on; or run.py left with 130."""
    for seconds in np.linspace(0.2, 4.0, 12):
        process = start(*TINY, f"--workdir={tmp_path / 'run'}")
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        # no look at stderr: before run.py's first line it is Python that shows where it was
        assert process.returncode in (preemption.EXIT_CODE, -signal.SIGINT), stderr


def test_a_second_process_in_the_same_work_directory(start, tmp_path, table):
    folder = tmp_path / "run"
    first = start(*TINY, f"--workdir={folder}")
    while not (folder / "config.json").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    second = start(*TINY, f"--workdir={folder}")
    _, stderr = second.communicate(timeout=120)
    assert second.returncode == 2 and f"in use by process {first.pid}" in stderr
    assert_one_line(stderr)
    assert first.poll() is None
    table.append(("a second process in the same work directory", 1, "one line that names the first"))


# Files


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
    table.append((
        "damaged checkpoint files (" + ", ".join(f"{v} x {k}" for k, v in sorted(kinds.items())) + ")", FILES,
        "0 accepted silently; each named, and the checkpoint before it used",
    ))  # fmt: skip


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
            f"--config={ROOT}/configs/cifar10.py:nominal", f"--config.data.dir={folder}",
            f"--workdir={tmp_path / 'run'}",
        )  # fmt: skip
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
        *arguments, program=("-c", LIMITED, "3000", str(ROOT)), GLIBC_TUNABLES="glibc.malloc.hugetlb=1",
        JAX_ENABLE_COMPILATION_CACHE="false",
    )  # fmt: skip
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 2, stdout + stderr
    assert "error: " in stderr and "Traceback" not in stderr
    assert "too large" in stderr.lower() or "cannot write" in stderr, stderr
    run(*arguments)
    assert (folder / "2_train" / "done.json").exists()
    table.append(("no room for files (RLIMIT_FSIZE)", 1, "one line; with room again the run goes on"))


# Numbers


@pytest.mark.parametrize("method", ["nominal", "qtrades"])  # one whose adversary runs inside the objective
def test_a_loss_that_is_not_finite(method, attempt, tmp_path, table):
    """The run ends with the step and the batch, and can pass over such steps instead."""
    arguments = (
        f"{TOY}:{method}", "--config.smoke=true", "--stages=2_train", "--config.train.optimizer=sgd",
        "--config.train.schedule=multistep", "--config.train.lr=1e9", "--config.train.weight_decay=1e9",
    )  # fmt: skip
    code, stderr = attempt(*arguments, f"--workdir={tmp_path / 'stop'}")
    assert code == 2 and "not finite at step" in stderr and "nonfinite=skip" in stderr
    assert_one_line(stderr)
    kept = arrays(tmp_path / "stop" / "2_train" / "nonfinite.npz")
    assert kept["x"].shape[0] == kept["y"].shape[0] == kept["ids"].shape[0] and np.isfinite(kept["x"]).all()
    assert not (tmp_path / "stop" / "metrics.jsonl").exists()
    code, stderr = attempt(*arguments, "--config.train.nonfinite=skip", f"--workdir={tmp_path / 'skip'}")
    assert code == 0 and stderr == ""
    (record,) = metrics(tmp_path / "skip")
    assert record["skipped"] >= 1 and np.isfinite(record["loss"])
    variables = clustr_jax.load(tmp_path / "skip").variables
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
    if method != "nominal":
        assert kept["x_adv"].shape == kept["x"].shape
        return
    table.append((
        "a loss that is not finite", 2, "stopped with its step and batch; or passed over and counted",
    ))  # fmt: skip


def test_no_duration_comes_from_the_wall_clock(table):
    """A clock that jumps changes nothing: none of those that can is read."""
    clocks = ("time.time", "time_ns", "import time as", "from time import", "datetime.now", "utcnow")
    texts = {p.name: p.read_text() for p in sorted((ROOT / "clustr_jax").rglob("*.py"))}
    used = {name: [c for c in clocks if c in text] for name, text in texts.items()}
    assert {name: found for name, found in used.items() if found} == {}
    table.append(("a clock that jumps", 1, "no code reads the wall clock"))


# Input


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
        max_examples=INPUTS, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(commands())
    def each(arguments):
        nonlocal number
        number += 1
        folder = tmp_path / f"run-{number}"
        small = ("--config.data.train_size=200", "--config.model.width=2", "--config.magnet.n_init=1")
        assert_told(attempt, (arguments[0], *small, *arguments[1:], f"--workdir={folder}"), counts)
        shutil.rmtree(folder, ignore_errors=True)

    each()
    table.append((
        "mutated command lines", counts["accepted"] + counts["told"],
        f"{counts['told']} told in one line with exit code 2, {counts['accepted']} valid; no traceback",
    ))  # fmt: skip


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
    table.append((
        "mutated config files", counts["accepted"] + counts["told"],
        f"{counts['told']} told in one line with exit code 2, {counts['accepted']} valid; no traceback",
    ))  # fmt: skip
