"""From a model and its images to a judgement: the gate, the protocol, the checks, an audit.

`judge` here writes no files but the records that make it resumable; clustr_jax.judge is the door.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from clustr_jax.attacks import calls, resuming, unattacked
from clustr_jax.attacks.gate import Admitted
from clustr_jax.attacks.scheduler import Outcome
from clustr_jax.classifier import Classifier
from clustr_jax.data import Examples
from clustr_jax.evaluation import (
    auditing,
    budgets,
    checks,
    distances,
    footprint,
    intervals,
    plans,
    sound_protocol,
    witness,
    wording,
)
from clustr_jax.evaluation import subject as subjects
from clustr_jax.evaluation.subject import Subject
from clustr_jax.runtime import canary, provenance, streams
from clustr_jax.runtime.errors import UserError, nearest
from clustr_jax.settings import AttackSettings, EvalSettings

FORMAT = "judgement-1"
# Other radii at which the curve is read off, in eps; the last one is half of the box.
_CURVE = (2.0, 4.0)
_LARGEST_BATCH = 64
_DOOR = "judge"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is judged: everything that the outcome depends on, admitted and completed."""

    subject: Subject
    examples: Examples
    classes: int
    settings: EvalSettings
    protocol: plans.Protocol
    given: Admitted
    logits: np.ndarray  # of the clean images
    seed: int
    own_budget: bool  # the settings are not the protocol's
    footprint: footprint.Footprint

    @property
    def label(self) -> str:
        """The protocol's name; with other budgets than its own that is said."""
        return self.protocol.name + "-custom" * self.own_budget


def budget(eps: float, slots: int, curve: tuple[float, ...] = ()) -> EvalSettings:
    """The steps, restarts, targets and queries of the sound protocols; a step is a quarter of the radius."""
    return EvalSettings(
        n=0, nearest=0, quick=False, slots=slots, protocols=("sound",), diagnostics=True, transfer=(),
        attack=AttackSettings(eps, eps / 4, 100, 10), paper_steps=(20,), sweep=(), curve=curve,
        apgd_steps=100, targets=9, queries=5000,
    )  # fmt: skip


def prepare(
    model: Callable | Classifier,
    x: Any,
    y: Any,
    *,
    eps: float,
    norm: str,
    bounds: tuple[float, float] | None,
    ids: Any,
    protocol: str,
    settings: EvalSettings | None,
    slots: int,
    seed: int,
) -> Case:
    """UserError for anything that would make the figure meaningless (attacks.gate has the list)."""
    if protocol not in plans.PROTOCOLS:
        raise UserError(
            f"protocol: unknown {protocol!r}{nearest(protocol, plans.PROTOCOLS)}; "
            f"known: {', '.join(plans.PROTOCOLS)}"
        )
    classifier = _classifier_of(model)
    function: Any = model if classifier is None else classifier.logits
    key = jax.random.key(seed)
    ball: Any = dict(eps=eps, norm=norm, bounds=bounds, ids=ids)
    given, logits = calls.prepare(key, function, x, y, **ball, slots=slots)
    if not len(given.x):
        raise UserError("x has no images: there is nothing to judge")
    if again := len(given.ids) - len(np.unique(given.ids)):
        raise UserError(
            f"ids: {again} of {len(given.ids)} are there twice, and their images would share random numbers; "
            f"number the images: ids=np.arange({len(given.ids)})"
        )
    size = footprint.of(given.model, given.x, logits.shape[1], slots)
    if size.slots < slots:  # the model is opened for as many images as it will see at once
        slots = size.slots
        given, logits = calls.prepare(key, function, x, y, **ball, slots=slots)
    unattacked.warn_of_settings(eps=eps)
    if classifier is None:
        subject = subjects.of_model(function, given, slots)
    else:
        subject = dataclasses.replace(
            subjects.of_classifier(classifier), bounds=given.bounds, norm=given.norm, unsteady=given.note
        )
    examples = Examples(given.x, given.y, given.ids)
    half = checks.half(subject, given.x.shape[1:])
    widest = sound_protocol.widest(subject, float(eps), given.x)
    curve = [*(times * float(eps) for times in _CURVE), *([] if half is None else [half])]
    own = budget(float(eps), slots, tuple(sorted(c for c in curve if float(eps) < c < widest)))
    used = own if settings is None else budgets.at_radius(settings, float(eps), slots)
    if plans.PROTOCOLS[protocol].own_targets and used.targets != own.targets:
        raise UserError(
            f"settings.targets={used.targets}: {protocol} says itself how many targets each attack has; "
            f"leave it at {own.targets}, or take protocol='sound-2'"
        )
    return Case(
        subject, examples, logits.shape[1], used, plans.PROTOCOLS[protocol], given, logits, seed, used != own,
        size,
    )  # fmt: skip


def _classifier_of(model) -> Classifier | None:
    """Of a classifier, and of its `logits`, which know no nearest clusters; None for other models."""
    if isinstance(model, Classifier):
        return model
    owner = getattr(model, "__self__", None)
    if isinstance(owner, Classifier) and getattr(model, "__func__", None) is Classifier.logits:
        return owner.replace(nearest=0)
    return None


