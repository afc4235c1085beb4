"""What is fixed in a stage of training: network, method, settings, and what follows from them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from clustr_jax.models import Net
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import MagnetSettings, Recipe, TrainingSettings
from clustr_jax.training.objectives import Method, draws_clusters

SCHEDULES = "multistep, cosine, onecycle or triangle"
# Of "triangle": the rate at the start and at the end as shares of its largest, and when it is that.
_LOW, _END, _PEAK = 0.2, 0.07, 0.23


def _norm_biases(params):
    """True at the biases of batch norm: those of modules that are called so."""

    def is_one(path, _):
        *modules, last = (str(entry.key).lower() for entry in path)
        return last == "bias" and any("norm" in name for name in modules)

    return jax.tree_util.tree_map_with_path(is_one, params)


def _others(params):
    return jax.tree.map(lambda one: not one, _norm_biases(params))


def optimizer(recipe: Recipe, steps_per_epoch: int) -> tuple[optax.GradientTransformation, Callable]:
    """(optax transformation at rate 1, learning rate as a function of the step) of a config section.

    The rate goes by the step, not by the transformation's own count: a step that is passed over has its turn.
    Schedules: "multistep" multiplies the rate by `decay` at the epochs `milestones` (paper, appendix D).
    "cosine" anneals to 0. "onecycle" warms up over the first 30 % and anneals to 0. "triangle" (of
    cifar10-airbench) rises from 0.2 of the rate over the first 23 % and falls to 0.07 of it, in straight
    lines. SGD has Nesterov's momentum, unless `nesterov` is False. With `norm_bias_rate` the biases of batch
    norm have so many times the rate, and the same decay per step.
    """
    total = max(1, recipe.epochs * steps_per_epoch)
    if recipe.schedule == "multistep":
        boundaries = {int(m) * steps_per_epoch: recipe.decay for m in recipe.milestones}
        rate = optax.piecewise_constant_schedule(recipe.lr, boundaries)
    elif recipe.schedule == "cosine":
        rate = optax.cosine_decay_schedule(recipe.lr, total)
    elif recipe.schedule == "onecycle":
        rate = optax.cosine_onecycle_schedule(max(total, 4), recipe.lr)
    elif recipe.schedule == "triangle":
        peak = max(1, round(_PEAK * total))
        rise = optax.linear_schedule(_LOW * recipe.lr, recipe.lr, peak)
        fall = optax.linear_schedule(recipe.lr, _END * recipe.lr, max(1, total - peak))
        rate = optax.join_schedules([rise, fall], [peak])
    else:
        raise UserError(f"schedule must be {SCHEDULES}, got {recipe.schedule!r}")
    if recipe.optimizer == "adam":
        transform = optax.adamw(1.0, weight_decay=recipe.weight_decay)
    elif recipe.optimizer == "sgd":
        sgd = optax.sgd(1.0, momentum=recipe.momentum, nesterov=recipe.nesterov)
        if recipe.norm_bias_rate == 1.0:
            transform = optax.chain(optax.add_decayed_weights(recipe.weight_decay), sgd)
        else:
            transform = optax.chain(
                optax.masked(optax.add_decayed_weights(recipe.weight_decay), _others),
                optax.masked(
                    optax.add_decayed_weights(recipe.weight_decay / recipe.norm_bias_rate), _norm_biases
                ),
                sgd,
                optax.masked(optax.scale(recipe.norm_bias_rate), _norm_biases),
            )
    else:
        raise UserError(f"optimizer must be adam or sgd, got {recipe.optimizer!r}")
    return transform, rate


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What is fixed in a stage. Compiled functions take it as a static argument, hashed by value."""

    net: Net
    method: Method
    settings: TrainingSettings
    recipe: Recipe  # of config.warmup or config.train
    size: int  # of the training set

    @property
    def magnet(self) -> bool:
        """Whether batches are drawn by clusters."""
        return draws_clusters(self.method, self.settings)

    @property
    def learned(self) -> bool:
        """Whether the cluster head is trained with the network."""
        return self.method.learned

    @property
    def step_net(self) -> Net:
        """The network of training steps and their adversaries; what is evaluated and kept is `net`."""
        return getattr(self.net, "tuned", self.net)

    @property
    def replays(self) -> int:
        """Steps on the same batch (Free AT); 1 otherwise."""
        return self.recipe.replays

    @property
    def batch_size(self) -> int:
        """Images per step: M x S, or the recipe's batch (at most the set)."""
        if self.magnet:
            return rows(self.settings.magnet, self.net.num_classes) * self.settings.magnet.samples
        return min(self.recipe.batch_size, self.size)

    @property
    def steps_per_epoch(self) -> int:
        """As many images as the set has, rounded down (paper, appendix D), each batch replayed."""
        return max(1, self.size // self.batch_size) * self.replays


def rows(magnet: MagnetSettings, num_classes: int) -> int:
    """M, the clusters of a Magnet batch: min(12, all clusters) where magnet.clusters is 0."""
    total = sum(per_class(magnet, num_classes))
    wanted = magnet.clusters
    if wanted > total:
        raise UserError(
            f"magnet.clusters is {wanted}, but there are only {total} clusters; lower it or set 0"
        )
    if wanted < 0 or wanted == 1 or magnet.samples < 2:
        raise UserError(
            f"magnet.clusters must be 0 (automatic) or at least 2 and magnet.samples at least 2, "
            f"got {wanted} and {magnet.samples}"
        )
    return wanted or min(12, total)


def per_class(magnet: MagnetSettings, num_classes: int) -> tuple[int, ...]:
    """Clusters of each class: magnet.k_per_class, or magnet.k for all."""
    k = magnet.k_per_class or (magnet.k,) * num_classes
    if len(k) != num_classes or min(k) < 1:
        raise UserError(
            f"magnet.k must be at least 1 and magnet.k_per_class have {num_classes} entries, got {k}"
        )
    return k


def strength(trainer: Trainer, step: ArrayLike):
    """Share of the adversary's radius at this step: it grows linearly over the first eps_ramp epochs."""
    if not trainer.recipe.eps_ramp:
        return 1.0
    return jnp.minimum(1.0, (step + 1) / (trainer.recipe.eps_ramp * trainer.steps_per_epoch))
