"""The examples in docstrings: every public name has one, and each prints what it says.

They may use what `names` has without importing it, and print three digits, as docs/api/index.md says; a
method's example goes on from that of its class.
"""

import doctest
import importlib
import inspect
import re
import tempfile
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clustr_jax
from clustr_jax import attacks, certify, clusters, data, lipschitz, losses, models
from clustr_jax.kmeans import kmeans

# orbax uses outdated calls of its own libraries
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning"
)

# Whose public functions and classes are meant for others. The first two say in __all__ what that is.
MODULES = (
    "clustr_jax", "clustr_jax.attacks", "clustr_jax.attacks.ensemble",
    "clustr_jax.attacks.targets", "clustr_jax.certify",
    "clustr_jax.classifier", "clustr_jax.clusters", "clustr_jax.data", "clustr_jax.kmeans",
    "clustr_jax.lipschitz", "clustr_jax.losses",
)  # fmt: skip
# Results of functions, shown in the examples of those; and what builds attacks for protocols.
WITHOUT = {
    "Judgement",
    "verify",
    "AutoAttackResult",
    "Interrupted",
    "NearestResult",
    "RecordWarning",
    "UnattackedWarning",
    "UnitWarning",
    "UnsteadyWarning",
    "KMeans",
    "UserError",
}
# The contract, by hand: a rename must not go unnoticed.
CONTRACT = {
    "judge", "load", "Classifier", "Classifier.logits", "Classifier.embed", "Classifier.predict",
    "Classifier.scores",
    "data.load", "attacks.pgd", "attacks.qtrades", "attacks.autoattack", "attacks.apgd", "attacks.fab",
    "attacks.square", "attacks.fgsm", "attacks.noise", "kmeans.kmeans", "Clusters", "Clusters.log_scores",
    "Clusters.scores", "Clusters.probs", "clusters.fit", "losses.cross_entropy", "losses.kl", "losses.margin",
    "losses.dlr", "losses.magnet_loss", "certify.radius", "lipschitz.bound",
}  # fmt: skip
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL


def names():
    """What examples may use without importing it."""
    return {
        "clustr_jax": clustr_jax, "jax": jax, "jnp": jnp, "np": np, "attacks": attacks, "certify": certify,
        "clusters": clusters, "data": data, "lipschitz": lipschitz, "losses": losses, "models": models,
        "Classifier": clustr_jax.Classifier, "Clusters": clustr_jax.Clusters, "kmeans": kmeans,
    }  # fmt: skip


def functions(cls):
    """Public methods and properties that the class itself defines (not what dataclasses add)."""
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else member
        own = isinstance(function, types.FunctionType) and function.__qualname__ == f"{cls.__name__}.{name}"
        if own and function.__module__ == cls.__module__ and not name.startswith("_"):
            yield name, function


def public():
    """{name: (object, its class or None)} of all that must have an example."""
    found = {}
    for path in MODULES:
        module = importlib.import_module(path)
        prefix = path.removeprefix("clustr_jax").removeprefix(".") + "."
        for name in getattr(module, "__all__", None) or vars(module):
            item = getattr(module, name)
            own = hasattr(module, "__all__") or getattr(item, "__module__", None) == path
            known = any(item is other for other, _ in found.values())
            if name.startswith("_") or not callable(item) or not own or known or name in WITHOUT:
                continue
            if not inspect.isclass(item):
                found[(prefix + name).lstrip(".")] = inspect.unwrap(item), None
                continue
            found[name] = item, None
            for method, function in functions(item):
                found[f"{name}.{method}"] = function, item
    return found


PUBLIC = public()


def run(item, namespace):
    """Run the examples of one docstring in `namespace`: (how many, what went wrong or "")."""
    example = doctest.DocTestParser().get_doctest(item.__doc__, namespace, item.__qualname__, None, None)
    report = []
    with np.printoptions(precision=3, suppress=True):
        doctest.DocTestRunner(optionflags=FLAGS).run(example, out=report.append, clear_globs=False)
    namespace.update(example.globs)
    return len(example.examples), "".join(report)


def test_the_contract_is_covered():
    assert PUBLIC.keys() >= CONTRACT, CONTRACT - PUBLIC.keys()
    assert len(PUBLIC) > len(CONTRACT)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "judge")) for name in PUBLIC]
)
def test_example(name, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    item, owner = PUBLIC[name]
    namespace = names()
    if owner is not None:
        run(owner, namespace)
    count, report = run(item, namespace)
    assert count, f"{name} has no example: add one with >>> to its docstring"
    assert not report, report


# Doors that are looked up: each has a table of its arguments.
DOORS = {
    "judge", "verify", "load", "data.load", "kmeans.kmeans", "clusters.fit", "clusters.fit_assign",
    "clusters.of_linear_head", "certify.radius", "certify.accuracy",
    "certify.sound_rules", "lipschitz.bound", "lipschitz.jacobian_norm", "losses.cross_entropy",
    "losses.smoothed_cross_entropy", "losses.kl", "losses.margin", "losses.dlr", "losses.probability_margin",
    "losses.magnet_loss", "losses.magnet_loss_of_rows",
    *(f"attacks.{name}" for name in attacks.__all__ if not name[0].isupper()),
}  # fmt: skip


def arguments(item):
    """The names that the section Args of a docstring has, in order; None without one."""
    section = re.search(r"^Args:\n((?:    .*\n)+)", f"{inspect.getdoc(item)}\n", re.MULTILINE)
    if section is None:
        return None
    names = re.findall(r"^    (\w[\w, ]*): ", section[1], re.MULTILINE)
    return [name for entry in names for name in entry.split(", ")]


@pytest.mark.parametrize("name", sorted(DOORS))
def test_the_arguments_of_a_door_are_told(name):
    """All of them, in the order of the signature."""
    item = importlib.import_module("clustr_jax.verify").verify if name == "verify" else PUBLIC[name][0]
    told = arguments(item)
    assert told == list(inspect.signature(item).parameters)


def test_whoever_tells_arguments_tells_the_right_ones():
    for name, (item, _) in PUBLIC.items():
        told = None if inspect.isclass(item) else arguments(item)
        assert told is None or told == [n for n in inspect.signature(item).parameters if n != "self"], name


def test_a_wrong_example_fails():
    def item():
        """
        >>> losses.margin(jnp.array([[2.0, 0.0]]), jnp.array([0])).item()
        2.0
        """

    count, report = run(item, names())
    assert count == 1 and "Expected:" in report and "-2.0" in report
