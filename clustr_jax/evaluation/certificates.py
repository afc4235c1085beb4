"""certified.json: what is certain, and what an l2 attack could not break, of the same classifier."""

import math
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from clustr_jax import certify, lipschitz, losses
from clustr_jax.attacks.pgd import run_pgd
from clustr_jax.classifier import Classifier
from clustr_jax.data import Examples
from clustr_jax.evaluation import intervals
from clustr_jax.runtime import canary
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import CertifySettings, MagnetSettings

# Images whose Jacobians give the lower bound of the Lipschitz constant.
_PROBES = 64
# What float32 may add to the norm of a Jacobian.
_SLACK = 1e-4
# Points of the curve of certified accuracy over the radius.
_CURVE = 101


def check_config(settings: CertifySettings, magnet: MagnetSettings, nearest: int) -> None:
    """UserError for settings that cannot be certified, before hours have gone into training."""
    if settings.rule not in certify.SOUND:
        raise UserError(f"certify.rule must be one of {', '.join(certify.SOUND)}, got {settings.rule!r}")
    k = max(magnet.k_per_class or (magnet.k,))
    rules = certify.sound_rules(k, nearest)
    if settings.rule not in rules:
        raise UserError(
            f"certify.rule={settings.rule} certifies another decision than that of K = {k} clusters per "
            f"class with eval.nearest={nearest}; these hold for it: {', '.join(rules)}"
        )
    if not settings.radii or not all(0 < r < math.inf for r in settings.radii):
        raise UserError(f"certify.radii must be one or more radii > 0, got {settings.radii}")
    written = [f"{r:.6f}" for r in settings.radii]
    if len({*written, f"{0:.6f}"}) <= len(written):
        raise UserError(
            f"certify.radii are told apart by six decimals, and these are {', '.join(written)}; give others"
        )
    if settings.steps < 1 or settings.restarts < 1:
        raise UserError(
            f"certify.steps and certify.restarts must be >= 1, got {settings.steps} and {settings.restarts}"
        )


def bounds(clf: Classifier, x: Float[np.ndarray, "N ..."]) -> dict[str, float]:
    """Upper bound of the embedding's Lipschitz constant, and the steepest Jacobian met on these inputs."""
    upper = lipschitz.bound(clf.net.describe(clf.variables), clf.net.input_shape)
    lower = lipschitz.jacobian_norm(Partial(type(clf).embed, clf), x[:_PROBES])
    return {"upper": upper, "lower": float(np.max(lower)), "lower_from": min(len(x), _PROBES)}


def radii(
    clf: Classifier, x: Float[np.ndarray, "N ..."], y: Int[np.ndarray, "N"], upper: float
) -> dict[str, np.ndarray]:
    """Radii of each example by each rule; 0 as well where the deployed rule is wrong."""
    assert clf.clusters is not None
    z = np.asarray(clf.embed(x))
    found = {rule: certify.radius(clf.clusters, z, y, lipschitz=upper, rule=rule) for rule in certify.RULES}
    correct = np.asarray(clf.predict(x)) == y
    return {rule: np.where(correct, r, np.float32(0)) for rule, r in found.items()}


def attack(
    key: Array,
    clf: Classifier,
    examples: Examples,
    alive: Bool[np.ndarray, "N"],
    *,
    eps: float,
    steps: int,
    restarts: int,
    lanes: int,
):
    """Which of `alive` survive l2-PGD on the margin of the log scores, steps of 2.5 eps / steps.

    A success is a returned image inside the ball and the box that the logits or the deployed rule
    misclassify in a fresh forward pass.
    """
    survive = alive.copy()
    pending = np.flatnonzero(alive)
    for start in range(0, len(pending), lanes):
        now = pending[start : start + lanes]
        index = np.resize(now, lanes)  # one compilation: the last batch repeats images
        x, y, ids = (jnp.asarray(a[index]) for a in (examples.x, examples.y, examples.ids))
        x_adv = run_pgd(
            key, clf.logits, x, y, eps=eps, step_size=2.5 * eps / steps, steps=steps, restarts=restarts,
            norm="l2", loss_fn=losses.margin, bounds=clf.bounds, ids=ids,
        )  # fmt: skip
        moved = np.linalg.norm(np.asarray(x_adv - x, np.float64).reshape(lanes, -1), axis=1)
        assert moved.max() <= eps * (1 + 1e-5) + 1e-6, "the attack left the ball"
        survive[index[~_correct(clf, x_adv, y)]] = False
    return survive


def _correct(clf, x, y):
    """Whether the logits and the deployed rule both say y."""
    x, y = jnp.asarray(x), np.asarray(y)
    return (np.asarray(clf.logits(x)).argmax(axis=1) == y) & (np.asarray(clf.predict(x)) == y)


