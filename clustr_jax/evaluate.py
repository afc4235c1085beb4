"""Two evaluations of the same classifier: the paper's protocol, to the letter, and a sound one.

Success is recomputed on the returned images in a fresh forward pass, inside the ball and the box.
"""

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Bool, Float, Int

from clustr_jax import losses, results
from clustr_jax.attacks.pgd import as_partial, check_settings, pgd_lanes
from clustr_jax.classifier import Classifier
from clustr_jax.errors import UserError

# Batch of the authors' evaluation: their loss is the mean over it, so gradients are 64 times smaller,
# which decides when they underflow.
_PAPER_BATCH = 64
# Float rounding allowed for in checking ||x_adv - x|| <= eps and the box.
_TOLERANCE = 1e-6


@dataclasses.dataclass
class Examples:
    """The test images under attack: pixels, labels, and their indices in the test split."""

    x: Float[np.ndarray, "N ..."]
    y: Int[np.ndarray, "N"]
    ids: Int[np.ndarray, "N"]

    def __len__(self):
        return len(self.y)


def clean(clf: Classifier, x, y) -> Bool[np.ndarray, "N"]:
    """Which examples the deployed rule classifies correctly."""
    return np.asarray(clf.predict(x)) == y


def paper_pgd(key, clf, examples, *, eps, step_size, steps, restarts, lanes, report) -> dict:
    """PGD exactly as the authors evaluate (fidelity.md 1.2): Bool outcomes, and what it left outside the box.

    Cross entropy of the exp scores, all restarts on all examples, fooled examples frozen, the start not
    clipped to the box, and of each example's restarts the one with the largest loss, fooled or not.
    """
    best = examples.x.copy()
    best_loss = np.zeros(len(examples), np.float32)  # the authors' initial value: >= 0 always replaces it
    ever = np.zeros(len(examples), bool)

    def collect(index, x_adv, loss, fooled):
        for i, image, value in zip(index, x_adv, loss, strict=True):  # in the order of the restarts
            if value >= best_loss[i]:
                best[i], best_loss[i] = image, value
        ever[index[fooled]] = True
        report(float(np.mean(~ever)))

    _attack_pairs(
        key, as_partial(clf.scores), examples, np.ones(len(examples), bool), collect, restarts, lanes,
        eps=eps, step_size=step_size, steps=steps, loss_fn=_paper_loss, select="loss",
        bounds=clf.bounds, clip_start=False,
    )  # fmt: skip
    robust = _argmax(clf.scores, best) == examples.y
    outside = np.zeros(len(examples), bool)
    if clf.bounds is not None:
        low, high = clf.bounds
        outside = np.any(
            (best < low - _TOLERANCE) | (best > high + _TOLERANCE), axis=tuple(range(1, best.ndim))
        )
    return {"robust": robust, "any_restart": ~ever, "fooled_outside_box": outside & ~robust}


def _paper_loss(logits, y):
    return losses.cross_entropy(logits, y) / _PAPER_BATCH


def sound_pgd(key, clf, examples, alive, loss_fn, *, eps, step_size, steps, restarts, lanes, report):
    """PGD on the log-domain logits. Returns (which of `alive` survive, gradient evaluations spent).

    A success counts when the returned image is misclassified by the logits or by the deployed rule in
    a fresh forward pass; the example's other restarts are dropped.
    """
    alive = alive.copy()

    def collect(index, x_adv, loss, fooled):
        verify_inside(x_adv, examples.x[index], eps, clf.bounds)
        y = examples.y[index]
        alive[index[(_argmax(clf.logits, x_adv) != y) | (_argmax(clf.deployed, x_adv) != y)]] = False
        report(float(np.mean(alive)))

    spent = _attack_pairs(
        key, as_partial(clf.logits), examples, alive, collect, restarts, lanes,
        eps=eps, step_size=step_size, steps=steps, loss_fn=loss_fn, bounds=clf.bounds,
    )  # fmt: skip
    return alive, spent


def verify_inside(x_adv, x, eps, bounds) -> None:
    """Raise if an adversarial image left the linf ball or the box: the number would be wrong."""
    worst = float(np.max(np.abs(x_adv - x), initial=0.0))
    if not worst <= eps + _TOLERANCE:
        raise AssertionError(f"attack left the ball: {worst} > eps = {eps}")
    if bounds is not None and (x_adv.min(initial=0.0) < bounds[0] or x_adv.max(initial=0.0) > bounds[1]):
        raise AssertionError(f"attack left the box {bounds}")


