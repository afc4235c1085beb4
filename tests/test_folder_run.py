"""Own images: what the config leaves to the data, and a run on them."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn.datasets import load_digits

import clustr_jax
from clustr_jax import data
from clustr_jax.data import folder
from clustr_jax.settings import DataSettings
from clustr_jax.stages import configuration
from clustr_jax.storage import loading
from marks import in_ci
from runs import ROOT, assert_one_line, read
from small_folders import write

# What the config leaves to the data


def own(size, channels=3, count=40):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (count, size, size, channels)).astype(np.uint8)
    images[..., -1] = 7  # a channel of one colour
    return data.Split(images, np.arange(count, dtype=np.int32) % 2, 2, 255.0, (0.0, 1.0), "", (), "abc")


def config(method="clustr", **model):
    found = ConfigDict(dict(
        method=method, variant="", smoke=False, model=dict(name="auto", mean=(), std=()) | model,
        data=dict(name="folder", dir="x/flowers"), eval=dict(n=32),
    ))  # fmt: skip
    return found.lock()


def test_mean_and_std_are_those_of_the_training_images():
    split = own(20, count=2500)  # more than are looked at together
    found = configuration.complete(config(), split, split)
    pixels = split.images.astype(np.float64) / 255
    np.testing.assert_allclose(found.model.mean, pixels.mean(axis=(0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(found.model.std[:2], pixels.std(axis=(0, 1, 2))[:2], atol=1e-6)
    assert found.model.std[2] == 1.0  # and not 0, by which nothing can be divided
    assert found.data.sha == "abc"
    given = configuration.complete(config(mean=(0.1,), std=(0.3,)), split, split)
    assert given.model.mean == (0.1,) and given.model.std == (0.3,)
    assert json.loads(json.dumps(found.to_dict()))["data"]["sha"] == "abc"


@pytest.mark.parametrize(
    ("size", "model", "expected"),
    [(8, "auto", "cnn"), (16, "auto_small", "cnn"), (17, "auto", "resnet18"), (32, "auto_small", "resnet8")],
)
def test_the_network_goes_by_the_size_of_the_images(size, model, expected):
    """And not by the name of the variant, which is the user's to choose."""
    c = config(name=model)
    c.variant = "mine"
    assert configuration.complete(c, own(size), own(size)).model.name == expected


def test_eval_n_fits_own_images_and_a_smoke_run():
    """Elsewhere too many are refused: there the sizes are known."""
    c, other = config(), dataclasses.replace(own(8), sha="")
    assert configuration.complete(c, own(8), own(8, count=9)).eval.n == 9
    assert configuration.complete(c, other, own(8, count=9)).eval.n == 32
    c.smoke = True
    assert configuration.complete(c, other, own(8, count=9)).eval.n == 9


def test_the_set_is_called_after_its_folder(tmp_path):
    c = config(method="clustr_qtrades")
    assert data.label(DataSettings.of(c.data)) == "flowers"
    assert str(configuration.default_workdir(c)) == "runs/flowers-clustr_qtrades"
    assert data.label(DataSettings(**dict(name="digits", dir="x"))) == "digits"
    # a dot is part of a folder's name; the figures of a known set are not those of own images called so
    (tmp_path / "birds.v2").mkdir()
    for place, label in (
        ("birds.v2", "birds.v2"),
        ("birds.v2.npz", "birds.v2"),
        ("cifar10", "own-cifar10"),
        ("svhn.npz", "own-svhn"),
        ("toy2d_pairs", "own-toy2d_pairs"),
    ):
        assert data.label(DataSettings(**dict(name="folder", dir=str(tmp_path / place)))) == label
    assert data.label(DataSettings(**dict(name="svhn", dir=""))) == "svhn_cropped"


# A run


def digits(root, per_class=12):
    """scikit-learn's digits as PNGs, in folders called zero to nine."""
    names = "zero one two three four five six seven eight nine".split()
    scans = load_digits()
    for label, name in enumerate(names):
        for i, index in enumerate(np.flatnonzero(scans.target == label)[:per_class]):
            image = (scans.images[index] * 255 / 16).astype(np.uint8)
            write(root / ("test" if i < 3 else "train") / name / f"{index}.png", image)


FOLDER = f"--config={ROOT}/configs/folder.py"


@pytest.mark.slow
@pytest.mark.parametrize("method", in_ci(["nominal", "clustr_qtrades"], "nominal"))
def test_a_run_from_a_folder(method, run, start, tmp_path):
    """Trains, evaluates, loads again; a changed folder is refused; tiny: 9 training images per class."""
    digits(tmp_path / "pngs")
    (tmp_path / "pngs" / "README.txt").write_text("not read")
    leaked = sorted((tmp_path / "pngs" / "test" / "two").iterdir())[0]
    shutil.copy(leaked, tmp_path / "pngs" / "train" / "three")
    arguments = (f"{FOLDER}:{method}", "--config.smoke=True", "--config.data.dir=pngs", "--workdir=out")
    stdout, _ = run(*arguments)
    assert "10 classes: eight, five, four, nine, one" in stdout
    assert f"{method} on pngs, cnn with" in stdout
    names = folder.read(tmp_path / "pngs").class_names
    (label, name), *_ = re.findall(r"class (\d) \((\w+)\) is predicted", stdout)
    assert names[int(label)] == name
    place = tmp_path / "out"
    kept = read(place / "config.json")
    assert kept["model"]["name"] == "cnn" and len(kept["model"]["mean"]) == 1
    assert kept["data"]["sha"] == folder.read(tmp_path / "pngs").sha
    clean = read(place / "results" / "clean.json")
    assert clean["dataset"] == "pngs" and clean["n"] == 30
    assert clean["class_names"][:3] == ["eight", "five", "four"]
    # the image on two sides, and the file that is not read: in the output, the results, the report, the card
    said = "1 test image is among the training images as well, 1 under another label"
    assert f"duplicates: {said}" in stdout and "not read: README.txt, beside train" in stdout
    for name in ("clean", "sound"):
        found = read(place / "results" / f"{name}.json")
        assert found["duplicates"]["train/test"]["images"] == 1
        assert "not read: README.txt, beside train" in found["data_notes"]
    for document in ("report.html", "MODEL_CARD.md"):
        text = (place / document).read_text(encoding="utf-8")
        assert said in text and "README.txt, beside train" in text
    clf = clustr_jax.load(place)
    with pytest.warns(UserWarning, match="not read: README.txt"):
        x, y = data.load("folder", "test", data_dir=str(tmp_path / "pngs"))
    assert float(np.mean(np.asarray(clf.predict(x)) == y)) == clean["clean"]
    stdout, _ = run(*arguments)
    assert "2_train: finished before" in stdout and "clean was done before" in stdout
    (tmp_path / "pngs").rename(tmp_path / "moved")
    stdout, _ = run(*(word.replace("dir=pngs", "dir=moved") for word in arguments))
    assert "2_train: finished before" in stdout and "clean was done before" in stdout
    assert loading.digest(clustr_jax.load(place)) == loading.digest(clf)
    (tmp_path / "moved").rename(tmp_path / "pngs")
    write(tmp_path / "pngs" / "train" / "one" / "more.png", np.full((8, 8), 9, np.uint8))
    process = start(*arguments)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 2
    assert_one_line(stderr)
    assert "pngs has changed" in stderr and "--workdir" in stderr
