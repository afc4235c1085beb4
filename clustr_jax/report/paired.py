"""Differences between runs that were attacked on the same test images, image by image."""

import itertools

import numpy as np

from clustr_jax.evaluation import intervals
from clustr_jax.report import words
from clustr_jax.report.record import Record

_MOST = 15  # pairs that are all shown; of more each run is held against the best one


def rows(records: list[Record], names: list[str]) -> list[dict]:
    """What one run has more than another: a row for each pair and protocol that share images and radius."""
    found = []
    for protocol in ("sound", "paper"):
        there = [
            (name, record, _robust(record, protocol))
            for name, record in zip(names, records, strict=True)
            if protocol in record.results
        ]
        for (name, record, ours), (rival, other, theirs) in _pairs(there, protocol):
            a, b = record.results[protocol], other.results[protocol]
            alike = a["eps"] == b["eps"] and a["protocol"] == b["protocol"] and _data(record) == _data(other)
            common = np.intersect1d(ours[0], theirs[0]) if alike and ours and theirs else ()
            if len(common):
                found.append(_row(name, rival, a, ours, theirs, common))
    return found


def _pairs(there, protocol):
    pairs = [*itertools.combinations(there, 2)]
    if len(pairs) <= _MOST:
        return pairs
    best = max(there, key=lambda run: run[1].results[protocol]["robust"])
    return [(best, run) for run in there if run is not best]


def _data(record):
    return record.data, record.config["data"].get("sha"), words.subset(record)


def _robust(record, protocol):
    """(ids [N], whether each image is right and withstood the protocol at its main radius [N])."""
    arrays = record.outcomes(protocol)
    if protocol == "sound":
        kept = [arrays["robust"]] if "robust" in arrays else []
    else:
        end = f"_{record.results[protocol]['eps']:.6f}"
        kept = [array for name, array in arrays.items() if name.endswith(end)]
        # what the attacks leave says nothing of images that are wrong as they are
        kept += [arrays["clean"]] if kept else []
    return (arrays["ids"], np.all(kept, axis=0)) if kept and "ids" in arrays else None


def _row(name, rival, result, ours, theirs, common):
    a, b = (robust[np.searchsorted(ids, common)] for ids, robust in map(_sorted, (ours, theirs)))
    difference, low, high = intervals.paired(a, b)
    return {
        "runs": f"{name} minus {rival}",
        "protocol": result["protocol"],
        "eps": intervals.radius(result["eps"]),
        "difference": intervals.points(difference),
        "value": 100 * difference,
        "interval": f"[{intervals.points(low)}, {intervals.points(high)}]",
        "clear": low > 0 or high < 0,
        "ours": int(np.sum(a & ~b)),
        "theirs": int(np.sum(~a & b)),
        "n": len(common),
    }


def _sorted(found):
    ids, robust = found
    order = np.argsort(ids)
    return ids[order], robust[order]
