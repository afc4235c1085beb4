"""docs/own_attack.md and docs/own_method.md do what they say: their blocks are run, one after the other.

The attack is then held to what every attack of the registry is held to, the method to its formula, and the
file of the method is trained from the command line.
"""

import dataclasses
import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest

import test_objectives
import test_registry
from clustr_jax import attacks, report, stages
from clustr_jax.attacks import scheduler
from clustr_jax.report import words
from clustr_jax.runtime.errors import UserError
from clustr_jax.storage import loading
from clustr_jax.training.objectives import METHODS
from runs import ROOT, read


def blocks(page):
    """The Python blocks of a page, in order."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


ATTACK, METHOD = blocks("own_attack.md"), blocks("own_method.md")


@pytest.fixture(scope="module")
def attack():
    """The names that the blocks of the page about attacks leave behind."""
    found = {"__name__": "own_attack"}
    for block in ATTACK:
        exec(compile(block, "docs/own_attack.md", "exec"), found)
    return found


def test_the_attack_breaks_images_inside_the_ball(attack):
    before = np.asarray(attack["model"](attack["x"])).argmax(axis=1) == attack["y"]
    assert before.mean() > 0.8
    assert attack["left"].mean() < before.mean() - 0.1  # and the page itself has measured ball and box
    moved = np.abs(attack["x_adv"] - attack["x"]).reshape(len(before), -1).max(axis=1)
    assert np.all(moved[~before] == 0) and moved.max() <= 0.1 + 1e-6


@pytest.mark.more
def test_the_entry_is_what_every_entry_is(attack):
    entry = attack["entry"]
    test_registry.test_outcomes(entry, "linf")
    test_registry.test_gradients_are_taken_where_the_entry_says_so(entry)
    test_registry.test_it_reads_the_settings_that_it_names_and_no_others(entry)
    test_registry.test_what_it_needs(entry)


def test_an_entry_runs_beside_the_names(attack):
    """And what it broke bears its name, however long; one that wants a step size is refused."""
    result, entry = attack["result"], attack["entry"]
    assert set(result.broken_by) == {"", "clean", "apgd-ce", "momentum"}
    key, model, x, y = jax.random.key(0), attack["model"], attack["x"], attack["y"]
    scheduler.verify_inside(result.x_adv, x, 0.1, "linf", (0.0, 1.0))
    assert ((np.asarray(model(result.x_adv)).argmax(axis=1) == y) == result.robust).all()
    named = dataclasses.replace(entry, name="momentum-with-a-long-name")
    alone = attacks.autoattack(key, model, x, y, eps=0.1, attacks=(named,))
    assert set(alone.broken_by) == {"", "clean", "momentum-with-a-long-name"}
    with pytest.raises(UserError, match="'momentum' reads a step size"):
        wanting = dataclasses.replace(entry, settings=("steps", "step_size"))
        attacks.autoattack(key, model, x, y, eps=0.1, attacks=(wanting,))


@pytest.fixture
def method(monkeypatch):
    """The names of the page about methods; the method is known while the test runs."""
    monkeypatch.syspath_prepend(str(ROOT))
    from configs import common

    for table in (METHODS, common.METHODS):
        monkeypatch.setitem(table, "mart", None)  # to be taken out again
    found = {"__name__": "mart"}
    for block in METHOD:
        exec(compile(block, "docs/own_method.md", "exec"), found)
    return found


def test_the_method_is_its_formula(method):
    """Value in both precisions and gradients: as the methods that are here are tested."""

    def formula(t):
        return method["reference"](t.logits, t.logits_adv, t.y, 5.0)

    terms, aux = test_objectives.check(test_objectives.Golden("mart", {}), formula)
    np.testing.assert_allclose(aux.per_example, formula(terms), rtol=1e-10)
    assert set(aux.metrics) == {"accuracy", "adversarial_accuracy"}


@pytest.mark.slow
def test_the_file_trains(run, tmp_path):
    """From the command line, start to end; and what it leaves is loaded where the method is known only."""
    (tmp_path / "mart.py").write_text(METHOD[0])
    stdout, _ = run("--config=mart.py", "--config.smoke=True", "--workdir=runs/mart")
    assert "mart on digits" in stdout and "robust accuracy" in stdout
    workdir = tmp_path / "runs" / "mart"
    assert read(workdir / "results" / "sound.json")["method"] == "mart"
    assert read(workdir / "config.json")["train"]["beta"] == 5.0
    assert loading.load(workdir).clusters is None  # here, where nobody knows mart
    stdout, _ = run(program=["-m", "clustr_jax.report", "runs/mart"], PYTHONPATH=str(ROOT))
    assert stdout.startswith("report: ")
    assert "2_train (mart): BCE(p(x_adv), y)" in (workdir / "report.html").read_text()
    shutil.copytree(workdir, tmp_path / "runs" / "again")
    _, stderr = run(program=["-m", "clustr_jax.report", "runs/mart", "runs/again"], PYTHONPATH=str(ROOT))
    assert "warning" not in stderr and (tmp_path / "compare.html").exists()


@pytest.mark.parametrize("head", ["linear", "clusters"])
def test_a_directory_needs_its_method_no_more(tmp_path, monkeypatch, capsys, head):
    """Of both stages, where the method is not known: loaded, and said in a report; without the note, told."""
    monkeypatch.syspath_prepend(str(ROOT))
    from configs import common, toy2d

    row = METHODS["clustr"] if head == "clusters" else METHODS["at_pretrain"]
    row = dataclasses.replace(row, warmup="theirs", source=False, adversary=None)
    for table, mine, theirs in ((METHODS, row, METHODS["nominal"]), (common.METHODS, common.clustr, None)):
        monkeypatch.setitem(table, "mine", mine)
        monkeypatch.setitem(table, "theirs", theirs or common.METHODS["nominal"])
    config = toy2d.get_config("mine")
    config.smoke = True
    stages.run(config, tmp_path / "run", ("1_warmup", "2_train"))
    capsys.readouterr()
    before = [loading.load(tmp_path / "run" / stage) for stage in ("1_warmup", "2_train")]
    said = words.method(report.read(tmp_path / "run"))
    for name in ("mine", "theirs"):
        monkeypatch.delitem(METHODS, name)
    after = [loading.load(tmp_path / "run" / stage) for stage in ("1_warmup", "2_train")]
    assert [loading.digest(clf) for clf in before] == [loading.digest(clf) for clf in after]
    assert before[0].clusters is None and (after[1].clusters is not None) == (head == "clusters")
    assert words.method(report.read(tmp_path / "run")) == said and len(said) == 3 and "theirs" in said[0]
    path = tmp_path / "run" / "2_train" / "done.json"
    wrong = {**read(path)["method"], "head": "x"}
    for damaged in ({}, {"method": "mine"}, {"method": {"name": "mine"}}, {"method": wrong}):
        path.write_text(json.dumps({k: v for k, v in read(path).items() if k != "method"} | damaged))
        with pytest.raises(UserError, match=r"method 'mine', which is not known here; import the file"):
            loading.load(tmp_path / "run")
        assert words.method(report.read(tmp_path / "run")) == ["mine, a method that is not known here."]


def test_what_a_page_needs_is_imported_by_it():
    assert len(ATTACK) == 5 and len(METHOD) == 2
    assert "mart" not in sys.modules
