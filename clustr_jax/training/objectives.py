"""What each method minimises. Adding a method = one function, one line in METHODS, one settings function.

A method has two parts. Its *adversary* (`adversaries`) makes images from the current parameters. Its
*objective* maps (net, variables, batch, adversarial, clusters, settings) to (loss [], Aux), where
`adversarial` is an `Adversarial`; it calls `net.train` where batch statistics are to be updated, and passes
them on explicitly.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clustr_jax import losses, models
from clustr_jax.clusters import Clusters
from clustr_jax.models import Net
from clustr_jax.runtime import mesh, struct
from clustr_jax.settings import TrainingSettings
from clustr_jax.training import between
from clustr_jax.training.adversaries import (
    Adversarial,
    authors_kl,
    mean_square,
    towards_chosen,
    towards_clean,
    towards_labels,
)
from clustr_jax.training.batches import Batch
from clustr_jax.training.heads import head_logits, head_probs


class Aux(struct.PyTreeNode):
    """What an objective returns beside its loss: new batch statistics, per-example losses, metrics."""

    batch_stats: dict
    per_example: Float[Array, "B"]
    metrics: dict[str, Float[Array, ""]]


def mean(values: Float[Array, "B"], mask: Bool[Array, "B"]):
    """Mean over the entries where `mask` is True, of the whole batch."""
    sums = mesh.total(jnp.stack([jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask).astype(values.dtype)]))
    return sums[0] / jnp.maximum(sums[1], 1)


def accuracy(logits: Float[Array, "B Y"], batch: Batch):
    """Fraction of the batch whose largest logit is the label's."""
    return mean((jnp.argmax(logits, axis=1) == batch.y).astype(jnp.float32), batch.mask)


def _cross_entropy(logits, batch, settings):
    """To the labels, or to smoothed ones."""
    smoothing = settings.train.label_smoothing
    if smoothing:
        return losses.smoothed_cross_entropy(logits, batch.y, smoothing)
    return losses.cross_entropy(logits, batch.y)


def nominal(
    net: Net,
    variables: dict,
    batch: Batch,
    adversarial: Adversarial,
    clusters: Clusters | None,
    settings: TrainingSettings,
):
    """Cross entropy: on clean images, or on the adversary's where there is one (Madry et al. 2018)."""
    outputs, stats = net.train(variables, batch.x if adversarial.images is None else adversarial.images)
    loss = _cross_entropy(outputs.logits, batch, settings)
    name = "accuracy" if adversarial.images is None else "adversarial_accuracy"
    return mean(loss, batch.mask), Aux(stats, loss, {name: accuracy(outputs.logits, batch)})


def trades(
    net: Net,
    variables: dict,
    batch: Batch,
    adversarial: Adversarial,
    clusters: Clusters | None,
    settings: TrainingSettings,
):
    """CE(f(x), y) + beta x KL(p(x) || p(x_adv)) (Zhang et al. 2019, eq. 5), through both arguments."""
    return _consistent(net, variables, batch, adversarial, settings, settings.train.beta, losses.kl)


def qtrades(
    net: Net,
    variables: dict,
    batch: Batch,
    adversarial: Adversarial,
    clusters: Clusters | None,
    settings: TrainingSettings,
):
    """CE(f(x), y) + lambda x CE(p(x_adv), p(x)): the paper's QTRADES on its own, linear head."""
    term = authors_kl if settings.switches.kl == "probs" else losses.cross_entropy
    return _consistent(net, variables, batch, adversarial, settings, settings.train.lam, term)


def _consistent(net, variables, batch, adversarial, settings, weight, term):
    clean, stats = net.train(variables, batch.x)
    x_adv, stats = adversarial.after(clean, stats)
    adv, stats = net.train({**variables, "batch_stats": stats}, x_adv)
    natural = _cross_entropy(clean.logits, batch, settings)
    target = jax.nn.softmax(clean.logits)
    consistency = term(adv.logits, jax.lax.stop_gradient(target) if settings.train.stop_target else target)
    metrics = {
        "accuracy": accuracy(clean.logits, batch),
        "adversarial_accuracy": accuracy(adv.logits, batch),
        "natural": mean(natural, batch.mask),
        "consistency": mean(consistency, batch.mask),
    }
    return mean(natural + weight * consistency, batch.mask), Aux(stats, natural, metrics)


