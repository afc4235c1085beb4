"""Every stream of randomness that is told from others by a number: which key is folded with what.

A stream is `jax.random.fold_in(key, number)`. A run's key is of its seed, a stage's is the run's with the
place of the stage, and the numbers below are folded into a stage's key. Of an attack, (example, restart) has
fold_in(fold_in(key, id), restart). A number that changes changes every result.
"""

import jax

from clustr_jax.runtime.stage_names import STAGES


class Training:
    """Of the key of a training stage."""

    STEPS = 0  # then the number of the step
    INITIAL = 0  # the first parameters: from the stream that the steps fold their numbers into
    ORDER = 1  # then the number of the epoch
    REFIT = 2  # k-means++, then the number of the step
    MONITOR = 3  # single-step and multi-step accuracy
    PROBE = 5  # the attacks of train.probe
    HEAD = 6  # what a trained cluster head starts from
    STATISTICS = 7  # the order of fidelity.epoch_statistics=clean, then the number of the step
    FLIPS = 4  # which images alternating flips turn first, then the image's number


class Evaluation:
    """Of the key of `evaluate`. The attacks of a sound protocol have their place in its plan, from 0."""

    SWEEP = 50  # attacks at other radii
    TRANSFER = 100  # images that were made for other models
    AUDIT = 2000  # another run of a whole protocol
    CHECKS = 1000  # apart from all attacks, whose starts the checks must not try again


class Checks:
    """Of the checks' own key."""

    KNOWN_ANSWER = 99
    NUDGE = 98
    SLOPES = 97


class Report:
    """Of the key of `report`."""

    GALLERY, EMBEDDINGS = 0, 1


def stage_key(seed: int, stage: str) -> jax.Array:
    """The key of `stage` in a run with this seed."""
    return jax.random.fold_in(jax.random.key(seed), STAGES.index(stage))
