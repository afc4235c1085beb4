"""Every attack that the scheduler runs, by name: how it is made of a budget, and what it needs.

    attack = registry.build("apgd-t", Budget(eps=8 / 255))

`autoattack`, the sound protocols, the checks, the tests that hold for every attack, and the table in
docs/attacks.md go by this list. To add an attack, add its `Entry` to `_ENTRIES` (and, where it goes towards
targets of a new kind, a function to `targets.CHOOSERS`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from clustr_jax.attacks import attack_losses
from clustr_jax.attacks.apgd import APGD
from clustr_jax.attacks.fab import FAB
from clustr_jax.attacks.fmn import DDN, FMN, first_step
from clustr_jax.attacks.pma import PMA, ROUNDS
from clustr_jax.attacks.scheduled_attack import Attack
from clustr_jax.attacks.scheduled_pgd import PGD
from clustr_jax.attacks.square import Square
from clustr_jax.runtime.errors import UserError

# Of AutoAttack's "standard": steps of the gradient attacks and queries of Square.
STEPS, QUERIES = 100, 5000
# Of a two-stage attack, the part that only runs away from the own cluster.
_AWAY_SHARE = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """The ball, and what an attack may spend in it; `Entry.settings` says which of these it reads.

    `steps` of gradient attacks, `step_size` in units of the pixels, `queries` of black boxes, `restarts` of
    each target. `rescale_schedule` as in `attacks.square`.
    """

    eps: float
    norm: str = "linf"
    bounds: tuple[float, float] | None = (0.0, 1.0)
    steps: int = STEPS
    step_size: float | None = None
    restarts: int = 1
    queries: int = QUERIES
    rescale_schedule: bool = True


# What an attack that takes one loss chooses it from at run time: attacks with the same options share a
# compilation. None: from itself.
Options = tuple[Callable, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One attack: `make(budget, options)` builds it, the rest says what it is and where it can be used."""

    name: str
    kind: type[Attack]
    make: Callable[[Budget, Options], Attack]
    what: str  # one phrase for docs/attacks.md
    source: str
    settings: tuple[str, ...]  # of `Budget`, beside the ball
    targets: str | None = None  # a name in `targets.CHOOSERS`
    restarts: int = 1  # that belong to the attack as it is published
    min_classes: int = 2
    clusters: bool = False  # takes a `View` of a cluster head only
    norms: tuple[str, ...] = ("linf", "l2")

    @property
    def gradients(self) -> bool:
        """Whether it differentiates the model; if not it is a black-box attack."""
        return self.kind.gradients > 0

    @property
    def images(self) -> bool:
        """Whether it takes [B, H, W, C] only."""
        return self.kind.images

    def lacking(
        self, *, shape: tuple[int, ...], classes: int, norm: str = "linf", clusters: bool = False
    ) -> str:
        """What keeps it from images of this batch shape and such a model, and what to do; "" if nothing."""
        if self.images and len(shape) != 4:
            return f"{self.name} takes images [B, H, W, C], got {shape}; leave it out for points"
        if classes < self.min_classes:
            return f"{self.name} needs at least {self.min_classes} classes, got {classes}; leave it out"
        if norm not in self.norms:
            return f"{self.name} works in {', '.join(self.norms)}, got norm={norm!r}; leave it out"
        if self.clusters and not clusters:
            return f"{self.name} needs a model with clusters (clf.view), got logits alone; leave it out"
        return ""

    def check(self, **where: Any) -> None:
        """UserError where something is `lacking`."""
        text = self.lacking(**where)
        if text:
            raise UserError(text)


def _ball(budget: Budget) -> dict:
    return {"eps": jnp.float32(budget.eps), "norm": budget.norm, "bounds": budget.bounds}


def _chosen(loss: Callable, options: Options) -> attack_losses.AttackLoss:
    return attack_losses.one(loss) if options is None else attack_losses.among(loss, options)


def _pgd(loss: Callable, opening: Callable = attack_losses.margin, share: float = 0.0):
    """PGD on `loss`; the first `share` of the steps climbs `opening`."""

    def make(budget: Budget, options: Options) -> PGD:
        if budget.step_size is None:
            raise ValueError("PGD needs a step_size")
        # with options there is always an opening, so that all of these attacks are one program
        staged = share > 0 or options is not None
        return PGD(
            steps=np.int32(budget.steps),
            step_size=jnp.float32(budget.step_size),
            loss=_chosen(loss, options),
            opening=_chosen(opening, options) if staged else None,
            opening_steps=np.int32(int(share * budget.steps)),
            **_ball(budget),
        )

    return make


def _apgd(loss: Callable):
    def make(budget: Budget, options: Options) -> APGD:
        return APGD(steps=budget.steps, loss=_chosen(loss, options), **_ball(budget))

    return make


def _pma(budget: Budget, options: Options) -> PMA:
    return PMA(steps=np.int32(budget.steps), **_ball(budget))


def _fab(budget: Budget, options: Options) -> FAB:
    return FAB(steps=budget.steps, restarts=budget.restarts, **_ball(budget))


def _fmn(budget: Budget, options: Options) -> FMN:
    step_size = jnp.float32(first_step(FMN, budget.norm, budget.bounds))
    margin = _chosen(attack_losses.margin, options)
    return FMN(steps=np.int32(budget.steps), step_size=step_size, margin=margin, **_ball(budget))


def _ddn(budget: Budget, options: Options) -> DDN:
    step_size = jnp.float32(first_step(DDN, budget.norm, budget.bounds))
    return DDN(steps=np.int32(budget.steps), step_size=step_size, **_ball(budget))


