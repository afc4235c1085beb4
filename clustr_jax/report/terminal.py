"""The tables that a run prints: figures side by side, and the checks."""

import dataclasses

from rich.markup import escape
from rich.table import Table

from clustr_jax.evaluation import wording
from clustr_jax.evaluation.intervals import percent, radius
from clustr_jax.reference import claims
from clustr_jax.storage.results import comparable


@dataclasses.dataclass(frozen=True)
class Row:
    """One accuracy, as a fraction of `n` images, from each source that has it.

    `kind`: "all" (the whole test split, by no protocol), "clean" (what was attacked), "attack" (one of the
    paper's), "part" (one of the sound protocol) or "worst".
    """

    label: str
    kind: str
    eps: float
    n: int
    claim: float | None = None  # what the paper reports
    paper: float | None = None  # its protocol here
    sound: float | None = None


def comparison(results: dict[str, dict]) -> list[Row]:
    """The rows of the side-by-side table: the paper's figure, its protocol here, the sound protocol here.

    A figure of the paper stands only beside the radius that it was reported for.
    """
    any_result = next(iter(results.values()))
    dataset, method = any_result["dataset"], any_result["method"]
    clean, claimed, sound = (results.get(name) for name in ("clean", "paper", "sound"))
    rows = []
    if clean:
        said = claims.claim(dataset, method, "clean")
        label = f"clean, all {clean['n']} test images"
        rows.append(Row(label, "all", 0.0, clean["n"], said, clean["clean"]))
    for n in dict.fromkeys(r["n"] for r in (claimed, sound) if r):  # one row, unless the numbers differ
        values = (r["clean"] if r and r["n"] == n else None for r in (claimed, sound))
        rows.append(Row(f"clean, the {n} attacked images", "clean", 0.0, n, None, *values))

    def attacks(found, eps, n):
        for name, value in found.items():
            said = claims.claim(dataset, method, name, eps)
            rows.append(Row(f"{name}, eps {radius(eps)}", "attack", eps, n, said, value))

    if claimed:
        attacks(claimed["attacks"], claimed["eps"], claimed["n"])
    if sound:
        for name, attack in sound["attacks"].items():
            rows.append(Row(name, "part", sound["eps"], sound["n"], sound=attack["robust"]))
        label = f"worst case, eps {radius(sound['eps'])}"
        rows.append(Row(label, "worst", sound["eps"], sound["n"], sound=sound["robust"]))
    if claimed:
        for eps, found in claimed["sweep"].items():
            attacks(found, float(eps), claimed["n"])
    return rows


def side_by_side(results: dict[str, dict]) -> Table:
    """`comparison` as a table for the terminal."""
    title, caption = escape(_title(next(iter(results.values())))), _caption(results)
    table = Table(title=title, caption=caption, caption_justify="left")
    table.add_column("accuracy in % [95 %]")
    for column in ("paper says", "paper's protocol", "sound protocol"):
        table.add_column(column, justify="right")
    for row in comparison(results):
        cells = ("" if v is None else percent(v, {"n": row.n}) for v in (row.paper, row.sound))
        indent = "  " if row.kind == "part" else ""
        table.add_row(escape(indent + row.label), "" if row.claim is None else percent(row.claim), *cells)
    if quick := results.get("quick"):  # a protocol of its own, whose column is not worth its width
        label = f"{quick['protocol']}, eps {radius(quick['eps'])}"
        table.add_row(label, "", "", percent(quick["robust"], {"n": quick["n"]}))
    return table


def checks_table(diagnosis: dict) -> Table:
    """The checks of diagnostics.json, a line each."""
    table = Table(title="can it be believed?")
    for column in ("", "check", "status", "value", "limit", "note"):
        table.add_column(column)
    colours = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red", "SKIP": "dim"}
    for check in diagnosis["checks"]:
        value = wording.shown_value(check)
        status = f"[{colours[check['status']]}]{check['status']}[/]"
        table.add_row(
            str(check["number"]), check["name"], status, value, escape(check["limit"]), escape(check["note"])
        )
    return table


def _title(result):
    where = result["dataset"] + (f" ({result['subset']})" if result["subset"] else "")
    return f"{result['method']} on {where}"


def _caption(results):
    claimed, sound = results.get("paper"), results.get("sound")
    if not claimed or not sound or not comparable(claimed, sound):
        return ""
    gap = 100 * (claimed["robust"] - sound["robust"])
    lines = [
        f"masking gap at eps {radius(sound['eps'])}: {gap:.2f} points "
        f"(paper's protocol minus {sound['protocol']})"
    ]
    if sound["head"] == "clusters":
        lines.append("The paper's attack follows the gradient of exp scores, which vanishes;")
        lines.append("RobustBench lists the authors' CIFAR-10 model at 0.00 % under AutoAttack.")
    return "\n".join(lines)
