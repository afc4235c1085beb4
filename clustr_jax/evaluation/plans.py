"""The protocols as a table: which attacks each one runs, in order, with which targets and restarts.

sound-2     every attack on all images that are right: an accuracy and unique kills for each
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from clustr_jax.attacks import attack_losses, ensemble
from clustr_jax.attacks.apgd import APGD
from clustr_jax.attacks.fab import FAB
from clustr_jax.attacks.scheduled_attack import Attack
from clustr_jax.attacks.scheduled_pgd import PGD
from clustr_jax.attacks.square import Square
from clustr_jax.evaluation.subject import Subject
from clustr_jax.settings import EvalSettings

# Of a two-stage attack, the part that only runs away from the own cluster.
_AWAY_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Plan:
    """One attack of a protocol: on which targets (None, "classes" or "clusters"), with how many restarts."""

    name: str
    attack: Attack
    restarts: int = 1
    targets: str | None = None
    number: int = 0  # of its stream (runtime.streams)
    count: int = 0  # targets; 0: as many as the settings say
    curved: bool = False  # its successes over restarts and steps are a curve of the result


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A named list of attacks. `cascade`: each runs on what the ones before left, and not on all images."""

    name: str
    plans: Callable[..., list[Plan]]
    cascade: bool = False


def sound_2(subject: Subject, settings: EvalSettings, *, eps: float, shape: tuple[int, ...]) -> list[Plan]:
    """The attacks of sound-2 on this subject, in order."""
    attack, quick = settings.attack, settings.quick
    steps, apgd_steps = (20, 20) if quick else (attack.steps, settings.apgd_steps)
    queries = 200 if quick else settings.queries
    common: dict[str, Any] = dict(eps=jnp.float32(eps), norm=subject.norm, bounds=subject.bounds)
    step_size = jnp.float32(attack.step_size * eps / attack.eps if attack.eps else 0.0)
    options = options_of(subject)

    def pgd_on(loss, **more):
        return pgd_attack(subject, eps=eps, steps=steps, step_size=step_size, loss=loss, **more)

    def apgd_on(loss):
        return APGD(steps=apgd_steps, loss=attack_losses.among(loss, options), **common)

    found = [
        Plan("ce", pgd_on(attack_losses.cross_entropy), attack.restarts, curved=True),
        Plan("margin", pgd_on(attack_losses.margin), attack.restarts, curved=True),
    ]
    if subject.clustered:
        away = pgd_on(
            attack_losses.margin, opening=attack_losses.away, opening_steps=int(_AWAY_SHARE * steps)
        )
        found += [
            Plan("centroid", pgd_on(attack_losses.centroid), 1, "clusters"),
            Plan("feature", pgd_on(attack_losses.feature), 1, "clusters"),
            Plan("away", away, attack.restarts),
        ]
    found += [
        Plan("apgd-ce", apgd_on(attack_losses.cross_entropy)),
        Plan("apgd-t", apgd_on(attack_losses.dlr_targeted), 1, "classes"),
        Plan("fab-t", FAB(steps=apgd_steps, **common), 1, "classes"),
    ]
    if len(shape) == 3:  # it paints squares
        found.append(Plan("square", Square(steps=queries, **common)))
    return numbered(found)


def numbered(found: list[Plan]) -> list[Plan]:
    """Each with the stream of its place."""
    return [dataclasses.replace(plan, number=i) for i, plan in enumerate(found)]


def options_of(subject: Subject):
    """The losses that attacks on this subject choose from."""
    return attack_losses.CLUSTERED if subject.clustered else attack_losses.LINEAR


def pgd_attack(
    subject: Subject, *, eps, steps, step_size, loss, opening=attack_losses.margin, opening_steps=0
) -> PGD:
    """PGD on the subject's model: one compilation for all radii, steps and losses."""
    options = options_of(subject)
    return PGD(
        eps=jnp.float32(eps), steps=np.int32(steps), norm=subject.norm, bounds=subject.bounds,
        step_size=jnp.float32(step_size), loss=attack_losses.among(loss, options),
        opening=attack_losses.among(opening, options), opening_steps=np.int32(opening_steps),
    )  # fmt: skip


def targets_of(plan: Plan, outputs, y, most: int):
    """[T, N] of each image the targets of this attack, likeliest first; None where it has none.

    `outputs` [N, ...]: the model's on the clean images; `most`: how many, where the plan does not say.
    """
    count = plan.count or most
    if plan.targets == "classes":
        return ensemble.likely_targets(attack_losses.logits_of(outputs), y, count)
    if plan.targets == "clusters":
        return nearest_clusters(outputs.exponents, y, count)
    return None


def nearest_clusters(exponents, y, count: int):
    """[T, N] of each example the `count` clusters of other classes with the largest exponents, best first.

    Clusters are numbered class * K + j; where a class has fewer than K, the best one stands in for the rest.
    """
    size, classes, k = exponents.shape
    flat = np.array(exponents).reshape(size, classes * k)
    flat[np.arange(classes * k)[None, :] // k == np.asarray(y)[:, None]] = -np.inf
    order = np.argsort(-flat, axis=1, kind="stable")[:, : min(count, (classes - 1) * k)]
    missing = np.isneginf(np.take_along_axis(flat, order, axis=1))
    return np.where(missing, order[:, :1], order).T.astype(np.int32)


PROTOCOLS = {p.name: p for p in (Protocol("sound-2", sound_2),)}
