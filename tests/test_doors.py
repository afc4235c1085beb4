"""The doors where the other tool is missing: clustr_jax does without, and says what to install."""

import subprocess
import sys

import jax
import pytest

from clustr_jax import models
from clustr_jax.classifier import Classifier
from clustr_jax.doors import foolbox_model, pytorch
from clustr_jax.runtime.errors import UserError
from clustr_jax.storage import description
from runs import ROOT

IMPORTS = """
import sys
import clustr_jax
from clustr_jax.doors import foolbox_model, pytorch, safetensors_file
found = {"torch", "foolbox", "eagerpy", "PIL"} & set(sys.modules)
assert not found, found
"""


@pytest.fixture(scope="module")
def clf():
    net = models.build("mlp", num_classes=3, input_shape=(2,), mean=(0.0,), std=(1.0,))
    return Classifier(jax.jit(net.init)(jax.random.key(0)), None, net)


def without(monkeypatch, *names):
    """As if these packages were not installed."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "clustr_jax.doors.clustr_torch", raising=False)


def test_importing_clustr_jax_needs_none_of_the_tools():
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_pytorch_each_way_in_says_what_to_install(clf, monkeypatch, tmp_path):
    without(monkeypatch, "torch")
    message = "needs PyTorch, which is not installed: pip install torch==[0-9.]+$"
    for enter in (
        lambda: pytorch.to_torch(clf),
        lambda: pytorch.save(clf, tmp_path / "model.pt"),
        lambda: pytorch.from_torch(tmp_path / "model.pt"),
    ):
        with pytest.raises(UserError, match=message):
            enter()
    assert list(tmp_path.iterdir()) == []


def test_without_foolbox_it_says_what_to_install(clf, monkeypatch):
    without(monkeypatch, "foolbox")
    with pytest.raises(
        UserError, match="needs Foolbox, which is not installed: pip install foolbox==[0-9.]+$"
    ):
        foolbox_model.to_foolbox(clf)


def test_foolbox_is_not_given_points(clf):
    with pytest.raises(UserError, match="needs bounds"):
        foolbox_model.to_foolbox(clf.replace(bounds=None))


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet8", "cnn", "mlp", "lip_sll", "lip_aol", "lip_cpl", "lip_orthogonal"]
)
def test_a_description_gives_back_the_network(name):
    shape = (2,) if name == "mlp" else (16, 8, 3)
    net = models.build(name, num_classes=3, input_shape=shape, mean=(1 / 3,), std=(0.1,), width=6)
    clf = Classifier({}, None, net, nearest=5, bounds=(0.0, 1.0))
    found = description.describe(clf)
    assert found["model"] == name == models.name_of(net) and found["nearest"] == 5
    assert description.network(found) == net and description.bounds(found) == (0.0, 1.0)


def test_the_pins_are_those_that_the_messages_name():
    pins = (ROOT / "requirements-doors.txt").read_text()
    benchmarks = (ROOT / "benchmarks" / "requirements-bench.txt").read_text()
    for file, package in ((pytorch, "torch"), (foolbox_model, "foolbox")):
        line = next(line for line in pins.splitlines() if line.startswith(f"{package}=="))
        source = (ROOT / "clustr_jax" / "doors" / f"{file.__name__.split('.')[-1]}.py").read_text()
        assert f"pip install {line}" in source and line in benchmarks
