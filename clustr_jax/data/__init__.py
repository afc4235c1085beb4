"""Data sets as arrays in memory, subsets of them, and augmentation on the device.

Images are kept as uint8 (pixels = uint8 / scale); `load` gives them as float32 in [0, 1].
Prepared TFDS sets are read without TensorFlow; `python -m clustr_jax.prepare NAME` prepares one.
Own images are the data set "folder": `clustr_jax.data.folder` reads them.
"""

import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import warnings
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from clustr_jax.data import folder, shares
from clustr_jax.runtime import mesh
from clustr_jax.runtime.errors import UserError, nearest, shown
from clustr_jax.runtime.paths import local
from clustr_jax.settings import DataSettings

# Sets of TFDS, and the published sizes of their splits.
PREPARED = {
    "cifar10": dict(sizes=(50_000, 10_000), num_classes=10),
    "cifar100": dict(sizes=(50_000, 10_000), num_classes=100),
    "svhn_cropped": dict(sizes=(73_257, 26_032), num_classes=10),
    "imagenet_resized/32x32": dict(sizes=(1_281_167, 50_000), num_classes=1000, test="validation"),
}
ALIASES = {"svhn": "svhn_cropped"}
OWN = "folder"
NAMES = (*PREPARED, "digits", "toy2d", OWN)
# Share of an image folder's training images that is its test split where it has none.
_TEST_SHARE = 0.2
_PADDING = 4  # of the random crop
_DIGESTED = 10_000  # images of a split that its digest looks at
_LEAST = 4  # images of each class that a smoke run trains on


@dataclasses.dataclass(frozen=True)
class Split:
    """One split: `images` uint8 (or float32 points), `labels` int32, and what it is.

    >>> split = data.load_split("digits", "test")
    >>> split.images.dtype, split.images.shape, split.num_classes, len(split)
    (dtype('uint8'), (359, 8, 8, 1), 10, 359)
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    scale: float  # pixel in [0, 1] = image / scale; 1 for points
    bounds: tuple[float, float] | None  # None: no box (points)
    subset: str  # "" for the official split, else what it is instead
    class_names: tuple[str, ...] = ()  # of an image folder; others have numbers
    sha: str = ""  # of an own data set: names the content of both splits
    notes: tuple[str, ...] = ()  # of an own data set: what is there and was not read, or not as it seems

    def __len__(self):
        return len(self.labels)

    def take(self, index, what: str) -> "Split":
        """The examples at `index`; `what` is added to the description of the subset.

        >>> split.take(slice(0, 10), "first ten").subset
        'first ten'
        """
        subset = f"{self.subset}, {what}" if self.subset else what
        return dataclasses.replace(self, images=self.images[index], labels=self.labels[index], subset=subset)

    def who(self, label: int) -> str:
        """What a class is called in a message: its name in quotes, or its number.

        >>> split.who(3)
        '3'
        """
        return repr(shown(self.class_names[label], 40)) if self.class_names else str(label)

    def pixels(self, index: slice | Int[np.ndarray, "N"] = slice(None)) -> Float[np.ndarray, "N ..."]:
        """float32 pixels in [0, 1] (points in their own units).

        >>> x = split.pixels(slice(0, 5))
        >>> x.dtype, x.shape, float(x.max())
        (dtype('float32'), (5, 8, 8, 1), 1.0)
        """
        return self.images[index].astype(np.float32) / np.float32(self.scale)


@dataclasses.dataclass
class Examples:
    """The test images under attack: pixels, labels, and their indices in the test split.

    >>> x, y = data.load("digits", "test")
    >>> examples = data.Examples(x, y, np.arange(len(y)))
    """

    x: Float[np.ndarray, "N ..."]
    y: Int[np.ndarray, "N"]
    ids: Int[np.ndarray, "N"]

    def __len__(self):
        return len(self.y)

    def take(self, index) -> "Examples":
        """Those at `index`, with the ids they have.

        >>> examples.take([7, 3]).ids.tolist()
        [7, 3]
        """
        return Examples(self.x[index], self.y[index], self.ids[index])


def load(
    name: str, split: str, data_dir: str | None = None
) -> tuple[Float[np.ndarray, "N ..."], Int[np.ndarray, "N"]]:
    """x float32 [N, H, W, C] in [0, 1] and y int32 [N] of the whole split, "train" or "test".

    Names: cifar10, cifar100, svhn_cropped (= svhn), digits, toy2d (x [N, 2], no box), and folder, for
    which `data_dir` is a folder of images or an .npz file (clustr_jax.data.folder). Otherwise it is where
    TFDS keeps its prepared sets ($TFDS_DATA_DIR or ~/tensorflow_datasets). What is there of own images and
    not read is a warning.

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
        return _digits(split)
    if name == "toy2d" or name.startswith("toy2d_"):
        return _toy2d(name, split)
    if name in PREPARED:
        return _tfds_split(name, split, data_dir)
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


