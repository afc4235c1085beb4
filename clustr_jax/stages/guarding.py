"""What is looked at after each epoch of a stage, what is said of it, and what follows (train.on_collapse)."""

import dataclasses
from collections.abc import Collection

import jax
import numpy as np
from jaxtyping import Array

from clustr_jax import data
from clustr_jax.attacks.pgd import run_pgd
from clustr_jax.classifier import Classifier, correct
from clustr_jax.evaluation import intervals, protocols
from clustr_jax.runtime import processes, streams
from clustr_jax.runtime.errors import UserError
from clustr_jax.stages.context import Run
from clustr_jax.storage.files import read_json, write_json
from clustr_jax.training import guard
from clustr_jax.training.guard import Health

# What train.on_collapse can be.
WARN, STOP, RESTORE = "warn", "stop", "restore"
ANSWERS = (WARN, STOP, RESTORE)


class Collapsed(UserError):
    """A stage destroyed what it was handed, and train.on_collapse=stop: run.py's exit code is 3."""

    exit_code = 3


# How the reason of a stage begins that went back to its best network.
COLLAPSED = "collapsed: "


def stopped(stage: str, epoch: int, alarms: Collection[str]) -> Collapsed:
    """What ends a stage where train.on_collapse=stop."""
    return Collapsed(
        f"{stage} is stopped after epoch {epoch} (train.on_collapse=stop): {', '.join(alarms)}; "
        f"change the setting in another --workdir, or go on with --config.train.on_collapse=warn"
    )


def health(this: Run, clf: Classifier) -> Health | None:
    """Of this network on the held-out images, None where there are none."""
    if not len(this.val_split):
        return None
    x = this.val_split.pixels()
    return guard.health(np.asarray(clf.predict(x)), this.val_split.labels, np.asarray(clf.embed(x)))


def handed(this: Run, stage: str) -> Health | None:
    """What was noted when the stage began, None where it began from random parameters.

    guard.UNSEEN where there are no held-out images.
    """
    path = this.workdir.stage(stage) / "handed.json"
    return Health(**read_json(path)) if path.exists() else None


def note_handed(this: Run, stage: str, clf: Classifier | None) -> None:
    """Write down what the stage is handed (nothing: None), for itself and for whoever resumes it."""
    path = this.workdir.stage(stage) / "handed.json"
    found = None if clf is None else health(this, clf) or guard.UNSEEN
    if processes.leader():
        path.unlink(missing_ok=True)  # of a start that was killed before its first checkpoint
        if found is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, dataclasses.asdict(found))
    processes.wait(f"{path} is written")


def monitor(this: Run, clf: Classifier, key: Array) -> dict[str, float]:
    """Single-step and multi-step accuracy on held-out images (nothing without any)."""
    if not this.settings.training.train.monitor or not len(this.val_split):
        return {}
    # some of every class: image folders are stored class by class
    labels = this.val_split.labels
    index = data.stratified(labels, min(len(labels), 256), this.val_split.num_classes)
    x, y = this.val_split.pixels(index), labels[index]
    eps = this.settings.training.train.attack.eps
    found, key = {}, jax.random.fold_in(key, streams.Training.MONITOR)
    for name, steps, step_size in (("single_step", 1, 1.25 * eps), ("multi_step", 10, eps / 4)):
        try:
            x_adv = run_pgd(
                key, clf.logits, x, y, eps=eps, step_size=step_size, steps=steps, bounds=clf.bounds
            )
        except UserError as error:  # one that overflows: no reason to end a training that goes on
            this.progress.line(f"no single-step and multi-step accuracy: {error}")
            return {}
        found[f"{name}_accuracy"] = intervals.fraction(correct(clf, x_adv, y))
    return found


def probe(this: Run, clf: Classifier, key: Array) -> dict[str, float]:
    """What `train.probe` held-out images are left with: by the paper's protocol (PGD^20), and by quick-1.

    One restart each. Nothing where none are asked for, or none are held out.
    """
    count, labels = min(this.settings.training.train.probe, len(this.val_split)), this.val_split.labels
    if not count:
        return {}
    index = data.stratified(labels, count, this.val_split.num_classes)
    examples = data.Examples(this.val_split.pixels(index), labels[index], index.astype(np.int32))
    settings = dataclasses.replace(
        this.settings.eval, quick=True, attack=dataclasses.replace(this.settings.eval.attack, restarts=1)
    )
    key = jax.random.fold_in(key, streams.Training.PROBE)
    found = {}
    for name in ("paper", "quick"):
        result, _, _ = protocols.run(name, key, clf, examples, settings, lambda *_: None)
        found[f"{name}_accuracy"] = result["robust"]
    return found


def recorded(now: Health | None, alarms: dict[str, str]) -> dict:
    """What of it goes into metrics.jsonl; the accuracy is there already."""
    found: dict = {} if now is None else dataclasses.asdict(now)
    found.pop("accuracy", None)
    return found | ({"alarms": list(alarms)} if alarms else {})


def hurts(alarms: Collection[str]) -> bool:
    """Whether a setting to change is named: one-step overfitting is said, and leaves a network that works."""
    return any(kind != guard.OVERFITTING for kind in alarms)


def collapses(alarms: Collection[str], before: Collection[str] = ()) -> bool:
    """Whether train.on_collapse is asked. `before`: the alarms of the epoch before.

    Open hinges alone are no lost network: runs that closed them later had an epoch of them (docs/results.md).
    They have to stay for a second one.
    """
    lasting = {kind for kind in alarms if kind != guard.HINGES or kind in before}
    return hurts(lasting)


def line(stage: str, epoch: int, alarms: dict[str, str], remedy: str) -> str:
    """One line about all alarms of an epoch."""
    what = "; ".join(f"{kind}: {text}" for kind, text in alarms.items())
    return f"{stage}: warning: after epoch {epoch} {what}" + (f"; {remedy}" if remedy else "")