def _square(budget: Budget, options: Options) -> Square:
    return Square(steps=budget.queries, rescale=budget.rescale_schedule, **_ball(budget))


_MADRY, _CROCE = "Madry et al. 2018", "Croce & Hein 2020"
_PGD_SETTINGS = ("steps", "step_size", "restarts")

_ENTRIES = (
    Entry(
        name="ce",
        kind=PGD,
        make=_pgd(attack_losses.cross_entropy),
        what="PGD on the cross entropy",
        source=_MADRY,
        settings=_PGD_SETTINGS,
    ),
    Entry(
        name="margin",
        kind=PGD,
        make=_pgd(attack_losses.margin),
        what="PGD on the margin",
        source="Carlini & Wagner 2017",
        settings=_PGD_SETTINGS,
    ),
    Entry(
        name="centroid",
        kind=PGD,
        make=_pgd(attack_losses.centroid),
        what="PGD towards one cluster of another class at a time, in the linearised logit",
        source="here",
        settings=_PGD_SETTINGS,
        targets="clusters",
        clusters=True,
    ),
    Entry(
        name="feature",
        kind=PGD,
        make=_pgd(attack_losses.feature),
        what="the same in feature distance",
        source="here",
        settings=_PGD_SETTINGS,
        targets="clusters",
        clusters=True,
    ),
    Entry(
        name="away",
        kind=PGD,
        make=_pgd(attack_losses.margin, opening=attack_losses.away, share=_AWAY_SHARE),
        what="PGD away from the own cluster for half of the steps, on the margin then",
        source="here",
        settings=_PGD_SETTINGS,
        clusters=True,
    ),
    Entry(
        name="apgd-ce",
        kind=APGD,
        make=_apgd(attack_losses.cross_entropy),
        what="Auto-PGD on the cross entropy",
        source=_CROCE,
        settings=("steps", "restarts"),
    ),
    Entry(
        name="apgd-margin",
        kind=APGD,
        make=_apgd(attack_losses.margin),
        what="Auto-PGD on the margin",
        source=_CROCE,
        settings=("steps", "restarts"),
    ),
    Entry(
        name="apgd-pm",
        kind=APGD,
        make=_apgd(attack_losses.probability_margin),
        what="Auto-PGD on the margin of the probabilities",
        source=_CROCE,
        settings=("steps", "restarts"),
    ),
    Entry(
        name="apgd-dlr",
        kind=APGD,
        make=_apgd(attack_losses.dlr),
        what="Auto-PGD on the difference of logits ratio",
        source=_CROCE,
        settings=("steps", "restarts"),
        min_classes=3,
    ),
    Entry(
        name="apgd-t",
        kind=APGD,
        make=_apgd(attack_losses.dlr_targeted),
        what="APGD-T: Auto-PGD on the targeted DLR (the margin below four classes)",
        source=_CROCE,
        settings=("steps", "restarts"),
        targets="likely",
    ),
    Entry(
        name="apgd-malt",
        kind=APGD,
        make=_apgd(attack_losses.dlr_targeted),
        what="APGD-T towards the classes whose boundaries are nearest by the linearised model",
        source="Melamed et al. 2024",
        settings=("steps", "restarts"),
        targets="malt",
    ),
    Entry(
        name="pma",
        kind=PMA,
        make=_pma,
        what="steps up the margin of the probabilities; odd restarts begin towards the likeliest other class",
        source="Xie et al. 2025",
        settings=("steps", "restarts"),
        restarts=ROUNDS,
    ),
    Entry(
        name="fab-t",
        kind=FAB,
        make=_fab,
        what="FAB-T: the nearest adversarial image towards each target; ends at the first one within eps",
        source=_CROCE,
        settings=("steps", "restarts"),
        targets="likely",
    ),
    Entry(
        name="fmn",
        kind=FMN,
        make=_fmn,
        what="the nearest adversarial image; ends at the first one within eps, if that is finite",
        source="Pintor et al. 2021",
        settings=("steps", "restarts"),
    ),
    Entry(
        name="ddn",
        kind=DDN,
        make=_ddn,
        what="the same on spheres that grow and shrink",
        source="Rony et al. 2019",
        settings=("steps", "restarts"),
        norms=("l2",),
    ),
    Entry(
        name="square",
        kind=Square,
        make=_square,
        what="random search with squares",
        source="Andriushchenko et al. 2020",
        settings=("queries", "restarts", "rescale_schedule"),
    ),
)

ATTACKS: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
# AutoAttack's "standard", in order.
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
# Those that any function `x -> logits` can be attacked with and that have no step size to tune.
PARAMETER_FREE = tuple(e.name for e in _ENTRIES if "step_size" not in e.settings and not e.clusters)


def build(name: str, budget: Budget, options: Options = None) -> Attack:
    """The attack of this name within this budget; `options`: see `Options`."""
    return ATTACKS[name].make(budget, options)


def table() -> list[str]:
    """The lines of the table in docs/attacks.md."""
    rows = [("attack", "what", "targets", "needs", "settings", "source")]
    for e in _ENTRIES:
        needs = {
            "gradients": e.gradients,
            "images": e.images,
            "clusters": e.clusters,
            f"{e.min_classes} classes": e.min_classes > 2,
            f"{e.norms[0]} only": len(e.norms) == 1,
        }
        rows.append(
            (
                f"`{e.name}`",
                e.what,
                e.targets or "",
                ", ".join(name for name, is_needed in needs.items() if is_needed),
                ", ".join(f"`{name}`" for name in e.settings),
                e.source,
            )
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