def clustr(
    net: Net,
    variables: dict,
    batch: Batch,
    adversarial: Adversarial,
    clusters: Clusters,
    settings: TrainingSettings,
):
    """Magnet loss (Eq. 3) on clean images, + xent_lam x cross entropy of the cluster head's logits."""
    outputs, stats = net.train(variables, batch.x if adversarial.images is None else adversarial.images)
    loss, metrics = _magnet(outputs, batch, clusters, settings)
    if adversarial.images is not None:  # Free AT's steps
        metrics["adversarial_accuracy"] = metrics.pop("accuracy")
    return mean(loss, batch.mask) + _xent(outputs, batch, clusters, settings), Aux(stats, loss, metrics)


def clustr_qtrades(
    net: Net,
    variables: dict,
    batch: Batch,
    adversarial: Adversarial,
    clusters: Clusters,
    settings: TrainingSettings,
):
    """Eq. 5: Magnet loss + lambda x divergence between clean and adversarial cluster predictions.

    `train.consistency`: "ce" is Eq. 5 as printed, "kl" subtracts the entropy of the clean prediction,
    "mse" compares embeddings (authors' option). Gradients flow through both sides, as in the equation,
    unless `train.stop_target`.
    """
    outputs, stats = net.train(variables, batch.x)
    magnet, metrics = _magnet(outputs, batch, clusters, settings)
    x_adv, stats = adversarial.after(outputs, stats)
    adv, stats = net.train({**variables, "batch_stats": stats}, x_adv)
    logits = head_logits(adv, clusters, settings)
    target = head_probs(outputs, clusters, settings)
    embeddings = outputs.embeddings
    if settings.train.stop_target:
        target, embeddings = jax.lax.stop_gradient((target, embeddings))
    if settings.train.consistency == "mse":
        consistency = mean_square(adv.embeddings, embeddings)
    elif settings.train.consistency == "kl":
        consistency = losses.kl(logits, target)
    else:
        consistency = losses.cross_entropy(logits, target)
    metrics |= {
        "magnet": mean(magnet, batch.mask),
        "consistency": mean(consistency, batch.mask),
        "adversarial_accuracy": accuracy(clusters.log_scores(adv.embeddings), batch),
    }
    loss = mean(magnet + settings.train.lam * consistency, batch.mask) + _xent(
        outputs, batch, clusters, settings
    )
    return loss, Aux(stats, magnet, metrics)


def single_stage(
    net: Net,
    variables: dict,
    batch: Batch,
    adversarial: Adversarial,
    clusters: Clusters | None,
    settings: TrainingSettings,
):
    """One stage through whichever head: CE(x_adv, y), or CE(x, y) + beta KL(p(x) || p(x_adv)); + IKL's term.

    `train.loss` says which; with `train.stop_target` no gradient flows into p(x), as in IKL (Cui et al.
    2024). `train.ikl` weighs `between.consistency`. clustr_at has the cluster head, linear_at the linear one.
    """
    train, clean, stats = settings.train, None, variables["batch_stats"]
    x_adv = adversarial.images
    if both_sides(settings):
        clean, stats = net.train(variables, batch.x)
        x_adv, stats = adversarial.after(clean, stats)
    assert x_adv is not None
    adv, stats = net.train({**variables, "batch_stats": stats}, x_adv)
    logits = head_logits(adv, clusters, settings)
    metrics = {"adversarial_accuracy": accuracy(logits, batch)}
    if clean is None:
        loss = losses.smoothed_cross_entropy(logits, batch.y, train.label_smoothing)
        return mean(loss, batch.mask), Aux(stats, loss, metrics)
    clean_logits = head_logits(clean, clusters, settings)
    metrics["accuracy"] = accuracy(clean_logits, batch)
    fitted = logits if train.loss == "ce" else clean_logits
    natural = total = losses.smoothed_cross_entropy(fitted, batch.y, train.label_smoothing)
    if train.loss == "trades":
        target = jax.nn.softmax(clean_logits)
        divergence = losses.kl(logits, jax.lax.stop_gradient(target) if train.stop_target else target)
        total = total + train.beta * divergence
        metrics |= {"natural": mean(natural, batch.mask), "consistency": mean(divergence, batch.mask)}
    if train.ikl:
        each, moved = between.scores(clean, clusters), between.scores(adv, clusters)
        term = between.consistency(each, moved, batch.y, batch.mask, train.ikl_temperature)
        total = total + train.ikl * term
        metrics["ikl"] = mean(term, batch.mask)
    return mean(total, batch.mask), Aux(stats, natural, metrics)


