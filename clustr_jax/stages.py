"""The stages of a run, in order, and what is handed from one to the next.

    1_warmup -> 2_train -> evaluate -> certify

A training stage starts from, in this order: its own newest checkpoint (resume); `config.init_from`
(the first stage only); the previous stage's model (parameters and batch statistics, nothing else);
fresh parameters. A finished stage is skipped.
"""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from clustr_jax import certified, data, diagnostics, evaluate, loading, models, results, settings, train
from clustr_jax.attacks import pgd
from clustr_jax.checkpoints import Checkpoints, write_json
from clustr_jax.classifier import Classifier, correct
from clustr_jax.errors import UserError
from clustr_jax.objectives import METHODS
from clustr_jax.progress import Progress, duration
from clustr_jax.workdir import Workdir, config_dict

WARMUP, TRAIN, EVALUATE, CERTIFY = "1_warmup", "2_train", "evaluate", "certify"
STAGES = (WARMUP, TRAIN, EVALUATE, CERTIFY)
# A compiled chunk of steps lasts about this long: progress and signals are served in between.
_CHUNK_SECONDS = 3.0
# Long epochs leave checkpoints inside them.
_CHECKPOINT_SECONDS = 600.0
# Ordinary adversarially trained networks differ by a few points between one step and ten.
_OVERFITTING_GAP = 0.2


@dataclasses.dataclass
class Run:
    """What every stage needs."""

    config: ConfigDict
    workdir: Workdir
    progress: Progress
    net: models.Net
    train_split: data.Split
    val_split: data.Split
    test_split: data.Split
    source: "Run | None" = None  # the same for the data set of at_pretrain's first stage

    def key(self, stage: str):
        """A stream of randomness for each stage."""
        return stage_key(self.config.seed, stage)


def stage_key(seed: int, stage: str):
    """The stream of `stage` in a run with this seed."""
    return jax.random.fold_in(jax.random.key(seed), STAGES.index(stage))


def run(config, workdir: str | None = None, stages: tuple[str, ...] | None = None) -> dict[str, dict]:
    """Run (or resume, or skip) the stages and return the results by name; prints as it goes.

    `stages` None means all that the method has. Raises UserError, before anything is computed, for
    settings that cannot work.
    """
    console = Console()
    config = settings.resolve(config)
    method = _method(config)
    wanted = _wanted(stages, method)
    evaluate.check_config(config)
    certified.check_config(config)
    place = Workdir(workdir or settings.default_workdir(config))
    splits = data.splits(config.data)
    progress = Progress(console)
    source = _source(config, place, progress, splits[0]) if method.source and WARMUP in wanted else None
    net = loading.build_net(config, splits[0])
    settings.check(config, method, net, splits[0], splits[2])
    place.open(config)
    with progress:
        this = Run(config, place, progress, net, *splits, source=source)
        _introduce(this)
        if source is not None:
            _introduce_data("pre-training data", source)
        for stage in wanted:
            if stage == EVALUATE:
                _evaluate(this)
            elif stage == CERTIFY:
                _certify(this)
            else:
                _train(this, stage)
        if EVALUATE in wanted and config.eval.diagnostics and "sound" in config.eval.protocols:
            _diagnose(this)
    found = {name: results.load(place.results, name) for name in ("clean", *config.eval.protocols)}
    found = {name: result for name, result in found.items() if result is not None}
    if EVALUATE in wanted and found:
        console.print(results.side_by_side(found))
        diagnosis = results.load(place.results, "diagnostics")
        if diagnosis is not None and "sound" in found:
            console.print(results.checks_table(diagnosis))
            console.print(diagnosis["verdict"], highlight=False, soft_wrap=True, style="bold")
        console.print(f"results: {place.results}", highlight=False, soft_wrap=True)
    return found


def _source(config, place, progress, target):
    """What at_pretrain trains on first: another data set with its own head."""
    if not config.pretrain.name:
        raise UserError(f"{config.method} needs a data set to pre-train on: set pretrain.name, e.g. cifar100")
    splits = data.splits(config.pretrain)
    if splits[0].images.shape[1:] != target.images.shape[1:]:
        raise UserError(
            f"pretrain.name={config.pretrain.name} has inputs of shape {splits[0].images.shape[1:]}, "
            f"{config.data.name} of {target.images.shape[1:]}; choose a set of the same size"
        )
    return Run(config, place, progress, loading.build_net(config, splits[0]), *splits)


