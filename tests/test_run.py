"""run.py as a user meets it: what a run leaves behind, resuming after SIGKILL, mistakes.

The runs are small: a narrow CNN on some digits, the MLP on points (tests/runs.py).
"""

import contextlib
import dataclasses
import importlib.util
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import clustr_jax
from clustr_jax import data, stages
from clustr_jax.data import toy
from clustr_jax.report.record import read as read_record
from clustr_jax.runtime import errors
from clustr_jax.runtime.errors import UserError
from clustr_jax.storage import loading, safetensors_file
from clustr_jax.training import train, train_state
from clustr_jax.training.objectives import METHODS
from marks import in_ci
from runs import (
    DIGITS,
    REQUIRED,
    ROOT,
    TINY,
    TOY,
    arrays,
    assert_one_line,
    assert_same_arrays,
    assert_same_run,
    metrics,
    read,
    timeless,
)  # fmt: skip

# orbax and ml_collections use outdated calls of their own libraries.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")
]

# A whole run


def assert_contract(folder, stdout, protocols=("clean", "paper", "sound")):
    """Files, fields and the printed table of a finished run."""
    assert {"config.json", "environment.json", "metrics.jsonl", "2_train", "results"} <= {
        path.name for path in folder.iterdir()
    }
    config = read(folder / "config.json")
    assert {"python", "platform", "devices", "versions"} <= read(folder / "environment.json").keys()
    for name in protocols:
        result = read(folder / "results" / f"{name}.json")
        assert set(REQUIRED) <= result.keys()
        assert result["protocol"].startswith(f"{name}-") and result["protocol"].split("-")[1].isdigit()
        assert result["method"] == config["method"] and result["seed"] == config["seed"]
        assert 0 <= result["robust"] <= result["clean"] <= 1
        low, high = result["robust_interval"]
        assert 0 <= low <= result["robust"] <= high <= 1
        assert f"{100 * result['robust']:.2f}" in stdout  # in the table, or in the line of its stage
        outcomes = arrays(folder / "results" / f"{name}.npz")
        assert all(len(values) == result["n"] for values in outcomes.values())
        assert outcomes["clean"].mean() == pytest.approx(result["clean"])
    for record in metrics(folder):
        assert {"stage", "epoch", "step", "loss", "val_accuracy", "epoch_seconds"} <= record.keys()
        assert np.isfinite([v for v in record.values() if isinstance(v, float)]).all()
    lines = stdout.splitlines()
    assert lines[-2:] == [f"results: {folder / 'results'}", f"report: {folder / 'report.html'}"]
    if "sound" not in protocols:
        return
    paper, sound = (read(folder / "results" / f"{name}.json") for name in ("paper", "sound"))
    assert arrays(folder / "results" / "sound.npz")["robust"].mean() == pytest.approx(sound["robust"])
    for text in ("paper's protocol", "sound protocol", "worst case, eps", "masking gap"):
        assert any(text in line for line in lines)
    assert f"{100 * (paper['robust'] - sound['robust']):.2f} points" in stdout


def stamps(folder):
    """Every file of a run but the two that describe the latest start, with time and size."""
    files = [
        p
        for p in folder.rglob("*")
        if p.is_file() and p.name not in ("config.json", "environment.json", "lock")
    ]
    return {p.relative_to(folder): (p.stat().st_mtime_ns, p.stat().st_size) for p in files}


