"""What each method minimises. Adding a method = one function, one line in METHODS, one settings function.

A method has two parts. Its *adversary* makes x_adv from the current parameters and carries no
gradient. Its *objective* maps (net, variables, batch, x_adv, clusters, settings) to (loss [], Aux); it
calls `net.train` where batch statistics are to be updated, and passes them on explicitly.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from clustr_jax import losses, models
from clustr_jax.attacks import pgd
from clustr_jax.runtime import mesh, struct
from clustr_jax.settings import TrainingSettings

# Log score, below the best class, of a class that owns none of the `train.nearest` clusters: far
# enough to count as zero probability, near enough to keep cross entropies finite.
_CUT = 50.0


class Batch(struct.PyTreeNode):
    """One training batch. Magnet batches are M x S rows of clusters, flattened to B = M S.

    On a mesh x, y and mask are those of one device.
    """

    x: Float[Array, "B ..."]
    y: Int[Array, "B"]
    mask: Bool[Array, "B"]
    classes: Int[Array, "M"] | None = None


class Aux(struct.PyTreeNode):
    """What an objective returns beside its loss: new batch statistics, per-example losses, metrics."""

    batch_stats: dict
    per_example: Float[Array, "B"]
    metrics: dict[str, Float[Array, ""]]


def mean(values, mask):
    """Mean over the entries where `mask` is True, of the whole batch."""
    sums = mesh.total(jnp.stack([jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask).astype(values.dtype)]))
    return sums[0] / jnp.maximum(sums[1], 1)


def accuracy(logits, batch):
    """Fraction of the batch whose largest logit is the label's."""
    return mean((jnp.argmax(logits, axis=1) == batch.y).astype(jnp.float32), batch.mask)


# Heads: outputs -> logits to train with, and the target of a consistency term.


def head_logits(outputs, clusters, settings):
    """Logits of the linear head, or of the clusters (log scores; exp scores as the authors do)."""
    if clusters is None:
        return outputs.logits
    nearest = settings.train.nearest or None
    if settings.switches.scores == "exp":
        return clusters.scores(outputs.embeddings, nearest)
    log_scores = clusters.log_scores(outputs.embeddings, nearest)
    if nearest is None:
        return log_scores
    floor = jnp.max(log_scores, axis=1, keepdims=True) - _CUT
    return jnp.where(jnp.isneginf(log_scores), floor, log_scores)


def head_probs(outputs, clusters, settings):
    """Class probabilities p(f(x)); with exp scores normalised as the authors do (their 1e-12)."""
    logits = head_logits(outputs, clusters, settings)
    if clusters is None or settings.switches.scores == "log":
        return jax.nn.softmax(logits)
    return logits / jnp.maximum(jnp.sum(logits, axis=1, keepdims=True), 1e-12)


# Adversaries: (net, variables, batch, clusters, key, settings, strength) -> (x_adv, batch_stats). `strength`
# in (0, 1] scales the radius and the step (train.eps_ramp).


def towards_labels(net, variables, batch, clusters, key, settings, strength=1.0):
    """PGD on the cross entropy to the labels (Madry et al. 2018; one step: Wong et al. 2020)."""
    what = head_logits, batch.y, losses.cross_entropy
    return _adversary(net, variables, batch, clusters, key, settings, strength, *what)


