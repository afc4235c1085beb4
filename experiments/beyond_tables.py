"""The tables of experiments/beyond.py: pure functions of the JSONs and outcomes under results/beyond."""

import json
import pathlib

import numpy as np
from result_tables import markdown

from clustr_jax.evaluation import intervals

OURS = "clustr_at"


def _share(found: dict | None) -> str:
    if not found:
        return "-"
    low, high = (100 * v for v in found["robust_interval"])
    return f"{100 * found['robust']:.1f} [{low:.1f}, {high:.1f}]"


def _settings(found: dict) -> str:
    values = found["settings"].items()
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values) or "as shared"


def _rows(folder: pathlib.Path) -> list[dict]:
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(found, key=lambda r: (-r["robust"], r["row"], r["seed"]))


def scale(folder: pathlib.Path) -> str:
    """All rows of one scale, the best first."""
    rows = [
        [
            r["row"],
            str(r["seed"]),
            _settings(r),
            f"{r['passes_per_image']:.1f}",
            f"{100 * r['clean']:.1f}",
            _share(r.get("screen")),
            _share(r),
            f"{r['n']} {r['on']}",
            f"{r['training_seconds'] / 60:.0f}",
            ", ".join([*r["alarms"], *(r.get("judgement") or {}).get("failed", ())]) or "none",
        ]
        for r in _rows(folder)
    ]
    header = [
        "row", "seed", "settings", "passes per image", "clean, %", "PMA, %", "robust, %", "images",
        "minutes",
        "alarms, failed checks",
    ]  # fmt: skip
    return markdown(header, rows)


def budgets(folder: pathlib.Path) -> str:
    """How many recipes of each method have been tried: the tuning budgets."""
    counts = {}
    for found in _rows(folder):
        counts[found["method"]] = counts.get(found["method"], 0) + 1
    return ", ".join(f"{method}: {count}" for method, count in sorted(counts.items()))


def differences(folder: pathlib.Path) -> str:
    """clustr_at minus each other method, image by image, over the seeds that both have: AutoAttack, and PMA.

    Of several rows of a method the one that is best by `robust` on these very images would be chosen with a
    look at the answer; so a method with more than one row of a seed is listed row by row.
    """
    found = {}
    for r in _rows(folder):
        path = folder / f"{r['row']}-{r['seed']}.npz"
        if path.exists():
            found.setdefault(r["row"], {})[r["seed"]] = np.load(path)
    rows = []
    for name in sorted(n for n in found if n.startswith(OURS)):
        for other in sorted(n for n in found if not n.startswith(OURS)):
            seeds = sorted(found[name].keys() & found[other].keys())
            for label, prefix in (("AutoAttack", ""), ("PMA", "screen_")):
                pairs = [(found[name][s], found[other][s]) for s in seeds]
                pairs = [pair for pair in pairs if all(f"{prefix}ids" in run for run in pair)]
                if pairs:
                    rows.append(_difference(f"{name} - {other}, {label}", pairs, prefix))
    header = [
        "minus", "points by seed", "lower 95 % bound, upper", "ours alone", "theirs alone", "images", "seeds",
    ]  # fmt: skip
    return markdown(header, rows)


def _difference(what, pairs, prefix):
    """A row: of one seed by Newcombe's paired interval, of several with an image as one observation."""
    ids, robust = f"{prefix}ids", f"{prefix}robust"
    common = pairs[0][0][ids]
    for a, b in pairs:  # one row may have been attacked on more images than another
        common = np.intersect1d(common, np.intersect1d(a[ids], b[ids]))
    ours, theirs = (
        np.array([run[robust][np.searchsorted(run[ids], common)] for run in runs])
        for runs in zip(*pairs, strict=True)
    )
    one = len(pairs) == 1
    _, low, high = intervals.paired(ours[0], theirs[0]) if one else intervals.over_seeds(ours, theirs)
    return [
        what,
        ", ".join(intervals.points(a.mean() - b.mean()) for a, b in zip(ours, theirs, strict=True)),
        f"{intervals.points(low)}, {intervals.points(high)}",
        str(int(np.sum(ours & ~theirs))), str(int(np.sum(~ours & theirs))), str(len(common)), str(len(pairs)),
    ]  # fmt: skip


def tables(folder: pathlib.Path) -> str:
    """Everything that is there, by scale."""
    parts = []
    for place in sorted(p for p in folder.glob("*") if p.is_dir()):
        parts.append(f"## {place.name}\n\n{scale(place)}")
        if place.name == "tune":
            parts.append(f"Recipes tried: {budgets(place)}")
        if any(place.glob("*.npz")):
            parts.append(differences(place))
    return "\n\n".join(parts) or "nothing there yet"
