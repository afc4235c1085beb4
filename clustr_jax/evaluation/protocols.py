"""Evaluations of one classifier, side by side: the paper's protocol to the letter, and sound ones.

Success is recomputed on the returned images in a fresh forward pass, inside the ball and the box.
"""

import dataclasses
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from clustr_jax import losses
from clustr_jax.attacks import attack_losses, scheduler
from clustr_jax.attacks.options import too_wide
from clustr_jax.attacks.pgd import as_partial
from clustr_jax.attacks.scheduled_attack import Attack
from clustr_jax.attacks.scheduled_pgd import PGD
from clustr_jax.classifier import Classifier
from clustr_jax.data import Examples
from clustr_jax.evaluation import budgets, intervals, sound_protocol
from clustr_jax.evaluation import subject as subjects
from clustr_jax.evaluation.resume import Store
from clustr_jax.models import Net
from clustr_jax.runtime import canary
from clustr_jax.runtime.errors import UserError, nearest
from clustr_jax.settings import AdversarySettings, EvalSettings
from clustr_jax.storage import loading

# Batch of the authors' evaluation: their loss is the mean over it, so gradients are 64 times smaller,
# which decides when they underflow.
_PAPER_BATCH = 64


def paper_pgd(
    key: Array,
    clf: Classifier,
    examples: Examples,
    *,
    eps: float,
    step_size: float,
    steps: int,
    restarts: int,
    slots: int,
    report: Callable[[float], None],
    records: Store | None = None,
    name: str = "paper",
) -> dict:
    """PGD exactly as the authors evaluate (docs/attacks.md): Bool outcomes, and what it left outside the box.

    Cross entropy of the exp scores, all restarts on all examples, fooled examples frozen, the start not
    clipped to the box, and of each example's restarts the one with the largest loss, fooled or not.
    """
    anywhere = clf.replace(bounds=None)  # the start may leave the box
    attack = PGD(
        eps=jnp.float32(eps), steps=steps, norm="linf", bounds=clf.bounds, step_size=jnp.float32(step_size),
        loss=PAPER_LOSS, clip_start=False,
    )  # fmt: skip
    return largest_loss(
        key, as_partial(anywhere.scores), attack, examples, restarts=restarts, slots=slots, report=report,
        records=records, name=name,
    )  # fmt: skip


def largest_loss(
    key: Array,
    model: Partial,
    attack: Attack,
    examples: Examples,
    *,
    restarts: int,
    slots: int,
    report: Callable[[float], None] = lambda unbroken: None,
    records: Store | None = None,
    name: str = "",
) -> dict:
    """All restarts to their end, judged by the authors' rule: the one with the largest cross entropy counts.

    Returns `robust` [N] by that rule, `any_restart` [N] (no restart succeeded), `fooled_outside_box` [N]
    (a success that counts, but is no image), and what was spent.
    """
    outcome, known = records.load(name, examples.x, restarts) if records else (None, {})
    if not known:  # the authors' initial loss is 0, so that any replaces it
        known = {
            "best": examples.x.copy(),
            "loss": np.zeros(len(examples), np.float32),
            "kept": np.full(len(examples), -1),
            "ever": np.zeros(len(examples), bool),
        }
    best, best_loss, kept, ever = (known[key] for key in ("best", "loss", "kept", "ever"))

    def note(outcome):
        if records:
            records.save(name, outcome, known)
        report(float(np.mean(~ever)))

    def collect(index, restart, x_adv, fooled):
        outputs, y = scheduler.forward(model, x_adv, slots), examples.y[index]
        loss = losses.cross_entropy(jnp.asarray(outputs), jnp.asarray(y))
        for i, r, image, value in zip(index, restart, x_adv, np.asarray(loss), strict=True):
            # of equal losses the later restart's, in whatever order they end
            if value > best_loss[i] or (value == best_loss[i] and r > kept[i]):
                best[i], best_loss[i], kept[i] = image, value, r
        ever[index[fooled]] = True

    outcome = scheduler.run(
        attack, key, model, examples.x, examples.y, ids=examples.ids, restarts=restarts, slots=slots,
        first=False, outcome=outcome, collect=collect, report=note,
    )  # fmt: skip
    if records:
        records.save(name, outcome, known, now=True)
    robust = _argmax(model, best) == examples.y
    outside = np.zeros(len(examples), bool)
    if attack.bounds is not None:
        low, high = attack.bounds
        outside = np.any(
            (best < low - scheduler.TOLERANCE) | (best > high + scheduler.TOLERANCE),
            axis=tuple(range(1, best.ndim)),
        )
    return {
        "robust": robust,
        "any_restart": ~ever,
        "fooled_outside_box": outside & ~robust,
        "evaluations": outcome.evaluations,
        "needed": outcome.needed,
    }


def _paper_loss(logits, y):
    return losses.cross_entropy(logits, y) / _PAPER_BATCH


PAPER_LOSS = attack_losses.one(attack_losses.untargeted(_paper_loss))


def _argmax(f: Callable, x) -> Int[np.ndarray, "N"]:
    return np.asarray(f(x)).argmax(axis=1)


def run_clean(
    clf: Classifier, x: Float[np.ndarray, "N ..."], y: Int[np.ndarray, "N"]
) -> tuple[dict, dict, float]:
    """clean.json: the deployed rule on the whole test split.

    `predicted` and `labelled` are each class's share of the predictions and of the labels: a network that
    says one class only is "robust" on that class's share of the images.
    """
    canary.check()
    started = time.perf_counter()
    predictions = np.asarray(clf.predict(x))
    right = predictions == y
    value = intervals.fraction(right)
    result = {
        "n": len(y),
        "eps": 0.0,
        "clean": value,
        "robust": value,
        "attack": {},
        "attacks": {},
        "sweep": {},
        "predicted": _shares(predictions, clf.net.num_classes),
        "labelled": _shares(y, clf.net.num_classes),
    }
    return result, {"clean": right, "y": y}, time.perf_counter() - started


