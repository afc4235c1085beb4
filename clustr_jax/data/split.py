"""One split of a data set as arrays, some examples of one, and what tells splits apart."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from clustr_jax.runtime.errors import shown

_DIGESTED = 10_000  # images of a split that its digest looks at


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
    files: tuple[str, ...] = ()  # of an image folder: the name of each image

    def __len__(self):
        return len(self.labels)

    def take(self, index: slice | Sequence[int] | np.ndarray, what: str) -> "Split":
        """The examples at `index`; `what` is added to the description of the subset.

        >>> split.take(slice(0, 10), "first ten").subset
        'first ten'
        """
        subset = f"{self.subset}, {what}" if self.subset else what
        files = tuple(np.asarray(self.files, object)[index]) if self.files else ()
        return dataclasses.replace(
            self, images=self.images[index], labels=self.labels[index], subset=subset, files=files
        )

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

    def take(self, index: slice | Sequence[int] | np.ndarray) -> "Examples":
        """Those at `index`, with the ids they have.

        >>> examples.take([7, 3]).ids.tolist()
        [7, 3]
        """
        return Examples(self.x[index], self.y[index], self.ids[index])


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