def digest(*splits: Split) -> str:
    """SHA-256, 16 hex digits, of what these splits hold: labels [N] and up to 10,000 of the images of each.

    Points are told by their labels alone, for the last digits of cosines differ between machines.

    >>> data.digest(data.load_split("digits", "test")) == data.digest(data.load_split("digits", "train"))
    False
    """
    found = hashlib.sha256()
    for split in splits:
        found.update(str((split.images.shape, split.num_classes)).encode())
        found.update(np.ascontiguousarray(split.labels, np.int32).tobytes())
        if split.images.dtype == np.uint8:
            found.update(split.images[:: len(split) // _DIGESTED + 1].tobytes())
    return found.hexdigest()[:16]


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


def _digits(split):
    """scikit-learn's 1,797 scans of handwritten digits, 8x8, 0..16; every fifth is a test image."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    assert not isinstance(scans, tuple)  # it is one with return_X_y=True
    test = np.arange(len(scans.target)) % 5 == 4
    chosen = test if split == "test" else ~test
    images = scans.images[chosen].astype(np.uint8)[..., None]
    return Split(images, scans.target[chosen].astype(np.int32), 10, 16.0, (0.0, 1.0), "")


def _toy2d(name, split):
    """Two binary sets in the plane (the paper does not publish those of its Fig. 3): ours.

    toy2d / toy2d_moons: two interleaved half circles; toy2d_pairs: two Gaussians per class on the
    corners of a square, classes on opposite corners.
    """
    count, seed = (1000, 0) if split == "train" else (500, 1)
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % 2).astype(np.int32)
    if name in ("toy2d", "toy2d_moons"):
        angle = rng.uniform(0, np.pi, count)
        upper = np.stack([np.cos(angle), np.sin(angle)], 1)
        lower = np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], 1)
        points = np.where(labels[:, None] == 0, upper, lower) + 0.1 * rng.standard_normal((count, 2))
    elif name == "toy2d_pairs":
        side = np.where(rng.random(count) < 0.5, 1.0, -1.0)
        centre = np.stack([side, np.where(labels == 0, side, -side)], 1)
        points = centre + 0.25 * rng.standard_normal((count, 2))
    else:
        raise UserError(f"unknown data set {name!r}; toy2d_moons and toy2d_pairs exist")
    return Split(points.astype(np.float32), labels, 2, 1.0, None, "")


def default_data_dir() -> pathlib.Path:
    """Where TFDS looks: $TFDS_DATA_DIR or ~/tensorflow_datasets.

    >>> import os, pathlib
    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, TFDS_DATA_DIR="~/sets"):
    ...     data.default_data_dir() == pathlib.Path.home() / "sets"
    True
    """
    return local(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets", "TFDS_DATA_DIR")


def _tfds_split(name, split, data_dir):
    import tensorflow_datasets as tfds

    directory = local(data_dir, "data.dir") if data_dir else default_data_dir()
    official = PREPARED[name]["sizes"][("train", "test").index(split)]
    split = PREPARED[name].get("test", "test") if split == "test" else split
    builder = _builder(tfds, name, directory)
    if builder is None:
        _prepare(name, directory)
        builder = _builder(tfds, name, directory)
    if builder is None or split not in builder.info.splits:
        raise UserError(
            f"{name} under {directory} has no {split} split; delete the folder and prepare it again"
        )
    size = builder.info.splits[split].num_examples
    try:
        source = builder.as_data_source(split=split)
        images = np.empty((size, 32, 32, 3), np.uint8)
        labels = np.empty(size, np.int32)
        for start in range(0, size, 1000):
            index = range(start, min(start + 1000, size))
            for i, example in zip(index, source.__getitems__(list(index)), strict=True):
                images[i], labels[i] = example["image"], example["label"]
    except MemoryError as error:
        raise UserError(
            f"the {size:,} images of {name}/{split} do not fit into this machine's memory ({error})"
        ) from error
    except Exception as error:  # array_record raises its own types for missing and truncated files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot read {name}/{split} under {directory}: {reason}; delete it and prepare it again"
        ) from error
    subset = "" if size == official else f"{size} of the official {official} {split} images"
    return Split(images, labels, PREPARED[name]["num_classes"], 255.0, (0.0, 1.0), subset)


def _builder(tfds: ModuleType, name, directory):
    """The builder of a prepared set that can be read at random, or None."""
    try:
        builder = tfds.builder(name, data_dir=directory)
        builder.info.splits["train"]  # noqa: B018  raises where nothing is prepared
        formats = builder.info.file_format
    except (KeyError, ValueError, FileNotFoundError):
        return None
    if formats is None or formats.value not in ("array_record", "riegeli"):
        raise UserError(
            f"{name} under {directory} is prepared as {formats and formats.value}, which cannot be read "
            f"at random; set data.dir to another folder to have it prepared as array_record"
        )
    return builder


def _prepare(name, directory):
    """Download and prepare in another process: TensorFlow is never imported in this one."""
    hint = f"{name} is not prepared under {directory}"
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"{hint}; install tensorflow-cpu once and run `python -m clustr_jax.prepare {name}` to download "
            f"it, or set data.dir (pretrain.dir for what at_pretrain starts with, or TFDS_DATA_DIR) to a "
            f"folder that has it"
        )
    print(f"{hint}: downloading and preparing it, once ...", flush=True)
    command = [sys.executable, "-m", "clustr_jax.prepare", name, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{hint}; {last.removeprefix('error: ')}")


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


def crop_flip(
    key: Array, images: UInt8[Array, "B H W C"], *, flip: bool = True, crop: bool = True
) -> UInt8[Array, "B H W C"]:
    """Random crop after zero padding by 4 on each side, and a horizontal flip of every second image.

    Of a batch that is spread over devices, each image gets what it would get in the whole.

    >>> images = jnp.ones((2, 8, 8, 1), jnp.uint8)
    >>> moved = data.crop_flip(jax.random.key(0), images)
    >>> moved.shape, moved.dtype, bool(moved.sum() < images.sum())  # zeros came in at the border
    ((2, 8, 8, 1), dtype('uint8'), True)
    """
    height, width, channels = images.shape[1:]
    size = mesh.whole(images.shape[0])
    crop_key, flip_key = jax.random.split(key)
    offsets = mesh.own(jax.random.randint(crop_key, (size, 2), 0, 2 * _PADDING + 1))
    if flip:
        flipped = mesh.own(jax.random.bernoulli(flip_key, 0.5, (size, 1, 1, 1)))
        images = jnp.where(flipped, images[:, :, ::-1], images)
    if not crop:
        return images
    padded = jnp.pad(images, ((0, 0), (_PADDING, _PADDING), (_PADDING, _PADDING), (0, 0)))

    def window(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))

    return jax.vmap(window)(padded, offsets)