def _shares(classes, num_classes) -> list[float]:
    return (np.bincount(classes, minlength=num_classes) / len(classes)).tolist()


def run_paper(
    key: Array,
    clf: Classifier,
    examples: Examples,
    settings: EvalSettings,
    report: Callable[[float, str], None],
    records: Store | None = None,
) -> tuple[dict, dict]:
    """paper.json: PGD^20 and PGD^100 at the main eps (`robust` = both together), then the other radii."""
    attack = settings.attack
    steps = (20,) if settings.quick else tuple(settings.paper_steps)
    right = _argmax(clf.scores, examples.x) == examples.y
    outcomes, attacks, sweep, spent, needed = {"clean": right}, {}, {}, 0, 0
    worst, any_restart, outside = right.copy(), right.copy(), np.zeros(len(right), bool)
    others = () if settings.quick else intervals.other_radii(settings.sweep, attack.eps)
    for eps in (attack.eps, *others):
        for count in steps:
            name = f"pgd{count}"
            found = paper_pgd(
                key, clf, examples, eps=eps, step_size=attack.step_size, steps=count,
                restarts=attack.restarts, slots=settings.slots,
                report=lambda a, name=name, eps=eps: report(a, f"{name} at eps {intervals.radius(eps)}"),
                records=records, name=f"{name}_{eps:.6f}",
            )  # fmt: skip
            robust = found["robust"]
            spent, needed = spent + found["evaluations"], needed + found["needed"]
            outcomes[f"{name}_{eps:.6f}"] = robust
            if eps == attack.eps:
                attacks[name] = intervals.fraction(robust)
                worst &= robust
                any_restart &= found["any_restart"]
                outside |= found["fooled_outside_box"] & right
            else:
                sweep.setdefault(f"{eps:.6f}", {})[name] = intervals.fraction(robust)
    result = {
        "n": len(examples), "eps": attack.eps,
        "clean": intervals.fraction(right), "robust": intervals.fraction(worst),
        "attack": {
            **dataclasses.asdict(attack), "steps": list(steps), "loss": "cross_entropy(exp scores)",
            "select": "loss",
        },
        "attacks": attacks, "sweep": sweep,
        # images, each counted once however many attacks met it
        "successes_lost_by_max_loss_rule": int(np.sum(worst & ~any_restart)),
        "successes_outside_box": int(np.sum(outside)),
        "gradient_evaluations": spent, "gradient_evaluations_needed": needed,
    }  # fmt: skip
    return result, outcomes


def check_config(settings: EvalSettings) -> None:
    """UserError for evaluation settings that cannot be run, before hours have gone into training."""
    budgets.check(settings)
    unknown = [name for name in settings.protocols if name not in RUNNERS]
    if unknown:
        raise UserError(
            f"eval.protocols: unknown {unknown[0]!r}{nearest(unknown[0], RUNNERS)}; "
            f"known: {', '.join(RUNNERS)}"
        )


def wide_radii(
    train: AdversarySettings,
    settings: EvalSettings,
    bounds: tuple[float, float] | None,
    shape: tuple[int, ...],
) -> list[str]:
    """What to say of radii that are larger than the box of the pixels."""
    radii = {}
    for name, attack in (("train.attack", train), ("eval.attack", settings.attack)):
        radii |= {f"{name}.eps": attack.eps, f"{name}.step_size": attack.step_size}
    for name, values in (("sweep", settings.sweep), ("curve", settings.curve)):
        radii |= {f"eval.{name}": max((*values, 0.0))}
    return too_wide(radii, "linf", bounds, shape)


def check_transfer(settings: EvalSettings, net: Net) -> None:
    """UserError for a source of transfer whose images or classes are not those of `net`."""
    own = tuple(net.input_shape), net.num_classes
    for path in settings.transfer:
        found = loading.input_and_classes(path)
        if found != own:
            raise UserError(
                f"eval.transfer: {path} takes images of {found[0]} in {found[1]} classes, this network of "
                f"{own[0]} in {own[1]}; name a run on the same data"
            )


def run_sound(
    key: Array,
    clf: Classifier,
    examples: Examples,
    settings: EvalSettings,
    report: Callable[[float, str], None],
    records: Store | None = None,
) -> tuple[dict, dict]:
    """sound.json: of the classifier, attacked from its own linear head and from `eval.transfer` as well."""
    # the whole path: folders can share a name
    sources = {f"transfer-{path}": loading.load(path).logits for path in settings.transfer}
    subject = subjects.of(clf).with_sources(sources)
    return sound_protocol.run_sound(key, subject, examples, settings, report, records)


RUNNERS = {"paper": run_paper, "sound": run_sound, "quick": sound_protocol.run_quick}


def run(
    name: str,
    key: Array,
    clf: Classifier,
    examples: Examples,
    settings: EvalSettings,
    report: Callable[[float, str], None],
    records: Store | None = None,
) -> tuple[dict, dict, float]:
    """(result, per-example outcomes, seconds) of one protocol; `records` lets an interrupted one go on."""
    canary.check()
    started = time.perf_counter()
    result, outcomes = RUNNERS[name](key, clf, examples, settings, report, records)
    outcomes |= {"ids": examples.ids, "y": examples.y}
    return result, outcomes, time.perf_counter() - started