def parts(case: Case, audit: bool) -> dict[str, str]:
    """What the outcome depends on, each as a short hash, as attacks.resuming has them."""
    source = [path.read_bytes().hex() for path in sorted(pathlib.Path(__file__).parent.glob("*.py"))]
    door = [
        _DOOR, case.label, case.seed, case.subject.norm, case.subject.bounds, audit,
        dataclasses.asdict(case.settings), provenance.sha(source),
    ]  # fmt: skip
    first = resuming.Planned("margin", _first_attack(case), None, 1)
    given = case.given._replace(model=case.subject.model)
    return resuming.parts_of(given, case.logits, [first], case.settings.slots, json.dumps(door))


def _first_attack(case):
    attack = case.settings.attack
    return plans.attack_on(
        case.subject, "margin", eps=attack.eps, steps=attack.steps, step_size=attack.step_size
    )


class Records:
    """The records of attacks.resuming, as a protocol asks for them; `prefix` tells two runs apart."""

    def __init__(self, kept: resuming.Kept, prefix: str = ""):
        self._kept, self._prefix = kept, prefix

    def load(self, name: str, x: Float[np.ndarray, "N ..."], restarts: int):
        """(the outcome to go on from, what was stored with it)."""
        return self._kept.load_with(self._prefix + name, x, restarts)

    def save(
        self, name: str, outcome: Outcome, extra: dict[str, np.ndarray] | None = None, **how: bool
    ) -> None:
        """Store it, if it is time to."""
        self._kept.note(self._prefix + name, outcome, extra, **how)


def judge(
    case: Case, kept: resuming.Kept, report: Callable, *, audit: bool = False
) -> tuple[dict, witness.Witness]:
    """(the content of judgement.json, the witness): the protocol, the checks, and the audit if asked for."""
    canary.check()
    started = time.perf_counter()
    key, examples, settings = jax.random.key(case.seed), case.examples, case.settings
    found, before = sound_protocol.Found.of(examples.x), case.subject.digest()
    result, outcomes = sound_protocol.run_sound(
        key, case.subject, examples, settings, report, Records(kept), protocol=case.protocol, found=found
    )
    outcomes |= {"ids": examples.ids, "y": examples.y}
    report(result["robust"], "checks")
    own = jax.random.fold_in(key, streams.Evaluation.CHECKS)
    listed = checks.run(
        own, case.subject, examples, settings, sound=result, outcomes=outcomes, paper=None, before=before
    )
    again = None
    if audit:
        again = auditing.run(case, Records(kept, auditing.PREFIX), report, outcomes, found)
        listed.append(checks.advised(again.pop("check")))
    evidence = witness.of(
        examples.x, examples.y, examples.ids, found.x_adv, outcomes["broken_by"], found.restart,
        eps=settings.attack.eps, norm=case.subject.norm, bounds=case.subject.bounds, near=found.near,
    )  # fmt: skip
    return _content(case, result, listed, again, evidence, time.perf_counter() - started), evidence


def _distances(case, evidence) -> dict:
    """Of the nearest adversarial images: median, and accuracy over the radius."""
    at = distances.radii(evidence.eps, case.settings.curve)
    return distances.summary(distances.of(evidence), at)


def _content(case, result, listed, again, evidence, seconds) -> dict:
    n = result["n"]
    y = case.examples.y
    names, counts = np.unique(evidence.attack, return_counts=True)
    told = dict(zip(names.tolist(), counts.tolist(), strict=True))
    by = {name: told.get(name, 0) for name in result["attacks"]}
    others = (sound_protocol.SMALLER, sound_protocol.LARGER, auditing.NAME)
    by |= {name: told[name] for name in others if told.get(name)}
    notes = [*filter(None, (case.subject.unsteady, unattacked.of_settings(eps=evidence.eps)))]
    if case.footprint.slots < case.footprint.asked:
        notes.append(f"{case.footprint.asked} images side by side would not have fitted into the memory")
    if by.get(auditing.NAME):
        notes.append("what the audit broke counts as broken; attacks and curves are of the first run")
    content = {
        "format": FORMAT, "protocol": case.label, "norm": case.subject.norm, "eps": evidence.eps,
        "bounds": None if case.subject.bounds is None else list(case.subject.bounds),
        "n": n, "classes": case.classes, "image": list(case.examples.x.shape[1:]),
        "clean": intervals.fraction(evidence.attack != "clean"),
        "robust": intervals.fraction(evidence.attack == ""),
        "clean_deployed": result["clean"], "constant": float(np.bincount(y).max() / n),
        "attack": result["attack"], "attacks": result["attacks"], "curves": result["curves"],
        "distances": _distances(case, evidence) if case.protocol.nearest else None,
        "unbounded": result["unbounded"], "unconfirmed": result["unconfirmed"], "sweep": result["sweep"],
        "checks": [dataclasses.asdict(check) for check in listed],
        "audit": again,
        "counts": {
            "clean_wrong": told.get("clean", 0), "robust": told.get("", 0),
            "broken_by": by,
        },
        "sha256": witness.hashes(evidence), "model_sha": case.subject.digest(),
        "notes": notes, "seed": case.seed,
        "slots": case.settings.slots, "versions": provenance.versions(), "commit": provenance.commit(),
        "devices": sorted({d.device_kind for d in jax.devices()}), "wall_seconds": seconds,
    }  # fmt: skip
    for name in ("clean", "robust"):
        content[f"{name}_interval"] = list(intervals.wilson(round(content[name] * n), n))
    content |= {
        "failed": wording.failed(content), "status": wording.status(content),
        "verdict": wording.verdict(content),
    }  # fmt: skip
    return json.loads(json.dumps(content))
