"""Own images as a data set: a folder with a folder for each class, or one .npz file.

    DIR/train/<class>/*.png|jpg, DIR/test/<class>/*.png|jpg     classes in alphabetical order
    FILE.npz with x_train, y_train, x_test, y_test              uint8 [N, H, W, C] or [N, H, W], labels 0..Y-1

DIR/val (or x_val, y_val) beside a test split is what is held out. All images have the same size and are
either all grey or all in colour. Whatever is not as expected is told in one line, with what to do; whatever
is there and not read is a note: nothing is resized, converted or left out silently.
"""

import dataclasses
import hashlib
import pathlib
import tarfile
import zipfile

import numpy as np
from jaxtyping import Int, UInt8

from clustr_jax.data import folder_images, folder_npz
from clustr_jax.data.folder_layout import LAYOUT
from clustr_jax.runtime.errors import UserError, cut, shown
from clustr_jax.runtime.paths import local

# A split whose brightest pixel is below this may be one of other levels: 0 to 1, 0 to 16, 0 to 100.
_DARK = 128


@dataclasses.dataclass(frozen=True)
class Part:
    """Images of one split, as stored, their labels and their files."""

    images: UInt8[np.ndarray, "N H W C"]
    labels: Int[np.ndarray, "N"]
    files: tuple[str, ...] = ()  # their names in the folder; none of an .npz


@dataclasses.dataclass(frozen=True)
class Folder:
    """What was read: `test`, `val` are None where there is none; `sha` names the content, not the place."""

    train: Part
    test: Part | None
    class_names: tuple[str, ...]  # empty for an .npz
    sha: str
    val: Part | None = None
    notes: tuple[str, ...] = ()  # what is there and was not read, a sentence each

    @property
    def num_classes(self) -> int:
        """Y."""
        return int(self.train.labels.max()) + 1


def read(path: str | pathlib.Path) -> Folder:
    """The images under `path`, an image folder or an .npz file; UserError with what is amiss.

    found = folder.read("flowers")
    found.train.images.shape, found.class_names      # ((160, 32, 32, 3), ("daisy", "rose"))
    """
    try:
        return _read(path)
    except UserError as error:
        raise UserError(cut(str(error))) from error.__cause__
    except MemoryError as error:
        raise UserError(cut(f"the images of {shown(path)} do not fit into memory ({error})")) from error


def _read(path):
    if not str(path):
        raise UserError(f"data.dir must name your images (--config.data.dir=PATH): {LAYOUT}")
    try:
        path = local(path, "data.dir")
        there, is_folder = path.exists(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, no such user, a null character
        raise UserError(f"data.dir: cannot look at {shown(path)}: {error}") from error
    if not there:
        raise UserError(f"data.dir: there is no {shown(path)}; {LAYOUT}")
    if not is_folder:
        _expect_npz(path)
    parts, names, notes = (folder_images if is_folder else folder_npz).read(path)
    parts = {split: Part(*part) for split, part in parts.items()}
    train, test, val = parts["train"], parts.get("test"), parts.get("val")
    for what, part in (("test", test), ("val", val)):
        if part is not None and part.images.shape[1:] != train.images.shape[1:]:
            raise UserError(
                f"{shown(path)}: the training images are {_shape(train)}, the {what} images {_shape(part)}; "
                f"make them all of one size and kind"
            )
    if len(np.unique(train.labels)) < 2:
        raise UserError(f"{shown(path)} has only one class; expected two or more")
    return Folder(train, test, names, _sha(parts, names), val, (*notes, *_dark(parts)))


def _dark(parts):
    """A note on splits without a bright pixel: of levels of their own, radii would be something else."""
    brightest = {split: int(part.images.max()) for split, part in parts.items() if part.images.size}
    dark = [f"{most} in {split}" for split, most in brightest.items() if most < _DARK]
    if not dark:
        return ()
    return (
        f"the brightest pixel is {', '.join(dark)}, of 255: if that is white, the levels are not 0 to 255, "
        f"and a radius of 8/255 is no small one; multiply them",
    )


def _expect_npz(path):
    """UserError for a file that is no .npz: archives of folders with how they are unpacked."""
    if not path.is_file():
        raise UserError(f"{shown(path)} is neither a file nor a folder; {LAYOUT}")
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"cannot read {shown(path)}: {error.strerror}") from error
    if zipfile.is_zipfile(path):
        return
    if tarfile.is_tarfile(path):
        raise UserError(
            f"{shown(path)} is a tar archive; unpack it (tar -xf) and name the folder that has train/ in it; "
            f"{LAYOUT}"
        )
    raise UserError(f"cannot read {shown(path)} as an .npz file, as np.savez writes it; or {LAYOUT}")


def name(path: str | pathlib.Path) -> str:
    """What the data set is called: the name of its folder, or of its file without .npz."""
    place = local(path, "data.dir").resolve()
    return (place.stem if place.suffix == ".npz" else place.name) or "folder"


def _sha(parts, names):
    """Short SHA-256 of pixels, labels and class names."""
    digest = hashlib.sha256()
    for split in ("train", "test", "val"):
        if split in parts:
            part = parts[split]
            digest.update(str((part.images.shape, names)).encode())
            digest.update(np.ascontiguousarray(part.images))
            digest.update(part.labels.tobytes())
    return digest.hexdigest()[:16]


def _shape(part):
    height, width, channels = part.images.shape[1:]
    return f"{height}x{width}x{channels}"