def run(
    key: Array,
    clf: Classifier,
    x: Float[np.ndarray, "N ..."],
    y: Int[np.ndarray, "N"],
    examples: Examples,
    settings: CertifySettings,
    report: Callable[[float, str], None],
    *,
    slots: int,
) -> tuple[dict, dict, float]:
    """(result, per-example outcomes, seconds): certificates of x, attacks on `examples` (some of them).

    `violations` counts attacked images that were broken within their certified radius: anything but 0
    is a bug, and raises.
    """
    canary.check()
    started = time.perf_counter()
    constant = bounds(clf, x)
    assert clf.clusters is not None
    sound = certify.sound_rules(int(jnp.max(jnp.sum(clf.clusters.valid, axis=1))), clf.nearest)
    # both would be faults of this package, and a figure that nobody may trust
    assert constant["lower"] <= constant["upper"] * (1 + _SLACK), f"the Lipschitz bound is none: {constant}"
    assert settings.rule in sound, f"{settings.rule} does not certify this head"
    found = radii(clf, x, y, constant["upper"])
    own = found[settings.rule]
    eps = tuple(settings.radii)
    table = {
        rule: {f"{e:.6f}": float(v) for e, v in zip(eps, certify.accuracy(r, np.array(eps)), strict=True)}
        for rule, r in found.items()
    }
    alive = _correct(clf, examples.x, examples.y)
    clean_attacked = intervals.fraction(alive)
    empirical, outcomes, violations = {}, {}, 0
    vacuous = not np.any(own > min(eps))  # then there is nothing to hold an attack against
    for i, e in enumerate(() if vacuous else sorted(eps)):
        alive = attack(
            jax.random.fold_in(key, i), clf, examples, alive, eps=e, steps=settings.steps,
            restarts=settings.restarts, lanes=min(slots, len(examples)),
        )  # fmt: skip
        outcomes[f"l2_pgd_{e:.6f}"] = alive
        certain = own[examples.ids] > e
        violations += int(np.sum(certain & ~alive))
        empirical[f"{e:.6f}"] = {
            "robust": intervals.fraction(alive),
            "certified": intervals.fraction(certain),
        }
        report(intervals.fraction(alive), f"l2-PGD at {intervals.radius(e)}")
    if violations:
        raise AssertionError(f"{violations} images were broken inside their certified radius")
    correct = np.asarray(clf.predict(x)) == y
    grid = np.linspace(0.0, max(1.0, 1.1 * max(eps)), _CURVE)
    result = {
        "n": len(y), "eps": eps[0], "norm": "l2", "clean": intervals.fraction(correct),
        "robust": table[settings.rule][f"{eps[0]:.6f}"], "rule": settings.rule,
        "lipschitz": constant,
        "attack": {
            "norm": "l2", "loss": "margin", "steps": settings.steps, "step_size": "2.5 eps / steps",
            "restarts": settings.restarts,
        },
        "attacks": {}, "sweep": table[settings.rule], "rules": table,
        "unsound_rules": [rule for rule in certify.RULES if rule not in sound],
        "paper_rule_over_claims": intervals.fraction(found["paper"] > found["hard"] * (1 + 1e-5)),
        "empirical": {"n": len(examples), "clean": clean_attacked, "violations": violations, "at": empirical},
        "median_radius": float(np.median(own)),
        "curve": {
            "radius": [round(float(r), 6) for r in grid],
            **{rule: [float(v) for v in certify.accuracy(r, grid)] for rule, r in found.items()},
        },
    }  # fmt: skip
    outcomes |= {f"radius_{rule}": r for rule, r in found.items()}
    outcomes |= {"clean": correct, "y": y, "attacked_ids": examples.ids}
    return result, outcomes, time.perf_counter() - started


def draw(path: pathlib.Path, result: dict) -> None:
    """The certified-accuracy curve of each rule that holds here, and what the attack left, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curve, empirical = result["curve"], result["empirical"]
    styles = {"any_d": "-", "soft": "--", "hard": ":"}
    for rule, style in styles.items():
        if rule in result["unsound_rules"]:
            continue
        axes.plot(
            curve["radius"], np.multiply(100, curve[rule]), style, color="C0", label=f"certified, {rule}"
        )
    eps = [0.0, *map(float, empirical["at"])]
    left = [empirical["clean"], *(v["robust"] for v in empirical["at"].values())]
    axes.plot(
        eps, np.multiply(100, left), "o", color="C3", label=f"not broken by l2-PGD ({empirical['n']} images)"
    )
    axes.set(
        xlabel="l2 radius, pixels in [0, 1]",
        ylabel="accuracy in %",
        ylim=(0, 100),
        xlim=(0, curve["radius"][-1]),
    )
    constant = result["lipschitz"]
    axes.set_title(
        f"{result['method']} on {result['dataset']}: {result['n']} test images\n"
        f"{constant['lower']:.3g} <= Lipschitz constant <= {constant['upper']:.3g}",
        fontsize="medium",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
