"""A small healthy classifier, one that is only functions, and the checks of one by number."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from centroid_classifiers import LinearNet, eval_settings, exact_robust, points, separated
from clustr_jax.classifier import Classifier
from clustr_jax.clusters import Clusters
from clustr_jax.evaluation.checks import Probe
from clustr_jax.evaluation.subject import Subject
from clustr_jax.models import Outputs

N, EPS = 32, 0.3


@dataclasses.dataclass(frozen=True)
class Features(LinearNet):
    """x W, or something that hides its gradient, or lets the batch decide."""

    kind: str = "plain"

    def eval(self, variables, x):
        if self.kind == "rounded":  # gradient 0 almost everywhere
            x = jnp.round(x * 64) / 64
        if self.kind == "halved":  # half of the gradient, with the right signs
            x = (x + jax.lax.stop_gradient(x)) / 2
        if self.kind == "stopped":
            x = jax.lax.stop_gradient(x)
        z = x @ variables["w"]
        if self.kind == "batch":
            z = z + 0.3 * jnp.mean(z, axis=0)[None]
        return Outputs(z, z)


@functools.cache
def problem(kind="plain", scale=1.0):
    """(classifier, examples, config, which are robust)."""
    weight, mu, variance, x, y = separated(
        np.random.default_rng(0), n=N, classes=5, size=12, scale=scale, noise=0.4
    )
    mu, x, variance = mu / 2, x / 2, variance / 4  # so that 0.5 is a large radius, as it is for pixels
    clf = Classifier(
        {"w": jnp.asarray(weight)},
        Clusters(jnp.asarray(mu), jnp.float32(variance)),
        Features(kind),
        bounds=None,
    )
    config = eval_settings(**{"eval.attack.eps": EPS, "eval.attack.step_size": EPS / 4, "eval.slots": N})
    return clf, points(x, y), config, exact_robust(x, y, mu, EPS)


def probe(kind="plain", scale=1.0, robust=None):
    clf, examples, config, exact = problem(kind, scale)
    return Probe(jax.random.key(1), clf, examples, config, exact if robust is None else robust)


def by_number(checks):
    found = {}
    for check in checks:
        found.setdefault(check.number, []).append(check)
    return found


def plain(logits):
    """A subject of which only the logits are looked at; a program calls the same function."""

    def called(x):
        with jax.ensure_compile_time_eval():
            shape = np.shape(logits(np.zeros(x.shape, np.float32)))
        told = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.pure_callback(lambda x: np.asarray(logits(np.asarray(x)), np.float32), told, x)

    return Subject(Partial(called), logits, lambda: "", None)


def outputs_of(logits):
    _, examples, config, _ = problem()
    return list(Probe(jax.random.key(0), plain(logits), examples, config, np.ones(N, bool)).outputs())


def linear(x):
    return np.asarray(x)[:, :5] * 10


def fits(check):
    """Whether the number is on the side of its limit that the status says."""
    words = check.limit.split()
    share = 100 if "points" in check.limit or "%" in check.limit else 1
    value = share * check.value
    if words[0] in ("<=", ">=", ">"):
        bound = float(words[1])
        inside = {"<=": value <= bound * 1.01, ">=": value >= bound, ">": value > bound}[words[0]]
    elif "to" in words:
        inside = float(words[0]) <= value <= float(words[2])
    else:
        inside = value == float(words[0])
    return inside == (check.status == "PASS")
