"""What each method minimises. Adding a method = one function, one line in METHODS, one config function.

An objective maps (net, variables, batch, clusters, key, config) to (loss [], Aux). It calls
`net.train` where batch statistics are to be updated, and passes them on explicitly.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from clustr_jax import losses
from clustr_jax.attacks import pgd


@struct.dataclass
class Batch:
    """One training batch. Magnet batches are M x S rows of clusters, flattened to B = M S."""

    x: Float[Array, "B ..."]
    y: Int[Array, "B"]
    mask: Bool[Array, "B"]
    classes: Int[Array, "M"] | None = None


@struct.dataclass
class Aux:
    """What an objective returns beside its loss: new batch statistics, per-example losses, metrics."""

    batch_stats: dict
    per_example: Float[Array, "B"]
    metrics: dict[str, Float[Array, ""]]


def mean(values, mask):
    """Mean over the entries where `mask` is True."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def accuracy(logits, batch):
    """Fraction of the batch whose largest logit is the label's."""
    return mean((jnp.argmax(logits, axis=1) == batch.y).astype(jnp.float32), batch.mask)


def nominal(net, variables, batch, clusters, key, config):
    """Cross entropy on clean images."""
    outputs, stats = net.train(variables, batch.x)
    loss = losses.cross_entropy(outputs.logits, batch.y)
    return mean(loss, batch.mask), Aux(stats, loss, {"accuracy": accuracy(outputs.logits, batch)})


def clustr(net, variables, batch, clusters, key, config):
    """Magnet loss (Eq. 3) on clean images."""
    outputs, stats = net.train(variables, batch.x)
    loss, variance = _magnet(outputs.embeddings, batch, config)
    metrics = {"accuracy": accuracy(clusters.log_scores(outputs.embeddings), batch), "variance": variance}
    return mean(loss, batch.mask), Aux(stats, loss, metrics)


def clustr_qtrades(net, variables, batch, clusters, key, config):
    """Eq. 5: Magnet loss + lambda x cross entropy between clean and one-step adversarial cluster scores.

    Both gradient paths of the cross entropy are kept, as in the equation. The adversary sees the
    statistics of its own batch and leaves the running ones alone.
    """
    outputs, stats = net.train(variables, batch.x)
    magnet, variance = _magnet(outputs.embeddings, batch, config)
    probs = clusters.probs(outputs.embeddings)

    def log_scores(variables, clusters, x):
        return clusters.log_scores(net.train(variables, x)[0].embeddings)

    # The adversary is data: no gradient flows through its making.
    frozen = jax.lax.stop_gradient({**variables, "batch_stats": stats})
    attack = {k: v for k, v in config.train.attack.items() if k != "steps"}
    x_adv = pgd(
        key,
        Partial(log_scores, frozen, clusters),
        batch.x,
        jax.lax.stop_gradient(probs),
        steps=config.train.attack.steps,
        bounds=_box(config),
        **attack,
    )
    adv, stats = net.train({**variables, "batch_stats": stats}, jax.lax.stop_gradient(x_adv))
    log_scores_adv = clusters.log_scores(adv.embeddings)
    consistency = losses.cross_entropy(log_scores_adv, probs)
    metrics = {
        "magnet": mean(magnet, batch.mask),
        "consistency": mean(consistency, batch.mask),
        "accuracy": accuracy(clusters.log_scores(outputs.embeddings), batch),
        "adversarial_accuracy": accuracy(log_scores_adv, batch),
        "variance": variance,
    }
    loss = mean(magnet, batch.mask) + config.train.lam * mean(consistency, batch.mask)
    return loss, Aux(stats, magnet, metrics)


def _magnet(embeddings, batch, config):
    """Per-example Magnet loss [B] and the batch's variance."""
    rows = batch.classes.shape[0]
    z = embeddings.reshape(rows, -1, embeddings.shape[-1])
    mask = batch.mask.reshape(rows, -1)
    loss, variance = losses.magnet_loss(z, batch.classes, alpha=config.magnet.alpha, mask=mask)
    return loss.reshape(-1), variance


def _box(config):
    return None if config.data.name.startswith("toy2d") else (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the paper's tables.

    `sampler`: "uniform" shuffles the set, "magnet" draws neighbouring clusters. `head`: what
    predicts, "linear" or "clusters". `warmup`: the method of stage 1, or None.
    """

    objective: Callable
    sampler: str = "uniform"
    head: str = "linear"
    warmup: str | None = None


METHODS = {
    "nominal": Method(nominal),
    "magnet": Method(clustr, sampler="magnet", head="clusters"),
    "clustr": Method(clustr, sampler="magnet", head="clusters", warmup="nominal"),
    "clustr_qtrades": Method(clustr_qtrades, sampler="magnet", head="clusters", warmup="nominal"),
}
