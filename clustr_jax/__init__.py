"""clustr_jax: ClusTR (Clustering Training for Robustness) in JAX, with evaluations that can be believed.

    clf = clustr_jax.load("runs/digits-clustr_qtrades")
    x, y = data.load("digits", "test")
    x_adv = attacks.pgd(key, clf.logits, x, y, eps=0.2, step_size=0.05, steps=20, restarts=10)

    j = clustr_jax.judge(model, x, y, eps=8/255)    # any JAX model: figure, interval, checks, verdict

Map, from the ground up; a room imports from those below it only (tests/test_rooms.py):
    runtime       devices and processes, signals, mistakes of the user, stage names, random streams, extras
    reference     the paper's claims, the authors' switches
    settings      what a config says, as frozen dataclasses; --help
    losses, kmeans, clusters, certify, lipschitz    arrays in, arrays out
    attacks       PGD and its relatives, AutoAttack, the scheduler under every evaluation
    models        networks; the only room that imports flax.linen
    classifier    network and head together: what is attacked and deployed
    data          prepared sets, your own images, who is in which split
    training      one function per method, the train step, Magnet batches, k-means++ between epochs
    storage       work directory, checkpoints, results, and back from there to a network
    evaluation    the paper's protocol, the sound ones, can they be believed?, certificates
    doors         PyTorch, Foolbox, safetensors
    report        report.html, figures and MODEL_CARD.md of a work directory
    judge, verify the verdict on any model, and its stored images measured again
    stages        the order of things, and what is refused; run.py calls stages.run
    prepare, quirks, fidelity    python -m clustr_jax.NAME

Shape legend: B batch, N train set, Y classes, K clusters per class, M x S Magnet batch, E embedding,
R restarts. Pixels are float32 NHWC in [0, 1]; normalisation is inside the model.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clustr_jax.classifier import Classifier
    from clustr_jax.clusters import Clusters
    from clustr_jax.judge import Judgement, judge
    from clustr_jax.runtime.errors import UserError
    from clustr_jax.storage.loading import load
    from clustr_jax.verify import verify

__version__ = "0.1.0"
__all__ = ["Classifier", "Clusters", "Judgement", "UserError", "judge", "load", "verify"]

# Where the public names come from. They are imported when they are first asked for: the attacks need JAX
# and NumPy, and `load` everything that a network is made and kept with.
_HOMES = {
    "Classifier": "classifier",
    "Clusters": "clusters",
    "Judgement": "judge",
    "UserError": "runtime.errors",
    "judge": "judge",
    "load": "storage.loading",
    "verify": "verify",
}
# Files that are called as the function in them.
_FUNCTIONS = ("judge", "verify")
# Of these an extra can be missing (`pip install "clustr-jax[all]"`).
_ROOMS = ("data", "models", "training", "storage", "evaluation", "doors", "report", "stages")

# As it is while Python looks for a program of this package; one of them needs no JAX.
if sys.argv[:1] == ["-m"] and not any(word.endswith("clustr_jax.verify") for word in sys.orig_argv):
    from clustr_jax.runtime import programs

    programs.check_jax()


def __getattr__(name: str) -> Any:
    if name not in _HOMES and name not in _ROOMS:
        raise AttributeError(f"module 'clustr_jax' has no attribute {name!r}")
    from clustr_jax.runtime import extras

    try:
        home = importlib.import_module(f"clustr_jax.{_HOMES.get(name, name)}")
    except ModuleNotFoundError as error:
        raise extras.explained(error, f"clustr_jax.{name}") from error
    value = getattr(home, name) if name in _HOMES else home
    globals()[name] = value
    if _HOMES.get(name) in _FUNCTIONS:  # importing a file of that name has put the file there
        globals()[_HOMES[name]] = getattr(home, _HOMES[name])
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