@pytest.mark.slow
def test_a_smoke_run_on_points_from_start_to_finish(run, tmp_path):
    """The whole way with the MLP: contract, second run, load(), only what changed is evaluated again."""
    folder = tmp_path / "runs" / "toy2d_moons-clustr_qtrades-smoke"  # the default work directory
    arguments = (f"{TOY}:clustr_qtrades", "--config.smoke=true")
    stdout, stderr = run(*arguments)
    assert stderr == ""
    assert_contract(folder, stdout)
    before = stamps(folder)

    stdout, stderr = run(*arguments)
    assert stderr == ""
    assert stdout.count("finished before") == 2 and stdout.count("was done before") == 4
    assert stamps(folder) == before
    assert_contract(folder, stdout)

    stdout, _ = run(
        *arguments, "--stages=evaluate", "--config.eval.protocols=('sound',)", "--config.eval.attack.steps=3"
    )
    assert "evaluate: sound" in stdout and "finished before" not in stdout
    changed = {path.name for path, stamp in stamps(folder).items() if before.get(path) != stamp}
    names = ("clean", "sound", "diagnostics")
    assert changed == {f"{name}.{kind}" for name in names for kind in ("json", "npz")}

    # At another radius than the paper's protocol, whose result stays: the checks are of what is there.
    sound_only = (*arguments, "--stages=evaluate", "--config.eval.protocols=('sound',)")
    stdout, _ = run(*sound_only, "--config.eval.attack.eps=0.05")
    assert "can it be believed?" in stdout and read_record(folder).checks is not None
    # Checks of an earlier result are nothing to print beside this one.
    stdout, _ = run(*sound_only, "--config.eval.attack.eps=0.06", "--config.eval.diagnostics=false")
    assert "0.06" in stdout and "can it be believed?" not in stdout and "no check failed" not in stdout
    assert read_record(folder).checks is None

    clf = clustr_jax.load(folder)
    x, y = data.load("toy2d_moons", "test")
    assert clf.clusters is not None and clf.bounds is None
    index = data.stratified(y, 200, 2)
    np.testing.assert_array_equal(
        np.asarray(clf.predict(x[index])) == y[index], arrays(folder / "results" / "clean.npz")["clean"]
    )


@pytest.mark.slow
def test_a_smoke_run_on_digits(run, tmp_path):
    """The README's first command, shrunk: every file of the contract, the table, and nothing left to do."""
    folder = tmp_path / "smoke"
    arguments = ("--config.smoke=true", f"--workdir={folder}")  # the default config
    stdout, stderr = run(*arguments)
    assert stderr == ""
    assert_contract(folder, stdout)
    assert [(r["stage"], r["epoch"]) for r in metrics(folder)] == [("1_warmup", 1), ("2_train", 1)]
    assert read(folder / "results" / "clean.json")["dataset"] == "digits"
    before = stamps(folder)
    stdout, _ = run(*arguments)
    assert stdout.count("finished before") == 2
    assert stamps(folder) == before
    assert_contract(folder, stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", in_ci((m for m in METHODS if not m.endswith("_certified")), "trades", "clustr_qtrades")
)
def test_every_method_is_killed_resumed_and_runs_to_the_end(method, start, run, tmp_path):
    """On points. After the first epoch of its training it dies; without a warm-up there is only 2_train.

    Certified methods want images. One method of each head meets the other protocols too, which do not know
    of methods.
    """
    folder, straight = tmp_path / "killed", tmp_path / "straight"
    more = {"nominal": ("sound",), "clustr_qtrades": ("sound",), "trades": ("quick",), "magnet": ("quick",)}
    protocols = ("paper", *more.get(method, ()))
    arguments = (
        f"{TOY}:{method}", "--config.smoke=true", "--config.data.train_size=0", "--config.magnet.samples=10",
        "--config.eval.n=16", "--config.eval.diagnostics=false", f"--config.eval.protocols={protocols}",
    )  # fmt: skip
    arguments += ("--config.pretrain.name=toy2d_pairs",) if method == "at_pretrain" else ()
    process = start(*arguments, f"--workdir={folder}")
    checkpoints = folder / "2_train" / "checkpoints"
    while not (checkpoints.exists() and any(p.name.isdigit() for p in checkpoints.iterdir())):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stdout, _ = run(*arguments, f"--workdir={folder}")
    assert_contract(folder, stdout, ("clean", *protocols))
    assert (folder / "1_warmup").exists() == (METHODS[method].warmup is not None)
    assert (clustr_jax.load(folder).clusters is not None) == (METHODS[method].head == "clusters")
    run(*arguments, f"--workdir={straight}")
    assert_same_run(folder, straight)


