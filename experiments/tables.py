"""Every table of figures in docs/ that comes from results/: written again, or compared.

    python experiments/tables.py [--check]

A document holds `<!-- table: NAME -->`, the table, `<!-- end -->`; NAME is a function of `TABLES`, which
reads JSONs under results/ and returns Markdown. --check changes nothing and exits with 1 if a document says
something else than the JSONs do.
"""

import argparse
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "results", ROOT / "docs"
_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(path: str) -> dict:
    """A JSON under results/."""
    return json.loads((RESULTS / path).read_text())


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; the first column is left-aligned, the others are right-aligned."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def devices() -> str:
    """Accuracies on eight devices and on one."""
    rows = []
    for row in read("benchmarks/devices.json")["rows"]:
        low, high = row["prediction_interval"]
        eight, one, stage_2 = (
            ", ".join(f"{100 * value:.2f}" for value in row[key])
            for key in ("eight_devices", "one_device", "stage_2_on_eight_devices")
        )
        equal = 100 * min(row["equal_outcomes"].values())
        rows.append(
            [
                row["set"], one, f"{100 * low:.1f} to {100 * high:.1f}", eight,
                f"{sum(row['inside_prediction_interval'])} of {len(row['eight_devices'])}",
                f"{row['p_of_equal_means']:.2f}", stage_2,
                f"{equal:.2f} % of {row['n']}", f"{100 * row['robust']:.1f} %",
            ]
        )  # fmt: skip
    header = [
        "clean accuracy, %", "1 device, by seed", "where one more seed lies (95 %)", "8 devices, by seed",
        "inside", "p of equal means (Welch)", "stage 2 alone on 8", "equal attack outcomes", "withstand",
    ]  # fmt: skip
    return markdown(header, rows)


TABLES = {f.__name__: f for f in (devices,)}


def rendered(text: str) -> str:
    """The document with all its tables as the JSONs have them."""
    return _MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", text)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text()
        new = rendered(text)
        if new != text:
            stale.append(path.name)
            if not args.check:
                path.write_text(new)
    print(f"{'stale' if args.check else 'written'}: {', '.join(stale) or 'nothing'}")
    sys.exit(bool(args.check and stale))


if __name__ == "__main__":
    main()
