"""run.py from start to finish: what a run leaves behind, and what is made of it.

The runs are small: a narrow CNN on some digits, the MLP on points (tests/runs.py).
"""

import dataclasses
import shutil
import signal
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
from clustr_jax.training import train_state
from clustr_jax.training.objectives import METHODS
from marks import in_ci
from runs import (
    DIGITS,
    REQUIRED,
    TINY,
    TOY,
    arrays,
    assert_same_arrays,
    assert_same_run,
    metrics,
    read,
    timeless,
)
from smoke_runs import smoke, toy2d

# orbax and ml_collections use outdated calls of their own libraries.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")
]


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

    def spy(images, labels, *, augment, **more):
        seen.append(augment)
        return real(images, labels, augment=augment, **more)

    monkeypatch.setattr(train_state, "TrainSet", spy)
    config = smoke("digits", "at_pretrain")
    config.pretrain.name, config.pretrain.augment, config.data.augment = "digits", "flip", "crop"
    stages.run(config, tmp_path / "run", ("1_warmup", "2_train"))
    assert seen == ["flip", "crop"]


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


def test_a_start_with_another_normalisation_is_told(tmp_path, capsys):
    def config(**changes):
        found = toy2d("nominal")
        found.smoke, found.train.epochs = False, 0
        found.update_from_flattened_dict(changes)
        return found

    stages.run(config(), tmp_path / "first", ("2_train",))
    start = {"init_from": str(tmp_path / "first" / "2_train")}
    stages.run(config(**start), tmp_path / "same", ("2_train",))
    assert "warning" not in capsys.readouterr().out
    stages.run(config(**start, **{"model.std": (0.1, 0.1)}), tmp_path / "other", ("2_train",))
    assert "has mean and std" in capsys.readouterr().out


def test_the_line_of_an_error_of_a_library_is_one_that_can_be_read():
    """Orbax names every array of a tree in one line."""
    assert errors.first_line(ValueError("\n  \nwrong shape\nat ...")) == "wrong shape"
    assert errors.first_line(KeyError()) == "KeyError"
    assert errors.first_line(KeyError("'eps'\nDid you mean ...")) == "no such key: 'eps' Did you mean ..."
    assert errors.first_line(AttributeError(KeyError("eps"))) == "no such key: eps"
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
        f"{DIGITS}:magnet",
        *TINY[1:],
        "--config.train.epochs=0",
        "--stages=2_train",
        f"--config.init_from={reference / '1_warmup'}",
        f"--workdir={folder}",
    )
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