@pytest.mark.slow
def test_the_source_of_at_pretrain_may_have_other_classes(tmp_path, monkeypatch):
    """Its body goes on, with a head for the classes of the target; a whole network is refused."""
    real = toy.points

    def three_classes(name, split):
        points = real(name, split)
        if name == "toy2d_pairs":
            labels = (np.arange(len(points.labels)) % 3).astype(np.int32)
            points = dataclasses.replace(points, labels=labels, num_classes=3)
        return points

    monkeypatch.setattr(toy, "points", three_classes)
    config = toy2d("at_pretrain")
    config.pretrain.name = "toy2d_pairs"
    stages.run(config, tmp_path / "run", ("1_warmup", "2_train"))
    first, last = (loading.load(tmp_path / "run" / stage) for stage in ("1_warmup", "2_train"))
    assert (first.net.num_classes, last.net.num_classes) == (3, 2)
    assert first.variables["params"].keys() == last.variables["params"].keys()
    with pytest.raises(UserError, match=r"another network.*'head'.*\(3,\) and \(2,\)"):
        loading.model_variables(tmp_path / "run" / "1_warmup", last.net)
    body = loading.model_variables(tmp_path / "run" / "1_warmup", last.net, body=True)
    assert_same_arrays(body, first.variables)
    monkeypatch.setattr(stages, "_source", lambda *_: pytest.fail("the source of a finished stage is read"))
    stages.run(config, tmp_path / "run", ("1_warmup", "2_train"))


@pytest.mark.slow
def test_each_set_has_its_own_augmentation(tmp_path, monkeypatch):
    """pretrain.augment is the source's, data.augment the target's."""
    seen, real = [], train_state.TrainSet

    def spy(images, labels, *, scale, augment):
        seen.append(augment)
        return real(images, labels, scale=scale, augment=augment)

    monkeypatch.setattr(train_state, "TrainSet", spy)
    config = smoke("digits", "at_pretrain")
    config.pretrain.name, config.pretrain.augment, config.data.augment = "digits", "flip", "crop"
    stages.run(config, tmp_path / "run", ("1_warmup", "2_train"))
    assert seen == ["flip", "crop"]


def toy2d(method):
    """The smoke config of a method on points."""
    return smoke("toy2d", method)


def smoke(name, method):
    """The smoke config of a method."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        spec.loader.exec_module(module)
    config = module.get_config(method)
    config.smoke = True
    return config


def test_a_result_of_another_network_is_not_kept(tmp_path):
    """The same config, but a stage was deleted and what it starts from has changed: evaluated again."""
    place, start = tmp_path / "run", tmp_path / "start.safetensors"

    def config(init_from=""):
        found = toy2d("nominal")
        found.smoke, found.train.epochs, found.init_from = False, 0, init_from
        found.eval.protocols, found.eval.diagnostics = (), False
        return found

    stages.run(config(), tmp_path / "first", ("2_train",))
    clf = clustr_jax.load(tmp_path / "first")

    def evaluated(scale):
        safetensors_file.save(clf.replace(variables=jax.tree.map(lambda w: scale * w, clf.variables)), start)
        shutil.rmtree(place / "2_train", ignore_errors=True)
        stages.run(config(str(start)), place, ("2_train", "evaluate"))
        return read(place / "results" / "clean.json")

    once, again, other = evaluated(1.0), evaluated(1.0), evaluated(-1.0)
    assert once == again  # kept, with the time it took
    assert once["config_sha"] == other["config_sha"] and once["network_sha"] != other["network_sha"]
    assert once["outcomes_sha"] != other["outcomes_sha"]


def test_the_line_of_an_error_of_a_library_is_one_that_can_be_read():
    """Orbax names every array of a tree in one line."""
    assert errors.first_line(ValueError("\n  \nwrong shape\nat ...")) == "wrong shape"
    assert errors.first_line(KeyError()) == "KeyError"
    assert errors.first_line(ValueError("x" * 9000)) == "x" * 300 + " ..."


@pytest.mark.slow
def test_load_gives_the_classifier_that_was_evaluated(reference):
    """Work directory and stage folders, clusters and linear head; predictions equal the stored outcomes."""
    x, y = data.load("digits", "test")
    index = data.stratified(y, 60, 10)
    x, y = x[index], y[index]
    clf = clustr_jax.load(reference)
    assert_same_arrays(clf, clustr_jax.load(reference / "2_train"))
    clean = arrays(reference / "results" / "clean.npz")["clean"]
    np.testing.assert_array_equal(np.asarray(clf.predict(x)) == y, clean)
    assert clf.clusters.centroids.shape == (10, 2, 16) and clf.bounds == (0.0, 1.0)

    linear = clustr_jax.load(reference, head="linear")
    assert linear.clusters is None
    assert_same_arrays(linear.variables, clf.variables)
    assert linear.logits(x).shape == (60, 10)
    assert (np.asarray(linear.logits(x)) != np.asarray(clf.logits(x))).any()

    warm = clustr_jax.load(reference / "1_warmup")
    assert warm.clusters is None
    accuracy = np.mean(np.asarray(warm.predict(x)) == y)
    assert accuracy > 0.4  # its target was 60 % on the held-out images
    with pytest.raises(UserError, match="no clusters"):
        clustr_jax.load(reference / "1_warmup", head="clusters")
    with pytest.raises(UserError, match="head must be"):
        clustr_jax.load(reference, head="centroids")
    with pytest.raises(UserError, match="no finished stage"):
        clustr_jax.load(reference / "results")


@pytest.mark.slow
def test_the_next_stage_starts_from_the_last_ones_parameters(reference, run, tmp_path):
    """With no epochs of fine-tuning stage 2 is what it was given: stage 1's model, bit for bit."""
    folder = tmp_path / "handover"
    run(*TINY, "--config.train.epochs=0", "--stages=1_warmup,2_train", f"--workdir={folder}")
    given, taken = (clustr_jax.load(folder / stage, head="linear") for stage in ("1_warmup", "2_train"))
    assert_same_arrays(taken.variables, given.variables)
    assert_same_arrays(given.variables, clustr_jax.load(reference / "1_warmup").variables)
    trained = clustr_jax.load(reference / "2_train", head="linear")
    kernels = [w.variables["params"] for w in (given, trained)]
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, kernels), strict=True))

    # the same through config.init_from, given as a stage's folder
    folder = tmp_path / "init_from"
    run(
        f"{DIGITS}:magnet", *TINY[1:], "--config.train.epochs=0", "--stages=2_train",
        f"--config.init_from={reference / '1_warmup'}", f"--workdir={folder}",
    )  # fmt: skip
    taken = clustr_jax.load(folder, head="linear")
    assert_same_arrays(taken.variables, clustr_jax.load(reference / "1_warmup").variables)