def _method(config):
    if config.method not in METHODS:
        raise UserError(f"unknown method {config.method!r}; known: {', '.join(METHODS)}")
    return METHODS[config.method]


def _wanted(stages, method):
    """The stages to run, in order: no 1_warmup without a warm-up, no certify without a cluster head."""
    unknown = [s for s in stages or () if s not in STAGES]
    if unknown:
        raise UserError(f"unknown stage {unknown[0]!r}; known: {', '.join(STAGES)}")
    has = {WARMUP: bool(method.warmup), CERTIFY: method.head == "clusters"}
    return [s for s in STAGES if s in (stages or STAGES) and has.get(s, True)]


def _introduce(this):
    """What is about to be trained, on what."""
    config, progress = this.config, this.progress
    devices = ", ".join(sorted({f"{d.platform} ({d.device_kind})" for d in jax.devices()}))
    count = sum(p.size for p in jax.tree.leaves(jax.eval_shape(this.net.init, jax.random.key(0))["params"]))
    progress.line(
        f"{config.method} on {config.data.name}, {config.model.name} with {count:,} parameters, {devices}"
    )
    _introduce_data("data", this)
    if METHODS[config.method].sampler == "magnet":
        clusters = train.per_class(config, this.net.num_classes)
        progress.line(
            f"clusters: {sum(clusters)} in all, {train.rows(config, this.net.num_classes)} x "
            f"{config.magnet.samples} images per Magnet batch"
        )
    progress.line(f"work directory: {this.workdir.root}")


def _introduce_data(what, this):
    subset = " and ".join(s.subset for s in (this.train_split, this.test_split) if s.subset)
    this.progress.line(
        f"{what}: {len(this.train_split):,} train, {len(this.val_split):,} held out, "
        f"{len(this.test_split):,} test" + (f" (a subset: {subset})" if subset else "")
    )


def _train(this: Run, stage: str) -> None:
    """One training stage, from wherever it stands to its end."""
    config, progress = this.config, this.progress
    folder = this.workdir.stage(stage)
    done = this.workdir.finished(stage)
    if done:
        progress.line(f"{stage}: finished before ({done['reason']} after {done['epochs']} epochs)")
        return
    method = METHODS[config.method]
    if stage == WARMUP:
        assert method.warmup is not None  # else the stage is not wanted
        method = METHODS[method.warmup]
        this = this.source or this
    recipe = config.warmup if stage == WARMUP else config.train
    train_set = train.TrainSet(
        jnp.asarray(this.train_split.images),
        jnp.asarray(this.train_split.labels),
        scale=this.train_split.scale,
        augment=config.data.augment,
    )
    trainer = train.Trainer(this.net, method, config, recipe, len(this.train_split))
    key = this.key(stage)
    checkpoints = Checkpoints(folder / "checkpoints")
    state = _start(this, stage, trainer, checkpoints, train_set, key)
    try:
        reason, epochs = _epochs(this, stage, trainer, checkpoints, state, train_set, key)
    finally:
        checkpoints.close()
    write_json(folder / "done.json", {
        "reason": reason, "epochs": epochs,
        "num_classes": this.net.num_classes, "input_shape": list(this.net.input_shape),
    })  # fmt: skip


def _start(this, stage, trainer, checkpoints, train_set, key):
    """The state to go on from: resume > init_from > previous stage > scratch."""
    config, progress = this.config, this.progress
    if checkpoints.latest is not None:
        template = train.blank(trainer, this.net.init(key), train_set, key)
        state = checkpoints.restore(template)
        this.workdir.rewind(stage, int(state.step))
        progress.line(f"{stage}: resuming after {int(state.step)} steps")
        return state
    first = METHODS[config.method].warmup is None or stage == WARMUP
    fresh = this.net.init(jax.random.fold_in(key, 0))
    this.workdir.rewind(stage, -1)  # records of a run that was killed before its first checkpoint
    if first and config.init_from:
        progress.line(f"{stage}: starting from {config.init_from}")
        variables = loading.model_variables(config.init_from, this.net)
    elif not first:
        if this.workdir.finished(WARMUP) is None:
            raise UserError(
                f"{stage} needs {WARMUP}, which is not finished in {this.workdir.root}; run it first"
            )
        variables = loading.model_variables(this.workdir.stage(WARMUP), this.net)
        if METHODS[config.method].source:  # other classes: keep the body only
            variables["params"][models.HEAD] = fresh["params"][models.HEAD]
    else:
        variables = fresh
    state = train.create(trainer, variables)
    if trainer.magnet:
        progress.status(f"{stage}: first k-means++ on the network's own embeddings")
        state = train.refit(trainer, state, train_set, key)
    return train.reset_totals(trainer, state, train_set, key)