def both_sides(settings: TrainingSettings) -> bool:
    """Whether `single_stage` trains on clean images beside the adversary's."""
    return settings.train.loss == "trades" or settings.train.ikl > 0


def nominal_certified(
    net: Net,
    variables: dict,
    batch: Batch,
    adversarial: Adversarial,
    clusters: Clusters | None,
    settings: TrainingSettings,
):
    """Cross entropy of the linear head's logits at their worst within the l2 ball of train.radius.

    For a 1-Lipschitz network z_c - z_y grows by at most radius |w_c - w_y| in the ball, so that amount
    is added to every wrong logit (Leino et al. 2021; Hu et al. 2023). With `train.temperature` both are
    divided by it and by the mean of |w_c - w_y| / sqrt(2) over pairs of classes: a head of orthonormal rows
    (Prach & Lampert 2022) keeps its length, and no other gains by growing.
    """
    outputs, stats = net.train(variables, batch.x)
    weights = variables["params"][models.HEAD]["kernel"].T
    apart = losses.distances(weights, weights)
    worst = outputs.logits + settings.train.radius * apart[batch.y]
    if settings.train.temperature:
        pairs = len(weights) * (len(weights) - 1)
        worst = worst / (settings.train.temperature * jnp.sum(apart) / (pairs * math.sqrt(2)))
    loss = losses.cross_entropy(worst, batch.y)
    metrics = {"accuracy": accuracy(outputs.logits, batch), "certified": accuracy(worst, batch)}
    return mean(loss, batch.mask), Aux(stats, loss, metrics)


def clustr_certified(
    net: Net,
    variables: dict,
    batch: Batch,
    adversarial: Adversarial,
    clusters: Clusters,
    settings: TrainingSettings,
):
    """Magnet loss at its worst within the l2 ball of train.radius, for a 1-Lipschitz network.

    Eq. 3 with radius |mu_c - mu_y| / sigma^2 added to every other cluster's exponent, plus xent_lam x
    the cross entropy of the cluster head's log scores with the same added (docs/certificates.md).
    """
    outputs, stats = net.train(variables, batch.x)
    radius = settings.train.radius
    loss, metrics = _magnet(outputs, batch, clusters, settings, radius=radius)
    total = mean(loss, batch.mask)
    worst = clusters.log_scores(outputs.embeddings) + radius * _farthest(clusters)[batch.y]
    metrics["certified"] = accuracy(worst, batch)
    if settings.train.xent_lam:
        cross = losses.cross_entropy(worst, batch.y)
        total = total + settings.train.xent_lam * mean(cross, batch.mask)
    return total, Aux(stats, loss, metrics)


def _farthest(clusters):
    """max over pairs of clusters of two classes of |mu_j - mu_l| / sigma^2 [Y, Y], 0 on the diagonal.

    The Lipschitz constant of z_c - z_y in the features: its gradient is a difference of two convex
    combinations of centroids.
    """
    num_classes, k, _ = clusters.centroids.shape
    flat = clusters.centroids.reshape(num_classes * k, -1)
    valid = clusters.valid.reshape(-1)
    apart = jnp.where(valid[:, None] & valid[None, :], losses.distances(flat, flat), 0.0)
    apart = jnp.max(apart.reshape(num_classes, k, num_classes, k), axis=(1, 3))
    return jnp.where(jnp.eye(num_classes, dtype=bool), 0.0, apart) / clusters.variance