def towards_clean(
    net, variables, batch, clusters, key, settings, strength=1.0, outputs=None, statistics=None
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
        what = _embeddings, outputs.embeddings, _mean_square
    else:
        authors = settings.method == "qtrades" and settings.switches.kl == "probs"
        target = head_probs(outputs, clusters, settings)
        what = head_logits, target, _authors_kl if authors else losses.cross_entropy
    return _adversary(net, variables, batch, clusters, key, settings, strength, *what, statistics)


def _embeddings(outputs, clusters, settings):
    return outputs.embeddings


def _mean_square(a, b):
    return jnp.mean(jnp.square(a - b), axis=1)


def _adversary(
    net, variables, batch, clusters, key, settings, strength, of_outputs, target, loss_fn, statistics=None
):
    """PGD on loss_fn(of_outputs(outputs, clusters, settings), target); KL has cross entropy's gradient."""

    def attacked(variables, clusters, x):
        outputs = net.eval(variables, x) if settings.train.attack_bn == "eval" else net.train(variables, x)[0]
        return of_outputs(outputs, clusters, settings)

    frozen = jax.lax.stop_gradient((variables, clusters))
    attack = functools.partial(
        pgd,
        key,
        Partial(attacked, *frozen),
        batch.x,
        jax.lax.stop_gradient(target),
        ids=mesh.numbers(len(batch.x)),
        eps=settings.train.attack.eps * strength,
        step_size=settings.train.attack.step_size * strength,
        start=settings.train.attack.start,
        bounds=settings.bounds,
        select="last",
        loss_fn=loss_fn,
    )
    x_adv = attack(steps=settings.train.attack.steps)
    stats = variables["batch_stats"] if statistics is None else statistics
    if settings.switches.attack_statistics == "update":  # as one forward pass of the attack would
        stats = net.train({**variables, "batch_stats": stats}, attack(steps=0))[1]
    return jax.lax.stop_gradient(x_adv), jax.lax.stop_gradient(stats)


def shares_clean(method, settings: TrainingSettings) -> bool:
    """Whether the adversary's target is the clean forward pass that the objective makes anyway.

    The adversary then runs inside the objective, from those outputs: on a mesh the compiler does not see
    that two passes with batch statistics are the same one. It does so too where its forward pass updates the
    running statistics, for the authors' order is clean, attack, adversarial.
    """
    updates = settings.switches.attack_statistics == "update"
    return method.adversary is towards_clean and (updates or settings.train.attack_bn != "eval")


def _seen(x_adv: Array | Callable[..., tuple[Array, dict]] | None, outputs, stats):
    """(the adversary's images, running statistics after it): made now, after the clean pass, if not there."""
    if isinstance(x_adv, Callable):
        return x_adv(outputs=jax.lax.stop_gradient(outputs), statistics=jax.lax.stop_gradient(stats))
    return x_adv, stats


# Objectives. x_adv: images, None without an adversary, or (`shares_clean`) what makes them from the clean
# outputs.


def nominal(net, variables, batch, x_adv, clusters, settings):
    """Cross entropy: on clean images, or on the adversary's where there is one (Madry et al. 2018)."""
    outputs, stats = net.train(variables, batch.x if x_adv is None else x_adv)
    smoothing = settings.train.label_smoothing
    if smoothing:
        loss = losses.smoothed_cross_entropy(outputs.logits, batch.y, smoothing)
    else:
        loss = losses.cross_entropy(outputs.logits, batch.y)
    name = "accuracy" if x_adv is None else "adversarial_accuracy"
    return mean(loss, batch.mask), Aux(stats, loss, {name: accuracy(outputs.logits, batch)})


def trades(net, variables, batch, x_adv, clusters, settings):
    """CE(f(x), y) + beta x KL(p(x) || p(x_adv)) (Zhang et al. 2019, eq. 5), through both arguments."""
    return _consistent(net, variables, batch, x_adv, settings, settings.train.beta, losses.kl)


def qtrades(net, variables, batch, x_adv, clusters, settings):
    """CE(f(x), y) + lambda x CE(p(x_adv), p(x)): the paper's QTRADES on its own, linear head."""
    term = _authors_kl if settings.switches.kl == "probs" else losses.cross_entropy
    return _consistent(net, variables, batch, x_adv, settings, settings.train.lam, term)


def _authors_kl(logits, probs):
    """F.kl_div given probabilities for log probabilities, element mean (docs/fidelity.md, kl)."""
    per_class = jnp.sum(probs * jax.nn.softmax(logits), axis=1)
    return (losses.negative_entropy(probs) - per_class) / probs.shape[1]


def _consistent(net, variables, batch, x_adv, settings, weight, term):
    clean, stats = net.train(variables, batch.x)
    x_adv, stats = _seen(x_adv, clean, stats)
    adv, stats = net.train({**variables, "batch_stats": stats}, x_adv)
    natural = losses.cross_entropy(clean.logits, batch.y)
    target = jax.nn.softmax(clean.logits)
    consistency = term(adv.logits, jax.lax.stop_gradient(target) if settings.train.stop_target else target)
    metrics = {
        "accuracy": accuracy(clean.logits, batch),
        "adversarial_accuracy": accuracy(adv.logits, batch),
        "natural": mean(natural, batch.mask),
        "consistency": mean(consistency, batch.mask),
    }
    return mean(natural + weight * consistency, batch.mask), Aux(stats, natural, metrics)


def clustr(net, variables, batch, x_adv, clusters, settings):
    """Magnet loss (Eq. 3) on clean images, + xent_lam x cross entropy of the cluster head's logits."""
    outputs, stats = net.train(variables, batch.x if x_adv is None else x_adv)
    loss, metrics = _magnet(outputs, batch, clusters, settings)
    if x_adv is not None:  # Free AT's steps
        metrics["adversarial_accuracy"] = metrics.pop("accuracy")
    return mean(loss, batch.mask) + _xent(outputs, batch, clusters, settings), Aux(stats, loss, metrics)


def clustr_qtrades(net, variables, batch, x_adv, clusters, settings):
    """Eq. 5: Magnet loss + lambda x divergence between clean and adversarial cluster predictions.

    `train.consistency`: "ce" is Eq. 5 as printed, "kl" subtracts the entropy of the clean prediction,
    "mse" compares embeddings (authors' option). Gradients flow through both sides, as in the equation,
    unless `train.stop_target`.
    """
    outputs, stats = net.train(variables, batch.x)
    magnet, metrics = _magnet(outputs, batch, clusters, settings)
    x_adv, stats = _seen(x_adv, outputs, stats)
    adv, stats = net.train({**variables, "batch_stats": stats}, x_adv)
    logits = head_logits(adv, clusters, settings)
    target = head_probs(outputs, clusters, settings)
    embeddings = outputs.embeddings
    if settings.train.stop_target:
        target, embeddings = jax.lax.stop_gradient((target, embeddings))
    if settings.train.consistency == "mse":
        consistency = _mean_square(adv.embeddings, embeddings)
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


def nominal_certified(net, variables, batch, x_adv, clusters, settings):
    """Cross entropy of the linear head's logits at their worst within the l2 ball of train.radius.

    For a 1-Lipschitz network z_c - z_y grows by at most radius |w_c - w_y| in the ball, so that amount
    is added to every wrong logit (Leino et al. 2021; Hu et al. 2023).
    """
    outputs, stats = net.train(variables, batch.x)
    weights = variables["params"][models.HEAD]["kernel"].T
    worst = outputs.logits + settings.train.radius * losses.distances(weights, weights)[batch.y]
    loss = losses.cross_entropy(worst, batch.y)
    metrics = {"accuracy": accuracy(outputs.logits, batch), "certified": accuracy(worst, batch)}
    return mean(loss, batch.mask), Aux(stats, loss, metrics)


def clustr_certified(net, variables, batch, x_adv, clusters, settings):
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
        losses.magnet_loss_of_rows, *arrays, alpha=settings.magnet.alpha,
        sharpness=settings.magnet.sharpness, total=mesh.total,
    )  # fmt: skip
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
    the train step (`train.replays` > 1).
    """

    objective: Callable
    adversary: Callable | None = None
    sampler: str = "uniform"
    head: str = "linear"
    warmup: str | None = None
    source: bool = False


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
    "nominal_certified": Method(nominal_certified),
    "clustr_certified": _clustered(clustr_certified, warmup="nominal_certified"),
}
