"""What is said of a trained model: one JSON for each kind, kept while its config is the same."""

import time

import jax
import numpy as np

from clustr_jax import data
from clustr_jax.attacks import resuming
from clustr_jax.evaluation import certificates, checks, intervals, protocols, resume
from clustr_jax.runtime import mesh, preemption, processes, provenance, streams
from clustr_jax.runtime.errors import UserError, first_line
from clustr_jax.runtime.progress import duration
from clustr_jax.runtime.stage_names import CERTIFY, EVALUATE, TRAIN
from clustr_jax.stages.context import Run
from clustr_jax.storage import additions, description, loading, results
from clustr_jax.storage.workdir import config_dict


def run(this: Run) -> None:
    """clean.json and one JSON per protocol; a result of the same config is kept."""
    settings, progress, folder = this.settings, this.progress, this.workdir.results
    clf, examples, network = _under_test(this, EVALUATE)
    test = this.test_split
    subset = "; ".join(s.subset for s in (this.train_split, test) if s.subset)
    for name in ("clean", *settings.eval.protocols):
        identity = _identity(this.config, name)
        if _kept(results.load(folder, name), identity, network):
            progress.line(f"evaluate: {name} was done before")
            continue
        # what was begun goes on with the same images only, and where it would have ended the same
        record = f"{identity}-{network}-{provenance.sha(examples.ids.tolist())}"
        records = resume.Records(folder, f"{record}-{resuming.surroundings()}")
        if records.strangers(record):
            progress.line(f"evaluate: {name} was begun by other libraries, devices or code, and begins anew")
        started = time.monotonic()

        def report(unbroken, what, name=name, started=started):
            spent = duration(time.monotonic() - started)
            this.profiler.tick(f"evaluate-{name}")
            progress.status(f"evaluate  {what}  unbroken {unbroken:.1%}  {spent}")
            preemption.check(f"evaluate, {what}")  # its records are saved before it reports

        key = this.key(EVALUATE)
        if name == "clean":
            result, outcomes, seconds = protocols.run_clean(clf, test.pixels(), test.labels)
            if test.class_names:
                result["class_names"] = list(test.class_names)
        else:
            result, outcomes, seconds = protocols.run(
                name, key, clf, examples, settings.eval, report, records
            )
        this.profiler.close()
        header = {
            "dataset": data.label(settings.data),
            "subset": subset,
            "n": result.pop("n"),
            "method": settings.method,
            "protocol": results.PROTOCOLS[name] + "-quick" * (settings.eval.quick and name != "clean"),
        }
        footer = {
            "head": "linear" if clf.clusters is None else "clusters",
            "nearest": clf.nearest,
            "seed": settings.seed,
            "config_sha": identity,
            "network_sha": network,
            "versions": provenance.versions(),
            **this.remarks.fields,
            "wall_seconds": seconds,
        }
        for figure in ("clean", "robust"):
            header[f"{figure}_interval"] = intervals.wilson(round(result[figure] * header["n"]), header["n"])
        results.save(folder, name, {**header, **result, **footer}, outcomes)
        records.clear()
        most = ""
        if name == "clean":
            top = int(np.argmax(result["predicted"]))
            predicted, labelled = (100 * result[shares][top] for shares in ("predicted", "labelled"))
            who = f"class {top}" + (f" ({test.class_names[top]})" if test.class_names else "")
            most = f"; {who} is predicted on {predicted:.1f} % (of the labels: {labelled:.1f} %)"
        progress.line(f"evaluate: {name} {100 * result['robust']:.2f} %{most} ({duration(seconds)})")


def _identity(config, name):
    """What result `name` of this config is recognised by: everything that can change it."""
    content = additions.plain(config_dict(config))
    content.pop("variant")
    content["data"].pop("dir")
    content["eval"].pop("protocols")
    if name == "certified":
        content["eval"] = {setting: content["eval"][setting] for setting in ("n", "nearest")}
        return provenance.sha({**content, "result": results.PROTOCOLS[name]})
    content.pop("certify")
    content["eval"].pop("diagnostics")
    if config.eval.transfer:  # what is behind a path can change
        sources = [loading.load(path) for path in config.eval.transfer]
        content["transfer"] = [[loading.digest(clf), description.describe(clf)] for clf in sources]
    return provenance.sha({**content, "result": results.PROTOCOLS[name]})


def _kept(before: dict | None, identity: str, network: str) -> bool:
    """Whether that result is of this config and network: a stage can have been trained again."""
    return before is not None and (before["config_sha"], before.get("network_sha")) == (identity, network)


