"""Own images as a data set: a folder with a folder for each class, or one .npz file.

    DIR/train/<class>/*.png|jpg, DIR/test/<class>/*.png|jpg     classes in alphabetical order
    FILE.npz with x_train, y_train, x_test, y_test              uint8 [N, H, W, C] or [N, H, W], labels 0..Y-1

All images have the same size and are either all grey or all in colour. Whatever is not as expected is
told in one line: nothing is resized, converted or left out silently.
"""

import dataclasses
import hashlib
import os
import pathlib
import zipfile

import numpy as np
from jaxtyping import Int, UInt8

from clustr_jax.errors import UserError, first_line
from clustr_jax.paths import local

_SUFFIXES = (".png", ".jpg", ".jpeg")
_ORIENTATION = 274  # EXIF tag; viewers turn the image by it, Pillow and other loaders do not
_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_LAYOUT = "expected train/<class>/*.png or *.jpg in it (and test/<class>/...), or a file NAME.npz"


@dataclasses.dataclass(frozen=True)
class Part:
    """Images of one split, as stored, and their labels."""

    images: UInt8[np.ndarray, "N H W C"]
    labels: Int[np.ndarray, "N"]


@dataclasses.dataclass(frozen=True)
class Folder:
    """What was read: `test` is None where there is no test folder; `sha` names the content, not the place."""

    train: Part
    test: Part | None
    class_names: tuple[str, ...]  # empty for an .npz
    sha: str

    @property
    def num_classes(self) -> int:
        """Y."""
        return int(self.train.labels.max()) + 1


def read(path: str | pathlib.Path) -> Folder:
    """The images under `path`, an image folder or an .npz file; UserError with the first thing amiss.

    found = folder.read("flowers")
    found.train.images.shape, found.class_names      # ((160, 32, 32, 3), ("daisy", "rose"))
    """
    if not str(path):
        raise UserError(f"data.dir must name your images (--config.data.dir=PATH): {_LAYOUT}")
    path = local(path, "data.dir")
    if not path.exists():
        raise UserError(f"data.dir: there is no {path}; {_LAYOUT}")
    if not path.is_dir() and not zipfile.is_zipfile(path):
        raise UserError(f"cannot read {path} as an .npz file, as np.savez writes it; or {_LAYOUT}")
    train, test, names = _folders(path) if path.is_dir() else _npz(path)
    if test is not None and test.images.shape[1:] != train.images.shape[1:]:
        raise UserError(
            f"{path}: the training images are {_shape(train.images)}, the test images {_shape(test.images)}; "
            f"make them all of one size and kind"
        )
    if len(np.unique(train.labels)) < 2:
        raise UserError(f"{path} has only one class; expected two or more")
    return Folder(train, test, names, _sha(train, test, names))


def name(path: str | pathlib.Path) -> str:
    """What the data set is called: the name of its folder, or of its file without .npz."""
    place = local(path, "data.dir").resolve()
    return (place.stem if place.suffix == ".npz" else place.name) or "folder"


def _sha(train, test, names):
    """Short SHA-256 of pixels, labels and class names."""
    digest = hashlib.sha256()
    for part in (train, test):
        if part is not None:
            digest.update(str((part.images.shape, names)).encode())
            digest.update(part.images.tobytes())
            digest.update(part.labels.tobytes())
    return digest.hexdigest()[:16]


def _shape(images):
    height, width, channels = images.shape[1:]
    return f"{height}x{width}x{channels}"


# Folders of images


def _folders(path):
    """(train, test or None, class names) of an image folder."""
    if not (path / "train").is_dir():
        raise UserError(f"there is no folder {path / 'train'}; {_LAYOUT}")
    names = _subfolders(path / "train")
    train = _images(path / "train", names)
    if not (path / "test").is_dir():
        return train, None, tuple(names)
    unknown = sorted(set(_subfolders(path / "test")) - set(names))
    if unknown:
        raise UserError(f"{path / 'test' / unknown[0]}: there is no class {unknown[0]!r} in {path / 'train'}")
    return (
        train,
        _images(path / "test", [n for n in names if (path / "test" / n).is_dir()], names),
        tuple(names),
    )


