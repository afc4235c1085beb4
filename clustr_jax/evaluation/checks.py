"""Can the sound protocol's number be believed? Twenty-one checks (PASS, WARN, FAIL or SKIP) and one verdict.

The numbering up to 20 is that of soundness checklists: Carlini et al. 2019, Athalye et al. 2018, Tramer et
al. 2020, Pintor et al. 2022 and AutoAttack's own flags. The figure is an upper bound in any case; a failed
check does not change it, but is a reason to expect the truth well below.
"""

import dataclasses

import jax
import numpy as np

from clustr_jax.attacks.registry import ATTACKS
from clustr_jax.evaluation import intervals
from clustr_jax.evaluation.probes import (
    FAIL,
    IMAGES,
    PASS,
    POINTS,
    SKIP,
    WARN,
    Check,
    Probe,
    at_most,
    compiler,
    status_of,
    toy,
)
from clustr_jax.runtime import streams
from clustr_jax.settings import EvalSettings


def run(
    key, clf, examples, settings: EvalSettings, sound: dict, outcomes: dict, paper: dict | None, radius=None
):
    """All checks of a classifier and its sound result. Returns a list of `Check`, by number.

    `sound` and `paper` are results, `outcomes` the sound one's per-example arrays; `radius` [N] the
    certified l2 radii of the same examples, where there are any.
    """
    # in any order but their own: image folders are stored class by class
    index = np.random.default_rng(0).permutation(np.flatnonzero(outcomes["clean"]))[:IMAGES]
    if not len(index):  # nothing to attack: nothing to check either
        names = dict.fromkeys(range(1, 22), "no image is classified correctly")
        return [Check(number, name, SKIP, None, "") for number, name in names.items()]
    part = examples.take(index)
    probe = Probe(key, clf, part, settings, outcomes["robust"][index])
    checks = [
        *probe.outputs(), *probe.gradients(), *probe.precision(), *probe.scales(), *probe.effort(),
        *probe.black_box(), toy(jax.random.fold_in(key, streams.Checks.KNOWN_ANSWER)), compiler(),
        *from_result(sound, outcomes, paper),
        certificates(sound, outcomes, radius, int(np.prod(examples.x.shape[1:]))),
    ]  # fmt: skip
    admissible = all(c.status == PASS for c in checks if c.number in (2, 4))
    note = "deterministic forward pass, gradients that are not zero, no optimisation inside"
    status, limit = status_of(admissible, WARN), "checks 2 and 4"
    checks.append(Check(16, "RobustBench admits such a model", status, float(admissible), limit, note))
    return sorted(checks, key=lambda check: check.number)


def verdict(sound: dict, checks: list[Check]) -> str:
    """One line: the number, its interval, and the checks that say it is too high."""
    failed, warned = ([str(number) for number in _having(checks, status)] for status in (FAIL, WARN))
    robust, eps = intervals.percent(sound["robust"], sound), intervals.radius(sound["eps"])
    text = f"robust accuracy {robust} % at eps {eps}"
    if failed:
        return f"{text} (expect less: check{'s' * (len(failed) > 1)} {', '.join(failed)} failed)"
    warnings = f"; {', '.join(warned)} warn{'s' * (len(warned) == 1)}" if warned else ""
    return f"{text} (no check failed{warnings})"


def _having(checks: list[Check], status: str) -> list[int]:
    return sorted({check.number for check in checks if check.status == status})


def _is_black_box(name: str) -> bool:
    """Whether the attack looks at no gradient of the model that is judged."""
    return name.startswith("transfer") or (name in ATTACKS and not ATTACKS[name].gradients)


