"""How many images of each class a subset has, and which of them: pure functions of labels and hashes."""

import hashlib

import numpy as np
from jaxtyping import Bool, Int, UInt64


def contents(images: np.ndarray) -> UInt64[np.ndarray, "N"]:
    """A 64-bit hash (BLAKE2b) of the pixels of each image: equal images have equal ones.

    Of a million different images two have the same one with a probability of 3e-8.
    """
    digests = [hashlib.blake2b(np.ascontiguousarray(image), digest_size=8).digest() for image in images]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def quotas(counts: Int[np.ndarray, "Y"], size: int, *, least: int = 0, keep: int = 0) -> Int[np.ndarray, "Y"]:
    """How many of each class a subset of `size` has: its share of `counts`, by largest remainders.

    `least`: no class that has images gets fewer, where `size` allows it; `keep`: so many of each class stay
    outside, and the sum is below `size` where not enough are left. Where a class gets none, the classes
    that do are drawn among equal ones (always the same draw), for the first ones are no sample of them all.
    """
    counts = np.asarray(counts, np.int64)
    exact = counts * size / max(1, counts.sum())
    whole = np.floor(exact).astype(np.int64)
    missing = size - whole.sum()
    quota = whole.copy()
    quota[np.argsort(-(exact - whole), kind="stable")[:missing]] += 1
    if (quota[counts > 0] == 0).any():
        drawn = np.random.default_rng(1).permutation(len(counts))
        quota = whole.copy()
        quota[np.lexsort((drawn, -(exact - whole)))[:missing]] += 1
    high = np.maximum(counts - keep, 0)
    low = np.minimum(least, high) if least * np.count_nonzero(counts) <= size else np.zeros_like(high)
    quota = np.clip(quota, low, high)
    while quota.sum() < size and (quota < high).any():
        quota[np.argmax(np.where(quota < high, exact - quota, -np.inf))] += 1
    while quota.sum() > size and (quota > low).any():
        quota[np.argmin(np.where(quota > low, exact - quota, np.inf))] -= 1
    return quota


def chosen(
    labels: Int[np.ndarray, "N"],
    quota: Int[np.ndarray, "Y"],
    hashes: UInt64[np.ndarray, "N"] | None = None,
) -> Int[np.ndarray, "size"]:
    """Sorted indices of `quota[c]` examples of each class c, always the same ones.

    With `hashes` no content is on both sides. What occurs once goes first. Images of one content and class go
    together, as long as one of another content stays behind: a class can then have fewer than its quota, or
    more. Content with two labels is left out.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    shared = None if hashes is None else _shared(labels, hashes)
    found = [np.zeros(0, np.int64)]
    for c, wanted in enumerate(quota):
        own = order[labels[order] == c]
        found.append(own[:wanted] if shared is None else _whole(own[~shared[own]], wanted, len(own), hashes))
    return np.sort(np.concatenate(found))


def _shared(labels, hashes) -> Bool[np.ndarray, "N"]:
    """Whether an image's content occurs under another label as well."""
    _, which = np.unique(hashes, return_inverse=True)
    size = which.max(initial=0) + 1
    low, high = np.full(size, labels.max(initial=0)), np.full(size, labels.min(initial=0))
    np.minimum.at(low, which, labels)
    np.maximum.at(high, which, labels)
    return (low != high)[which]


def _whole(own, wanted, count, hashes):
    """At least `wanted` of `own`, contents whole, those that occur once first; fewer than `count`."""
    _, which, times = np.unique(hashes[own], return_inverse=True, return_counts=True)
    once = times[which] == 1
    taken = own[once][: min(wanted, count - 1)]
    groups = dict.fromkeys(which[~once].tolist())  # in order of appearance
    for group in groups:
        members = own[which == group]
        if len(taken) < wanted and len(taken) + len(members) < count:
            taken = np.concatenate([taken, members])
    return taken
