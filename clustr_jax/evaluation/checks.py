"""Can the sound protocol's number be believed? Twenty-nine checks (PASS, WARN, FAIL, SKIP), one verdict.

The numbering up to 20 is that of soundness checklists: Carlini et al. 2019, Athalye et al. 2018, Tramer et
al. 2020, Pintor et al. 2022 and AutoAttack's own flags. Each check has a number of its own and is named by
what is right; one that warns or fails says what to do (`evaluation.advice`). The figure is an upper bound in
any case; a failed check does not change it, but is a reason to expect the truth well below.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Float

from clustr_jax.attacks.registry import ATTACKS
from clustr_jax.classifier import Classifier
from clustr_jax.data import Examples
from clustr_jax.evaluation import intervals, wording
from clustr_jax.evaluation import subject as subjects
from clustr_jax.evaluation.advice import ADVICE
from clustr_jax.evaluation.check import FAIL, PASS, SKIP, WARN, Check, at_most, status_of
from clustr_jax.evaluation.known_answers import compiler, toy
from clustr_jax.evaluation.probes import IMAGES, POINTS, Probe
from clustr_jax.evaluation.subject import Subject
from clustr_jax.runtime import streams
from clustr_jax.settings import EvalSettings

NUMBERS = (*range(1, 29), 30)  # and 29, an audit's, where one was asked for


def run(
    key: Array,
    what: Subject | Classifier,
    examples: Examples,
    settings: EvalSettings,
    *,
    sound: dict,
    outcomes: dict,
    paper: dict | None,
    radius: Float[np.ndarray, "N"] | None = None,
    before: str | None = None,
) -> list[Check]:
    """All checks of a classifier or subject and its sound result, by number.

    `sound` and `paper` are results, `outcomes` the sound one's per-example arrays. `radius` [N] are the
    certified l2 radii of the same examples, where there are any. `before` is the subject's digest before the
    protocol ran, where that was just now: check 20 is then of the protocol too.
    """
    # in any order but their own: image folders are stored class by class
    index = np.random.default_rng(0).permutation(np.flatnonzero(outcomes["broken_by"] != "clean"))[:IMAGES]
    if not len(index):  # nothing to attack: nothing to check either
        names = dict.fromkeys(NUMBERS, "no image is classified correctly")
        return [Check(number, name, SKIP, None, "") for number, name in names.items()]
    part = examples.take(index)
    probe = Probe(key, what, part, settings, outcomes["robust"][index])
    probe.before = before or probe.before
    norm = getattr(what, "norm", "linf")
    checks = [
        *probe.outputs(), *probe.gradients(), *probe.precision(), *probe.slopes(), *probe.scales(),
        *probe.effort(), *probe.black_box(),
        toy(jax.random.fold_in(key, streams.Checks.KNOWN_ANSWER), norm), compiler(),
        *from_result(sound, outcomes, paper, half=half(what, examples.x.shape[1:])),
        certificates(sound, outcomes, radius, int(np.prod(examples.x.shape[1:])), norm),
    ]  # fmt: skip
    missing = [c.number for c in checks if c.number in (2, 4) and c.status != PASS]
    note = "deterministic forward pass, gradients that are not zero, no optimisation inside"
    checks.append(
        Check(
            16,
            "RobustBench admits such a model: checks 2 and 4 that do not pass",
            status_of(not missing, WARN),
            len(missing),
            "0",
            note,
        )
    )
    return [advised(check) for check in sorted(checks, key=lambda check: check.number)]


def advised(check: Check) -> Check:
    """With what to do, where it warns or fails."""
    wanted = check.status in (WARN, FAIL)
    return dataclasses.replace(check, advice=ADVICE[check.number]) if wanted else check


def half(what: Subject | Classifier, shape: tuple[int, ...]) -> float | None:
    """The radius within which every image can be made grey: half of the box; None where there is no box."""
    subject = subjects.of(what)
    if subject.bounds is None:
        return None
    width = subject.bounds[1] - subject.bounds[0]
    return 0.5 * width * (1.0 if subject.norm == "linf" else float(np.sqrt(np.prod(shape))))


def verdict(sound: dict, checks: list[Check]) -> str:
    """One line: the number, its interval, and the checks that say it is too high."""
    failed, warned = ([str(number) for number in _having(checks, status)] for status in (FAIL, WARN))
    robust, eps = intervals.percent(sound["robust"], sound), intervals.radius(sound["eps"])
    text = f"robust accuracy {robust} % at eps {eps}"
    if failed:
        return f"{text} (expect less: check{'s' * (len(failed) > 1)} {', '.join(failed)} failed)"
    warnings = f"; {', '.join(warned)} warn{'s' * (len(warned) == 1)}" if warned else ""
    return f"{text} (no check failed{warnings})"


_CLUSTERS = "attacks made for clusters do not lag generic ones"


def _having(checks: list[Check], status: str) -> list[int]:
    return sorted({check.number for check in checks if check.status == status})


def _ran(attack: dict) -> bool:
    """Whether it looked at any image: in a cascade nothing may have been left for it."""
    return attack.get("evaluations_needed", 1) > 0


def _is_black_box(name: str) -> bool:
    """Whether the attack looks at no gradient of the model that is judged."""
    entry = ATTACKS.get(name)
    return name.startswith("transfer") or (entry is not None and not entry.gradients)


def from_result(sound: dict, outcomes: dict, paper: dict | None, half: float | None = 0.5):
    """What the sound result itself shows: 8, 9, 11 to 15, 19 and 23. `half`: the radius of half the box.

    Where there is no box that is None: no radius makes every image grey, and 23 has nothing to look at.
    """
    n, attacks, curves = sound["n"], sound["attacks"], sound["curves"]
    slack = max(POINTS, 1.0 / max(n, 1))
    name, silent = "what fools an attack's program fools the model", sound.get("unconfirmed")
    if silent is None:  # of an earlier version
        yield Check(8, name, SKIP, None, "", "not counted")
    else:
        yield Check(8, name, status_of(silent / max(n, 1) <= slack), silent / max(n, 1), at_most(slack))
    restarts = [curve["restarts"] for name, curve in curves.items() if name != "eps"]
    last = max(((c[-2][1] - c[-1][1] if len(c) > 1 else 0.0) for c in restarts), default=0.0)
    lost = f"a max-loss rule loses {paper['successes_lost_by_max_loss_rule']} successes" if paper else ""
    several = any(len(c) > 1 for c in restarts)
    status = status_of(last <= slack, WARN) if several else SKIP
    yield Check(9, "more restarts find nothing new", status, last if several else None, at_most(slack), lost)

    chance = float(np.max(np.bincount(outcomes["y"])) / max(n, 1))
    curve = curves.get("eps")
    if curve is None or sound["unbounded"] is None:
        yield Check(
            11, "an unbounded attack leaves nothing", SKIP, None, "", "no sweep in a quick evaluation"
        )
    else:
        grey = "with half of the box in reach, accuracy is chance"
        wide = [] if half is None else [value for eps, value in curve if eps >= half * (1 - 1e-6)]
        if half is None:
            yield Check(23, grey, SKIP, None, "", "the pixels have no box")
        elif wide:
            good = status_of(wide[0] <= chance + 0.02)
            yield Check(
                23,
                grey,
                good,
                wide[0],
                f"<= {100 * (chance + 0.02):.1f} %",
                "chance and 2 points",
            )
        left = sound["unbounded"]
        yield Check(11, "an unbounded attack leaves nothing", status_of(left <= 0.01), left, "<= 1 %")

    black = [name for name in attacks if _is_black_box(name) and _ran(attacks[name])]
    white = [name for name in attacks if not _is_black_box(name)]
    survivors = {name: outcomes[f"robust_{name}"] for name in attacks}
    by_white = np.all([survivors[name] for name in white], axis=0)
    if black:
        only = int(np.sum(by_white & ~np.all([survivors[name] for name in black], axis=0)))
        limit = max(1, int(np.ceil(0.002 * n)))
        status = status_of(only <= limit)
        yield Check(
            12,
            "black boxes break nothing that gradients do not: images",
            status,
            only,
            f"<= {limit}",
            ", ".join(black),
        )
    else:
        yield Check(12, "black boxes break nothing that gradients do not: images", SKIP, None, "", "none ran")

    adaptive = [name for name in attacks if (entry := ATTACKS.get(name)) is not None and entry.clusters]
    cascade = any("added_kills" in attack for attack in attacks.values())
    if adaptive and cascade:
        yield Check(13, _CLUSTERS, SKIP, None, "", "each attack ran on what the ones before left")
    elif adaptive:
        generic = [name for name in white if name not in adaptive]
        own = intervals.fraction(np.all([survivors[name] for name in adaptive], axis=0))
        rest = intervals.fraction(np.all([survivors[name] for name in generic], axis=0))
        kills = {name: attacks[name]["unique_kills"] for name in attacks if attacks[name]["unique_kills"]}
        gap = own - rest
        yield Check(
            13,
            _CLUSTERS,
            status_of(gap <= 0.02, WARN),
            gap,
            "<= 2 points",
            f"unique kills: {kills or 'none'}",
        )
    else:
        yield Check(13, _CLUSTERS, SKIP, None, "", "a linear head")
    yield _kinds(sound)
    if "square" in black:
        gain = intervals.fraction(by_white) - intervals.fraction(by_white & survivors["square"])
        yield Check(
            15,
            "Square does not improve on gradients (AutoAttack's flag)",
            status_of(gain <= 0.002 + 1 / n, WARN),
            gain,
            at_most(0.002 + 1 / n),
        )
    else:
        yield Check(
            15, "Square does not improve on gradients (AutoAttack's flag)", SKIP, None, "", "it did not run"
        )
    low, high = intervals.wilson(round(sound["robust"] * n), n)
    yield Check(
        19,
        "the 95 % interval is narrow: its width",
        status_of(high - low <= 0.07, WARN),
        high - low,
        "<= 7 points",
        f"n = {n}",
    )


def _kinds(sound):
    """14: how many attacks with and without targets spent gradients on images, whatever their names."""
    kinds = {"targeted": 0, "untargeted": 0}
    for name, attack in sound["attacks"].items():
        entry = ATTACKS.get(name)
        if entry is None or entry.clusters or not entry.gradients:
            continue
        targeted = attack.get("targets", 0 if entry.targets is None else 1)
        kinds["targeted" if targeted else "untargeted"] += _ran(attack)
    fewest, name = min(kinds.values()), "targeted and untargeted gradients attacked: the fewer"
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    if fewest < 2 and sound["robust"] == 0:
        return Check(14, name, SKIP, None, "", f"no image was left for more ({told})")
    return Check(14, name, status_of(fewest >= 2), fewest, ">= 2", told)


def certificates(
    sound: dict, outcomes: dict, radius: Float[np.ndarray, "N"] | None, dimensions: int, norm: str = "linf"
) -> Check:
    """18: nothing certified was broken. The linf ball of eps lies in the l2 ball of eps sqrt(dimensions)."""
    name = "nothing certified was broken: images"
    if radius is None:
        return Check(18, name, SKIP, None, "", "no certificate")
    certain = np.asarray(radius) > sound["eps"] * (np.sqrt(dimensions) if norm == "linf" else 1.0)
    wrong = int(np.sum(certain & ~outcomes["robust"]))
    return Check(
        18, name, status_of(wrong == 0), wrong, "0", f"{int(certain.sum())} certified at this radius"
    )


def as_result(sound: dict, checks: list[Check], paper: dict | None, constant: float | None = None) -> dict:
    """diagnostics.json: the verdict as a line and in plain words, the checks and the masking gap.

    `constant`: the accuracy of the best constant answer, where it is known.
    """
    gap = None if paper is None else paper["robust"] - sound["robust"]
    listed = [dataclasses.asdict(check) for check in checks]
    return {
        "verdict": verdict(sound, checks),
        "masking_gap": gap,
        "words": wording.words({"clean": 1.0, **sound, "constant": constant, "checks": listed}),
        "failed": _having(checks, FAIL),
        "checks": listed,
    }
