"""Outcomes that were recorded once, of every attack, objective and protocol on small fixed models.

They say that nothing has changed, not that it is right; other tests do that. Where a protocol is meant to
change, its version is bumped and golden.json made again: `python tests/test_golden.py`.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clustr_jax import attacks, losses, models
from clustr_jax.classifier import Classifier
from clustr_jax.clusters import Clusters
from clustr_jax.data import Examples
from clustr_jax.evaluation import protocols
from clustr_jax.models import Outputs
from clustr_jax.settings import EvalSettings
from clustr_jax.training.objectives import METHODS
from linear_problems import Linear, get_config, problem

FILE = pathlib.Path(__file__).with_name("golden.json")
# Sums over a few hundred float32 numbers, in whatever order a processor adds them.
TOLERANCE = 2e-5
EPS, STEP = 0.02, 0.006
SHAPE, COUNT, CLASSES = (6, 6, 2), 16, 5


@dataclasses.dataclass(frozen=True)
class Curved:
    """tanh(x A) B as embeddings, and a linear head on them."""

    num_classes: int = CLASSES

    def eval(self, variables, x):
        hidden = jnp.tanh(x.reshape(x.shape[0], -1) @ variables["a"])
        z = hidden @ variables["b"]
        return Outputs(z @ variables["head"], z)


@functools.cache
def fixed():
    """(a classifier of two clusters for each class, images that it is mostly right about, labels)."""
    rng = np.random.default_rng(0)
    size = int(np.prod(SHAPE))
    weights = {"a": rng.normal(size=(size, 12)) / 3, "b": rng.normal(size=(12, 8)) / 3}
    weights["head"] = rng.normal(size=(8, CLASSES))
    weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), weights)
    x = rng.uniform(size=(COUNT, *SHAPE)).astype(np.float32)
    own = np.arange(COUNT) % CLASSES
    z = np.asarray(Curved().eval(weights, jnp.asarray(x)).embeddings)
    means = np.stack([z[own == c].mean(axis=0) for c in range(CLASSES)])
    centroids = np.stack([means, means + 0.3 * rng.normal(size=means.shape)], axis=1)
    clusters = Clusters(jnp.asarray(centroids, jnp.float32), jnp.float32(0.15))
    clf = Classifier(weights, clusters, Curved(), nearest=3)
    y = np.asarray(clf.predict(x)).astype(np.int32)
    y[:2] = (y[:2] + 1) % CLASSES
    return clf, x, y


def summary(clf, x, y, x_adv):
    """Which images are misclassified, and how far each one went."""
    x_adv = np.asarray(x_adv)
    moved = np.abs(x_adv - x).reshape(len(x), -1)
    logits = np.asarray(clf.replace(bounds=None).logits(x_adv))  # the authors' starts may leave the box
    return {
        "fooled": (logits.argmax(axis=1) != y).astype(int).tolist(),
        "moved": [float(v) for v in moved.mean(axis=1)],
    }


def of_attack(name):
    """The outcome of one attack."""
    clf, x, y = fixed()
    call, more = ATTACKS[name]
    found = call(jax.random.key(3), clf.logits, x, y, **more)
    if isinstance(found, attacks.NearestResult):
        # the order: on which side of the boundary an iterate lies may be decided by rounding
        order = np.argsort(found.distance, kind="stable").tolist()
        return {"order": order, "fooled": summary(clf, x, y, found.x_adv)["fooled"]}
    return summary(clf, x, y, found)


def _quick(key, f, x, y, **more):
    return attacks.qtrades(key, f, x, jax.nn.softmax(f(x)), **more)


_PGD = dict(eps=EPS, step_size=STEP, steps=6)
_FEW = dict(eps=EPS, slots=8)
ATTACKS = {
    "pgd": (attacks.pgd, dict(_PGD, restarts=2)),
    "pgd-loss": (attacks.pgd, dict(_PGD, restarts=2, select="loss", clip_start=False)),
    "pgd-last": (attacks.pgd, dict(_PGD, select="last", start="normal")),
    "pgd-l2": (attacks.pgd, dict(eps=0.12, step_size=0.04, steps=6, norm="l2", loss_fn=losses.margin)),
    "qtrades": (_quick, dict(eps=EPS, step_size=1.25 * EPS)),
    "fgsm": (attacks.fgsm, dict(eps=EPS)),
    "noise": (attacks.noise, dict(eps=0.1, draws=20)),
    "noise-gaussian": (attacks.noise, dict(eps=0.5, draws=20, kind="gaussian", norm="l2")),
    "apgd": (attacks.apgd, dict(_FEW, steps=8)),
    "apgd-l2": (attacks.apgd, dict(eps=0.12, slots=8, steps=8, norm="l2")),
    "apgd-t": (attacks.apgd, dict(_FEW, steps=8, targeted=True)),
    "apgd-malt": (attacks.apgd, dict(_FEW, steps=8, targeted=True, targets="malt")),
    "apgd-pm": (attacks.apgd, dict(_FEW, steps=8, loss_fn=losses.probability_margin)),
    "pma": (attacks.pma, dict(_FEW, steps=8)),
    "pma-l2": (attacks.pma, dict(eps=0.12, slots=8, steps=8, norm="l2")),
    "adaptive": (attacks.adaptive_restarts, dict(_FEW, steps=6, most=4, share=0.5)),
    "fmn": (attacks.fmn, dict(slots=8, steps=20)),
    "fmn-l2": (attacks.fmn, dict(slots=8, steps=20, norm="l2", targeted=True)),
    "ddn": (attacks.ddn, dict(slots=8, steps=20)),
    "fab": (attacks.fab, dict(_FEW, steps=8)),
    "fab-l2": (attacks.fab, dict(eps=0.12, slots=8, steps=8, norm="l2", restarts=2)),
    "square": (attacks.square, dict(_FEW, queries=60)),
    "square-l2": (attacks.square, dict(eps=0.2, slots=8, queries=60, norm="l2")),
}


def of_autoattack():
    """Who breaks what."""
    clf, x, y = fixed()
    found = attacks.autoattack(jax.random.key(3), clf.logits, x, y, eps=EPS, slots=8)
    return {"broken_by": found.broken_by.tolist(), **summary(clf, x, y, found.x_adv)}


def of_protocol(name, head):
    """Per-example outcomes and the figures of one protocol."""
    clf, x, y = fixed()
    if head == "linear":
        clf = clf.replace(clusters=None, nearest=0)
        y = np.asarray(clf.predict(x)).astype(np.int32)
        y[:2] = (y[:2] + 1) % CLASSES
    config = get_config("clustr", **{
        "eval.attack.eps": EPS, "eval.attack.step_size": STEP, "eval.attack.steps": 4,
        "eval.attack.restarts": 2, "eval.paper_steps": (2, 4), "eval.sweep": (EPS / 2,),
        "eval.curve": (EPS / 2, 1.5 * EPS), "eval.slots": 16, "eval.apgd_steps": 4, "eval.queries": 20,
        "eval.targets": 2,
    })  # fmt: skip
    examples = Examples(x, y, np.arange(len(y), dtype=np.int32) + 5)
    result, outcomes, _ = protocols.run(
        name, jax.random.key(1), clf, examples, EvalSettings.of(config.eval), lambda a, what: None
    )
    kept = {
        what: value.tolist() if value.dtype.kind == "U" else value.astype(int).tolist()
        for what, value in outcomes.items()
    }
    return {"outcomes": kept, "result": timeless(result)}


def timeless(value):
    """Without times."""
    if isinstance(value, dict):
        return {name: timeless(v) for name, v in value.items() if not name.endswith("_seconds")}
    return [timeless(v) for v in value] if isinstance(value, (list, tuple)) else value


def of_objective(method, **changes):
    """Metric sums, and the weights, after two steps of training."""
    net = Headed((3,), 3) if method == "nominal_certified" else Linear((3,), 3, normed=True)
    state = problem(method, np.random.default_rng(2), net, **changes).run(2)
    found = {name: float(value) for name, value in state.totals.items()}
    weights = jax.tree.leaves(state.params)
    return found | {"weights": [float(v) for leaf in weights for v in np.asarray(leaf).ravel()]}


@dataclasses.dataclass(frozen=True)
class Headed(Linear):
    """Its parameters as a network with a head has them."""

    def variables(self, rng):
        found = super().variables(rng)
        return found | {"params": {models.HEAD: found["params"]}}

    def _outputs(self, variables, x, mean, variance):
        return super()._outputs({"params": variables["params"][models.HEAD]}, x, mean, variance)


# Networks that are 1-Lipschitz are not asked for here: the objectives do not look.
OBJECTIVES = {method: (method, {}) for method in METHODS} | {
    "free_at": ("free_at", {"train.replays": 2}),
    "clustr_qtrades-mse": ("clustr_qtrades", {"train.consistency": "mse"}),
    "clustr_qtrades-paper_code": ("clustr_qtrades", {"fidelity.preset": "paper_code"}),
    "qtrades-paper_code": ("qtrades", {"fidelity.preset": "paper_code"}),
    "pgd_at-awp": ("pgd_at", {"train.awp": 0.01, "train.ema": 0.9, "train.eps_ramp": 2.0}),
}
PROTOCOLS = [("paper", "clusters"), ("sound", "clusters"), ("quick", "linear")]
# Compilation takes seconds for each of these, and most of their code is that of another one.
SLOW = (
    "attack pgd-l2", "attack noise-gaussian", "attack apgd-l2", "attack apgd-t", "attack fab-l2",
    "attack square-l2", "attack pma-l2", "attack fmn-l2", "attack apgd-pm",
    "autoattack", "protocol sound clusters", "objective fast_at", "objective at_pretrain",
    "objective clustr", "objective clustr_qtrades-mse", "objective qtrades",
)  # fmt: skip
MORE = (
    "protocol paper clusters", "objective magnet", "objective trades", "objective pgd_at",
    "objective pgd_at-awp", "objective clustr_trades", "objective clustr_certified",
    "objective clustr_qtrades-paper_code", "objective qtrades-paper_code",
)  # fmt: skip


def everything():
    """All that is compared."""
    found = {f"attack {name}": functools.partial(of_attack, name) for name in ATTACKS}
    found["autoattack"] = of_autoattack
    for name, head in PROTOCOLS:
        found[f"protocol {name} {head}"] = functools.partial(of_protocol, name, head)
    for name, (method, changes) in OBJECTIVES.items():
        found[f"objective {name}"] = functools.partial(of_objective, method, **changes)
    return found


def assert_same(found, expected, where):
    """Words and whole numbers are equal, other numbers within the rounding of a sum."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            assert_same(found[name], expected[name], f"{where} {name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE / 10), where
    else:
        assert found == expected, where


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW) + [pytest.mark.more] * (name in MORE))
        for name in everything()
    ],
)
@pytest.mark.one_in(3)
def test_outcomes_are_those_recorded(name):
    recorded = json.loads(FILE.read_text())[name]
    assert_same(json.loads(json.dumps(everything()[name]())), recorded, name)


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: make() for name, make in everything().items()}, indent=0) + "\n")
