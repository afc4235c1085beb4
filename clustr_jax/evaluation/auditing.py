"""The audit of a judgement: the same protocol with another seed, order and number of slots.

Whatever it breaks is broken: the figure that is reported is the union. The number of images that only the
audit broke says whether the attacks have converged. Equal totals would not say it, for each could have broken
images that the other did not.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from clustr_jax.evaluation import intervals, sound_protocol
from clustr_jax.evaluation.check import Check, status_of
from clustr_jax.runtime import streams

NAME, PREFIX = "audit", "audit-"
# Share of the images that the audit alone may break; one image always may.
_SHARE = 0.005


def run(
    case: Any, records: Any, report: Callable, outcomes: dict[str, Any], found: sound_protocol.Found
) -> dict[str, Any]:
    """What the audit of `case` came to, and its check; `outcomes` and `found` become the union's."""
    x, n = case.examples.x, len(case.examples)
    key = jax.random.fold_in(jax.random.key(case.seed), streams.Evaluation.AUDIT)
    order = np.random.default_rng(abs(case.seed + 1)).permutation(n)
    slots = max(1, case.settings.slots // 2 + 1)
    own = sound_protocol.Found.of(x[order])
    settings = dataclasses.replace(case.settings, slots=slots, curve=())
    _, there = sound_protocol.run_sound(
        key, case.subject, case.examples.take(order), settings,  # minimum norms have no randomness
        lambda left, what: report(left, f"audit, {what}"), records, protocol=case.protocol.within(),
        found=own,
    )  # fmt: skip
    again = np.zeros(n, bool)
    again[order] = there["robust"]
    here, more = outcomes["robust"], outcomes["robust"] & ~again
    chosen = more[order]
    found.take(order[chosen], own.x_adv[chosen], own.restart[chosen])
    outcomes["robust"] = here & again
    outcomes["broken_by"] = np.where(more, NAME, outcomes["broken_by"].astype(object)).astype(str)
    value, count = intervals.fraction(again), int(more.sum())
    good = count <= allowed(n)
    return {
        "robust": value,
        "slots": slots,
        "agrees": good,
        "check": Check(
            29,
            "an audit with another seed, order and slots breaks no more images",
            status_of(good),
            count,
            f"<= {allowed(n)}",
            f"{100 * value:.2f} % there",
        ),
        "broken_here_only": int(np.sum(~here & again)),
        "broken_there_only": count,
    }


def allowed(n: int) -> int:
    """How many of n images only the audit may break."""
    return max(1, math.ceil(_SHARE * n))
