"""What a user has to know of the images before believing a number: what was left out, what is missing, and
what is on two sides of a split.

Equal pixels are found (hashes of decoded images), near duplicates are not.
"""

import dataclasses

import numpy as np

from clustr_jax import data
from clustr_jax.data import Split, shares

_PAIRS = 100  # pairs of equal images that are listed
_NAMES = {
    "train": "training",
    "held_out": "held-out",
    "test": "test",
    "pretrain": "pre-training",
}


@dataclasses.dataclass(frozen=True)
class Remarks:
    """Sentences, and equal images of two splits, or of one under several labels.

    `duplicates` has two kinds of keys. "train/test": how many `images` of the second split are in the first
    as well, and how many of those have none of its labels there (`other_labels`, None where the labels are of
    another set). `pairs` are indices in both, at most 100. "train": `images` of one split that are in it
    under another label as well, their different `contents`, and `pairs`. None where it was not looked for:
    points have no pixels.
    """

    notes: tuple[str, ...] = ()
    duplicates: dict[str, dict] | None = None

    @property
    def lines(self) -> tuple[str, ...]:
        """All that is worth a line of the output."""
        said = sentence(self.duplicates)
        return (*self.notes, *([f"duplicates: {said}"] if said else []))

    @property
    def fields(self) -> dict:
        """As results keep it."""
        return {"data_notes": list(self.notes), "duplicates": self.duplicates}


def of(train: Split, val: Split, test: Split, *, attacked: int = 0) -> Remarks:
    """The remarks on the splits of a run that attacks `attacked` test images (0 = all)."""
    notes = list(train.notes)
    if len(val):
        notes += _missing(val, "held out", "raise data.val_size to have some of each", train)
    notes += _missing(test, "test", "nothing is said of them", train)
    if 0 < attacked < len(test):
        chosen = test.take(data.stratified(test.labels, attacked, test.num_classes), "")
        notes += _missing(chosen, f"eval.n={attacked}", "nothing is said of their robustness", test)
    return Remarks(tuple(notes), _duplicates(train, val, test))


def sentence(duplicates: dict[str, dict] | None) -> str:
    """What was found, "" where nothing was."""
    said = []
    for pair, found in (duplicates or {}).items():
        if not found["images"]:
            continue
        if "/" not in pair:
            said.append(_contradictions(pair, found))
            continue
        first, second = (_NAMES[name] for name in pair.split("/"))
        count, other = found["images"], found["other_labels"]
        labels = f", {other} under another label" if other else ""
        i, j = found["pairs"][0]
        what = f"{second} images are" if count > 1 else f"{second} image is"
        said.append(f"{count} {what} among the {first} images as well{labels} ({second} {j} is {first} {i})")
    return "; ".join(said)


def _contradictions(split, found) -> str:
    """Images of one split under several labels."""
    where, (i, j) = _NAMES[split], found["pairs"][0]
    contents = f"{found['contents']} image{'s are' if found['contents'] > 1 else ' is'}"
    return (
        f"{contents} among the {where} images under several labels, {found['images']} times in all "
        f"({where} {i} is {where} {j})"
    )


def _missing(split, what, remedy, among):
    """A note on the classes of `among` of which `split` has none."""
    there = np.bincount(among.labels, minlength=among.num_classes) > 0
    gone = np.flatnonzero(there & (np.bincount(split.labels, minlength=among.num_classes) == 0))
    if not len(gone):
        return []
    names = ", ".join(among.who(c) for c in gone[:3]) + (
        f" and {len(gone) - 3} more" if len(gone) > 3 else ""
    )
    return [f"{what}: no image of class {names} ({len(gone)} of {there.sum()} classes); {remedy}"]


def _duplicates(train, val, test):
    if train.images.dtype != np.uint8:
        return None
    splits = {"train": train, "held_out": val, "test": test}
    hashes = {name: shares.contents(split.images) for name, split in splits.items() if len(split)}
    between = {
        f"{first}/{second}": _between(
            hashes[first], splits[first].labels, hashes[second], splits[second].labels
        )
        for first, second in (("train", "held_out"), ("train", "test"), ("held_out", "test"))
        if first in hashes and second in hashes
    }
    return between | {name: _under_several_labels(hashes[name], splits[name].labels) for name in hashes}


def of_pretraining(pretrain: Split, test: Split) -> str:
    """The sentence on test images that another set, trained on first, has as well; "" without any."""
    if pretrain.images.dtype != np.uint8:
        return ""
    hashes = (shares.contents(split.images) for split in (pretrain, test))
    return sentence({"pretrain/test": _between(next(hashes), None, next(hashes), test.labels)})


def _between(first, first_labels, second, second_labels):
    """Images of the second set whose content is in the first."""
    order = np.argsort(first, kind="stable")
    start, end = (np.searchsorted(first[order], second, side) for side in ("left", "right"))
    found = np.flatnonzero(end > start)
    other = None
    if first_labels is not None:
        other = sum(second_labels[j] not in first_labels[order[start[j] : end[j]]] for j in found.tolist())
    pairs = [[int(order[start[j]]), int(j)] for j in found[:_PAIRS].tolist()]
    return {"images": len(found), "other_labels": None if other is None else int(other), "pairs": pairs}


def _under_several_labels(hashes, labels):
    """Images of one set whose content is there under another label as well."""
    order = np.argsort(hashes, kind="stable")
    _, starts, counts = np.unique(hashes[order], return_index=True, return_counts=True)
    found = []
    for start, count in zip(starts[counts > 1], counts[counts > 1], strict=True):
        same = order[start : start + count]
        if len(np.unique(labels[same])) > 1:
            found.append(same)
    pairs = sorted([int(same[0]), int(same[labels[same] != labels[same[0]]][0])] for same in found)
    return {"images": sum(map(len, found)), "contents": len(found), "pairs": pairs[:_PAIRS]}