def _epochs(this, stage, trainer, checkpoints, state, train_set, key):
    """Train to the end of the stage. Returns (why it ended, epochs)."""
    config, recipe, per_epoch = this.config, trainer.recipe, trainer.steps_per_epoch
    target = recipe.get("target", 0.0) if stage == WARMUP else 0.0
    _, rate = train.optimizer(recipe, per_epoch)
    val_x, val_y = this.val_split.pixels(), this.val_split.labels
    step, chunk, saved, warned = int(state.step), 1, time.monotonic(), False
    records = [r for r in this.workdir.records() if r["stage"] == stage]
    if records and target and records[-1]["val_accuracy"] >= target:
        return "target reached", records[-1]["epoch"]
    while step < recipe.epochs * per_epoch:
        epoch = step // per_epoch
        order = train.epoch_order(key, trainer.size, epoch)
        started, start_step = time.monotonic(), step
        while step < (epoch + 1) * per_epoch:
            count = min(chunk, (epoch + 1) * per_epoch - step)
            before = time.monotonic()
            state = jax.block_until_ready(train.run_steps(trainer, state, train_set, order, key, count))
            seconds = time.monotonic() - before
            step += count
            totals = {k: float(v) / (step - epoch * per_epoch) for k, v in state.totals.items()}
            if not math.isfinite(totals["loss"]):
                raise UserError(
                    f"{stage}: the loss is {totals['loss']} near step {step} (epoch {epoch + 1}); lower "
                    f"the rate ({stage[2:]}.lr={recipe.lr}); the last checkpoint "
                    f"in {checkpoints.directory} is intact"
                )
            if count == chunk:  # grow, or shrink, towards the wanted length
                chunk = max(1, min(int(chunk * _CHUNK_SECONDS / max(seconds, 1e-3)), 4 * chunk))
            speed = (step - start_step) * trainer.batch_size / (time.monotonic() - started)
            left = (recipe.epochs * per_epoch - step) * trainer.batch_size / speed
            this.progress.status(
                f"{stage} {epoch + 1}/{recipe.epochs}  step {step - epoch * per_epoch}/{per_epoch}  "
                f"{_metrics(totals)}  {speed:.0f} img/s  at most {duration(left)} left"
            )
            if time.monotonic() - saved > _CHECKPOINT_SECONDS and step < (epoch + 1) * per_epoch:
                checkpoints.save(state)
                saved = time.monotonic()
        if trainer.magnet:
            state = train.refit(trainer, state, train_set, key)
        if config.fidelity.epoch_statistics == "leak_test":
            for split in (this.train_split, this.test_split):
                stats = train.pass_in_train_mode(this.net, state.variables, split.pixels())
                state = state.replace(batch_stats=stats)
        variables, clusters = state.deployed
        clf = Classifier(variables, clusters, this.net, bounds=this.train_split.bounds)
        val = results.fraction(correct(clf, val_x, val_y)) if len(val_y) else 0.0
        if trainer.method.adversary or trainer.replays > 1:
            found = _monitor(this, clf, key)
            warned = warned or _warn_of_overfitting(this, stage, found)
            totals |= found
        record = {
            "stage": stage, "epoch": epoch + 1, "step": step, **totals, "val_accuracy": val,
            "learning_rate": float(rate(step - 1)),
            "epoch_seconds": time.monotonic() - started, "images_per_second": speed,
        }  # fmt: skip
        this.workdir.log(record)
        state = train.reset_totals(trainer, state, train_set, key)
        checkpoints.save(state)
        saved = time.monotonic()
        this.progress.line(
            f"{stage} {epoch + 1:3d}/{recipe.epochs}  {_metrics(totals)}  held-out {val:.1%}  "
            f"{speed:.0f} img/s {duration(record['epoch_seconds'])}"
        )
        if target and val >= target:
            return "target reached", epoch + 1
    if step == 0:  # no epochs asked for: the start is the result
        checkpoints.save(state)
    return "all epochs", recipe.epochs


