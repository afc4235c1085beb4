"""The tables of experiments/systems.py: pure functions of the files under results/systems."""

import json

import numpy as np
from lever_tables import share
from result_tables import RESULTS, markdown

from clustr_jax.evaluation import intervals
from clustr_jax.reference import claims as paper

FOLDER = RESULTS / "systems"
PAPER_ROW = "clustr_qtrades"


def _rows() -> list[dict]:
    """All finished rows, in the order of their names and seeds."""
    return [json.loads(p.read_text()) for p in sorted(FOLDER.glob("*-[0-9].json"))]


def systems() -> str:
    """What each system is worth by both protocols, in %; the paper's own figures beside it."""
    rows = []
    for row in _rows():
        # the paper's figures are of whole trainings, with the inner steps that it has
        variant = "+" in row["row"].removesuffix("+paper_code") or row["row"].endswith("-short")
        n = row["n"]
        claimed = paper.CLAIMS[row.get("dataset", "cifar10")].get("" if variant else row["method"])
        passes = sum(row["gradient_passes"].values())
        rows.append(
            [
                row["row"],
                str(row["seed"]),
                f"{passes / 1e6:.2f}",
                share(row["clean"], row.get("clean_n", 10_000)),
                share(row["paper"]["pgd20"], n),
                share(row["paper"]["pgd100"], n) if "pgd100" in row["paper"] else "",
                "" if row["sound"] is None else share(row["sound"], n),
                " / ".join(f"{v:.1f}" for v in claimed) if claimed else "",
            ]
        )
    header = [
        "system", "seed", "gradient passes, millions", "clean", "paper's protocol, PGD^20", "PGD^100",
        "sound", "the paper: clean / 20 / 100",
    ]  # fmt: skip
    return markdown(header, rows)


def _left(name: str, what: str) -> dict[int, np.ndarray]:
    """Seed -> which images withstand, of every finished seed of a row."""
    found = {}
    for path in FOLDER.glob(f"{name}-[0-9].npz"):
        with np.load(path) as outcomes:
            if what in outcomes:
                found[int(path.stem.rpartition("-")[2])] = outcomes[what]
    return found


def difference(first: str, second: str, what: str) -> tuple[float, float, float] | None:
    """Of two rows, image by image: the mean over the seeds that both have, with its 95 % interval."""
    a, b = _left(first, what), _left(second, what)
    both = sorted(a.keys() & b.keys())
    if not both:
        return None
    ids = [_left(name, "ids") for name in (first, second)]
    if any(not np.array_equal(*(of.get(seed) for of in ids)) for seed in both):
        raise ValueError(f"{first} and {second} were not attacked on the same images")
    if len(both) == 1:
        return intervals.paired(a[both[0]], b[both[0]])
    return intervals.over_seeds([a[s] for s in both], [b[s] for s in both])


# Two rows are called equal where their difference is smaller for sure.
EQUAL = 0.01


def verdict(low: float, high: float) -> str:
    """Of "the first is above the second", by the interval of their difference."""
    if low > 0 or high < 0:
        return "holds" if low > 0 else "does not hold"
    if max(-low, high) < EQUAL:
        return f"equal within {100 * max(-low, high):.1f}"
    return "undecided"


# claim -> the row that is said to be above, and the one below; rows of equal passes
ABOVE = {
    "ClusTR above Magnet": ("clustr-short", "magnet-short"),
    "ClusTR+QTRADES above ClusTR": ("clustr_qtrades-short", "clustr-short"),
    "ClusTR+QTRADES above QTRADES": ("clustr_qtrades-short", "qtrades-short"),
    "ClusTR above Free AT": ("clustr-short", "free_at-short"),
    "ClusTR+QTRADES above TRADES": ("clustr_qtrades-short", "trades-short"),
    "ClusTR+QTRADES above PGD-AT": ("clustr_qtrades-short", "pgd_at-short"),
    "ClusTR+QTRADES above Fast AT": ("clustr_qtrades-short", "fast_at-short"),
}


def claims() -> str:
    """Who is above whom, by the paper's protocol and by the sound one; verdicts by 95 % intervals."""
    rows = []
    passes = {row["row"]: sum(row["gradient_passes"].values()) for row in _rows()}
    for claim, (first, second) in ABOVE.items():
        known = first in passes and second in passes
        cells = [claim, f"{passes[first] / passes[second]:.2f}" if known else ""]
        for what in ("pgd20", "sound"):
            found = difference(first, second, what)
            if found is None:
                cells += ["not run", ""]
                continue
            value, low, high = found
            cells += [
                f"{intervals.points(value)} [{intervals.points(low)}, {intervals.points(high)}]",
                verdict(low, high),
            ]
        rows.append(cells)
    header = ["claim", "gradient passes, first / second", "paper's protocol, points", "", "sound, points", ""]
    return markdown(header, rows)


def more(name: str = PAPER_ROW, seed: int = 0) -> str:
    """Table 4 and Fig. 4 of one row: other radii, and the D nearest clusters, by both protocols."""
    row = json.loads((FOLDER / f"{name}-{seed}.json").read_text())
    found = json.loads((FOLDER / f"{name}-{seed}.more.json").read_text())["results"]
    rows = []
    radii, nearest = (
        sorted((k.partition(kind)[2] for k in found if k.startswith(f"paper-{kind}")), key=float)
        for kind in ("eps", "nearest")
    )
    for what in [f"eps{radius}" for radius in radii] + [f"nearest{d}" for d in nearest]:
        key = f"paper-{what}"
        theirs, true = found[key], found[f"quick-{what}"]
        label, claim = f"the {what.removeprefix('nearest')} nearest clusters", None
        if what.startswith("eps"):
            label = f"{what.removeprefix('eps')}/255"
            claim = paper.claim("cifar10", row["method"], "pgd20", float(what.removeprefix("eps")) / 255)
        rows.append(
            [
                label,
                share(theirs["clean"], theirs["n"]),
                share(theirs["robust"], theirs["n"]),
                share(true["robust"], true["n"]),
                f"{100 * claim:.2f}" if claim is not None else "",
            ]
        )
    return markdown(["", "clean", "paper's protocol", "sound attacks", "the paper says"], rows)
