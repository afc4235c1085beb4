"""A training stage, from wherever it stands to its end: 1_warmup or 2_train."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from clustr_jax import models
from clustr_jax.classifier import Classifier, correct
from clustr_jax.evaluation import intervals
from clustr_jax.reference.switches import VERSION as SWITCHES_VERSION
from clustr_jax.reference.switches import authors_batches
from clustr_jax.runtime import mesh, preemption, processes, provenance, streams
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.progress import duration
from clustr_jax.runtime.stage_names import WARMUP
from clustr_jax.stages import guarding
from clustr_jax.stages.clock import EpochClock
from clustr_jax.stages.context import Run
from clustr_jax.storage import loading
from clustr_jax.storage.checkpoints import Checkpoints
from clustr_jax.storage.files import write_json
from clustr_jax.storage.workdir import config_dict
from clustr_jax.training import cost, described, guard, refit, train, train_state, trainers
from clustr_jax.training.objectives import METHODS

# A compiled chunk of steps lasts about this long: progress and signals are served in between.
_CHUNK_SECONDS = 3.0
# Long epochs leave checkpoints inside them.
_CHECKPOINT_SECONDS = 600.0
# Training images from which a network takes what it does not learn.
_FITTED = 5000


def run(this: Run, stage: str) -> None:
    """One training stage, from wherever it stands to its end."""
    settings, progress = this.settings, this.progress
    folder = this.workdir.stage(stage)
    done = this.workdir.finished(stage)
    if done:
        progress.line(f"{stage}: finished before ({done['reason']} after {done['epochs']} epochs)")
        return
    name = settings.method
    if stage == WARMUP:
        name = METHODS[name].warmup
        assert name is not None  # else the stage is not wanted
    augment = settings.data.augment
    if stage == WARMUP and this.source:
        this, augment = this.source, settings.pretrain.augment
    recipe = settings.warmup if stage == WARMUP else settings.recipe
    train_set = train_state.TrainSet(
        this.placement.put(this.train_split.images),
        mesh.place(jnp.asarray(this.train_split.labels)),
        scale=this.train_split.scale,
        augment=augment,
        authors_batch=authors_batches(settings.data.name)[0],
        sharded=this.placement.sharded,
    )
    trainer = trainers.Trainer(this.net, METHODS[name], settings.training, recipe, len(this.train_split))
    key = this.key(stage)
    identity = this.workdir.identity(config_dict(this.config))
    # that of the network it was handed, and the best of its own
    keep_best = 2 if settings.training.train.on_collapse == guarding.RESTORE else 1
    checkpoints = Checkpoints(
        folder / "checkpoints", identity, keep_best=keep_best, mend=True, say=progress.line
    )
    state = mesh.place(_start(this, stage, trainer, checkpoints, train_set, key))
    try:
        reason, epochs = _epochs(this, stage, trainer, checkpoints, state, train_set, key)
        collapsed = reason.startswith(guarding.COLLAPSED)
        checkpoints.wait()
        best = recipe.select == "best" or collapsed
        # what the stage was handed is at step 0: gone back to, but not what it was trained for
        step = checkpoints.best_since(0 if collapsed else 1) if best else checkpoints.latest
    finally:
        checkpoints.close()
    if best:
        progress.line(f"{stage}: keeping the model of step {step}, the best on the held-out images")
    images = epochs * trainer.steps_per_epoch * trainer.batch_size
    write_json(
        folder / "done.json",
        {
            "reason": reason,
            "epochs": epochs,
            "step": step,
            "placement": this.placement.name,
            "gradient_passes": images * cost.gradients(name, settings.training, recipe),
            "num_classes": this.net.num_classes,
            "input_shape": list(this.net.input_shape),
            "switches": SWITCHES_VERSION,
            "commit": provenance.commit(),
            "method": dataclasses.asdict(described.of(name)),
        },
    )
    processes.wait(f"{stage} is done")


def _start(this, stage, trainer, checkpoints, train_set, key):
    """The state to go on from: resume > init_from > previous stage > scratch."""
    settings, progress = this.settings, this.progress
    if checkpoints.latest is not None:
        template = train.blank(trainer, this.net.init(key), train_set, key)
        state = checkpoints.restore(template)
        this.workdir.rewind(stage, int(state.step))
        progress.line(f"{stage}: resuming after {int(state.step)} steps")
        return state
    this.workdir.rewind(stage, -1)  # records of a run that was killed before its first checkpoint
    first = METHODS[settings.method].warmup is None or stage == WARMUP
    fresh = this.net.init(jax.random.fold_in(key, streams.Training.INITIAL))
    if first and settings.init_from:
        progress.line(f"{stage}: starting from {settings.init_from}")
        variables = loading.model_variables(settings.init_from, this.net)
        theirs, ours = loading.normalisation(settings.init_from), this.net.module
        if theirs != (tuple(ours.mean), tuple(ours.std)):
            progress.line(
                f"{stage}: warning: {settings.init_from} has mean and std {theirs}, this network "
                f"{ours.mean} and {ours.std}: it answers otherwise than there"
            )
    elif not first:
        if this.workdir.finished(WARMUP) is None:
            raise UserError(
                f"{stage} needs {WARMUP}, which is not finished in {this.workdir.root}; run it first"
            )
        body = METHODS[settings.method].source  # other classes: a new head
        variables = loading.model_variables(this.workdir.stage(WARMUP), this.net, body=body)
        if body:
            variables["params"][models.HEAD] = fresh["params"][models.HEAD]
    else:
        some = this.train_split.pixels(np.arange(min(len(this.train_split), _FITTED)))
        fresh = variables = this.net.fitted(fresh, some)
    state = train.create(trainer, variables)
    if trainer.magnet or trainer.learned:
        progress.status(f"{stage}: first k-means++ on the network's own embeddings")
    state = refit.begin(trainer, state, train_set, key)
    clf = None if variables is fresh else _deployed(this, trainer, state)
    guarding.note_handed(this, stage, clf)
    state = train.with_totals(trainer, state, train_set, key)
    if clf is not None and trainer.settings.train.on_collapse == guarding.RESTORE and len(this.val_split):
        right = correct(clf, this.val_split.pixels(), this.val_split.labels)
        checkpoints.save(state, intervals.fraction(right))  # what may have to be gone back to
    return state


def _deployed(this, trainer, state) -> Classifier:
    variables, clusters = state.deployed
    if trainer.method.head == "linear":  # and clusters for its batches alone
        clusters = None
    return Classifier(variables, clusters, this.net, bounds=this.train_split.bounds)


def _epochs(this, stage, trainer, checkpoints, state, train_set, key):
    """Train to the end of the stage. Returns (why it ended, epochs)."""
    recipe, per_epoch = trainer.recipe, trainer.steps_per_epoch
    target = recipe.target if stage == WARMUP else 0.0
    _, rate = trainers.optimizer(recipe, per_epoch)
    val_x, val_y = this.val_split.pixels(), this.val_split.labels
    step, chunk, saved = int(state.step), 1, time.monotonic()
    clock = EpochClock(this.workdir.stage(stage) / "clock.json")
    records = [r for r in this.workdir.records() if r["stage"] == stage]
    handed, answer = guarding.handed(this, stage), trainer.settings.train.on_collapse
    said = {kind for r in records for kind in r.get("alarms", ())}
    if records and target and (records[-1]["val_accuracy"] or 0.0) >= target:
        return "target reached", records[-1]["epoch"]
    older, last = ([], [], *(r.get("alarms", []) for r in records))[-2:]
    if guarding.collapses(last, older) and answer == guarding.STOP:
        raise guarding.stopped(stage, records[-1]["epoch"], last)
    if guarding.collapses(last, older) and answer == guarding.RESTORE:
        return guarding.COLLAPSED + ", ".join(last), records[-1]["epoch"]
    while step < recipe.epochs * per_epoch:
        epoch = step // per_epoch
        order = train.epoch_order(key, trainer.size, epoch)
        start_step = clock.start(step, epoch * per_epoch)
        while step < (epoch + 1) * per_epoch:
            count = min(chunk, (epoch + 1) * per_epoch - step)
            before = time.monotonic()
            state = jax.block_until_ready(train.run_steps(trainer, state, train_set, order, key, count))
            seconds = time.monotonic() - before
            this.profiler.tick(stage)
            step += count
            if int(state.step) < step:
                _stop_at_nonfinite(this, stage, trainer, checkpoints, state, train_set, order, key)
            totals = _means(state.totals, step - epoch * per_epoch)
            if count == chunk:  # grow, or shrink, towards the wanted length
                chunk = max(1, min(int(chunk * _CHUNK_SECONDS / max(seconds, 1e-3)), 4 * chunk))
            chunk, due = processes.agree([chunk, time.monotonic() - saved > _CHECKPOINT_SECONDS])
            speed = (step - start_step) * trainer.batch_size / clock.seconds()
            left = (recipe.epochs * per_epoch - step) * trainer.batch_size / speed
            this.progress.status(
                f"{stage} {epoch + 1}/{recipe.epochs}  step {step - epoch * per_epoch}/{per_epoch}  "
                f"{_metrics(totals)}  {speed:.0f} img/s  at most {duration(left)} left"
            )
            if due and step < (epoch + 1) * per_epoch:
                clock.note(step)
                checkpoints.save(state)
                saved = time.monotonic()
            # at its end an epoch is refitted, logged and saved first: a checkpoint before that would skip it
            if preemption.requested() and step < (epoch + 1) * per_epoch:
                clock.note(step)
                checkpoints.save(state)
                checkpoints.wait()
                preemption.check(f"{stage} after {step} steps (epoch {epoch + 1} of {recipe.epochs})")
        if trainer.magnet:
            if trainer.settings.switches.epoch_statistics == "clean":
                state = refit.with_clean_statistics(trainer, state, train_set, key)
            state = refit.refit(trainer, state, train_set, key)
        if trainer.magnet and trainer.settings.switches.epoch_statistics == "leak_test":
            batches = authors_batches(this.settings.data.name)
            for split, batch in zip((this.train_split, this.test_split), batches, strict=True):
                stats = refit.pass_in_train_mode(this.net, state.variables, split.pixels(), batch)
                state = state.replace(batch_stats=stats)
        clf = _deployed(this, trainer, state)
        val = intervals.fraction(correct(clf, val_x, val_y)) if len(val_y) else None
        if trainer.method.adversary or trainer.replays > 1:
            totals |= guarding.monitor(this, clf, key)
        totals |= guarding.probe(this, clf, key)
        now = guarding.health(this, clf)
        older, alarms = last, guard.alarms(handed, now, totals, updates=step)
        last, collapsed = [*alarms], guarding.collapses(alarms, older)
        record = {
            "stage": stage,
            "epoch": epoch + 1,
            "step": step,
            **totals,
            "val_accuracy": val,
            **guarding.recorded(now, alarms),
            "learning_rate": float(rate(step - 1)),
            "epoch_seconds": clock.seconds(),
            "images_per_second": speed,
        }
        this.workdir.log(record)
        state = train.reset_totals(state)
        # while the adversary's radius still grows, accuracy says how small it is, and no model is the best;
        # nor is one to go back to that has collapsed
        best = trainers.strength(trainer, step - 1) >= 1 and not (collapsed and answer == guarding.RESTORE)
        checkpoints.save(state, val if best else None)
        saved = time.monotonic()
        this.progress.line(
            f"{stage} {epoch + 1:3d}/{recipe.epochs}  {_metrics(totals)}  "
            f"{'' if val is None else f'held-out {val:.1%}  '}"
            f"{speed:.0f} img/s {duration(record['epoch_seconds'])}"
        )
        new = {kind: text for kind, text in alarms.items() if kind not in said}
        if new:
            remedy = ""
            if guarding.hurts(new):
                gradients = guard.term_gradients(trainer, state, train_set, order, key)
                weights = dataclasses.asdict(trainer.settings.train)
                remedy = guard.remedy(gradients, weights, recipe.lr, stage[2:])
            said |= set(new)
            this.progress.line(guarding.line(stage, epoch + 1, new, remedy))
        if collapsed and answer != guarding.WARN:
            checkpoints.wait()
            if answer == guarding.RESTORE:
                return guarding.COLLAPSED + ", ".join(alarms), epoch + 1
            raise guarding.stopped(stage, epoch + 1, alarms)
        if target and val is not None and val >= target:
            return "target reached", epoch + 1
        if preemption.requested():
            checkpoints.wait()
            preemption.check(f"{stage} after epoch {epoch + 1} of {recipe.epochs}")
    if step == 0:  # no epochs asked for: the start is the result
        checkpoints.save(state)
    return "all epochs", recipe.epochs


def _means(totals, steps):
    """Means over the steps of the epoch that counted; how many did not, where they are passed over."""
    values = {name: float(value) for name, value in totals.items()}
    skipped = values.pop(train.SKIPPED, 0.0)
    means = {name: value / max(steps - skipped, 1) for name, value in values.items()}
    return means | ({train.SKIPPED: skipped} if train.SKIPPED in totals else {})


def _stop_at_nonfinite(this, stage, trainer, checkpoints, state, train_set, order, key):
    """UserError with the step, the metrics until then, and the batch in a file."""
    batch, ids, x_adv = train.seen(trainer, state, train_set, order, key)
    arrays = {"step": state.step, "ids": ids, "x": batch.x, "y": batch.y, "mask": batch.mask}
    if x_adv is not None:
        arrays["x_adv"] = x_adv
    path = this.workdir.stage(stage) / "nonfinite.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    if processes.leader():
        np.savez(path, **{name: np.asarray(value) for name, value in arrays.items()})  # pyright: ignore[reportArgumentType]
    checkpoints.wait()
    step = int(state.step)
    done = step % trainer.steps_per_epoch
    before = _metrics(_means(state.totals, done)) if done else "none in this epoch"
    raise UserError(
        f"{stage}: the loss or its gradient is not finite at step {step + 1} (metrics until then: {before}); "
        f"the batch is in {path}; lower the rate ({stage[2:]}.lr={trainer.recipe.lr}) in another --workdir, "
        f"or pass over such steps there ({stage[2:]}.nonfinite=skip)"
    )


def _metrics(totals):
    shown = {"loss": "loss {:.3f}", "accuracy": "acc {:.1%}", "adversarial_accuracy": "adv {:.1%}"}
    return "  ".join(form.format(totals[name]) for name, form in shown.items() if name in totals)