def _entries(folder):
    """What is in a folder, by name, hidden files aside."""
    try:
        return sorted(e for e in os.listdir(folder) if not e.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from error


def _subfolders(folder):
    names = _entries(folder)
    for entry in names:
        try:
            entry.encode()
        except UnicodeEncodeError as error:  # bytes of another system's encoding: they cannot be printed
            raise UserError(
                f"{folder} has a class whose name is not UTF-8, {ascii(entry)}; rename it"
            ) from error
        if not (folder / entry).is_dir():
            raise UserError(f"{folder / entry} is not in the folder of a class; {_LAYOUT}")
    if not names:
        raise UserError(f"{folder} has no folders of classes; {_LAYOUT}")
    return names


def _images(folder, present, names=None):
    """The images of all classes, class after class, by name within each."""
    names = names or present
    paths, labels = [], []
    for entry in present:
        files = _entries(folder / entry)
        for file in files:
            if not file.lower().endswith(_SUFFIXES):
                raise UserError(f"{folder / entry / file} is no {', '.join(_SUFFIXES)} file; take it out")
        if not files:
            raise UserError(f"class {entry!r} has no images: {folder / entry} is empty")
        paths += [folder / entry / file for file in files]
        labels += [names.index(entry)] * len(files)
    first = _image(paths[0])
    images = np.empty((len(paths), *first.shape), np.uint8)
    for i, path in enumerate(paths):
        image = first if i == 0 else _image(path)
        if image.shape != first.shape:
            raise UserError(
                f"{path} is {_shape(image[None])}, {paths[0]} is {_shape(first[None])} (height x width x "
                f"channels); make all images of one size and kind"
            )
        images[i] = image
    return Part(images, np.asarray(labels, np.int32))


def _image(path) -> np.ndarray:
    """uint8 [H, W, 1 or 3]: grey or RGB as stored, a palette or a bitmap spelled out."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            transparent = "transparency" in image.info
            mode = {"1": "L", "P": "RGB"}.get(image.mode, image.mode)
            if transparent or mode not in ("L", "RGB"):
                what = f"{image.mode} with transparency" if transparent else image.mode
                raise UserError(f"{path} is of mode {what}; expected 8-bit grey (L) or RGB: convert it")
            if any(";16" in str(part) for tile in image.tile for part in tile):  # Pillow takes the upper 8
                raise UserError(f"{path} has 16 bits per channel; expected 8: convert it")
            if image.getexif().get(_ORIENTATION, 1) != 1:
                raise UserError(
                    f"{path} is stored rotated (its EXIF says how); rotate its pixels, or take that out"
                )
            pixels = np.asarray(image.convert(mode))
    except UserError:
        raise
    except Exception as error:  # Pillow raises many types for damaged files
        raise UserError(f"cannot read the image {path}: {first_line(error)}") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


# One file


def _npz(path):
    """(train, test, no names) of an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [n for n in _ARRAYS if n not in file.files]
            if missing:
                raise UserError(
                    f"{path} has no array {missing[0]}; expected {', '.join(_ARRAYS)}, got "
                    f"{', '.join(file.files) or 'none'}"
                )
            arrays = {n: file[n] for n in _ARRAYS}
    except UserError:
        raise
    except Exception as error:  # NumPy and zipfile raise many types for damaged files
        raise UserError(f"cannot read {path} as an .npz file: {first_line(error)}") from error
    train = _part(path, "train", arrays)
    classes = np.unique(train.labels)
    if not np.array_equal(classes, np.arange(len(classes))):
        absent = next(c for c in range(int(classes[-1]) + 1) if c not in classes)
        raise UserError(
            f"{path}: y_train must have classes 0 to Y-1, got {classes[0]} to {classes[-1]} without {absent}"
        )
    test = _part(path, "test", arrays)
    if test.labels.max() >= len(classes):
        raise UserError(f"{path}: y_test has class {test.labels.max()}, y_train only 0 to {len(classes) - 1}")
    return train, test, ()


def _part(path, split, arrays):
    x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if x.dtype != np.uint8:
        hint = "multiply by 255, round and" if x.dtype.kind == "f" else "if they lie in 0 to 255,"
        raise UserError(f"{path}: x_{split} is {x.dtype}; expected uint8, 0 to 255: {hint} .astype(np.uint8)")
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or not x.size:
        raise UserError(f"{path}: x_{split} has the shape {x.shape}; expected [N, H, W, C] or [N, H, W]")
    if x.shape[-1] not in (1, 3):
        hint = "; channels come last: .transpose(0, 2, 3, 1)" if x.shape[1] in (1, 3) else ""
        raise UserError(f"{path}: x_{split} has {x.shape[-1]} channels {x.shape}; expected 1 or 3{hint}")
    if x.max() <= 1:
        raise UserError(f"{path}: x_{split} has no value above 1; expected uint8, 0 to 255: multiply by 255")
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise UserError(f"{path}: y_{split} is {y.dtype} {y.shape}; expected whole numbers [N]")
    if len(x) != len(y):
        raise UserError(f"{path}: x_{split} has {len(x)} images, y_{split} {len(y)} labels")
    if y.min() < 0:
        raise UserError(f"{path}: y_{split} must have classes 0 to Y-1, got {y.min()}")
    return Part(x, y.astype(np.int32))
