"""Which departure of the authors' protocol buys how many points, on one trained model.

    python -m clustr_jax.quirks runs/cifar10-clustr_qtrades [--n=512] [--steps=20] [--restarts=10] [--eps=...]

The first row is the paper's protocol; each following row switches one departure off and leaves the others;
the last has all of them off. All rows are of the same rule, Eq. 4 with every cluster (D is no departure of
the protocol), at the radius and step of the run's last evaluation unless --eps and --step_size say others.
Below stands the paper's adaptive attack, which ascends the Magnet loss about the fixed centroids: with its
hinge, as the paper has it, and without. Writes results/quirks.json.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from clustr_jax import data
from clustr_jax.attacks import attack_losses, scheduler
from clustr_jax.attacks.pgd import as_partial
from clustr_jax.attacks.scheduled_pgd import PGD
from clustr_jax.classifier import Classifier
from clustr_jax.data import Examples
from clustr_jax.evaluation import intervals
from clustr_jax.evaluation.protocols import PAPER_LOSS, largest_loss
from clustr_jax.runtime import canary, provenance
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.programs import program
from clustr_jax.runtime.stage_names import EVALUATE
from clustr_jax.runtime.streams import stage_key
from clustr_jax.settings import DataSettings, EvalSettings
from clustr_jax.storage import loading, results

# name -> what it is in the authors' code, and instead.
QUIRKS = {
    "exp_scores": "cross entropy of exp scores -> of log scores",
    "mean_loss": "gradient of the mean over 64 images -> of each image's own loss (underflow)",
    "max_loss": "the restart with the largest loss counts -> any restart that succeeds",
    "start_outside": "the start may leave the box -> it may not",
}
_ADAPTIVE = {
    "hinged": "the paper's adaptive attack: PGD on the Magnet loss, flat beyond its margin",
    "unhinged": "the same loss without the hinge",
}
_EXP_LOSS = attack_losses.one(attack_losses.cross_entropy)


def evaluate(
    key: Array,
    clf: Classifier,
    examples: Examples,
    settings: EvalSettings,
    on: frozenset[str],
    *,
    steps: int,
    restarts: int,
):
    """Bool [N]: who is right, and survives PGD with the departures `on`, all others switched off."""
    budget = settings.attack
    anywhere = clf.replace(bounds=None)  # a start may leave the box
    model = as_partial(anywhere.scores if "exp_scores" in on else anywhere.logits)
    attack = PGD(
        eps=jnp.float32(budget.eps),
        steps=steps,
        norm="linf",
        bounds=clf.bounds,
        step_size=jnp.float32(budget.step_size),
        loss=PAPER_LOSS if "mean_loss" in on else _EXP_LOSS,
        clip_start="start_outside" not in on,
    )
    found = largest_loss(key, model, attack, examples, restarts=restarts, slots=settings.slots)
    right = np.argmax(scheduler.forward(model, examples.x, settings.slots), axis=1) == examples.y
    return found["robust" if "max_loss" in on else "any_restart"] & right


def table(
    key: Array,
    clf: Classifier,
    examples: Examples,
    settings: EvalSettings,
    *,
    steps: int,
    restarts: int,
    report: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Rows {quirk off, robust, points}: all on, each off in turn, all off."""
    everything = frozenset(QUIRKS)
    rows, base = [], None
    for name in ("", *QUIRKS, "all"):
        on = everything - ({name} if name in QUIRKS else everything if name else frozenset())
        report(f"without {name or 'nothing'}")
        robust = intervals.fraction(
            evaluate(key, clf, examples, settings, on, steps=steps, restarts=restarts)
        )
        base = robust if base is None else base
        rows.append({"off": name or "none", "robust": robust, "points": 100 * (robust - base)})
    return rows


