"""What a report says in sentences: pure functions of a record; every number comes from it."""

import dataclasses

import numpy as np

from clustr_jax.data import remarks
from clustr_jax.evaluation import intervals, wording
from clustr_jax.report import tables
from clustr_jax.report.record import Record
from clustr_jax.report.tables import Cell, cell
from clustr_jax.runtime.stage_names import TRAIN, WARMUP
from clustr_jax.settings import DataSettings


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The first thing that a reader sees: robust or not, and how far the figure can be trusted."""

    status: str  # "NO CHECK FAILED", "UPPER BOUND ONLY", "UNCHECKED" or "NO EVIDENCE"
    tone: str  # info, warn, fail or skip: the look of the status, which is about trust, not about robustness
    label: str
    figure: Cell | None
    line: str  # the verdict of diagnostics.json, or why there is none
    meaning: str
    answer: str = "NOT KNOWN"  # robust or not (evaluation.wording.answer)
    answer_tone: str = "skip"  # pass for what withstood everything alone; else warn, fail or skip


def verdict(record: Record) -> Verdict:
    """From diagnostics.json where it is about these results; else what is known, and what is not."""
    found, sound = _trust(record), record.results.get("sound")
    if not sound:
        return found
    checks = [] if record.checks is None else record.checks["checks"]
    facts = {"robust": sound["robust"], "clean": sound["clean"], "n": sound["n"], "checks": checks}
    answer, tone = wording.answer({**facts, "constant": constant_share(record)})
    return dataclasses.replace(found, answer=answer, answer_tone=tone)


def _trust(record):
    """The verdict without the answer."""
    found, checks = record.results, record.checks
    sound = found.get("sound")
    if sound:
        kept, n, eps = round(sound["robust"] * sound["n"]), sound["n"], intervals.radius(sound["eps"])
        line = f"{kept} of {n} test images are classified correctly under every attack that was tried"
        line += f" (changes of at most {eps} in each pixel)" if in_pixels(record) else f" (eps {eps})"
        label, figure = f"robust accuracy, linf, eps {eps}", cell(sound["robust"], n)
        low = _no_better(record)
        if checks is None or all(c["status"] == "SKIP" for c in checks["checks"]):
            stale = "belong to earlier results" if "diagnostics" in found else "were not run"
            why = stale if checks is None else "had nothing to look at"
            text = f"{line}. The checks {why}, so nothing says yet whether the attacks can be believed.{low}"
            return Verdict("UNCHECKED", "warn", label, figure, f"No verdict: the checks {why}.", text)
        plain = checks.get("words", "").partition(". ")[0]
        line = f"{plain}. {line}" if plain else line
        failed = ", ".join(map(str, checks["failed"]))
        if failed:
            checked = f"check{'s' * (len(checks['failed']) > 1)} {failed} failed"
            text = f"{line}, but {checked}: the attacks may have been misled, and the truth may be far lower."
            return Verdict("UPPER BOUND ONLY", "fail", label, figure, checks["verdict"], text + low)
        warned = [str(c["number"]) for c in checks["checks"] if c["status"] == "WARN"]
        text = f"{line}, and no check found a reason to distrust the attacks"
        text += f" ({len(warned)} gave a warning: {', '.join(warned)})" if warned else ""
        text += f". A stronger attack can still lower the figure, and none can raise it.{low}"
        return Verdict("NO CHECK FAILED", "info", label, figure, checks["verdict"], text)
    quick = found.get("quick")
    if quick:
        label = f"after a quick attack, eps {intervals.radius(quick['eps'])}"
        text = (
            f"A quick look with {len(quick['attacks'])} attacks of few steps: the sound protocol will find "
        )
        text += "less. Run it."
        line = "No verdict: the sound protocol was not run."
        return Verdict("NO EVIDENCE", "warn", label, cell(quick["robust"], quick["n"]), line, text)
    if "paper" in found:
        text = "The paper's protocol alone is no evidence: its attack can fail where others succeed."
    elif "clean" in found:
        text = "No attack was run: nothing is known of this network's robustness."
    else:
        text = "This network was trained and not evaluated: nothing is known of its accuracy."
    clean = found.get("clean")
    figure = cell(clean["clean"], clean["n"]) if clean else None
    label = f"clean accuracy, {clean['n']} test images" if clean else "not evaluated"
    return Verdict("NO EVIDENCE", "skip", label, figure, "No verdict: the sound protocol was not run.", text)


def in_pixels(record: Record) -> bool:
    """Whether the inputs have a box, as images do; points of the plane have none."""
    return DataSettings.of(record.config["data"]).bounds is not None


def _no_better(record):
    """A sentence where answering one class only would do as well."""
    constant, sound = constant_share(record), record.results["sound"]
    if constant is None or constant == 1 or sound["robust"] > constant:
        return ""
    return f" Always answering the commonest class would score no less: {intervals.percent(constant)} %."


def constant_share(record: Record) -> float | None:
    """The accuracy of the best constant answer on the attacked images."""
    if "sound" not in record.results:
        return None
    labels = record.outcomes("sound")["y"]
    return float(np.bincount(labels).max() / len(labels)) if len(labels) else None


def facts(record: Record) -> list[tuple[str, Cell, str]]:
    """A handful of figures beside the verdict: (name, value, unit)."""
    found = []
    clean, paper, sound, certified = (record.results.get(n) for n in ("clean", "paper", "sound", "certified"))
    if clean and (sound or paper):
        found.append(("clean accuracy", cell(clean["clean"], clean["n"]), "%"))
    if paper:
        name = f"paper's protocol, eps {intervals.radius(paper['eps'])}"
        found.append((name, cell(paper["robust"], paper["n"]), "%"))
    gap = tables.masking_gap(record)
    if gap is not None:
        found.append(("masking gap", Cell(f"{100 * gap:.2f}"), "points"))
    if certified:
        name = f"certified, l2 radius {intervals.radius(certified['eps'])}"
        found.append((name, cell(certified["robust"], certified["n"]), "%"))
    constant = constant_share(record)
    if constant is not None:
        found.append(("best constant answer", cell(constant), "%"))
    if clean and "predicted" in clean:
        top = int(np.argmax(clean["predicted"]))
        share, labelled = clean["predicted"][top], clean["labelled"][top]
        if share > 1.5 * labelled + 0.05:
            name = f"answers of class {top}, which has {intervals.percent(labelled)} % of the labels"
            found.append((name, cell(share), "%"))
    return found


def method(record: Record) -> list[str]:
    """What was trained, stage by stage, in the words of the objectives' docstrings."""
    from clustr_jax.training import described  # a judgement's page does without what "train" brings

    config = record.config
    row = described.told(config["method"], record.stages.get(TRAIN))
    if row is None:
        return [f"{config['method']}, a method that is not known here."]
    stages = [(WARMUP, row.warmup, config["warmup"])] if row.warmup else []
    lines = []
    for stage, name, recipe in [*stages, (TRAIN, row.name, config["train"])]:
        known = described.told(name, record.stages.get(stage))
        if known is None:
            continue
        text = f"{stage} ({name}): {known.what}"
        epochs = (record.stages[stage] if stage in record.stages else recipe)["epochs"]
        text += f" {epochs} epoch{'s' * (epochs != 1)} of {recipe['optimizer']}, rate {recipe['lr']:g}."
        if stage == WARMUP and row.source:
            text += f" Data: {config['pretrain']['name']}."
        if stage == WARMUP or not row.warmup:
            text += f" Started from {config['init_from']}." if config["init_from"] else ""
        if recipe["replays"] > 1:
            text += (
                f" Free adversarial training: each batch {recipe['replays']} times, with a perturbation "
                f"within eps {intervals.radius(config['train']['attack']['eps'])} that is carried along."
            )
        if recipe["awp"]:
            text += f" Adversarial weight perturbation, gamma {recipe['awp']:g}."
        if known.adversary:
            attack = config["train"]["attack"]
            text += (
                f" Adversary: {attack['steps']} step{'s' * (attack['steps'] != 1)} of "
                f"{attack['step_size']:.4g} within eps {intervals.radius(attack['eps'])}."
            )
        lines.append(text)
    head = "the clusters of the embeddings" if row.head == "clusters" else "a linear layer"
    lines.append(f"Predictions come from {head}.")
    return lines


