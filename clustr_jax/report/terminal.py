"""The tables that a run prints: figures side by side, and the checks."""

import dataclasses
import textwrap

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from clustr_jax.evaluation import wording
from clustr_jax.evaluation.intervals import percent, radius
from clustr_jax.reference import claims
from clustr_jax.storage.results import comparable

WIDTH = 80  # columns of the narrowest terminal that people use
_COUNTED = {"PASS": "passed", "WARN": "warn", "FAIL": "failed", "SKIP": "skipped"}


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
    paper: float | None = None  # by the paper's protocol, run here
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
    """`comparison` as a table for the terminal, at most WIDTH columns wide; "-" where there is no figure.

    Of the sound protocol's attacks the strongest alone has a row, and each other radius has one.
    """
    title, caption = escape(_title(next(iter(results.values())))), _caption(results)
    rows = list(_terminal_rows(results))
    claimed = any(row.claim is not None for row in rows)
    table = Table(
        title=title, caption=caption, caption_justify="left", title_justify="left", box=SIMPLE_HEAD,
        padding=(0, 1), pad_edge=False, min_width=WIDTH - 10,
    )  # fmt: skip
    table.add_column("accuracy in % [95 %]")
    for column in (*(["paper says"] if claimed else []), "paper's protocol", "sound protocol"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [percent(value, {"n": row.n}) for value in (row.paper, row.sound)]
        table.add_row(escape(row.label), *([percent(row.claim)] if claimed else []), *cells)
    return table


def _terminal_rows(results):
    """The rows of `comparison`, each with every figure that there is for it."""
    claimed, sound, quick = (results.get(name) for name in ("paper", "sound", "quick"))
    rows = comparison(results)
    alike = claimed and sound and (claimed["eps"], claimed["n"]) == (sound["eps"], sound["n"])
    for row in rows:
        if row.kind == "all":  # clean accuracy of all images belongs to no protocol
            yield dataclasses.replace(row, label=f"clean, all {row.n} images", sound=row.paper)
        elif row.kind == "clean":
            yield dataclasses.replace(row, label=f"clean, {row.n} attacked")
        elif row.kind == "attack" and claimed and row.eps == claimed["eps"]:
            same = alike and row.label.startswith(f"pgd{sound.get('attack', {}).get('steps')},")
            yield dataclasses.replace(row, sound=sound["attacks"]["ce"]["robust"]) if same else row
    if sound and sound["attacks"]:
        name, best = min(sound["attacks"].items(), key=lambda item: item[1]["robust"])
        label = f"strongest one ({name})"
        yield Row(label, "part", sound["eps"], sound["n"], sound=best["robust"])
    if claimed and not alike:
        label = f"worst case, eps {radius(claimed['eps'])}"
        yield Row(label, "worst", claimed["eps"], claimed["n"], paper=claimed["robust"])
    for row in rows:
        if row.kind == "worst":
            yield dataclasses.replace(row, paper=claimed["robust"] if alike else None)
    if quick:
        label = f"{quick['protocol']}, eps {radius(quick['eps'])}"
        yield Row(label, "worst", quick["eps"], quick["n"], sound=quick["robust"])
    for eps, found in claimed["sweep"].items() if claimed else ():
        there = sound["sweep"].get(eps) if sound else None
        lowest = min(found.values(), default=None)
        label = f"strongest, eps {radius(float(eps))}"
        yield Row(label, "attack", float(eps), claimed["n"], None, lowest, there and there["robust"])


def checks_text(diagnosis: dict) -> Text:
    """The checks of diagnostics.json: how many passed, and those that did not with what they say."""
    checks = diagnosis["checks"]
    statuses = [check["status"] for check in checks]
    counts = ", ".join(
        f"{statuses.count(status)} {word}" for status, word in _COUNTED.items() if status in statuses
    )
    text = Text(f"can it be believed? {counts}\n", style="bold")
    colours = {"WARN": "yellow", "FAIL": "bold red", "SKIP": "dim"}
    for check in sorted((c for c in checks if c["status"] != "PASS"), key=lambda c: c["status"] == "SKIP"):
        value = "" if check["value"] is None else f": {wording.shown_value(check)}"
        limit = f" (limit {check['limit']})" if check["limit"] and value else ""
        said = "; ".join(filter(None, (check["note"], check.get("advice", ""))))
        full = f"{check['number']:>2} {check['name']}{value}{limit}{'; ' * bool(said)}{said}"
        lines = textwrap.wrap(full, WIDTH - 7, subsequent_indent="   ", break_long_words=False)
        text.append(f"  {check['status']} ", style=colours[check["status"]])
        text.append("\n       ".join(lines) + "\n", style="not bold")
    return text


def verdict_text(diagnosis: dict) -> str:
    """The verdict in plain words, and its line; no word is broken."""
    texts = filter(None, (diagnosis.get("words"), diagnosis["verdict"]))
    return "\n".join(line for text in texts for line in textwrap.wrap(text, WIDTH, break_long_words=False))


def _title(result):
    where = result["dataset"] + (f" ({result['subset']})" if result["subset"] else "")
    return f"{result['method']} on {where}"


def _caption(results):
    claimed, sound = results.get("paper"), results.get("sound")
    if not claimed or not sound or not comparable(claimed, sound):
        return ""
    gap = 100 * (claimed["robust"] - sound["robust"])
    lines = [
        f"masking gap at eps {radius(sound['eps'])}: {gap:.2f} points, paper's minus {sound['protocol']}"
    ]
    if sound["head"] == "clusters":
        lines.append("The paper's attack follows the gradient of exp scores, which")
        lines.append("vanishes. RobustBench lists the authors' CIFAR-10 model at")
        lines.append("0.00 % under AutoAttack.")
    if claimed["sweep"] and sound["sweep"].keys() & claimed["sweep"].keys():
        lines.append("At other radii the sound column is APGD on the margin alone.")
    return "\n".join(lines)