def _magnet(outputs, batch, clusters, settings, radius=0.0):
    """Per-example Magnet loss [B] and what is logged of it."""
    size = len(batch.x)
    samples = mesh.whole(size) // batch.classes.shape[0]
    arrays = outputs.embeddings, mesh.numbers(size) // samples, batch.classes, batch.mask
    magnet_loss = functools.partial(
        losses.magnet_loss_of_rows,
        *arrays,
        alpha=settings.magnet.alpha,
        sharpness=settings.magnet.sharpness,
        total=mesh.total,
    )
    loss, variance = magnet_loss(eps=1e-8 if settings.switches.hinge == "eps" else 0.0, radius=radius)
    metrics = {
        "accuracy": accuracy(clusters.log_scores(outputs.embeddings), batch),
        "variance": variance,
        "hinge_active": mean((loss > 0).astype(jnp.float32), batch.mask),
    }
    if settings.switches.logged_loss == "plus_k":
        # their mask multiplies inside exp: K own clusters add exp(0)
        k = clusters.centroids.shape[1]
        logged, _ = magnet_loss(surplus=k, eps=1e-8)
        metrics["magnet_plus_k"] = mean(logged, batch.mask)
    return loss, metrics


def _xent(outputs, batch, clusters, settings):
    """The authors' --xent-lambda: cross entropy of the cluster head's logits to the labels."""
    if not settings.train.xent_lam:
        return 0.0
    cross = losses.cross_entropy(head_logits(outputs, clusters, settings), batch.y)
    return settings.train.xent_lam * mean(cross, batch.mask)


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the tables.

    `sampler`: "uniform" shuffles the set, "magnet" draws neighbouring clusters. `head`: what
    predicts, "linear" or "clusters". `warmup`: the method of stage 1, or None; with `source` it runs
    on another data set (config.pretrain). Free AT has no adversary: its perturbation is carried by
    the train step (`train.replays` > 1). `learned`: the cluster head is trained with the network
    (`training.learned`). With the adversary `towards_chosen` the sampler is a setting as well.
    """

    objective: Callable
    adversary: Callable | None = None
    sampler: str = "uniform"
    head: str = "linear"
    warmup: str | None = None
    source: bool = False
    learned: bool = False


def draws_clusters(method: Method, settings: TrainingSettings) -> bool:
    """Whether batches are drawn by clusters: the method's sampler, or the one that train.sampler chooses."""
    chosen = method.adversary is towards_chosen and settings.train.sampler == "magnet"
    return method.sampler == "magnet" or chosen


# Worst cases of a 1-Lipschitz network, with no adversary.
CERTIFIED = (nominal_certified, clustr_certified)
_clustered = functools.partial(Method, sampler="magnet", head="clusters")
METHODS = {
    "nominal": Method(nominal),
    "free_at": Method(nominal),
    "fast_at": Method(nominal, towards_labels),
    "pgd_at": Method(nominal, towards_labels),
    "at_pretrain": Method(nominal, towards_labels, warmup="pgd_at", source=True),
    "trades": Method(trades, towards_clean),
    "qtrades": Method(qtrades, towards_clean),
    "magnet": _clustered(clustr),
    "clustr": _clustered(clustr, warmup="nominal"),
    "clustr_qtrades": _clustered(clustr_qtrades, towards_clean, warmup="nominal"),
    "clustr_trades": _clustered(clustr_qtrades, towards_clean, warmup="trades"),
    "clustr_at": Method(single_stage, towards_chosen, head="clusters", learned=True),
    "linear_at": Method(single_stage, towards_chosen),
    "nominal_certified": Method(nominal_certified),
    "clustr_certified": _clustered(clustr_certified, warmup="nominal_certified"),
}
