"""The sound protocols: log-domain losses, attacks made for cluster heads, AutoAttack; the union per example.

sound-2 is PGD on the cross entropy and on the margin; APGD-CE, APGD-T, FAB-T and Square as in AutoAttack;
transfer from the network's own linear head and from other checkpoints. For cluster heads it is also PGD
towards the nearest clusters of other classes (in logit and in feature distance) and away from the own one
first. Every attack runs on all examples that are classified correctly, so each has an accuracy of its own,
and unique kills. quick-1 is margin PGD, cluster PGD and APGD-T with 20 steps, each on what the one before
left. The attacks are those of `evaluation.plans`; what is attacked is a `Subject`, or the Classifier it is
made of.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from clustr_jax.attacks import attack_losses, scheduler
from clustr_jax.attacks.adaptive import Progress
from clustr_jax.attacks.adaptive import run as run_adaptively
from clustr_jax.attacks.pgd import run_pgd
from clustr_jax.attacks.scheduled_attack import Attack
from clustr_jax.attacks.targets import CHOOSERS, ranking_gradients
from clustr_jax.classifier import Classifier
from clustr_jax.data import Examples
from clustr_jax.evaluation import intervals, plans
from clustr_jax.evaluation import subject as subjects
from clustr_jax.evaluation.found import Found, Near
from clustr_jax.evaluation.plans import Plan, attack_on
from clustr_jax.evaluation.resume import Store
from clustr_jax.evaluation.subject import Subject
from clustr_jax.losses import margin
from clustr_jax.runtime import streams
from clustr_jax.settings import EvalSettings

__all__ = [
    "Found", "Plan", "Sweep", "attack_on", "bound", "execute", "run_quick", "run_sound", "transfer",
]  # fmt: skip

# Restarts at which the curve over restarts is read off.
_RESTARTS = (1, 2, 5, 10, 20, 50)
# An unbounded attack: the whole box; without one at least this many times the main radius.
_UNBOUNDED = 100.0
# What broke an image at a smaller radius than the main one; or at a larger one, and was then brought in.
SMALLER, LARGER = "smaller-eps", "larger-eps"


def execute(
    plan: Plan,
    key: Array,
    subject: Subject,
    examples: Examples,
    *,
    alive: Bool[np.ndarray, "N"],
    settings: EvalSettings,
    report: Callable[[float, str], None],
    records: Store | None = None,
) -> tuple[scheduler.Outcome, dict]:
    """Run one attack on the examples that are `alive`. Returns (its outcome for those, what it cost)."""
    started = time.perf_counter()
    index = np.flatnonzero(alive)
    part, model, slots = examples.take(index), subject.model, settings.slots
    targets, ranking = None, 0
    if plan.targets is not None:
        outputs = scheduler.forward(model, part.x, slots)
        count = plan.count or settings.targets
        targets = CHOOSERS[plan.targets](
            model, part.x, part.y, outputs, subject.norm, count=count, slots=slots
        )
        ranking = ranking_gradients(plan.targets, outputs) * len(index)
    total = plan.restarts * (1 if targets is None else len(targets))
    outcome, known = records.load(plan.name, part.x, total) if records else (None, {})
    outcome = scheduler.Outcome.fresh(part.x, total) if outcome is None else outcome

    margins = np.full(outcome.spent.shape, np.nan, np.float32)
    so_far = Progress(outcome, known.get("margins", margins).copy(), plan.restarts)

    def save(**how):
        if records:
            records.save(
                plan.name, so_far.outcome, {"margins": so_far.margins} if plan.adaptive else None, **how
            )

    def note(found, _=None):
        so_far.outcome = found.outcome if plan.adaptive else found
        save()
        left = len(index) - so_far.outcome.broken.sum()
        report(float(left / max(len(examples), 1)), plan.name)

    if len(index):
        given: Any = plan.attack, jax.random.fold_in(key, plan.number), model, part.x, part.y
        where: Any = dict(ids=part.ids, targets=targets, slots=slots, report=note)
        try:
            if plan.adaptive:
                run_adaptively(*given, **where, most=plan.restarts, progress=so_far)
            else:
                so_far.outcome = scheduler.run(*given, **where, restarts=plan.restarts, outcome=outcome)
        except KeyboardInterrupt:
            save(leaving=True)
            raise
        save(now=True)
    outcome = so_far.outcome
    cost = {
        "targets": 0 if targets is None else len(targets),
        **outcome.cost(plan.attack),
        "evaluations_bound": bound(plan.attack, outcome, slots),
        "wall_seconds": time.perf_counter() - started,
    }
    cost["gradient_evaluations"] += ranking
    return outcome, cost


def bound(attack: Attack, outcome: scheduler.Outcome, slots: int) -> int:
    """What a good schedule may spend: 1.05 x the evaluations needed, and a tail of slots x steps."""
    return int(1.05 * outcome.needed + slots * np.asarray(attack.steps))


def transfer(
    key: Array,
    source: Callable,
    subject: Subject,
    examples: Examples,
    alive: Bool[np.ndarray, "N"],
    settings: EvalSettings,
) -> tuple[Bool[np.ndarray, "N"], Float[np.ndarray, "N ..."]]:
    """(which of `alive` survive images made on another model's logits, those images).

    Margin PGD on the other model, without stopping.
    """
    attack, alive, made = settings.attack, alive.copy(), np.array(examples.x, np.float32)
    lanes = settings.slots
    for start in range(0, len(examples), lanes):
        index = np.arange(start, min(start + lanes, len(examples)))
        padded = np.resize(index, lanes)
        x_adv = np.asarray(
            run_pgd(
                key, source, examples.x[padded], examples.y[padded], eps=attack.eps,
                step_size=attack.step_size, steps=20, loss_fn=margin, select="last", norm=subject.norm,
                bounds=subject.bounds, ids=examples.ids[padded],
            )
        )  # fmt: skip
        scheduler.verify_inside(x_adv, examples.x[padded], attack.eps, subject.norm, subject.bounds)
        fooled = scheduler.misjudged(subject.model, x_adv, examples.y[padded], len(index))
        alive[index] &= ~fooled
        made[index] = x_adv[: len(index)]
    return alive, made


def run_sound(
    key: Array,
    what: Subject | Classifier,
    examples: Examples,
    settings: EvalSettings,
    report: Callable[[float, str], None],
    records: Store | None = None,
    *,
    protocol: plans.Protocol = plans.SOUND_2,
    found: Found | None = None,
) -> tuple[dict, dict]:
    """sound.json: the attacks on all correct examples, the union, curves, and other radii.

    `found` is told the adversarial images; `records` must then keep images as well, as they must where the
    protocol looks for minimum norms.
    """
    this, attack, quick = subjects.of(what), settings.attack, settings.quick
    deployed, right = _right(this, examples, settings)
    broken_by = np.where(right, "", "clean").astype(object)  # names of any length
    survivors, attacks, curves, unconfirmed = {}, {}, {}, np.zeros(len(examples), bool)
    others = [] if quick else sorted(intervals.other_radii(settings.curve, attack.eps))
    smaller = [eps for eps in others if eps < attack.eps]
    larger = [eps for eps in others if eps > attack.eps]
    sweep = Sweep(key, this, examples, settings, report, records)
    near = None
    if protocol.nearest:
        found = Found.of(examples.x) if found is None else found
        near = found.near = Near.of(examples.x, this.norm)
    alive = sweep.run(right, smaller, found)
    broken_by[right & ~alive] = SMALLER

    def note(name, index, broken, x_adv, restart):
        """What this attack did to the examples at `index`: whom it broke first, and with what."""
        nonlocal alive
        survivors[name] = np.zeros(len(examples), bool)
        survivors[name][index] = ~broken
        new = broken & alive[index]
        broken_by[index[new]] = name
        alive = alive & survivors[name]
        if found is not None:
            found.take(index[new], x_adv[new], restart[new])

    shape, classes = examples.x.shape[1:], _classes(this, examples, settings)
    for plan in protocol.plans(this, settings, eps=attack.eps, shape=shape, classes=classes):
        before = alive if protocol.cascade and not plan.nearest else right
        outcome, cost = execute(
            plan, key, this, examples, alive=before, settings=settings,
            report=lambda a, what: report(a, f"sound, {what}"), records=records,
        )  # fmt: skip
        attacks[plan.name] = cost
        index = np.flatnonzero(before)
        if plan.nearest:  # on the boundary rounding decides: all of it is looked at again
            assert near is not None
            distance, images = near.look(plan, key, this, examples, index, outcome, settings.slots)
            note(plan.name, index, distance <= attack.eps, images, np.zeros(len(index), np.int32))
            continue
        unconfirmed |= _spread(before, outcome.unconfirmed)
        if plan.curved:
            curves[plan.name] = _curves(outcome, before, plan)
        note(plan.name, index, outcome.broken, outcome.x_adv, outcome.restart)
    for name, source in this.transfer.items():
        started, before = time.perf_counter(), alive if protocol.cascade else right
        survived, x_adv = transfer(
            jax.random.fold_in(key, streams.Evaluation.TRANSFER), source, this, examples, before, settings
        )
        attacks[name] = {"wall_seconds": time.perf_counter() - started}
        index = np.flatnonzero(before)
        note(name, index, ~survived[index], x_adv[index], np.full(len(index), -1, np.int32))
    unbounded = None
    if not quick:
        left = sweep.run(alive, [*larger, widest(this, attack.eps, examples.x)], near)
    if near is not None:
        assert found is not None
        near.bring_in(this, examples.y, settings.slots)
        index = np.flatnonzero(alive & (near.distance <= attack.eps))
        found.take(index, near.images[index], np.full(len(index), -1, np.int32))
        broken_by[index], alive[index] = LARGER, False
        for eps in sweep.robust:  # of an image with a nearer one nothing else may be said
            sweep.robust[eps] &= near.distance > eps

    for name, survived in survivors.items():
        if protocol.cascade:
            kills = {"added_kills": int(np.sum(broken_by == name))}
        else:
            rest = np.all([s for n, s in survivors.items() if n != name], axis=0)
            kills = {"unique_kills": int(np.sum(rest & right & ~survived))}
        attacks[name] = {"robust": intervals.fraction(survived), **kills, **attacks[name]}
    if not quick:
        unbounded = intervals.fraction(left)
        radii = {0.0: right, attack.eps: alive, **sweep.robust}
        curves["eps"] = [[eps, intervals.fraction(radii[eps])] for eps in sorted(radii)]
    result = {
        "n": len(examples), "eps": attack.eps,
        "clean": intervals.fraction(deployed), "robust": intervals.fraction(alive),
        "attack": {
            **dataclasses.asdict(attack), "steps": 20 if quick else attack.steps, "select": "success",
            "apgd_steps": 20 if quick else settings.apgd_steps,
            "queries": 200 if quick else settings.queries,
            **({} if protocol.own_targets else {"targets": settings.targets}),
        },
        "attacks": attacks, "curves": curves, "unbounded": unbounded,
        # left, though an attack fooled them in its own program: rounding decided in the pass that judges
        "unconfirmed": int(np.sum(unconfirmed & alive)),
        "sweep": {f"{eps:.6f}": {"robust": intervals.fraction(s)} for eps, s in sorted(sweep.robust.items())},
    }  # fmt: skip
    outcomes = {"clean": deployed, "robust": alive, "broken_by": broken_by.astype(str)}
    outcomes |= {f"robust_{name}": survived for name, survived in survivors.items()}
    return result, outcomes


def widest(subject: Subject, eps: float, x: np.ndarray) -> float:
    """The radius of an unbounded attack: the whole box, or the spread of x [N, ...] where there is none.

    However small eps is, every image of x is then in reach of every other one.
    """
    box = subject.bounds
    if box is None:
        box = (float(np.min(x)), float(np.max(x))) if np.size(x) else (0.0, 0.0)
    width = box[1] - box[0]
    radius = width if subject.norm == "linf" else width * float(np.sqrt(np.prod(np.shape(x)[1:])))
    return radius if subject.bounds is not None else max(radius, _UNBOUNDED * eps)


def run_quick(
    key: Array,
    what: Subject | Classifier,
    examples: Examples,
    settings: EvalSettings,
    report: Callable[[float, str], None],
    records: Store | None = None,
) -> tuple[dict, dict]:
    """quick.json: margin PGD, the clusters, then APGD-T, with 20 steps, each on what is left."""
    this, attack = subjects.of(what), settings.attack
    quick = dataclasses.replace(settings, quick=True)
    deployed, alive = _right(this, examples, settings)
    broken_by, attacks = np.where(alive, "", "clean").astype("U32"), {}
    for plan in plans.SOUND_2.plans(this, quick, eps=attack.eps, shape=examples.x.shape[1:]):
        if plan.name in ("margin", "centroid", "apgd-t"):
            outcome, cost = execute(
                plan, key, this, examples, alive=alive, settings=quick,
                report=lambda a, what: report(a, f"quick, {what}"), records=records,
            )  # fmt: skip
            broken_by[np.flatnonzero(alive)[outcome.broken]] = plan.name
            alive = broken_by == ""
            attacks[plan.name] = {"unbroken_after": intervals.fraction(alive), **cost}
    result = {
        "n": len(examples),
        "eps": attack.eps,
        "clean": intervals.fraction(deployed),
        "robust": intervals.fraction(alive),
        "attack": {**dataclasses.asdict(attack), "steps": 20},
        "attacks": attacks,
        "sweep": {},
    }
    return result, {"clean": deployed, "robust": alive, "broken_by": broken_by}


class Sweep:
    """APGD on the margin at other radii, ascending; what breaks at a smaller one counts at larger ones."""

    def __init__(
        self,
        key: Array,
        subject: Subject,
        examples: Examples,
        settings: EvalSettings,
        report: Callable[[float, str], None],
        records: Store | None = None,
    ):
        self.key, self.subject, self.examples, self.settings = key, subject, examples, settings
        self.report, self.records = report, records
        self.robust: dict[float, np.ndarray] = {}

    def run(self, alive: Bool[np.ndarray, "N"], radii: Iterable[float], found: Found | Near | None = None):
        """Survivors of all `radii`; each radius starts from what the ones before left."""
        for eps in radii:
            attack = plans.attack_on(self.subject, "apgd-margin", eps=eps, steps=self.settings.apgd_steps)
            plan = Plan(f"apgd-margin-{eps:.6f}", attack, number=streams.Evaluation.SWEEP)
            outcome, _ = execute(
                plan, self.key, self.subject, self.examples, alive=alive, settings=self.settings,
                report=lambda a, what: self.report(a, f"sound, {what}"), records=self.records,
            )  # fmt: skip
            if found is not None:
                index = np.flatnonzero(alive)[outcome.broken]
                found.take(index, outcome.x_adv[outcome.broken], outcome.restart[outcome.broken])
            alive = _spread(alive, ~outcome.broken)
            self.robust[eps] = alive
        return alive


def _classes(subject: Subject, examples, settings) -> int:
    outputs = scheduler.forward(subject.model, examples.x[:1], settings.slots)
    return attack_losses.logits_of(outputs).shape[1]


def _right(subject: Subject, examples, settings):
    """(right by the deployed rule, right by both it and the logits) of each example."""
    outputs = scheduler.forward(subject.model, examples.x, settings.slots)
    right: Any = attack_losses.logits_of(outputs).argmax(axis=1) == examples.y
    deployed = right if subject.predict is None else np.asarray(subject.predict(examples.x)) == examples.y
    return deployed, deployed & right


def _spread(mask, values):
    """`values` at the places where `mask` is True, False elsewhere."""
    full = np.zeros(len(mask), bool)
    full[mask] = values
    return full


def _curves(outcome: scheduler.Outcome, right, plan: Plan) -> dict:
    """Accuracy after so many restarts, and after so many steps of the first restart."""
    size = max(len(right), 1)
    restarts = [r for r in _RESTARTS if r < plan.restarts] + [plan.restarts]

    def left(broken):
        return float((len(broken) - broken.sum()) / size)

    first = outcome.broken & (outcome.restart == 0)
    steps = int(np.asarray(plan.attack.steps))
    at = sorted({0, 1, 2, 3, *range(5, steps, 5), steps})
    return {
        "restarts": [[r, left(outcome.broken & (outcome.restart < r))] for r in restarts],
        "steps": [[s, left(first & (outcome.step <= s))] for s in at],
    }
