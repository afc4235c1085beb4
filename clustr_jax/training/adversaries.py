"""The inner adversaries of training, and what an objective sees of them.

An adversary maps (net, variables, batch, clusters, key, settings, strength) to (images [B, ...], batch
statistics), and carries no gradient. `strength` in (0, 1] scales the radius and the step (train.eps_ramp).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from clustr_jax import losses, models
from clustr_jax.attacks import pgd
from clustr_jax.clusters import Clusters
from clustr_jax.models import Net, Outputs
from clustr_jax.runtime import mesh, struct
from clustr_jax.settings import TrainingSettings
from clustr_jax.training import between
from clustr_jax.training.batches import Batch
from clustr_jax.training.heads import head_logits, head_probs


class Adversarial(struct.PyTreeNode):
    """The adversarial images of a batch, as an objective is given them: made, to be made, or none.

    `images` [B, ...]: made already. `make`: where the adversary starts from the clean forward pass, which the
    objective makes anyway (`shares_clean`), it is called from within it. Neither: there is no adversary.
    """

    images: Float[Array, "B ..."] | None = None
    make: Callable | None = struct.field(pytree_node=False, default=None)

    def after(self, outputs: Outputs, statistics: dict) -> tuple[Float[Array, "B ..."], dict]:
        """(images, batch statistics to go on with), given the clean pass: its outputs and its statistics."""
        if self.make is not None:
            outputs, statistics = jax.lax.stop_gradient((outputs, statistics))
            return self.make(outputs=outputs, statistics=statistics)
        assert self.images is not None  # the method has an adversary
        return self.images, statistics

    def alone(self) -> Float[Array, "B ..."] | None:
        """The images without an objective, from a clean pass of their own; None without an adversary."""
        return self.images if self.make is None else self.make()[0]


def towards_labels(
    net: Net,
    variables: dict,
    batch: Batch,
    clusters: Clusters | None,
    key: Array,
    settings: TrainingSettings,
    strength: ArrayLike = 1.0,
):
    """PGD on the cross entropy to the labels (Madry et al. 2018; one step: Wong et al. 2020)."""
    what = {"of_outputs": head_logits, "target": batch.y, "loss_fn": losses.cross_entropy}
    return _adversary(net, variables, batch, clusters, key, settings, strength, **what)


def towards_clean(
    net: Net,
    variables: dict,
    batch: Batch,
    clusters: Clusters | None,
    key: Array,
    settings: TrainingSettings,
    strength: ArrayLike = 1.0,
    outputs: Outputs | None = None,
    statistics: dict | None = None,
):
    """Steps on the divergence from the clean prediction (TRADES; one step: QTRADES, Eq. 5).

    The authors step on the term that they train with: with train.consistency=mse and a cluster head that is
    the distance of the embeddings, in QTRADES with fidelity.kl=probs their kl_div. `outputs` and
    `statistics`: those of the clean images and the running ones after them, where they are known
    (`shares_clean`).
    """
    if settings.train.attack_bn == "eval":
        outputs = net.eval(variables, batch.x)
    elif outputs is None:
        outputs = net.train(variables, batch.x)[0]
    if clusters is not None and settings.train.consistency == "mse":
        of_outputs, target, loss_fn = embeddings_of, outputs.embeddings, mean_square
    else:
        authors = settings.method == "qtrades" and settings.switches.kl == "probs"
        target = head_probs(outputs, clusters, settings)
        of_outputs, loss_fn = head_logits, authors_kl if authors else losses.cross_entropy
    return _adversary(
        net,
        variables,
        batch,
        clusters,
        key,
        settings,
        strength,
        of_outputs=of_outputs,
        target=target,
        loss_fn=loss_fn,
        statistics=statistics,
    )


def towards_rival(
    net: Net,
    variables: dict,
    batch: Batch,
    clusters: Clusters | None,
    key: Array,
    settings: TrainingSettings,
    strength: ArrayLike = 1.0,
):
    """Steps on the cross entropy between the label and the one rival that `between.against_rival` picks.

    It is picked anew at every step, from that step's own forward pass.
    """
    head = variables["params"][models.HEAD]["kernel"] if clusters is None else clusters
    label = jnp.zeros(len(batch.x), jnp.int32)  # the first of the two
    what = {"of_outputs": _against_rival, "target": label, "loss_fn": losses.cross_entropy}
    return _adversary(net, variables, batch, (head, batch.y), key, settings, strength, **what)


def _against_rival(outputs, head_and_labels, settings):
    return between.against_rival(outputs, *head_and_labels)


def towards_chosen(
    net: Net,
    variables: dict,
    batch: Batch,
    clusters: Clusters | None,
    key: Array,
    settings: TrainingSettings,
    strength: ArrayLike = 1.0,
    **known: Any,
):
    """The adversary that `train.aim` names."""
    adversary = AIMS[settings.train.aim]
    return adversary(net, variables, batch, clusters, key, settings, strength, **known)


# What train.aim can be.
AIMS = {"labels": towards_labels, "clean": towards_clean, "rival": towards_rival}


def of_method(method: Any, settings: TrainingSettings) -> Callable | None:
    """The adversary of a method, where it is a setting the one that is set."""
    return AIMS[settings.train.aim] if method.adversary is towards_chosen else method.adversary


def embeddings_of(outputs: Outputs, clusters: Clusters | None, settings: TrainingSettings):
    """What `_adversary` moves where it is not the logits."""
    return outputs.embeddings


def mean_square(a: Float[Array, "B E"], b: Float[Array, "B E"]) -> Float[Array, "B"]:
    """|a - b|^2 / E of each example."""
    return jnp.mean(jnp.square(a - b), axis=1)


def _adversary(
    net, variables, batch, clusters, key, settings, strength, *, of_outputs, target, loss_fn, statistics=None
):
    """PGD on loss_fn(of_outputs(outputs, clusters, settings), target); KL has cross entropy's gradient."""

    def attacked(variables, clusters, x):
        outputs = net.eval(variables, x) if settings.train.attack_bn == "eval" else net.train(variables, x)[0]
        return of_outputs(outputs, clusters, settings)

    frozen = jax.lax.stop_gradient((variables, clusters))
    eps, step_size = (getattr(settings.train.attack, name) * strength for name in ("eps", "step_size"))
    attack_from = functools.partial(
        pgd,
        key,
        Partial(attacked, *frozen),
        y=jax.lax.stop_gradient(target),
        ids=mesh.numbers(len(batch.x)),
        bounds=settings.bounds,
        select="last",
        loss_fn=loss_fn,
    )
    attack = functools.partial(
        attack_from, batch.x, eps=eps, step_size=step_size, start=settings.train.attack.start
    )
    if settings.train.noise:
        x_adv = _after_noise(attack_from, batch.x, settings.train.noise * eps, step_size)
    else:
        x_adv = attack(steps=settings.train.attack.steps)
    stats = variables["batch_stats"] if statistics is None else statistics
    if settings.switches.attack_statistics == "update":  # as one forward pass of the attack would
        stats = net.train({**variables, "batch_stats": stats}, attack(steps=0))[1]
    return jax.lax.stop_gradient(x_adv), jax.lax.stop_gradient(stats)


