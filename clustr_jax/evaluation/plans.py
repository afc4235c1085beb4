"""The protocols as a table: which attacks each one runs, in order, with which targets and restarts.

sound-2     every attack on all images that are right: an accuracy of its own and unique kills for each
sound-3     in cascade: cheap attacks first, each on what the ones before left; PMA, APGD towards the classes
            whose boundaries are nearest (MALT), restarts for the images nearest to breaking, and the parts
            of AutoAttack. linf and l2. Beside it, on all images that are right, minimum norms: how far the
            nearest adversarial image lies (one within eps counts).

Attacks go by their names in attacks.registry.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from clustr_jax.attacks import attack_losses, registry
from clustr_jax.attacks.registry import Budget
from clustr_jax.attacks.scheduled_attack import Attack
from clustr_jax.evaluation.subject import Subject
from clustr_jax.settings import EvalSettings


@dataclasses.dataclass(frozen=True)
class Plan:
    """One attack of a protocol: on which targets (`attacks.targets`), with how many restarts."""

    name: str
    attack: Attack
    restarts: int = 1
    targets: str | None = None
    number: int = 0  # of its stream (runtime.streams)
    count: int = 0  # targets; 0: as many as the settings say
    curved: bool = False  # its successes over restarts and steps are a curve of the result
    adaptive: bool = False  # restarts go to the images that came nearest to breaking (attacks.adaptive)

    @property
    def nearest(self) -> bool:
        """Whether it looks for the nearest adversarial image, within eps or not."""
        return bool(np.asarray(self.attack.eps) == np.inf)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a protocol. `budget`: "pgd" (with the settings' restarts), "once", "others", or "nearest"
    (a minimum norm: the same without a radius)."""

    attack: str
    budget: str
    curved: bool = False
    restarts: int = 0  # 0: those of the budget
    count: int = 0
    targets: str | None = None  # other ones than the attack's own
    adaptive: bool = False


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A named list of attacks. `cascade`: each runs on what the ones before left, and not on all images."""

    name: str
    rows: tuple[Row, ...]
    cascade: bool = False

    @property
    def nearest(self) -> bool:
        """Whether it has attacks that look for minimum norms."""
        return any(row.budget == "nearest" for row in self.rows)

    @property
    def own_targets(self) -> bool:
        """Whether its rows say how many targets they go to, so that `settings.targets` is read by none."""
        rows = [row for row in self.rows if row.targets or registry.ATTACKS[row.attack].targets]
        return all(row.count for row in rows)

    def within(self) -> "Protocol":
        """The same without them."""
        rows = tuple(row for row in self.rows if row.budget != "nearest")
        return dataclasses.replace(self, rows=rows)

    def plans(
        self,
        subject: Subject,
        settings: EvalSettings,
        *,
        eps: float,
        shape: tuple[int, ...],
        classes: int = 2,
    ) -> list[Plan]:
        """The attacks that this subject can be attacked with, in order, each with the stream of its place."""
        budgets = _budgets(subject, settings, eps)
        found = []
        for row in self.rows:
            entry, budget = registry.ATTACKS[row.attack], budgets[row.budget]
            where: dict[str, Any] = dict(
                shape=(1, *shape), classes=classes, norm=subject.norm, clusters=subject.clustered
            )
            if entry.lacking(**where):
                continue
            restarts = row.restarts or budget.restarts
            made = entry.make(dataclasses.replace(budget, restarts=restarts), options_of(subject))
            targets = row.targets or entry.targets
            found.append(
                Plan(row.attack, made, restarts, targets, len(found), row.count, row.curved, row.adaptive)
            )
        return found


def _budgets(subject, settings, eps) -> dict[str, Budget]:
    attack, quick = settings.attack, settings.quick
    once = Budget(
        eps=eps,
        norm=subject.norm,
        bounds=subject.bounds,
        steps=20 if quick else attack.steps,
        step_size=attack.step_size * eps / attack.eps if attack.eps else 0.0,
    )
    others = dataclasses.replace(
        once, steps=20 if quick else settings.apgd_steps, queries=200 if quick else settings.queries
    )
    return {
        "once": once, "pgd": dataclasses.replace(once, restarts=attack.restarts), "others": others,
        "many": dataclasses.replace(others, restarts=attack.restarts),
        "nearest": dataclasses.replace(others, eps=float("inf")),
    }  # fmt: skip


def options_of(subject: Subject) -> tuple[Callable, ...]:
    """The losses that attacks on this subject choose from."""
    return attack_losses.CLUSTERED if subject.clustered else attack_losses.LINEAR


def attack_on(subject: Subject, name: str, *, eps: float, **spend: Any) -> Attack:
    """An attack on a subject, by its name in the registry: one compilation for all radii, and all of PGD."""
    budget = Budget(eps=eps, norm=subject.norm, bounds=subject.bounds, **spend)
    return registry.build(name, budget, options_of(subject))


SOUND_2 = Protocol("sound-2", (
    Row("ce", "pgd", curved=True), Row("margin", "pgd", curved=True), Row("centroid", "once"),
    Row("feature", "once"), Row("away", "pgd"), Row("apgd-ce", "others"), Row("apgd-t", "others"),
    Row("fab-t", "others"), Row("square", "others"),
))  # fmt: skip
SOUND_3 = Protocol("sound-3", (
    Row("pma", "many", adaptive=True, curved=True),
    Row("centroid", "once", count=3, targets="malt-clusters"), Row("away", "once", restarts=1),
    Row("apgd-malt", "others", count=6),
    Row("apgd-ce", "others"), Row("fab-t", "others", count=2, targets="malt"), Row("square", "others"),
    Row("fmn", "nearest"), Row("ddn", "nearest"),
), cascade=True)  # fmt: skip
PROTOCOLS = {protocol.name: protocol for protocol in (SOUND_2, SOUND_3)}
