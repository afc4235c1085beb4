"""What a model says of the images of a witness, with NumPy alone: right, wrong, or a tie within rounding.

An image is right where the logits and, for heads that have one, the deployed rule prefer its label: the rule
of `attacks.attack_losses.misclassified`. So `verify` takes functions of images that return logits [B, Y] or a
`View`, and a `Classifier`.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from clustr_jax.runtime.errors import UserError

# Two frameworks add up in other orders: below this part of the two scores that decide a margin is a tie.
_TIE = 1e-5
# Share of a line's images that may be ties; one image always may.
_TIES = 0.01
_BATCH = 64


def check(done: Any, found: Any, model: Callable | Any) -> None:
    """Lines of whether the model says of every image what the witness does."""
    rules = model.view if is_classifier(model) else model
    clean, attacked = _scores(rules, found.x), _scores(rules, found.x_adv)
    lost = sum(_without_number(scores) for scores in (clean, attacked))
    done.add("logits are numbers", not lost, f"{lost} of {len(found.x) + len(found.x_adv)} images without")
    right = found.attack != "clean"
    _agree(done, "images that count as right are classified correctly", clean, found.y, right, True)
    _agree(done, "images that count as wrong are misclassified", clean, found.y, ~right, False)
    every = np.ones(len(found.x_adv), bool)
    _agree(done, "adversarial images are misclassified", attacked, found.y[found.broken], every, False)
    if len(found.near):  # on the boundary: each may be a tie
        near, y = _scores(rules, found.x_near), found.y[found.near]
        every = np.ones(len(y), bool)
        _agree(done, "nearest images are misclassified", near, y, every, False, most=len(y))


def most_ties(n: int) -> int:
    """How many of n images may be ties."""
    return max(1, int(_TIES * n))


def _agree(done, what, scores, y, chosen, right, most=None):
    """Whether the model says so of the chosen ones, but for a few ties (`most` of them)."""
    y = y[chosen]
    most = most_ties(len(y)) if most is None else most
    if not len(y):
        return done.add(what, True, "none")
    wrong, close = zip(*(_decided(rule[chosen], y) for rule in scores), strict=True)
    wrong, close = np.stack(wrong), np.stack(close)
    if right:
        off, tie = wrong.any(axis=0), (~wrong | close).all(axis=0)
    else:
        off, tie = ~wrong.any(axis=0), close.any(axis=0)
    bad, ties = int(np.sum(off & ~tie)), int(np.sum(off & tie))
    told = f"{len(y) - bad - ties} of {len(y)}"
    done.add(
        what,
        bad == 0 and ties <= most,
        told + (f", {ties} ties within rounding (at most {most})" if ties else ""),
    )


def _decided(scores, y):
    """([B] another class is preferred, [B] the label and its rival are equal but for rounding)."""
    rows = np.arange(len(y))
    own, rest = scores[rows, y], np.array(scores)
    rest[rows, y] = -np.inf
    rival = rest.max(axis=1)
    known = np.isfinite(own) & np.isfinite(rival)
    own, rival = np.where(known, own, 0.0), np.where(known, rival, 0.0)
    close = known & (np.abs(own - rival) <= _TIE * np.maximum(np.abs(own), np.abs(rival)))
    # what is no number prefers nothing: it is a line of its own
    return (scores.argmax(axis=1) != y) & ~np.isnan(scores).any(axis=1), close


def _without_number(scores) -> int:
    """Images with a logit that is not finite; a deployed rule may rule classes out with -inf."""
    logits, *deployed = scores
    lost = ~np.isfinite(logits).all(axis=1)
    for rule in deployed:
        lost |= (np.isnan(rule) | np.isposinf(rule)).any(axis=1)
    return int(lost.sum())


def is_classifier(model: Any) -> bool:
    """Whether it is a `Classifier`, without importing what classifiers are made of."""
    known = sys.modules.get("clustr_jax.classifier")
    return known is not None and isinstance(model, known.Classifier)


def _scores(model, x) -> list[np.ndarray]:
    """[N, Y] logits, and those of the deployed rule where the model returns a View."""
    if not len(x):
        return [np.zeros((0, 2))]
    parts = []
    for start in range(0, len(x), _BATCH):
        batch = x[start : start + _BATCH]
        outputs = model(batch)
        has_rule = hasattr(outputs, "logits") and hasattr(outputs, "deployed")
        rules = (outputs.logits, outputs.deployed) if has_rule else (outputs,)
        arrays = [np.asarray(rule, np.float64) for rule in rules]
        for scores in arrays:
            if scores.ndim != 2 or len(scores) != len(batch):
                raise UserError(f"the model must return logits [B, Y], got shape {scores.shape}")
        parts.append(arrays)
    return [np.concatenate(rule) for rule in zip(*parts, strict=True)]