def _after_noise(attack_from, x, noise, step_size):
    """N-FGSM (de Jorge et al. 2022): one step from x + U(-noise, noise), kept in the box and in no ball.

    The noise, which is larger than the radius, is what keeps training with a single step from catastrophic
    overfitting at no further pass; cutting the step off at the radius would undo it.
    """
    noisy = attack_from(x, eps=noise, step_size=0.0, steps=0, start="uniform")
    return attack_from(noisy, eps=step_size, step_size=step_size, steps=1, start="zero")


def shares_clean(method: Any, settings: TrainingSettings) -> bool:
    """Whether the adversary's target is the clean forward pass that the objective makes anyway.

    The adversary then runs inside the objective, from those outputs: on a mesh the compiler does not see
    that two passes with batch statistics are the same one. It does so too where its forward pass updates the
    running statistics, for the authors' order is clean, attack, adversarial.
    """
    updates = settings.switches.attack_statistics == "update"
    adversary = of_method(method, settings)
    return adversary is towards_clean and (updates or settings.train.attack_bn != "eval")


def authors_kl(logits: Float[Array, "B Y"], probs: Float[Array, "B Y"]):
    """F.kl_div given probabilities for log probabilities, element mean (docs/fidelity.md, kl)."""
    per_class = jnp.sum(probs * jax.nn.softmax(logits), axis=1)
    return (losses.negative_entropy(probs) - per_class) / probs.shape[1]