def _monitor(this, clf, key):
    """Single-step and multi-step accuracy on held-out images (nothing without any)."""
    if not this.config.train.monitor or not len(this.val_split):
        return {}
    count = min(len(this.val_split), 256)
    x, y = this.val_split.pixels(slice(0, count)), this.val_split.labels[:count]
    eps = this.config.train.attack.eps
    found = {}
    for name, steps, step_size in (("single_step", 1, 1.25 * eps), ("multi_step", 10, eps / 4)):
        x_adv = pgd(key, clf.logits, x, y, eps=eps, step_size=step_size, steps=steps, bounds=clf.bounds)
        found[f"{name}_accuracy"] = results.fraction(correct(clf, x_adv, y))
    return found


def _warn_of_overfitting(this, stage, found) -> bool:
    """Catastrophic overfitting (Wong et al. 2020) shows as a gap between one step and ten. Says so, once."""
    if not found or found["single_step_accuracy"] - found["multi_step_accuracy"] <= _OVERFITTING_GAP:
        return False
    this.progress.line(
        f"{stage}: warning: catastrophic overfitting? On held-out images one step leaves "
        f"{found['single_step_accuracy']:.1%}, ten steps {found['multi_step_accuracy']:.1%} "
        f"(later epochs: multi_step_accuracy in metrics.jsonl)"
    )
    return True


def _metrics(totals):
    shown = {"loss": "loss {:.3f}", "accuracy": "acc {:.1%}", "adversarial_accuracy": "adv {:.1%}"}
    return "  ".join(form.format(totals[name]) for name, form in shown.items() if name in totals)


def _evaluate(this: Run) -> None:
    """clean.json and one JSON per protocol; a result of the same config is kept."""
    config, progress, folder = this.config, this.progress, this.workdir.results
    clf, examples = _under_test(this, EVALUATE)
    test = this.test_split
    content = config_dict(config)
    content.pop("variant")
    content["data"].pop("dir")
    content["eval"].pop("protocols")
    subset = "; ".join(s.subset for s in (this.train_split, test) if s.subset)
    for name in ("clean", *config.eval.protocols):
        identity = results.sha({**content, "result": results.PROTOCOLS[name]})
        before = results.load(folder, name)
        if before and before["config_sha"] == identity:
            progress.line(f"evaluate: {name} was done before")
            continue
        started = time.monotonic()

        def report(unbroken, what, started=started):
            spent = duration(time.monotonic() - started)
            progress.status(f"evaluate  {what}  unbroken {unbroken:.1%}  {spent}")

        key = this.key(EVALUATE)
        if name == "clean":
            result, outcomes, seconds = evaluate.run_clean(clf, test.pixels(), test.labels)
        else:
            records = results.Records(folder, identity)
            result, outcomes, seconds = evaluate.run(name, key, clf, examples, config, report, records)
        header = {
            "dataset": config.data.name, "subset": subset, "n": result.pop("n"), "method": config.method,
            "protocol": results.PROTOCOLS[name] + ("-quick" if config.eval.quick and name != "clean" else ""),
        }  # fmt: skip
        footer = {
            "head": "linear" if clf.clusters is None else "clusters", "nearest": clf.nearest,
            "seed": config.seed, "config_sha": identity,
            "versions": results.versions(), "wall_seconds": seconds,
        }  # fmt: skip
        for figure in ("clean", "robust"):
            header[f"{figure}_interval"] = results.wilson(round(result[figure] * header["n"]), header["n"])
        results.save(folder, name, {**header, **result, **footer}, outcomes)
        results.Records(folder, identity).clear()
        progress.line(f"evaluate: {name} {100 * result['robust']:.2f} % ({duration(seconds)})")


