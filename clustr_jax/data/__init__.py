"""Data sets as arrays in memory, subsets of them, and augmentation on the device.

Images are kept as uint8 (pixels = uint8 / scale); `load` gives them as float32 in [0, 1].
Prepared TFDS sets are read without TensorFlow; `python -m clustr_jax.prepare NAME` prepares one.
Own images are the data set "folder": `clustr_jax.data.folder` reads them.
"""

import dataclasses
import warnings

import numpy as np
from jaxtyping import Float, Int

from clustr_jax.data import folder, prepared, shares, toy
from clustr_jax.data.augment import crop_flip, translate_flip
from clustr_jax.data.prepared import PREPARED, default_data_dir
from clustr_jax.data.split import Examples, Split, digest
from clustr_jax.runtime.errors import UserError, nearest, shown
from clustr_jax.settings import DataSettings

__all__ = [
    "ALIASES", "NAMES", "OWN", "PREPARED", "Examples", "Split", "crop_flip", "default_data_dir", "digest",
    "label", "load", "load_split", "splits", "stratified", "translate_flip",
]  # fmt: skip

ALIASES = {"svhn": "svhn_cropped"}
OWN = "folder"
NAMES = (*PREPARED, "digits", "toy2d", OWN)
# Share of an image folder's training images that is its test split where it has none.
_TEST_SHARE = 0.2
_LEAST = 4  # images of each class that a smoke run trains on


def load(
    name: str, split: str, data_dir: str | None = None
) -> tuple[Float[np.ndarray, "N ..."], Int[np.ndarray, "N"]]:
    """A whole split as arrays.

    Args:
        name: cifar10, cifar100, svhn_cropped (= svhn), digits, toy2d (x [N, 2], no box), or folder: your own
            images.
        split: "train" or "test".
        data_dir: of folder, a folder of images or an .npz file (clustr_jax.data.folder). Otherwise where TFDS
            keeps its prepared sets; default $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Returns:
        x float32 [N, H, W, C] in [0, 1], and y int32 [N]. What is there of own images and not read is a
        warning.

    Raises:
        UserError: for unknown names, and where the set is not there.

    >>> x, y = data.load("digits", "test")
    >>> x.shape, x.dtype, float(x.min()), float(x.max())
    ((359, 8, 8, 1), dtype('float32'), 0.0, 1.0)
    >>> y.shape, y.dtype
    ((359,), dtype('int32'))
    """
    read = load_split(name, split, data_dir)
    for note in read.notes:
        warnings.warn(f"{shown(data_dir)}: {note}", stacklevel=2)
    return read.pixels(), read.labels


def load_split(name: str, split: str, data_dir: str | None = None) -> Split:
    """As `load`, undecoded: uint8 images and what is known of the set.

    >>> split = data.load_split("digits", "train")
    >>> len(split), split.images.dtype, split.scale, split.bounds
    (1438, dtype('uint8'), 16.0, (0.0, 1.0))
    """
    name = ALIASES.get(name, name)
    if split not in ("train", "test"):
        raise UserError(f"split must be train or test, got {split!r}")
    if name == "digits":
        return toy.digits(split)
    if name == "toy2d" or name.startswith("toy2d_"):
        return toy.points(name, split)
    if name in PREPARED:
        return prepared.read(name, split, data_dir)
    if name == OWN:
        train, _, test = _own(data_dir)
        return train if split == "train" else test
    raise UserError(
        f"unknown data set {name!r}{nearest(name, (*NAMES, *ALIASES))}; known: {', '.join(NAMES)}"
    )


def label(settings: DataSettings) -> str:
    """What the set of this config section is called: its name; an own set by its folder or file.

    Own images in a folder that is called as a known set are "own-NAME": the paper says nothing of them.

    >>> from clustr_jax.settings import DataSettings
    >>> data.label(DataSettings("digits"))
    'digits'
    >>> data.label(DataSettings("folder", "/sets/birds"))
    'birds'
    """
    if settings.name != OWN or not settings.dir:
        return ALIASES.get(settings.name, settings.name)
    name = folder.name(settings.dir)
    known = name in (*NAMES, *ALIASES) or name.startswith("toy2d_")
    return f"own-{name}" if known else name


def _own(data_dir):
    """(train, val or None, test) of own images; without a test folder a part of train, and it says so."""
    found = folder.read(data_dir or "")

    def split(part):
        return Split(
            part.images,
            part.labels,
            found.num_classes,
            255.0,
            (0.0, 1.0),
            "",
            found.class_names,
            found.sha,
            found.notes,
            part.files,
        )

    train = split(found.train)
    if found.test is not None:
        return train, None if found.val is None else split(found.val), split(found.test)
    size = max(1, round(_TEST_SHARE * len(train)))
    counts = np.bincount(train.labels, minlength=train.num_classes)
    quota = np.minimum(np.maximum(shares.quotas(counts, size), 1), counts - 1)
    index = shares.chosen(train.labels, quota, shares.contents(train.images))
    without = np.setdiff1d(np.arange(train.num_classes), train.labels[index])
    if len(without):
        more = f" (and {len(without) - 1} more like it)" if len(without) > 1 else ""
        raise UserError(
            f"class {train.who(without[0])} in {shown(data_dir)} has too few images of different pixels to "
            f"hold some out{more}: add a test folder"
        )
    what = f"{_TEST_SHARE:.0%} of the train folder, held out, as there is no test folder"
    if len(index) != size:
        what += f" ({len(index)} images, at least one of each class)"
    rest = np.setdiff1d(np.arange(len(train)), index)
    return train.take(rest, f"without the {len(index)} test images"), None, train.take(index, what)