def adaptive(
    key: Array,
    clf: Classifier,
    examples: Examples,
    settings: EvalSettings,
    *,
    alpha: float,
    steps: int,
    restarts: int,
) -> dict[str, float]:
    """Accuracy under PGD on the Magnet loss, {alpha + ...}_+ as in the paper and without the hinge.

    Any restart that succeeds counts. The hinged loss is flat wherever the margin exceeds alpha.
    """
    budget = settings.attack
    right = scheduler.judge(as_partial(clf.view), examples.x, examples.y)[0]
    found = {}
    for name, loss in (("hinged", attack_losses.magnet_hinged(alpha)), ("unhinged", attack_losses.magnet)):
        attack = PGD(
            eps=jnp.float32(budget.eps),
            steps=steps,
            norm="linf",
            bounds=clf.bounds,
            step_size=jnp.float32(budget.step_size),
            loss=attack_losses.one(loss),
        )
        outcome = scheduler.run(
            attack, key, as_partial(clf.view), examples.x, examples.y, ids=examples.ids, restarts=restarts,
            slots=settings.slots,
        )  # fmt: skip
        found[name] = intervals.fraction(~outcome.broken & ~np.asarray(right))
    return found


@program
def main(argv: list[str]) -> None:
    """The table, and results/quirks.json."""
    parser = argparse.ArgumentParser(
        prog="python -m clustr_jax.quirks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir")
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--eps", type=float)
    parser.add_argument("--step_size", type=float)
    args = parser.parse_args(argv)
    console = Console()
    canary.check()
    clf = loading.load(args.workdir)
    network = loading.digest(clf)
    if clf.clusters is None:
        raise UserError(f"{args.workdir} has a linear head; the departures are those of cluster scores")
    config = loading.read_config(pathlib.Path(args.workdir))
    if args.n < 1 or args.steps < 1 or args.restarts < 1:
        raise UserError("--n, --steps and --restarts must be at least 1")
    if not all(value is None or 0 < value < np.inf for value in (args.eps, args.step_size)):
        raise UserError(f"--eps and --step_size must be above 0, got {args.eps} and {args.step_size}")
    config["eval"]["nearest"] = 0  # the log scores of one row know no other rule
    clf = clf.replace(nearest=0)
    for name in ("eps", "step_size"):
        config["eval"]["attack"][name] = getattr(args, name) or config["eval"]["attack"][name]
    images, settings = DataSettings.of(config["data"]), EvalSettings.of(config["eval"])
    test = data.splits(images, smoke=config["smoke"])[2]
    count = min(args.n, len(test))
    index = data.stratified(test.labels, count, test.num_classes)
    examples = data.Examples(test.pixels(index), test.labels[index], index.astype(np.int32))
    started = time.perf_counter()
    key, budget = stage_key(config["seed"], EVALUATE), {"steps": args.steps, "restarts": args.restarts}
    with console.status("quirks") as status:
        rows = table(
            key, clf, examples, settings, **budget, report=lambda text: status.update(f"quirks: {text}")
        )
        status.update("quirks: the adaptive attack")
        magnet = adaptive(key, clf, examples, settings, alpha=config["magnet"]["alpha"], **budget)
    shown = Table(
        title=f"{config['method']} on {data.label(images)}, PGD^{args.steps} x {args.restarts}, n = {count}"
    )
    for column in ("switched off", "instead", "accuracy %", "points"):
        shown.add_column(column)
    for row in rows:
        what = QUIRKS.get(row["off"]) or {"none": "the paper's protocol", "all": "none of them"}[row["off"]]
        shown.add_row(
            row["off"], what, intervals.percent(row["robust"], {"n": count}), f"{row['points']:+.2f}"
        )
    shown.add_section()
    for name, robust in magnet.items():
        shown.add_row(f"adaptive, {name}", _ADAPTIVE[name], intervals.percent(robust, {"n": count}), "")
    console.print(shown)
    content = {
        "dataset": data.label(images), "subset": test.subset, "n": count, "method": config["method"],
        "protocol": "quirks-4", "eps": settings.attack.eps, "clean": intervals.fraction(
            np.asarray(clf.predict(examples.x)) == examples.y),
        "robust": rows[-1]["robust"], "nearest": clf.nearest,
        "attack": budget | {"step_size": settings.attack.step_size},
        "rows": rows, "adaptive": magnet, "seed": config["seed"], "network_sha": network,
        "config_sha": provenance.sha({**config, "quirks": {"n": count, **budget}}),
        "versions": provenance.versions(), "wall_seconds": time.perf_counter() - started,
    }  # fmt: skip
    target = pathlib.Path(args.workdir) / "results"
    results.save(target, "quirks", content, {"ids": examples.ids, "y": examples.y})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
