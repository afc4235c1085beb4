"""The tables of experiments/systems.py: pure functions of the files under results/systems."""

import json

import numpy as np
from lever_tables import share
from result_tables import RESULTS, markdown

from clustr_jax.evaluation import intervals

FOLDER = RESULTS / "systems"
PAPER_ROW = "clustr_qtrades+exp"
# Table 1 of the paper, CIFAR-10: clean, PGD^20, PGD^100.
CLAIMED = {
    "magnet": (83.14, 23.71, 22.54),
    "clustr": (87.34, 49.04, 47.76),
    "clustr_qtrades": (91.03, 74.44, 74.04),
    "qtrades": (81.07, 44.18, 43.42),
}


def _rows() -> list[dict]:
    """All finished rows, in the order of their names and seeds."""
    return [json.loads(p.read_text()) for p in sorted(FOLDER.glob("*-[0-9].json"))]


def systems() -> str:
    """What each system is worth by both protocols, in %; the paper's own figures beside it."""
    rows = []
    for row in _rows():
        n, claimed = row["n"], CLAIMED.get(row["row"].partition("+")[0])
        passes = sum(row["gradient_passes"].values())
        rows.append(
            [
                row["row"],
                str(row["seed"]),
                f"{passes / 1e6:.2f}",
                share(row["clean"], 10_000),
                share(row["paper"]["pgd20"], n),
                share(row["paper"]["pgd100"], n) if "pgd100" in row["paper"] else "",
                share(row["sound"], n),
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
    if len(both) == 1:
        return intervals.paired(a[both[0]], b[both[0]])
    return intervals.over_seeds([a[s] for s in both], [b[s] for s in both])


def verdict(low: float, high: float, claimed: float = 0.0) -> str:
    """Of "the first is above the second by more than `claimed`"."""
    return "holds" if low > claimed else "does not hold" if high <= claimed else "undecided"


# claim -> the row that is said to be above, and the one below
ABOVE = {
    "ClusTR above Magnet": ("clustr", "magnet"),
    "ClusTR+QTRADES above ClusTR": (PAPER_ROW, "clustr"),
    "ClusTR+QTRADES above QTRADES": (PAPER_ROW, "qtrades"),
    "ClusTR above Free AT": ("clustr", "free_at"),
    "ClusTR+QTRADES above TRADES": (PAPER_ROW, "trades"),
}


def claims() -> str:
    """Who is above whom, by the paper's protocol and by the sound one; verdicts by 95 % intervals."""
    rows = []
    for claim, (first, second) in ABOVE.items():
        cells = [claim]
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
    header = ["claim", "paper's protocol, points", "", "sound, points", ""]
    return markdown(header, rows)