@pytest.mark.long
def test_the_same_seed_gives_the_same_run(reference, run, tmp_path):
    """Everything but times. Another seed gives another run."""
    folder = tmp_path / "again"
    run(*TINY, f"--workdir={folder}")
    assert_same_run(folder, reference)
    other = tmp_path / "other"
    run(*TINY, "--config.seed=1", "--stages=1_warmup", f"--workdir={other}")
    assert timeless(metrics(other))[0] != timeless(metrics(reference))[0]


@pytest.mark.slow
def test_each_stage_compiles_its_step_once(reference):
    """Minutes for a large network: whether arrays come from a checkpoint must not make a difference."""
    assert (reference / "stderr").read_text().count("Compiling jit(run_steps)") == 2


@pytest.mark.long
def test_stages_one_by_one_give_the_same_run(reference, run, tmp_path):
    folder = tmp_path / "by_stage"
    for stage in ("1_warmup", "2_train", "evaluate", "certify"):
        run(*TINY, f"--stages={stage}", f"--workdir={folder}")
    assert_same_run(folder, reference)


# Interrupted runs


@pytest.mark.slow
@pytest.mark.parametrize("stage", in_ci(("1_warmup", "2_train", "evaluate"), "2_train"))
def test_a_run_killed_at_a_random_moment_is_resumed(stage, reference, start, run, tmp_path):
    """SIGKILL somewhere within the stage; the run that goes on ends as if nothing had happened."""
    begun = {"1_warmup": "1_warmup", "2_train": "2_train", "evaluate": "2_train/done.json"}[stage]
    ended = {
        "1_warmup": "1_warmup/done.json",
        "2_train": "2_train/done.json",
        "evaluate": "results/sound.json",
    }[stage]
    longest = 6.0
    for attempt in range(8):
        folder = tmp_path / f"killed-{attempt}"
        process = start(*TINY, f"--workdir={folder}")
        while not (folder / begun).exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        delay = random.uniform(0, longest)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not (folder / ended).exists():
            break
        longest = delay  # too late: the stage was over
    else:
        pytest.fail(f"{stage} was over before it could be killed")
    there = sorted(str(p.relative_to(folder)) for p in folder.glob("*/*"))
    print(f"killed {delay:.3f} s into {stage}; there were {there}")  # shown if it fails
    run(*TINY, f"--workdir={folder}")
    assert_same_run(folder, reference)


