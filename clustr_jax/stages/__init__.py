"""The stages of a run, in order, and what is handed from one to the next.

    1_warmup -> 2_train -> evaluate -> certify -> report

A training stage starts from, in this order: its own newest checkpoint (resume); `config.init_from`
(the first stage only); the previous stage's model (parameters and batch statistics, nothing else);
fresh parameters. A finished stage is skipped.
"""

import jax
from ml_collections import ConfigDict
from rich.console import Console

from clustr_jax import data
from clustr_jax.data import remarks
from clustr_jax.evaluation import certificates, protocols
from clustr_jax.report import terminal
from clustr_jax.runtime import canary, mesh, processes, surroundings
from clustr_jax.runtime.errors import UserError, nearest
from clustr_jax.runtime.profiling import Profiler
from clustr_jax.runtime.progress import Progress
from clustr_jax.runtime.stage_names import CERTIFY, EVALUATE, REPORT, STAGES, TRAIN, WARMUP
from clustr_jax.runtime.streams import stage_key
from clustr_jax.settings import Settings
from clustr_jax.stages import configuration, evaluation, refusals, reporting, training
from clustr_jax.stages.context import Run
from clustr_jax.storage import loading, results
from clustr_jax.storage.workdir import Workdir
from clustr_jax.training import placement, trainers
from clustr_jax.training.objectives import METHODS, draws_clusters

__all__ = ["CERTIFY", "EVALUATE", "REPORT", "STAGES", "TRAIN", "WARMUP", "Run", "run", "stage_key"]


def run(
    config: ConfigDict,
    workdir: str | None = None,
    stages: tuple[str, ...] | None = None,
    *,
    command: str = "",
    quiet: bool = False,
    profile: bool = False,
) -> dict[str, dict]:
    """Run (or resume, or skip) the stages of a config, as `run.py` does.

    Args:
        config: of `configs/`, or one of yours.
        workdir: default runs/<dataset>-<method>[-<variant>].
        stages: names in any order; None for all that the method has.
        command: what the user typed, for the record.
        quiet: prints nothing on the way.
        profile: writes a trace of a few seconds of each stage to WORKDIR/profile.

    Returns:
        results by name, as they are in WORKDIR/results.

    Raises:
        UserError: before anything is computed, for settings that cannot work.
    """
    config = configuration.resolve(config)
    _check_method(config)
    wanted = _wanted(stages, config.method)
    asked = Settings.of(config)
    refusals.check_paths(asked)
    protocols.check_config(asked.eval)
    certificates.check_config(asked.certify, asked.training.magnet, asked.eval.nearest)
    place = Workdir(workdir or configuration.default_workdir(config))
    with surroundings.steady(f"the run goes on, and its results go to {place.results}"):
        progress = Progress(Console(quiet=quiet or not processes.leader()))
        with surroundings.pinned(progress.line):
            return _run(config, asked, place, wanted, progress, command, profile)


def _run(config, asked, place, wanted, progress, command, profile):
    """`run`, once it is known what is wanted and where."""
    method = METHODS[config.method]
    refusals.check_start(asked, method, place, wanted)
    splits = data.splits(asked.data, smoke=asked.smoke)
    config = configuration.complete(config, splits[0], splits[2])
    known = Settings.of(config)
    source = None
    if method.source and WARMUP in wanted and not place.finished(WARMUP):
        source = _source(config, known, place, progress, splits[0])
    net = loading.build_net(known.model, splits[0], known.training.switches.running_variance)
    protocols.check_transfer(known.eval, net)
    train_attack = known.training.train.attack
    for text in protocols.wide_radii(train_attack, known.eval, splits[0].bounds, net.input_shape):
        progress.line(f"warning: {text}")
    images = (_images(splits), _images((source.train_split, source.val_split)) if source else None)
    devices = jax.devices()
    if processes.on_cores():  # a core left idle is no mistake to report
        devices = devices[: refusals.divisor(len(devices), known, method, net, *images)]
    refusals.check(
        known,
        method,
        net,
        splits[0],
        splits[2],
        held_out=len(splits[1]),
        source=images[1],
        devices=len(devices),
    )
    lies = placement.of("data", known.data.placement, splits[0].images.nbytes, len(devices))
    refusals.check_leak(known, lies)
    if source is not None:
        whole = source.train_split.images.nbytes
        source.placement = placement.of("pretrain", known.pretrain.placement, whole, len(devices))
    found_in_data = remarks.of(*splits, attacked=known.eval.n)
    seen = {"data": data.digest(*splits)}
    if source is not None:
        seen["pretrain"] = data.digest(source.train_split, source.val_split, source.test_split)
    canary.check()  # before anything is computed that somebody may believe
    with mesh.over(devices), place.locked(progress.line), progress:
        place.open(config, command, seen)
        profiler = Profiler(place.root / "profile" if profile and processes.leader() else None)
        this = Run(
            config,
            known,
            place,
            progress,
            net,
            *splits,
            source=source,
            profiler=profiler,
            placement=lies,
            remarks=found_in_data,
        )
        _introduce(this)
        if source is not None:
            source.profiler = profiler
            _introduce_data("pre-training data", source)
            leaked = remarks.of_pretraining(source.train_split, this.test_split)
            if leaked:
                progress.line(f"duplicates: {leaked}")
        for stage in wanted:
            if stage == EVALUATE:
                evaluation.run(this)
            elif stage == CERTIFY:
                evaluation.certify(this)
            elif stage in (WARMUP, TRAIN):
                training.run(this, stage)
            profiler.close()
        # last, for they look at the certificates as well; a new certificate is a new diagnosis
        if {EVALUATE, CERTIFY} & set(wanted) and known.eval.diagnostics:
            evaluation.diagnose(this)
        unreported = None
        if REPORT in wanted:
            try:
                reporting.run(this)
            except Exception as error:  # the verdict first, then what went wrong with the page about it
                unreported = error
    there = {name: results.load(place.results, name) for name in results.PROTOCOLS}
    there = {name: result for name, result in there.items() if result is not None}
    found = {name: there[name] for name in ("clean", *known.eval.protocols) if name in there}
    if EVALUATE in wanted and found:
        progress.console.print(terminal.side_by_side(found))
        diagnosis = results.diagnosis(there)
        if diagnosis is not None and "sound" in found:
            progress.console.print(terminal.checks_text(diagnosis), soft_wrap=True)
            verdict = terminal.verdict_text(diagnosis)
            progress.console.print(verdict, markup=False, highlight=False, soft_wrap=True, style="bold")
        progress.line(f"results: {place.results}")
    if unreported is not None:
        raise unreported
    if REPORT in wanted:
        progress.line(f"report: {place.root / 'report.html'}")
    return found