def _under_test(this: Run, stage: str):
    """The trained classifier with its deployed rule, the test images that are attacked, and `network_sha`."""
    settings, test = this.settings.eval, this.test_split
    if this.workdir.finished(TRAIN) is None:
        raise UserError(f"nothing to {stage}: {TRAIN} is not finished in {this.workdir.root}; run it first")
    clf = loading.load(this.workdir.root)
    network = loading.digest(clf)
    clf = mesh.place(clf)
    clf = clf.replace(nearest=settings.nearest if clf.clusters is not None else 0)
    size = settings.n or len(test)
    index = data.stratified(test.labels, size, test.num_classes)
    return clf, data.Examples(test.pixels(index), test.labels[index], index.astype(np.int32)), network


def diagnose(this: Run) -> None:
    """diagnostics.json: the checks and the verdict on the sound result of this config, if there is one."""
    folder = this.workdir.results
    sound, paper, certain = (results.load(folder, name) for name in ("sound", "paper", "certified"))
    if sound is None:
        return
    clf, _, network = _under_test(this, EVALUATE)
    if not _kept(sound, _identity(this.config, "sound"), network):
        return
    identity = results.diagnosis_sha(sound, paper, certain)
    if paper is not None and not results.comparable(paper, sound):
        paper = None  # nothing to take a difference of
    before = results.load(folder, "diagnostics")
    if before and before["config_sha"] == identity:
        this.progress.line("evaluate: diagnostics were done before")
        return
    started = time.monotonic()
    this.progress.status("evaluate  diagnostics: twenty-nine checks")
    outcomes = results.load_outcomes(folder, "sound")
    ids, test = outcomes["ids"], this.test_split  # those that were attacked then
    examples = data.Examples(test.pixels(ids), test.labels[ids], ids)
    radius = None
    if certain is not None and certain.get("network_sha") == network and this.test_split.bounds is not None:
        radius = results.load_outcomes(folder, "certified")[f"radius_{certain['rule']}"][outcomes["ids"]]
    key = jax.random.fold_in(this.key(EVALUATE), streams.Evaluation.CHECKS)
    found = checks.run(
        key, clf, examples, this.settings.eval, sound=sound, outcomes=outcomes, paper=paper, radius=radius
    )
    shared = ("dataset", "subset", "n", "method", "eps", "clean", "robust", "attack", "seed", "versions")
    content = {name: sound[name] for name in shared} | this.remarks.fields
    constant = float(np.bincount(examples.y).max() / max(len(examples), 1))
    content |= checks.as_result(sound, found, paper, constant)
    seconds = time.monotonic() - started
    content |= {"protocol": results.PROTOCOLS["diagnostics"], "config_sha": identity, "wall_seconds": seconds}
    results.save(folder, "diagnostics", content, {"ids": examples.ids})
    this.progress.line(f"evaluate: diagnostics ({duration(seconds)})")


def certify(this: Run) -> None:
    """certified.json, its per-example radii, and the curve as a picture."""
    settings, progress, folder = this.settings, this.progress, this.workdir.results
    clf, examples, network = _under_test(this, CERTIFY)
    test = this.test_split
    identity = _identity(this.config, "certified")
    if _kept(results.load(folder, "certified"), identity, network):
        progress.line("certify: was done before")
        return

    def report(unbroken, what):
        progress.status(f"certify  {what}  unbroken {unbroken:.1%}")
        preemption.check(f"certify, {what}")

    result, outcomes, seconds = certificates.run(
        this.key(CERTIFY),
        clf,
        test.pixels(),
        test.labels,
        examples,
        settings.certify,
        report,
        slots=settings.eval.slots,
    )
    result = {
        "dataset": data.label(settings.data),
        "subset": "; ".join(s.subset for s in (this.train_split, test) if s.subset),
        "n": result.pop("n"),
        "method": settings.method,
        "protocol": results.PROTOCOLS["certified"],
        **result,
        "head": "clusters",
        "nearest": clf.nearest,
        "seed": settings.seed,
        "config_sha": identity,
        "network_sha": network,
        "versions": provenance.versions(),
        **this.remarks.fields,
        "wall_seconds": seconds,
    }
    results.save(folder, "certified", result, outcomes)
    if processes.leader():
        try:
            certificates.draw(folder / "certified.png", result)
        except Exception as error:  # no picture is worth a result
            progress.line(f"certify: certified.png could not be drawn ({first_line(error)})")
    at = ", ".join(
        f"{intervals.percent(v['robust'])} / {intervals.percent(result['sweep'][e])} at {float(e):.4g}"
        for e, v in result["empirical"]["at"].items()
    )
    found = f"l2-PGD leaves / certified in %: {at}" if at else f"nothing at {intervals.radius(result['eps'])}"
    progress.line(
        f"certify: clean {intervals.percent(result['clean'])} %; {found}; "
        f"Lipschitz constant {result['lipschitz']['lower']:.3g} to {result['lipschitz']['upper']:.3g} "
        f"({duration(seconds)})"
    )