def _attack_pairs(
    key, logits_fn: Partial, examples, alive, collect, restarts, lanes, *, eps, step_size, **settings
):
    """Every restart of every example that is `alive` when its turn comes, `lanes` pairs at a time.

    `collect(index, x_adv, loss, fooled)` receives each batch and may clear `alive`. All batches have
    exactly `lanes` lanes (one compilation; outcomes that do not depend on the split): the last one
    repeats pairs. Returns the gradient evaluations spent, lanes x steps at most.
    """
    eps, step_size = np.float32(eps), np.float32(step_size)
    size, spent = len(examples), 0
    pending = np.arange(restarts * size)  # restart-major: first restart of all examples first
    pending = pending[alive[pending % size]]
    while len(pending):
        now, pending = pending[:lanes], pending[lanes:]
        padded = np.resize(now, lanes)
        index = padded % size
        x_adv, loss, fooled = pgd_lanes(
            key, logits_fn, examples.x[index], examples.y[index], examples.ids[index],
            (padded // size).astype(np.int32), eps, step_size, **settings,
        )  # fmt: skip
        count = len(now)
        collect(
            index[:count], np.asarray(x_adv)[:count], np.asarray(loss)[:count], np.asarray(fooled)[:count]
        )
        spent += lanes * settings["steps"]
        pending = pending[alive[pending % size]]
    return spent


def _argmax(f: Callable, x) -> Int[np.ndarray, "N"]:
    return np.asarray(f(x)).argmax(axis=1)


def run_clean(clf, x, y) -> tuple[dict, dict, float]:
    """clean.json: the deployed rule on the whole test split."""
    started = time.perf_counter()
    correct = clean(clf, x, y)
    value = results.fraction(correct)
    result = {
        "n": len(y),
        "eps": 0.0,
        "clean": value,
        "robust": value,
        "attack": {},
        "attacks": {},
        "sweep": {},
    }
    return result, {"clean": correct, "y": y}, time.perf_counter() - started


def run_paper(key, clf, examples, config, report) -> tuple[dict, dict]:
    """paper.json: PGD^20 and PGD^100 at the main eps (`robust` = both together), then the other radii."""
    settings = config.eval.attack
    steps = (20,) if config.eval.quick else tuple(config.eval.paper_steps)
    correct = _argmax(clf.scores, examples.x) == examples.y
    outcomes, attacks, sweep, lost, outside = {"clean": correct}, {}, {}, 0, 0
    worst = correct.copy()
    for eps in (settings.eps, *(() if config.eval.quick else config.eval.sweep)):
        for count in steps:
            name = f"pgd{count}"
            found = paper_pgd(
                key, clf, examples, eps=eps, step_size=settings.step_size, steps=count,
                restarts=settings.restarts, lanes=config.eval.lanes,
                report=lambda a, name=name, eps=eps: report(a, f"{name} at eps {results.radius(eps)}"),
            )  # fmt: skip
            robust = found["robust"]
            outcomes[f"{name}_{eps:.6f}"] = robust
            if eps == settings.eps:
                attacks[name] = results.fraction(robust)
                worst &= robust
                lost += int(np.sum(robust & ~found["any_restart"]))
                outside += int(np.sum(found["fooled_outside_box"]))
            else:
                sweep.setdefault(f"{eps:.6f}", {})[name] = results.fraction(robust)
    result = {
        "n": len(examples), "eps": settings.eps,
        "clean": results.fraction(correct), "robust": results.fraction(worst),
        "attack": {
            **settings.to_dict(), "steps": list(steps), "loss": "cross_entropy(exp scores)", "select": "loss",
        },
        "attacks": attacks, "sweep": sweep,
        "successes_lost_by_max_loss_rule": lost, "counted_successes_outside_box": outside,
    }  # fmt: skip
    return result, outcomes


def run_sound(key, clf, examples, config, report) -> tuple[dict, dict]:
    """sound.json: log-domain cross entropy, then margin, each on what is still unbroken."""
    settings = config.eval.attack
    steps = 20 if config.eval.quick else settings.steps
    deployed = clean(clf, examples.x, examples.y)
    alive = deployed & (_argmax(clf.logits, examples.x) == examples.y)
    broken_by = np.where(alive, "", "clean").astype("U16")
    attacks = {}
    for name, loss_fn in (("ce", losses.cross_entropy), ("margin", losses.margin)):
        survive, spent = sound_pgd(
            jax.random.fold_in(key, len(attacks)), clf, examples, alive, loss_fn,
            eps=settings.eps, step_size=settings.step_size, steps=steps, restarts=settings.restarts,
            lanes=config.eval.lanes, report=lambda a, name=name: report(a, f"sound, {name}"),
        )  # fmt: skip
        broken_by[alive & ~survive] = name
        alive = survive
        attacks[name] = {"unbroken_after": results.fraction(alive), "gradient_evaluations": spent}
    result = {
        "n": len(examples), "eps": settings.eps,
        "clean": results.fraction(deployed), "robust": results.fraction(alive),
        "attack": {**settings.to_dict(), "steps": steps, "losses": list(attacks), "select": "success"},
        "attacks": attacks, "sweep": {},
    }  # fmt: skip
    return result, {"clean": deployed, "robust": alive, "broken_by": broken_by}


def check_config(config) -> None:
    """UserError for evaluation settings that cannot be run, before hours have gone into training."""
    attack = config.eval.attack
    check_settings(eps=attack.eps, step_size=attack.step_size)
    for name, value, low in (
        ("eval.attack.steps", attack.steps, 1), ("eval.attack.restarts", attack.restarts, 1),
        ("eval.n", config.eval.n, 0), ("eval.lanes", config.eval.lanes, 1),
        ("eval.nearest", config.eval.nearest, 0),
    ):  # fmt: skip
        if value < low:
            raise UserError(f"{name} must be at least {low}, got {value}")
    if not config.eval.paper_steps or min(config.eval.paper_steps) < 1:
        raise UserError(f"eval.paper_steps must be one or more numbers >= 1, got {config.eval.paper_steps}")
    for eps in config.eval.sweep:
        check_settings(eps=eps, step_size=attack.step_size)
    unknown = [name for name in config.eval.protocols if name not in RUNNERS]
    if unknown:
        raise UserError(f"eval.protocols: unknown {unknown[0]!r}; known: {', '.join(RUNNERS)}")


RUNNERS = {"paper": run_paper, "sound": run_sound}


def run(name: str, key, clf: Classifier, examples: Examples, config, report) -> tuple[dict, dict, float]:
    """(result, per-example outcomes, seconds) of one protocol."""
    started = time.perf_counter()
    result, outcomes = RUNNERS[name](key, clf, examples, config, report)
    outcomes |= {"ids": examples.ids, "y": examples.y}
    return result, outcomes, time.perf_counter() - started
