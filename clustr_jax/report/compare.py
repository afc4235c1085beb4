"""One page for several work directories: the same figures side by side, and curves in one picture."""

import dataclasses

from clustr_jax.evaluation import intervals
from clustr_jax.report import figures, page, paired, tables, words
from clustr_jax.report.record import Record
from clustr_jax.report.svg import attempt
from clustr_jax.runtime import provenance
from clustr_jax.runtime.errors import UserError
from clustr_jax.storage import results

_OWN = "of its own"  # where certificates are about different radii
_QUICK = "-quick"  # ends the version of a protocol that ran with few steps and queries


def compare(records: list[Record]) -> str:
    """One page for several runs; UserError where they hold different versions of the same result."""
    _check_versions(records)
    names = _names(records)
    drawing = attempt("eps", "Accuracy over the radius", figures.compared, records, names)
    found = {r["protocol"] for record in records for r in record.results.values()}
    by_name = {  # the full one, where there are both
        n: min((p for p in found if p.startswith(n)), key=len, default="not run")
        for n in ("clean", "paper", "sound", "quick")
    }
    certified = [r.results["certified"] for r in records if "certified" in r.results]
    radii = {f"{intervals.radius(c['eps'])} ({c['rule']})" for c in certified}
    radius = radii.pop() if len(radii) == 1 else _OWN
    columns = [f"sound protocol ({by_name['sound']})", f"paper's protocol ({by_name['paper']})"]
    columns += [f"clean, all test images ({by_name['clean']})", f"certified, l2 radius {radius}"]
    columns += [f"quick attacks ({by_name['quick']})"] if by_name["quick"] != "not run" else []
    columns += ["eps", "images attacked"]
    rows = []
    for name, record in zip(names, records, strict=True):
        said = words.verdict(record)
        rows.append({
            "name": name, "data": record.data, "cells": _cells(record, radius, by_name),
            "answer": said.answer, "answer_tone": said.answer_tone, "tone": said.tone,
            "status": _status(record),
        })  # fmt: skip
    title = f"{len(records)} runs compared"
    return page.render(
        "compare.html",
        title=title,
        identity=provenance.sha([r.identity for r in records]),
        lead=" · ".join(names),
        columns=columns,
        rows=rows,
        notes=_compare_notes(records, names, drawing),
        drawing=drawing,
        attacks=_attack_table(records, names),
        paired=paired.rows(records, names),
        script=page.script("compare.js"),
        runs=[
            {"name": name, "title": record.title, "pairs": [*page.origins(record), *_command(record)]}
            for name, record in zip(names, records, strict=True)
        ],
    )


def _versions(records, name):
    return {r.results[name]["protocol"] for r in records if name in r.results}


def _check_versions(records):
    for name in results.PROTOCOLS:
        there = [r for r in records if name in r.results]
        versions = {r.results[name]["protocol"].removesuffix(_QUICK): r.root for r in there}
        if len(versions) > 1:
            (a, at), (b, other), *_ = versions.items()
            raise UserError(
                f"{name} is {a} in {at} and {b} in {other}; versions are never mixed in a table: evaluate "
                f"one of them again, or compare them apart"
            )


def _names(records):
    """Folder names, or as much of the paths as makes them different."""
    for depth in range(1, max(len(r.root.parts) for r in records) + 1):
        names = ["/".join(r.root.parts[-depth:]) for r in records]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same work directory is given twice; give each once")


def _cell(result, version):
    """Its robust accuracy, with a mark where it is of fewer steps than `version`."""
    found = tables.cell(result["robust"], result["n"]) if result else None
    return dataclasses.replace(found, mark="quick") if found and result["protocol"] != version else found


def _cells(record, radius, by_name):
    clean, paper, sound, certified, quick = (
        record.results.get(n) for n in ("clean", "paper", "sound", "certified", "quick")
    )
    attacked = [r for r in (paper, sound, quick) if r]
    eps = " and ".join(dict.fromkeys(intervals.radius(r["eps"]) for r in attacked))
    count = " and ".join(dict.fromkeys(str(r["n"]) for r in attacked))
    certain = tables.cell(certified["robust"], certified["n"]) if certified else None
    if certified and certain and radius == _OWN:
        at = f"{certain.interval} at {intervals.radius(certified['eps'])} ({certified['rule']})"
        certain = dataclasses.replace(certain, interval=at)
    quick = [_cell(quick, by_name["quick"])] if by_name["quick"] != "not run" else []
    return [
        _cell(sound, by_name["sound"]),
        _cell(paper, by_name["paper"]),
        tables.cell(clean["clean"], clean["n"]) if clean else None,
        certain,
        *quick,
        eps or None,
        count or None,
    ]


def _status(record):
    status = words.verdict(record).status
    if status not in ("UPPER BOUND ONLY", "NO CHECK FAILED") or record.checks is None:
        return status
    failed = record.checks["failed"]
    return f"FAILED: {', '.join(map(str, failed))}" if failed else "NONE FAILED"


def _compare_notes(records, names, drawing):
    notes = []
    for name in ("paper", "sound"):
        without = [n for n, r in zip(names, records, strict=True) if name not in r.results]
        if without:
            notes.append(f"The {tables.PROTOCOLS[name]} was not run in {', '.join(without)}.")
    if any(len(_versions(records, name)) > 1 for name in ("paper", "sound")):
        notes.append(
            "A figure marked quick is of the same protocol with few steps and queries: the full finds less."
        )
    sets = {(r.data, r.config["data"].get("sha")) for r in records}
    if len(sets) > 1 or len({words.subset(r) for r in records if r.results}) > 1:
        notes.append("The runs are on different data: compare within a data set only.")
    rules = {c["nearest"] for r in records if (c := r.results.get("sound")) and c["head"] == "clusters"}
    if len(rules) > 1:
        notes.append("Different numbers of clusters decide (eval.nearest): the rules are not the same.")
    for name, record in zip(names, records, strict=True):
        if record.outdated:
            left = ", ".join(record.outdated)
            notes.append(
                f"Left out in {name}, of another network or eval.nearest: {left}; evaluate it again."
            )
    if (
        len({(r.results["sound"]["eps"], r.results["sound"]["n"]) for r in records if "sound" in r.results})
        > 1
    ):
        notes.append("The runs were attacked at different radii or on different numbers of images.")
    if drawing is None:
        notes.append("There are no curves: no run has a sound result at more than one radius.")
    return notes


def _attack_table(records, names):
    pairs = zip(names, records, strict=True)
    having = [(name, record.results["sound"]) for name, record in pairs if "sound" in record.results]
    attacks = dict.fromkeys(attack for _, sound in having for attack in sound["attacks"])
    rows = [
        (
            a,
            [
                tables.cell(s["attacks"][a]["robust"], s["n"]) if a in s["attacks"] else None
                for _, s in having
            ],
        )
        for a in attacks
    ]
    if rows:
        rows.append(("all together", [tables.cell(s["robust"], s["n"]) for _, s in having]))
    columns = [f"{name}, eps {intervals.radius(sound['eps'])}" for name, sound in having]
    return {"columns": columns, "rows": rows}


def _command(record):
    commands = record.environment.get("commands", [])
    return [("command", commands[-1])] if commands else []