def subset(record: Record) -> str:
    """What the data are instead of the official splits, or that they are those."""
    found = {r["subset"] for name, r in record.results.items() if name != "diagnostics"}
    texts = [text for text in found if text]
    if texts:
        return "; ".join(sorted(texts))
    return "the whole splits" if found else "not known before an evaluation"


def duplicates(record: Record) -> str:
    """What was found on two sides of a split; "" where nothing was looked for."""
    found = [r["duplicates"] for r in record.results.values() if r.get("duplicates") is not None]
    if not found:
        return ""
    said = list(dict.fromkeys(filter(None, map(remarks.sentence, found))))
    return "; ".join(said) or "none between the splits (equal pixels; near ones were not looked for)"


def notes(record: Record) -> list[str]:
    """What results say of the images: left out, missing classes."""
    return list(dict.fromkeys(note for r in record.results.values() for note in r.get("data_notes", ())))


def alarms(record: Record) -> list[str]:
    """What was said while it trained (training.guard): each kind once, with the epochs that had it."""
    epochs: dict[tuple[str, str], list[int]] = {}
    for metrics in record.metrics:
        for kind in metrics.get("alarms", ()):
            epochs.setdefault((metrics["stage"], kind), []).append(metrics["epoch"])
    return [
        f"{stage}: {kind} after epoch {found[0]}"
        + (f", and after {len(found) - 1} later ones" if found[1:] else "")
        for (stage, kind), found in epochs.items()
    ]


