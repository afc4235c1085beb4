"""The images of a folder: their headers first, then what they need of memory, then their pixels.

All faults are collected and told together: the first one by name, the others by number, and the command that
makes a folder without them (`clustr_jax.data.mend`).
"""

import collections
import pathlib
import shlex
import warnings

import numpy as np
from jaxtyping import Int, UInt8

from clustr_jax.data.folder_layout import Fault, look
from clustr_jax.runtime import extras, memory
from clustr_jax.runtime.errors import UserError, cut, first_line, shown

_ORIENTATION = 274  # EXIF tag; viewers turn the image by it, Pillow and other loaders do not
_MODES = {"1": "L", "P": "RGB", "L": "L", "RGB": "RGB"}  # as stored -> as read
# Bytes for each byte of an image: the images, and a copy while they are split or sent to the device.
COPIES = 2
_COMMAND = 230  # characters of a message that the command that mends may take

# {split: (images [N, H, W, C], labels [N], their files' names in the folder)}
Parts = dict[str, tuple[UInt8[np.ndarray, "N H W C"], Int[np.ndarray, "N"], tuple[str, ...]]]


def read(path: pathlib.Path) -> tuple[Parts, tuple[str, ...], tuple[str, ...]]:
    """(images, labels and files of each split, class names, notes); UserError with all that is amiss."""
    layout = look(path)
    files = [f for classes in layout.files.values() for inside in classes.values() for f in inside]
    heads = [_head(file) for file in files]
    shapes = collections.Counter(shape for shape in heads if isinstance(shape, tuple))
    common = shapes.most_common(1)[0][0] if shapes else None
    faults = layout.faults + [fault for fault in heads if isinstance(fault, Fault)]
    if faults or len(shapes) > 1:
        # also what only the pixels tell, so that it is no fault of the next round
        for i, (file, head) in enumerate(zip(files, heads, strict=True)):
            found = _pixels(file) if isinstance(head, tuple) else None
            if isinstance(found, Fault):
                heads[i] = found
                faults.append(found)
        faults += _other_shapes(files, heads, common)
    _raise(faults, path)
    assert common is not None  # without an image there is a fault
    needed = COPIES * len(files) * int(np.prod(common))
    height, width, channels = common
    memory.check(
        needed,
        f"{shown(path)}: {len(files):,} images of {height}x{width}x{channels} bytes and a copy of them need "
        f"memory",
        "take fewer images, or make them smaller: " + _command(path, "--size 64x64"),
    )
    parts: Parts = {}
    for split, classes in layout.files.items():
        labels = [c for c, name in enumerate(layout.names) for _ in classes.get(name, ())]
        ordered = [file for name in layout.names for file in classes.get(name, ())]
        images = np.empty((len(ordered), *common), np.uint8)
        for i, file in enumerate(ordered):
            pixels = _pixels(file)
            if isinstance(pixels, Fault):
                faults.append(pixels)
            elif pixels.shape == common:
                images[i] = pixels
            else:  # a header that lies
                faults.append(Fault("damaged images", f"cannot read the image {shown(file)}: not {common}"))
        names = tuple(file.relative_to(path).as_posix() for file in ordered)
        parts[split] = images, np.asarray(labels, np.int32), names
    _raise(faults, path)
    return parts, tuple(layout.names), tuple(layout.notes)


# What is amiss


def _raise(faults, path):
    """UserError with the first of them, how many there are of each kind, and the command that mends."""
    if not faults:
        return
    kinds = collections.Counter(fault.kind for fault in faults)
    first = faults[0]
    counts = [f"{count:,} {kind}" for kind, count in kinds.items()]
    more = f"; found in all: {', '.join(counts)}" if len(faults) > 1 else ""
    mends = f"; a copy without such: {_command(path)}"
    raise UserError(cut(cut(first.text, 330) + more, 499 - len(mends)) + mends)


def _command(path, options=""):
    command = "python -m clustr_jax.data.mend"
    place = shlex.quote(str(path))
    known = str(path).isprintable() and len(place) < _COMMAND // 4
    return " ".join(filter(None, (command, place if known else "DIR", "MENDED", options)))


def _other_shapes(files, heads, common):
    """Images that are not as most are; one fault for all where most are of no shape."""
    there = [(f, h) for f, h in zip(files, heads, strict=True) if isinstance(h, tuple)]
    shapes = collections.Counter(shape for _, shape in there)
    kind, remedy = "images of another size or kind", "make all images of one size and kind"
    others = [(file, shape) for file, shape in there if shape != common]
    if not others:
        return []
    like = next((file for file, shape in there if shape == common), "none")
    most = f"{_shape(common)} (height x width x channels)"
    if 2 * shapes[common] <= len(there):
        text = (
            f"{shown(others[0][0])} is {_shape(others[0][1])}: {len(there):,} images have {len(shapes):,} "
            f"sizes and kinds, most often {most}; {remedy}"
        )
    else:
        text = (
            f"{shown(others[0][0], 100)} is {_shape(others[0][1])}, {shapes[common]:,} others (such as "
            f"{shown(like, 100)}) are {most}; {remedy}"
        )
    return [Fault(kind, text)] * len(others)


def _shape(shape):
    height, width, channels = shape
    return f"{height}x{width}x{channels}"


# One image


def _head(path) -> tuple[int, int, int] | Fault:
    """(H, W, 1 or 3) without decoding it."""
    return _attempt(path, _shape_of)


def _pixels(path) -> np.ndarray | Fault:
    """uint8 [H, W, 1 or 3]: grey or RGB as stored, a palette or a bitmap spelled out."""
    return _attempt(path, _decoded)


def _attempt(path, look_at):
    try:  # arrays are looked at without it
        from PIL import Image
    except ModuleNotFoundError as error:
        raise extras.explained(error, "a folder of images") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images: their memory is known before it is taken
            with Image.open(path) as image:
                return _fault(path, image) or look_at(path, image)
    except Exception as error:  # Pillow raises many types for damaged files
        return Fault("damaged images", f"cannot read the image {shown(path)}: {first_line(error, 120)}")


def _fault(path, image):
    """What its header says that is not as expected."""
    transparent = "transparency" in image.info
    if transparent or image.mode not in _MODES:
        what = f"{image.mode} with transparency" if transparent else image.mode
        return Fault(
            f"images of mode {what}",
            f"{shown(path)} is of mode {what}; expected 8-bit grey (L) or RGB: convert it",
        )
    if any(";16" in str(part) for tile in image.tile for part in tile):  # Pillow takes the upper 8
        return Fault("images of 16 bits", f"{shown(path)} has 16 bits per channel; expected 8: convert it")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # of a camera, with a preview
        return Fault(
            "animated images", f"{shown(path)} has {image.n_frames} frames; expected one image: convert it"
        )
    return None


def _shape_of(_, image):
    return image.height, image.width, len(_MODES[image.mode]) if image.mode != "P" else 3


def _decoded(path, image):
    if image.getexif().get(_ORIENTATION, 1) != 1:
        return Fault(
            "images stored rotated",
            f"{shown(path)} is stored rotated (its EXIF says how); rotate its pixels, or take that out",
        )
    pixels = np.asarray(image.convert(_MODES[image.mode]))
    return pixels[..., None] if pixels.ndim == 2 else pixels
