"""Every table of figures in docs/ and README.md that comes from results/: written again, or compared.

    python experiments/tables.py [--check]

A document holds `<!-- table: NAME -->`, the table, `<!-- end -->`; NAME is a function of `TABLES`, which
reads JSONs under results/ and returns Markdown. --check changes nothing and exits with 1 if a document says
something else than the JSONs do.
"""

import argparse
import functools
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import benchmark_tables  # noqa: E402
import beyond_tables  # noqa: E402
import certified  # noqa: E402
import lever_tables  # noqa: E402
import norm_statistics  # noqa: E402
import result_tables  # noqa: E402
import system_tables  # noqa: E402
from benchmark_tables import read  # noqa: E402
from result_tables import markdown  # noqa: E402

RESULTS, DOCS = ROOT / "results", ROOT / "docs"
_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def digits() -> str:
    """What `make run` ends with: both protocols on digits."""
    clean, paper, sound = (read(f"digits/{name}.json") for name in ("clean", "paper", "sound"))

    def percent(value):
        return f"{100 * value:.2f}"

    best = min(sound["attacks"], key=lambda name: sound["attacks"][name]["robust"])
    rows = [
        ["clean", percent(clean["clean"]), percent(clean["clean"])],
        # of the sound protocol on the log scores, and any restart counts
        [
            "PGD^20, 10 restarts",
            percent(paper["attacks"]["pgd20"]),
            percent(sound["attacks"]["ce"]["robust"]),
        ],
        ["PGD^100, 10 restarts", percent(paper["attacks"]["pgd100"]), ""],
        [f"strongest single attack ({best})", "", percent(sound["attacks"][best]["robust"])],
        ["worst case", percent(paper["robust"]), f"**{percent(sound['robust'])}**"],
    ]
    larger = read("systems/clustr_qtrades-0.json")
    rows += [
        [
            f"CIFAR-10, clean {100 * larger['clean']:.1f}: worst case",
            percent(larger["paper"]["pgd20"]),
            f"**{percent(larger['sound'])}**",
        ]
    ]
    return markdown(["digits, ClusTR + QTRADES", "paper's protocol", "sound protocol"], rows)


TABLES = benchmark_tables.TABLES | {"digits": digits}
# Those of docs/results.md and the lab notes that results/ can fill so far: FUNCTION or FUNCTION-DATASET.
for _name in (
    "fullsize", "search-svhn", "search-cifar10", "accuracies-svhn_cropped", "accuracies-cifar10",
    "accuracies-cifar100", "radii", "nearest", "times", "paired", "effect", "quirks", "warm_start",
):  # fmt: skip
    _of, _, _dataset = _name.partition("-")
    TABLES[_name] = functools.partial(getattr(result_tables, _of), *([_dataset] if _dataset else []))
TABLES |= {"certified": certified.table, "levers": lever_tables.levers, "systems": system_tables.systems}
TABLES |= {"claims": system_tables.claims, "systems-more": system_tables.more}
TABLES["beyond-tune"] = functools.partial(beyond_tables.scale, RESULTS / "beyond" / "tune")
TABLES["norm-statistics"] = norm_statistics.table
for _name in ("authors", "clean-statistics", "exp", "text"):
    TABLES[f"levers-{_name}"] = functools.partial(lever_tables.curve, _name)
DOCUMENTS = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(RESULTS.glob("*/README.md"))]


def rendered(text: str) -> str:
    """The document with all its tables as the JSONs have them."""
    return _MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", text)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    result_tables.check_versions()
    stale = []
    for path in DOCUMENTS:
        text = path.read_text()
        new = rendered(text)
        if new != text:
            stale.append(str(path.relative_to(ROOT)))
            if not args.check:
                path.write_text(new)
    print(f"{'stale' if args.check else 'written'}: {', '.join(stale) or 'nothing'}")
    sys.exit(bool(args.check and stale))


if __name__ == "__main__":
    main()