def limits(record: Record) -> list[str]:
    """What the numbers do not say."""
    found, sound, certificate = [], record.results.get("sound"), record.results.get("certified")
    if sound:
        found += [
            f"Robust accuracy is what the attacks of {sound['protocol']} left: an upper bound, which a "
            f"stronger attack may lower.",
            f"It is about changes within an linf ball of eps {intervals.radius(sound['eps'])}; it says "
            f"nothing of other norms, larger changes, shifts, noise or corruptions.",
            f"{sound['n']} test images were attacked; the intervals are those of drawing that many images "
            f"(Wilson, 95 %).",
        ]
        if record.checks is None:
            found.append("The checks of the sound evaluation were not run on these results.")
        elif record.checks["failed"]:
            failed = ", ".join(map(str, record.checks["failed"]))
            found.append(f"Of the checks {failed} failed: the attacks may have been misled.")
        if sound["protocol"].endswith("-quick"):
            found.append(
                "The sound protocol ran with few steps and queries (quick): the full one finds less."
            )
    else:
        found.append("Its robustness is not known: the sound protocol was not run.")
    if "paper" in record.results:
        found.append(
            "The figures of the paper's protocol are for comparison with the paper; they are not evidence of "
            "robustness."
        )
    if record.outdated:
        found.append(
            f"Results of another network, or of another number of clusters that decide (eval.nearest), were "
            f"left out: {', '.join(record.outdated)}; run the evaluation again."
        )
    if certificate:
        found.append(
            f"Certificates ({certificate['rule']}) are about l2 changes; a radius of 0 is no statement."
        )
    found.append(
        f"One network from one seed ({record.config['seed']}): other seeds vary, and the intervals do not "
        f"include that."
    )
    texts = subset(record)
    if not texts.startswith(("the whole", "not")):
        found.append(f"Not the official data: {texts}. Figures cannot be set beside published ones.")
    sides = [
        {pair: same for pair, same in (r.get("duplicates") or {}).items() if "/" in pair}
        for r in record.results.values()
    ]
    leaks = dict.fromkeys(filter(None, map(remarks.sentence, sides)))
    if leaks:
        found.append(
            f"The same image is on two sides of a split: {'; '.join(leaks)}. The figures count such images."
        )
    if record.config["smoke"]:
        found.append("A smoke run: everything was shrunk to seconds, and no number here means anything.")
    return found