def stratified(labels: Int[np.ndarray, "N"], size: int, num_classes: int) -> Int[np.ndarray, "size"]:
    """Sorted indices of a subset whose class proportions are those of `labels` within one example.

    A class whose share is below one can have none (`clustr_jax.data.remarks` says which); which of several
    equal ones have is drawn.

    Always the same subset for the same size, whatever the run's seed: runs are compared on the same
    images.

    >>> labels = np.array([0, 0, 0, 0, 1, 1])
    >>> labels[data.stratified(labels, 3, num_classes=2)].tolist()  # two to one, as in the whole
    [0, 0, 1]
    """
    if not 0 < size <= len(labels):
        raise UserError(f"a subset of {size} was asked for, of {len(labels)} examples")
    return shares.chosen(labels, shares.quotas(np.bincount(labels, minlength=num_classes), size))


def splits(settings: DataSettings, smoke: bool = False) -> tuple[Split, Split, Split]:
    """(train, val, test) as the config asks: subsets, and the held-out part of the training split.

    In a `smoke` run, whose sizes were chosen without knowing the set, a subset that is larger than the split
    is all of it, and four images of each class are trained on at least. UserError where own images are no
    longer those that this config was completed with (`stages.configuration.complete`).

    >>> from clustr_jax.settings import DataSettings
    >>> train, val, test = data.splits(DataSettings("digits", train_size=100, val_size=0.1))
    >>> len(train), len(val), len(test), train.subset
    (90, 10, 359, '100 train')
    """
    directory, own_val = settings.dir or None, None
    if settings.name == OWN:
        train, own_val, test = _own(directory)
        if settings.sha and settings.sha != train.sha:
            raise UserError(
                f"{settings.dir} has changed: {train.sha} now, {settings.sha} when this was trained"
            )
    else:
        train, test = (load_split(settings.name, split, directory) for split in ("train", "test"))
    for name in ("train_size", "test_size"):
        if getattr(settings, name) < 0:
            raise UserError(f"data.{name} must be >= 0 (0 = all), got {getattr(settings, name)}")
    if not 0 <= settings.val_size < 1:
        raise UserError(
            f"data.val_size is a fraction of the training split in [0, 1), got {settings.val_size}"
        )

    def subset(split, size, what, least=0):
        if not size or (smoke and size >= len(split)):
            return split
        if size > len(split):
            raise UserError(f"a subset of {size} was asked for, of {len(split)} examples")
        counts = np.bincount(split.labels, minlength=split.num_classes)
        index = shares.chosen(split.labels, shares.quotas(counts, size, least=least))
        return split.take(index, f"{size} {what}")

    least = _LEAST * train.num_classes if smoke and settings.train_size else 0
    train = subset(train, max(settings.train_size, least), "train", least=1)
    test = subset(test, settings.test_size, "test")
    if own_val is not None:
        return _with_own_val(
            settings, train, subset(own_val, settings.test_size if smoke else 0, "val"), test
        )
    held_out = round(settings.val_size * len(train))
    if not held_out:
        return train, train.take(slice(0, 0), "none"), test
    index = _held_out(settings, train, held_out)
    rest = np.setdiff1d(np.arange(len(train)), index)
    return dataclasses.replace(train.take(rest, ""), subset=train.subset), train.take(index, "held out"), test


def _with_own_val(settings, train, val, test):
    """The splits of own images that have a split to be held out: it is, unless nothing is to be."""
    if not settings.val_size:
        note = f"not used: the {len(val):,} images of val, as data.val_size is 0; above 0 they are held out"
        return dataclasses.replace(train, notes=(*train.notes, note)), val.take(slice(0, 0), "none"), test
    note = f"held out: the {len(val):,} images of val, and not data.val_size={settings.val_size} of train"
    return dataclasses.replace(train, notes=(*train.notes, note)), val, test


def _held_out(settings, train, size):
    """Indices of the `size` training images that are held out; none is the last of its class."""
    counts = np.bincount(train.labels, minlength=train.num_classes)
    quota = shares.quotas(counts, size, keep=1)
    if quota.sum() < size:
        last = int(np.argmin(np.where(counts > 0, counts, len(train) + 1)))
        raise UserError(
            f"data.val_size={settings.val_size} holds {size} of {len(train)} training images out and leaves "
            f"none of class {train.who(last)}, which has {counts[last]}; lower it (0 = none), or add images"
        )
    # the held-out images of prepared sets stay what they always were, whatever occurs in them twice
    return shares.chosen(train.labels, quota, shares.contents(train.images) if train.sha else None)
