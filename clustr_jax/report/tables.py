"""The tables of a report, as cells: pure functions of a record; every number comes from it."""

import dataclasses

from clustr_jax.evaluation import intervals, wording
from clustr_jax.report import terminal
from clustr_jax.report.record import Record
from clustr_jax.storage import results

# What the columns are called.
PROTOCOLS = {"paper": "paper's protocol", "sound": "sound protocol"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A percentage with its 95 % interval ("": none), `span` columns wide; `mark` is a word on it."""

    value: str
    interval: str = ""
    span: int = 1
    mark: str = ""


def cell(value: float | None, n: int | None = None) -> Cell | None:
    """None stays None: no figure, no zero."""
    if value is None:
        return None
    text, _, interval = intervals.percent(value, None if n is None else {"n": n}).partition(" ")
    return Cell(text, interval)


def masking_gap(record: Record) -> float | None:
    """Paper's protocol minus sound, where both are about the same images and radius."""
    paper, sound = record.results.get("paper"), record.results.get("sound")
    if not paper or not sound or not results.comparable(paper, sound):
        return None
    return paper["robust"] - sound["robust"]


def accuracy_table(record: Record) -> dict | None:
    """{columns, groups, notes}: what the paper reports, its protocol here, the sound (and quick) one here.

    `groups` are (heading, rows) and rows (label, kind, cells), by radius: none, the main one, others.
    """
    found = {name: record.results[name] for name in ("clean", "paper", "sound") if name in record.results}
    paper, sound, quick = (record.results.get(name) for name in ("paper", "sound", "quick"))
    if not found and not quick:
        return None
    groups: dict[float, list] = {}
    parts = []
    for row in terminal.comparison(found) if found else ():
        cells = [cell(row.claim), cell(row.paper, row.n), cell(row.sound, row.n)]
        if row.kind == "all" and cells[1]:  # clean accuracy of all images belongs to no protocol
            cells[1:] = [dataclasses.replace(cells[1], span=2)]
        if row.kind == "part":
            parts.append(row)
        elif row.kind != "worst":
            groups.setdefault(row.eps, []).append((row.label.split(", eps")[0], row.kind, cells))
    if sound and parts:
        best = min(parts, key=lambda part: part.sound)
        label = f"strongest single attack ({best.label})"
        groups.setdefault(sound["eps"], []).append((label, "", [None, None, cell(best.sound, best.n)]))
    worst = {}  # eps -> cells
    for column, result in ((1, paper), (2, sound)):
        if result:
            worst.setdefault(result["eps"], [None, None, None])[column] = cell(result["robust"], result["n"])
    main = tuple(dict.fromkeys(r["eps"] for r in (sound, paper, quick) if r))
    for eps, cells in worst.items():
        groups.setdefault(eps, []).append(("worst case", "worst", cells))
    for eps, value in sound["sweep"].items() if sound else ():  # there with one attack alone
        swept = [None, None, cell(value["robust"], sound["n"] if sound else None)]
        groups.setdefault(float(eps), []).append(("APGD on the margin", "", swept))
    columns = ["paper reports", *(_column(found, name) for name in ("paper", "sound"))]
    if quick:
        columns.append(f"quick protocol ({quick['protocol']})")
        groups = {e: [(*row[:2], [*row[2], None]) for row in rows] for e, rows in groups.items()}
        last = ("quick attack", "", [None, None, None, cell(quick["robust"], quick["n"])])
        groups.setdefault(quick["eps"], []).append(last)
    named = [
        (f"eps {intervals.radius(e)}" if e else "no attack", groups[e]) for e in (0.0, *main) if e in groups
    ]
    others = [
        (f"eps {intervals.radius(e)}, {label}", kind, cells)
        for e in sorted(groups)
        if e not in (0.0, *main)
        for label, kind, cells in groups[e]
    ]
    named += [("other radii", others)] if others else []
    return {"columns": columns, "groups": named, "notes": _accuracy_notes(record, named)}


def _column(found, name):
    return f"{PROTOCOLS[name]} ({found[name]['protocol']})" if name in found else PROTOCOLS[name]


def _accuracy_notes(record, groups):
    notes = [f"The {text} was not run." for name, text in PROTOCOLS.items() if name not in record.results]
    if not any(cells[0] for _, rows in groups for _, _, cells in rows):
        notes.append(f"The paper reports no figure for {record.title} at these radii.")
    paper, gap = record.results.get("paper"), masking_gap(record)
    if gap is not None:
        sound = record.results["sound"]
        error = " It is an error of the evaluation, not robustness." if gap > 0 else ""
        notes.append(
            f"Masking gap: {100 * gap:.2f} points, paper's protocol minus {sound['protocol']}.{error}"
        )
        if sound["head"] == "clusters":
            notes.append(
                "The paper's attack follows the gradient of exp scores, which vanishes; RobustBench lists "
                "the authors' CIFAR-10 model at 0.00 % under AutoAttack."
            )
    if paper and paper.get("successes_lost_by_max_loss_rule"):
        notes.append(
            f"Of the images that count as robust by the paper's protocol, "
            f"{paper['successes_lost_by_max_loss_rule']} had been fooled by another restart."
        )
    return notes


def attack_rows(record: Record) -> list[dict]:
    """Each attack of the sound protocol: accuracy, unique kills and cost, the strongest first."""
    sound = record.results.get("sound")
    if not sound:
        return []
    rows = [
        {
            "name": name,
            "cell": cell(attack["robust"], sound["n"]),
            "kills": attack["unique_kills"],
            "gradients": attack.get("gradient_evaluations"),
            "forwards": attack.get("forward_evaluations"),
            "seconds": attack["wall_seconds"],
            "robust": attack["robust"],
        }
        for name, attack in sound["attacks"].items()
    ]
    return sorted(rows, key=lambda row: row["robust"])


def certified_table(record: Record) -> dict | None:
    """Certified accuracy by rule and radius, and what l2-PGD left."""
    result = record.results.get("certified")
    if not result:
        return None
    radii = list(result["sweep"])
    rows = [
        (
            rule + (", not sound" if rule in result["unsound_rules"] else ""),
            [cell(at[r], result["n"]) for r in radii],
        )
        for rule, at in result["rules"].items()
    ]
    empirical = result["empirical"]
    if empirical["at"]:
        left = [empirical["at"].get(r) for r in radii]
        rows.append(("left by l2-PGD", [at and cell(at["robust"], empirical["n"]) for at in left]))
    return {"radii": [intervals.radius(float(r)) for r in radii], "rows": rows, "result": result}


def check_value(check: dict) -> str:
    """The number that was compared with the limit, in the limit's unit."""
    return "–" if check["value"] is None else wording.shown_value(check)


def check_limit(check: dict) -> str:
    """The limit as it is printed in books."""
    limit = check["limit"].replace("<=", "≤").replace(">=", "≥") or "–"
    return limit + " points" if limit.endswith("chance + 2") else limit