def from_result(sound: dict, outcomes: dict, paper: dict | None):
    """What the sound result itself shows: 9 to 15 and 19."""
    n, attacks, curves = sound["n"], sound["attacks"], sound["curves"]
    slack = max(POINTS, 1.0 / max(n, 1))
    name, silent = "left, though fooled in an attack's own program", sound.get("unconfirmed")
    if silent is None:  # of an earlier version
        yield Check(8, name, SKIP, None, "", "not counted")
    else:
        yield Check(8, name, status_of(silent / max(n, 1) <= slack), silent / max(n, 1), at_most(slack))
    restarts = [curves[name]["restarts"] for name in ("ce", "margin")]
    last = max((c[-2][1] - c[-1][1] if len(c) > 1 else 0.0) for c in restarts)
    lost = f"a max-loss rule loses {paper['successes_lost_by_max_loss_rule']} successes" if paper else ""
    several = any(len(c) > 1 for c in restarts)
    status = status_of(last <= slack, WARN) if several else SKIP
    yield Check(9, "the last restarts gain", status, last if several else None, at_most(slack), lost)

    chance = float(np.max(np.bincount(outcomes["y"])) / max(n, 1))
    curve = curves.get("eps")
    if curve is None or sound["unbounded"] is None:
        yield Check(11, "an unbounded attack leaves", SKIP, None, "", "no sweep in a quick evaluation")
    else:
        wide = [value for eps, value in curve if eps >= 0.5]
        if wide:
            good = status_of(wide[0] <= chance + 0.02)
            yield Check(10, "accuracy at an eps of 0.5 or more", good, wide[0], "<= chance + 2 points")
        left = sound["unbounded"]
        yield Check(11, "an unbounded attack leaves", status_of(left <= 0.01), left, "<= 1 %")

    black = [name for name in attacks if _is_black_box(name)]
    white = [name for name in attacks if name not in black]
    survivors = {name: outcomes[f"robust_{name}"] for name in attacks}
    by_white = np.all([survivors[name] for name in white], axis=0)
    if black:
        only = int(np.sum(by_white & ~np.all([survivors[name] for name in black], axis=0)))
        limit = max(1, int(np.ceil(0.002 * n)))
        status = status_of(only <= limit)
        yield Check(12, "broken by black boxes only", status, only, f"<= {limit}", ", ".join(black))
    else:
        yield Check(12, "broken by black boxes only", SKIP, None, "", "none ran")

    adaptive = [name for name in attacks if name in ATTACKS and ATTACKS[name].clusters]
    if adaptive:
        generic = [name for name in white if name not in adaptive]
        own = intervals.fraction(np.all([survivors[name] for name in adaptive], axis=0))
        rest = intervals.fraction(np.all([survivors[name] for name in generic], axis=0))
        kills = {name: attacks[name]["unique_kills"] for name in attacks if attacks[name]["unique_kills"]}
        gap = own - rest
        yield Check(
            13, "attacks made for clusters lag generic ones", status_of(gap <= 0.02, WARN), gap,
            "<= 2 points",
            f"unique kills: {kills or 'none'}",
        )  # fmt: skip
    else:
        yield Check(13, "attacks made for clusters lag generic ones", SKIP, None, "", "a linear head")
    targeted = sum(name in attacks for name in ("apgd-t", "fab-t"))
    yield Check(
        14,
        "targeted and untargeted attacks ran",
        status_of(targeted == 2 and "margin" in attacks),
        targeted,
        "2",
    )
    if "square" in attacks:
        gain = intervals.fraction(by_white) - intervals.fraction(by_white & survivors["square"])
        yield Check(
            15,
            "AutoAttack's flag: Square improves",
            status_of(gain <= 0.002 + 1 / n, WARN),
            gain,
            at_most(0.002 + 1 / n),
        )
    else:
        yield Check(15, "AutoAttack's flag: Square improves", SKIP, None, "", "no images")
    low, high = intervals.wilson(round(sound["robust"] * n), n)
    yield Check(
        19,
        "width of the 95 % interval",
        status_of(high - low <= 0.07, WARN),
        high - low,
        "<= 7 points",
        f"n = {n}",
    )


def certificates(sound: dict, outcomes: dict, radius, dimensions: int) -> Check:
    """18: nothing certified was broken. The linf ball of eps lies in the l2 ball of eps sqrt(dimensions)."""
    name = "certified, and broken all the same"
    if radius is None:
        return Check(18, name, SKIP, None, "", "no certificate")
    certain = np.asarray(radius) > sound["eps"] * np.sqrt(dimensions)
    wrong = int(np.sum(certain & ~outcomes["robust"]))
    return Check(
        18, name, status_of(wrong == 0), wrong, "0", f"{int(certain.sum())} certified at this radius"
    )


def as_result(sound: dict, checks: list[Check], paper: dict | None) -> dict:
    """diagnostics.json: the verdict, the checks and the masking gap."""
    gap = None if paper is None else paper["robust"] - sound["robust"]
    return {
        "verdict": verdict(sound, checks), "masking_gap": gap,
        "failed": _having(checks, FAIL),
        "checks": [dataclasses.asdict(check) for check in checks],
    }  # fmt: skip