# Dies at the n-th call of a function of the project, before or after it.
CRASH = """
import importlib, os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
where, name, when, count = sys.argv.pop(1).split(":")
import run
run._prepare_process()
module = importlib.import_module("clustr_jax." + where)
owner, _, attribute = name.rpartition(".")
owner = getattr(module, owner) if owner else module
original, calls = getattr(owner, attribute), 0

def crash(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(count) and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    if calls == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, attribute, crash)
if where == "training.train":  # checkpoints after every step
    stages = importlib.import_module("clustr_jax.stages.training")
    stages._CHECKPOINT_SECONDS = stages._CHUNK_SECONDS = 0.0
sys.exit(run.main(sys.argv))
"""
TUNED = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # else run.py starts itself again with it
MOMENTS = [
    # stage 1: the first epoch is logged, and nothing was ever saved
    ("storage.workdir:Workdir.log:after:1", "metrics.jsonl", "1_warmup/done.json"),
    # in the middle of an epoch of stage 1, with checkpoints in it
    ("training.train:run_steps:after:15", "1_warmup", "1_warmup/done.json"),
    # an epoch is logged, its checkpoint was not begun
    ("storage.workdir:Workdir.log:after:2", "1_warmup", "1_warmup/done.json"),
    # a checkpoint is being written
    ("storage.checkpoints:Checkpoints.save:after:2", "1_warmup", "1_warmup/done.json"),
    # the target is reached, the stage is not yet marked as finished
    ("stages.training:write_json:before:1", "1_warmup", "1_warmup/done.json"),
    # stage 2: before its first checkpoint, within an epoch, and at its very end
    ("storage.workdir:Workdir.log:after:1", "2_train", "2_train/done.json"),
    ("training.train:run_steps:after:10", "2_train", "2_train/done.json"),
    ("storage.checkpoints:Checkpoints.save:after:2", "2_train", "2_train/done.json"),
    ("stages.training:write_json:before:1", "2_train", "2_train/done.json"),
    # evaluation: outcomes are written, their result is not; and between two attacks
    ("storage.results:write_json:before:2", "results/paper.npz", "results/paper.json"),
    ("evaluation.sound_protocol:execute:after:1", "results/paper.json", "results/sound.json"),
]


@pytest.mark.long
def test_a_run_that_dies_at_every_delicate_moment(reference, start, run, tmp_path):
    """Eleven crashes of one run, each resumed by the next; a torn line at the end of the metrics, too."""
    folder = tmp_path / "unlucky"
    for moment, present, absent in MOMENTS:
        process = start(
            *TINY,
            f"--workdir={folder}",
            program=("-c", CRASH, str(ROOT), moment),
            GLIBC_TUNABLES="glibc.malloc.hugetlb=1",
        )
        stdout, stderr = process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL, (moment, stdout, stderr)
        assert (folder / present).exists() and not (folder / absent).exists(), moment
        if moment == "checkpoints:Checkpoints.save:after:2":
            with (folder / "metrics.jsonl").open("a") as file:
                file.write('{"stage": "1_warmup", "epo')
    run(*TINY, f"--workdir={folder}")
    assert_same_run(folder, reference)


# Mistakes


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
    assert "was trained on other images of digits" in message and "data.dir" in message
    assert (tmp_path / "run" / "environment.json").read_bytes() == before
    monkeypatch.undo()
    assert read(tmp_path / "run" / "environment.json")["images"]["data"] in message


@pytest.mark.parametrize("name", ["exp[lr=0.1]", "what?", "a*b"])
def test_a_work_directory_that_orbax_takes_for_a_pattern(name, mistake, tmp_path):
    """It would write checkpoints that it does not find again."""
    message = mistake(DIGITS_METHOD, "--stages=evaluate", f"--workdir={tmp_path / name / 'run'}")
    assert name in message and "may not have *, ? or [" in message
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
    with pytest.raises(UserError, match="is not the config of a run: it has no 'method'"):
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
