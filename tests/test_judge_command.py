"""clustr-jax judge: a model by its name, images by theirs, a verdict and a folder."""

import json
import pathlib

import numpy as np
import pytest

import clustr_jax
from clustr_jax.command import judge as command
from clustr_jax.command import main
from clustr_jax.evaluation import judging
from clustr_jax.runtime import locks
from judged import curved, images, small

OWN = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
from judged import curved
def make():
    return curved
def probabilities(x):
    import jax
    return jax.nn.softmax(curved(x))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a module and images, and budgets of seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_model.py").write_text(OWN)
    x, y = images()
    np.savez(tmp_path / "images.npz", x=x, y=y)
    few = small(0.02)
    monkeypatch.setattr(judging, "budget", lambda eps, slots, curve=(): few)
    return tmp_path


def test_a_model_and_its_images_by_name(place, capsys):
    code = main(["judge", "own_model:make", "--data=images.npz", "--eps=1/50", "--n=0", "--slots=32"])
    told, said = capsys.readouterr()
    assert code == 0 and "robust accuracy" in told and "at linf eps 0.02" in told
    assert said.startswith("memory: about 0.00 GB of ") and said.count("\n") == 1
    assert ": 32 images of 6x6x1, 4 classes, 32 side by side\n" in said
    content = json.loads((place / "judgement" / "judgement.json").read_text())
    assert content["eps"] == 0.02 and content["n"] == 32
    assert clustr_jax.verify(place / "judgement", curved).ok
    assert main(["verify", "judgement", "--model=own_model:curved"]) == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["own_model:make", "--data=images.npz", "--eps=8/0"], "expected a number or a fraction like 8/255"),
        (["own_model:none", "--data=images.npz", "--eps=0.1"], "own_model:none"),
        (["own_model:probabilities", "--data=images.npz", "--eps=0.1"], "returned probabilities"),
        (["own_model:make", "--data=none.npz", "--eps=0.1"], "unknown data set"),
        (["own_model:make", "--data=broken.npz", "--eps=0.1"], "cannot be read"),
        (["own_model:make", "--data=other.npz", "--eps=0.1"], "expected x and y"),
        (["own_model:make", "--data=images.npz", "--eps=0.1", "--n=-1"], "--n must be >= 0"),
        (["own_model:make", "--data=column.npz", "--eps=0.1", "--n=3"], "(32, 1), a column: give y[:, 0]"),
        (["own_model:make", "--data=onehot.npz", "--eps=0.1", "--n=3"], "give the classes, y.argmax(axis=1)"),
        (["own_model:make", "--data=floats.npz", "--eps=0.1", "--n=3"], "whole numbers >= 0, one for each"),
        (["own_model:make", "--data=negative.npz", "--eps=0.1", "--n=3"], "whole numbers >= 0"),
        (["own_model:make", "--data=scalar.npz", "--eps=0.1", "--n=3"], "whole numbers >= 0"),
        (
            ["own_model:make", "--data=fewer.npz", "--eps=0.1", "--n=3"],
            "32 labels for x of shape (31, 6",
        ),
        (["own_model", "--data=images.npz", "--eps=0.1"], "expected module:function"),
    ],
)
def test_mistakes_are_one_line(place, capsys, words, text):
    (place / "broken.npz").write_bytes(b"nothing")
    np.savez(place / "other.npz", a=np.zeros(3))
    x, y = images()
    labels = {
        "column": y[:, None], "onehot": np.eye(4)[y], "floats": y.astype(float), "negative": y - 1,
        "scalar": np.int64(1),
    }  # fmt: skip
    for name, given in labels.items():
        np.savez(place / f"{name}.npz", x=x, y=given)
    np.savez(place / "fewer.npz", x=x[:-1], y=y)
    assert main(["judge", *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and text in told and told.count("\n") == 1


def test_a_subset_has_the_shares_of_the_classes(place):
    x, y, index = command.images_of("images.npz", 8)
    assert len(x) == len(y) == 8
    np.testing.assert_array_equal(images()[1][index], y)


def test_two_judges_in_one_folder_are_refused(place, capsys):
    """The second one, at once: it would replace what the first one finds."""
    words = ["judge", "own_model:make", "--data=images.npz", "--eps=1/50", "--n=8"]
    with locks.held(place / "judgement"):
        assert main(words) == 2
    assert "judgement is in use by process" in capsys.readouterr().err
    assert not (place / "judgement" / "judgement.json").exists()
    assert main([*words, "--slots=8"]) == 0
    assert "lock" not in [path.name for path in (place / "judgement").iterdir()]


@pytest.mark.parametrize("name", ["judge", "verify", "completion", "prepare", "quirks", "report"])
def test_help_is_no_mistake(name, capsys):
    try:
        code = main([name, "--help"])
    except SystemExit as left:
        code = left.code
    told = capsys.readouterr()
    assert not code and told.out.startswith("usage: ") and not told.err