def _under_test(this: Run, stage: str):
    """The trained classifier with its deployed rule, and the test images that are attacked."""
    config, test = this.config, this.test_split
    if this.workdir.finished(TRAIN) is None:
        raise UserError(f"nothing to {stage}: {TRAIN} is not finished in {this.workdir.root}; run it first")
    clf = loading.load(this.workdir.root)
    clf = clf.replace(nearest=config.eval.nearest if clf.clusters is not None else 0)
    size = config.eval.n or len(test)
    index = data.stratified(test.labels, size, test.num_classes)
    return clf, data.Examples(test.pixels(index), test.labels[index], index.astype(np.int32))


def _diagnose(this: Run) -> None:
    """diagnostics.json: the checks and the verdict on the sound result that stands there."""
    config, folder = this.config, this.workdir.results
    sound, paper, certain = (results.load(folder, name) for name in ("sound", "paper", "certified"))
    assert sound is not None  # evaluation comes first
    identity = results.sha([r and r["config_sha"] for r in (sound, paper, certain)] + [results.PROTOCOLS])
    before = results.load(folder, "diagnostics")
    if before and before["config_sha"] == identity:
        this.progress.line("evaluate: diagnostics were done before")
        return
    started = time.monotonic()
    this.progress.status("evaluate  diagnostics: twenty checks")
    with np.load(folder / "sound.npz", allow_pickle=False) as file:
        outcomes = dict(file)
    radius = None
    if certain is not None and this.test_split.bounds is not None:
        with np.load(folder / "certified.npz", allow_pickle=False) as file:
            radius = file[f"radius_{certain['rule']}"][outcomes["ids"]]
    clf, examples = _under_test(this, EVALUATE)
    checks = diagnostics.run(
        jax.random.fold_in(this.key(EVALUATE), 1), clf, examples, config, sound, outcomes, paper, radius
    )
    shared = ("dataset", "subset", "n", "method", "eps", "clean", "robust", "attack", "seed", "versions")
    content = {name: sound[name] for name in shared} | diagnostics.as_result(sound, checks, paper)
    seconds = time.monotonic() - started
    content |= {"protocol": results.PROTOCOLS["diagnostics"], "config_sha": identity, "wall_seconds": seconds}
    results.save(folder, "diagnostics", content, {"ids": examples.ids})
    this.progress.line(f"evaluate: diagnostics ({duration(seconds)})")


def _certify(this: Run) -> None:
    """certified.json, its per-example radii, and the curve as a picture."""
    config, progress, folder = this.config, this.progress, this.workdir.results
    clf, examples = _under_test(this, CERTIFY)
    test = this.test_split
    content = config_dict(config)
    content["data"].pop("dir")
    content["eval"] = {name: content["eval"][name] for name in ("n", "nearest")}
    content.pop("variant")
    identity = results.sha({**content, "result": results.PROTOCOLS["certified"]})
    before = results.load(folder, "certified")
    if before and before["config_sha"] == identity:
        progress.line("certify: was done before")
        return
    result, outcomes, seconds = certified.run(
        this.key(CERTIFY), clf, test.pixels(), test.labels, examples, config,
        lambda unbroken, what: progress.status(f"certify  {what}  unbroken {unbroken:.1%}"),
    )  # fmt: skip
    result = {
        "dataset": config.data.name,
        "subset": "; ".join(s.subset for s in (this.train_split, test) if s.subset),
        "n": result.pop("n"), "method": config.method, "protocol": results.PROTOCOLS["certified"], **result,
        "head": "clusters", "nearest": clf.nearest, "seed": config.seed, "config_sha": identity,
        "versions": results.versions(), "wall_seconds": seconds,
    }  # fmt: skip
    results.save(folder, "certified", result, outcomes)
    certified.draw(folder / "certified.png", result)
    at = ", ".join(
        f"{results.percent(v['robust'])} / {results.percent(result['sweep'][e])} at {float(e):.4g}"
        for e, v in result["empirical"]["at"].items()
    )
    found = f"l2-PGD leaves / certified in %: {at}" if at else f"nothing at {results.radius(result['eps'])}"
    progress.line(
        f"certify: clean {results.percent(result['clean'])} %; {found}; "
        f"Lipschitz constant {result['lipschitz']['lower']:.3g} to {result['lipschitz']['upper']:.3g} "
        f"({duration(seconds)})"
    )