def _images(splits) -> tuple[int, int]:
    """To train on, and held out."""
    return len(splits[0]), len(splits[1])


def _source(config, settings, place, progress, target):
    """What at_pretrain trains on first: another data set with its own head."""
    images = settings.pretrain
    if not images.name:
        raise UserError(
            f"{settings.method} needs a data set to pre-train on: set pretrain.name, e.g. cifar100"
        )
    if images.name == data.OWN:
        raise UserError("pretrain.name cannot be own images; name a prepared set, e.g. cifar100")
    splits = data.splits(images)
    refusals.check_classes("pretrain", images, splits[0])
    if splits[0].images.shape[1:] != target.images.shape[1:]:
        raise UserError(
            f"pretrain.name={images.name} has inputs of shape {splits[0].images.shape[1:]}, "
            f"{data.label(settings.data)} of {target.images.shape[1:]}; choose a set of the same size"
        )
    net = loading.build_net(settings.model, splits[0], settings.training.switches.running_variance)
    return Run(config, settings, place, progress, net, *splits)


def _check_method(config):
    if config.method not in METHODS:
        raise UserError(
            f"unknown method {config.method!r}{nearest(config.method, METHODS)}; known: {', '.join(METHODS)}"
        )


def _wanted(stages, name):
    """The stages to run, in order: no 1_warmup without a warm-up, no certify without a cluster head."""
    method = METHODS[name]
    if stages is not None and not any(stages):
        raise UserError(f"--stages names no stage; known: {', '.join(STAGES)} (leave it out for all)")
    unknown = [s for s in stages or () if s not in STAGES]
    if unknown:
        raise UserError(
            f"unknown stage {unknown[0]!r}{nearest(unknown[0], STAGES)}; known: {', '.join(STAGES)}"
        )
    if CERTIFY in (stages or ()) and method.head != "clusters":
        raise UserError(f"certify needs a cluster head, and {name} ends in a linear one; leave the stage out")
    has = {WARMUP: bool(method.warmup), CERTIFY: method.head == "clusters"}
    wanted = [s for s in STAGES if s in (stages or STAGES) and has.get(s, True)]
    if not wanted:
        raise UserError(f"{name} has no {WARMUP}, and nothing else was asked for; its training is {TRAIN}")
    return wanted


def _introduce(this):
    """What is about to be trained, on what."""
    settings, progress = this.settings, this.progress
    kinds = ", ".join(sorted({f"{d.platform} ({d.device_kind})" for d in jax.devices()}))
    devices = f"{mesh.devices()} x {kinds}" if mesh.devices() > 1 else kinds
    count = sum(p.size for p in jax.tree.leaves(jax.eval_shape(this.net.init, jax.random.key(0))["params"]))
    where = data.label(settings.data)
    progress.line(f"{settings.method} on {where}, {settings.model.name} with {count:,} parameters, {devices}")
    _introduce_data("data", this)
    for line in this.remarks.lines:
        progress.line(line)
    names = this.train_split.class_names
    if names:
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        progress.line(f"{len(names)} classes: {shown}")
    if draws_clusters(METHODS[settings.method], settings.training):
        magnet = settings.training.magnet
        clusters = trainers.per_class(magnet, this.net.num_classes)
        progress.line(
            f"clusters: {sum(clusters)} in all, {trainers.rows(magnet, this.net.num_classes)} x "
            f"{magnet.samples} images per Magnet batch"
        )
    progress.line(f"work directory: {this.workdir.root}")


def _introduce_data(what, this):
    subset = " and ".join(s.subset for s in (this.train_split, this.test_split) if s.subset)
    this.progress.line(
        f"{what}: {len(this.train_split):,} train, {len(this.val_split):,} held out, "
        f"{len(this.test_split):,} test" + (f" (a subset: {subset})" if subset else "")
    )
    if this.placement.devices > 1:
        this.progress.line(str(this.placement))
