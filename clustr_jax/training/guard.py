"""Whether a stage destroys the network that it was handed: rules on what is seen of it after each epoch.

The paper's own recipe can do so within one epoch (docs/fidelity.md). A stage that starts from random
parameters was handed nothing; of the rules, that of catastrophic overfitting alone applies to it.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from clustr_jax.runtime import mesh
from clustr_jax.training import learned, train
from clustr_jax.training.train_state import TrainSet, TrainState
from clustr_jax.training.trainers import Trainer

# The share of the handed accuracy that may be lost.
LOST = 1 / 3
# The share of the predictions that one class may have.
ONE_CLASS = 0.5
# How much more than before that has to be: of two classes one always has half.
MORE = 0.25
# How many times smaller the features' spread may get.
FLAT = 100.0
# The share of open hinges that counts as all, and the updates after which they have had their time: runs that
# end well start with 100 % for some 30 updates and 99 % for 100.
OPEN, PATIENCE = 0.999, 200
# Ordinary adversarially trained networks differ by a few points between one step and ten.
OVERFITTING_GAP = 0.2
# What the alarms are called in metrics.jsonl, done.json and reports.
ACCURACY, CLASS, FEATURES, HINGES, OVERFITTING = (
    "accuracy lost",
    "one class",
    "features fall together",
    "no hinge closes",
    "catastrophic overfitting",
)


@dataclasses.dataclass(frozen=True)
class Health:
    """Of a network on held-out images: accuracy, the predictions' commonest class, and the features' spread.

    `spread` is the features' total variance as a share of their mean square: 0 where all images have one
    feature, whatever its length. The scale of the features does not count, for the Magnet loss divides by it.
    """

    accuracy: float
    largest_class: float
    feature_spread: float


# A network that was handed over and not looked at: no figure of it can be lost.
UNSEEN = Health(accuracy=0.0, largest_class=1.0, feature_spread=0.0)


def health(
    predictions: Int[np.ndarray, "N"], labels: Int[np.ndarray, "N"], embeddings: Float[np.ndarray, "N E"]
) -> Health:
    """Of at least one image.

    >>> from clustr_jax.training import guard
    >>> guard.health(np.array([0, 1, 1, 1]), np.array([0, 1, 1, 0]), np.array([[1.0], [-1], [1], [-1]]))
    Health(accuracy=0.75, largest_class=0.75, feature_spread=1.0)
    """
    z = np.asarray(embeddings, np.float64)
    square = float(np.mean(np.sum(np.square(z), axis=1)))
    variance = float(np.sum(np.var(z, axis=0)))
    return Health(
        accuracy=float(np.mean(predictions == labels)),
        largest_class=float(np.max(np.bincount(predictions)) / len(predictions)),
        feature_spread=variance / square if square > 0 else 0.0,
    )


def alarms(
    handed: Health | None, now: Health | None, totals: dict[str, float], *, updates: int
) -> dict[str, str]:
    """What is wrong after an epoch: kind -> the figures that say so, {} where nothing is.

    `handed` is the network at the start of the stage, None where it began from random parameters. Where there
    are no held-out images it is UNSEEN and `now` is None: the rule on hinges alone is left. `totals` are the
    epoch's means, `updates` those of the stage so far.
    """
    found = {}
    single, multi = totals.get("single_step_accuracy"), totals.get("multi_step_accuracy")
    if single is not None and multi is not None and single - multi > OVERFITTING_GAP:
        found[OVERFITTING] = f"on held-out images one step leaves {single:.1%}, ten steps {multi:.1%}"
    if handed is None:
        return found
    if now is not None and now.accuracy < (1 - LOST) * handed.accuracy:
        found[ACCURACY] = f"held-out accuracy {now.accuracy:.1%}, and {handed.accuracy:.1%} was handed over"
    if now is not None and now.largest_class > max(ONE_CLASS, handed.largest_class + MORE):
        found[CLASS] = f"one class has {now.largest_class:.0%} of the predictions"
    if now is not None and now.feature_spread * FLAT < handed.feature_spread:
        found[FEATURES] = (
            f"the features' variance is {now.feature_spread:.1e} of their mean square, "
            f"{handed.feature_spread:.1e} before"
        )
    if totals.get("hinge_active", 0.0) >= OPEN and updates >= PATIENCE:
        found[HINGES] = f"every hinge of the Magnet loss is open after {updates} updates"
    return found


# Weights of a term of the objectives, beside the one that has none.
_WEIGHTS = ("lam", "beta", "xent_lam", "ikl")


def term_gradients(
    trainer: Trainer, state: TrainState, train_set: TrainSet, order: Int[Array, "N"], key: Array
) -> dict[str, float]:
    """The length of each term's gradient by the parameters, on the next batch: "" for what has no weight."""
    found = _term_gradients(trainer, state, train_set, order, key)
    return {name: float(value) for name, value in found.items() if value > 0}


@jax.jit(static_argnums=0)
def _term_gradients(trainer, state, train_set, order, key):
    batch, _, adversarial, stats = train.prepare(trainer, state, train_set, order, key)
    start = train.head_clusters(trainer, state)

    def gradient(settings):
        def loss(params):
            params, clusters = learned.split(params, start)
            variables = {"params": params, "batch_stats": stats}
            found = trainer.method.objective(
                trainer.step_net, variables, batch, adversarial, clusters, settings
            )
            return found[0]

        return mesh.average(jax.grad(loss)(state.params))

    settings = trainer.settings
    weighted = {name: getattr(settings.train, name) for name in _WEIGHTS}
    whole, found = gradient(settings), {}
    for name in (name for name, weight in weighted.items() if weight):
        without = gradient(_with(settings, **{name: 0.0}))
        found[name] = optax.tree.norm(jax.tree.map(lambda a, b: a - b, whole, without))
    found[""] = optax.tree.norm(gradient(_with(settings, **dict.fromkeys(_WEIGHTS, 0.0))))
    return found


def _with(settings, **changes: Any):
    return dataclasses.replace(settings, train=dataclasses.replace(settings.train, **changes))


def remedy(gradients: dict[str, float], weights: dict[str, float], rate: float, stage: str) -> str:
    """The term that outweighs the others, and the setting to change."""
    rest = gradients.get("", 0.0)
    name = max(gradients, key=lambda name: gradients[name], default="")
    if name and gradients[name] > rest:
        share = f"{gradients[name] / rest:.1f} times the gradient of the rest" if rest else "all the gradient"
        return f"the term of train.{name}={weights[name]:g} has {share}: lower it"
    return f"no weighted term outweighs the loss itself: lower {stage}.lr={rate:g}"
