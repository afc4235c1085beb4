"""Own images in one .npz file: x_train, y_train, x_test, y_test, and x_val, y_val where there are such."""

import pathlib
import zipfile

import numpy as np

from clustr_jax.data.folder_images import COPIES, Parts
from clustr_jax.runtime import memory
from clustr_jax.runtime.errors import UserError, cut, first_line, listed, shown

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_HELD_OUT = ("x_val", "y_val")


class _Faults(list):
    """What is amiss with the arrays; told together."""

    def tell(self, path):
        """UserError with as many as a message holds."""
        if not self:
            return
        shorter = [cut(text, 260) for text in self]
        told = shorter[0]
        for i, text in enumerate(shorter[1:], 1):
            if len(told) + len(text) > 320:
                told += f"; and {len(shorter) - i} more"
                break
            told += f"; {text}"
        raise UserError(f"{shown(path)}: {told}")


def read(path: pathlib.Path) -> tuple[Parts, tuple[str, ...], tuple[str, ...]]:
    """(images and labels of each split, no class names, notes) of an .npz file."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
        _expect_arrays(path, members)
        with np.load(path, allow_pickle=False) as file:
            names = _wanted(path, file.files)
            _check_memory(path, names)
            arrays = {name: file[name] for name in names}
            unused = [name for name in file.files if name not in names]
    except UserError:
        raise
    except Exception as error:  # NumPy and zipfile raise many types for damaged files
        # NumPy advises to unpickle it, which no data set needs
        pickled = "allow_pickle" in str(error)
        why = "it is damaged, or holds objects and not numbers" if pickled else first_line(error, 150)
        raise UserError(f"cannot read {shown(path)} as an .npz file: {why}; save it again") from error
    faults = _Faults()
    splits = [name[2:] for name in names if name.startswith("x_")]
    images = {split: _images(f"x_{split}", arrays[f"x_{split}"], faults) for split in splits}
    labels = {split: _labels(split, arrays, faults) for split in splits}
    faults.tell(path)
    classes = np.unique(labels["train"])
    if not np.array_equal(classes, np.arange(len(classes), dtype=classes.dtype)):
        present = set(classes.tolist())
        absent = next(c for c in range(len(present) + 1) if c not in present)
        faults.append(
            f"y_train must have classes 0 to Y-1, got {classes[0]} to {classes[-1]} without {absent}"
        )
    else:
        for split in splits[1:]:
            if int(labels[split].max()) >= len(classes):
                known = len(classes) - 1
                faults.append(f"y_{split} has class {labels[split].max()}, y_train only 0 to {known}")
    faults.tell(path)
    # narrowed only now, when all labels are known to fit
    parts: Parts = {split: (images[split], labels[split].astype(np.int32), ()) for split in splits}
    notes = (f"not read: {'array' if len(unused) == 1 else 'arrays'} {listed(unused)}",) if unused else ()
    return parts, (), notes


def _expect_arrays(path, members):
    """UserError for a zip of something else."""
    if members and any(name.endswith(".npy") for name in members):
        return
    raise UserError(
        f"{shown(path)} is a zip archive of {len(members):,} files ({listed(members) or 'none'}), no .npz; "
        f"unpack it (unzip FILE -d DIR) and set data.dir to the folder that has train/ in it; or expected "
        f"arrays {', '.join(_ARRAYS)}, as np.savez writes them"
    )


def _wanted(path, there):
    """The arrays to read, training first; UserError where one is missing."""
    missing = [name for name in _ARRAYS if name not in there]
    if missing:
        raise UserError(
            f"{shown(path)} has no array {' nor '.join(missing)}; expected {', '.join(_ARRAYS)}, got "
            f"{listed(there, 8) or 'none'}"
        )
    held_out = [name for name in _HELD_OUT if name in there]
    if len(held_out) == 1:
        other = next(name for name in _HELD_OUT if name not in held_out)
        raise UserError(f"{shown(path)} has {held_out[0]} and no {other}; add that, or leave both out")
    return (*_ARRAYS, *held_out)


def _check_memory(path, names):
    """UserError where the arrays and a copy of them are more than there is, by their headers."""
    needed, sizes = 0, []
    with zipfile.ZipFile(path) as archive:
        for name in names:
            with archive.open(f"{name}.npy") as member:
                version = np.lib.format.read_magic(member)
                header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = header(member)
            size = dtype.itemsize
            for side in shape:  # in whole numbers without a limit
                size *= int(side)
            needed += COPIES * size
            sizes.append(f"{name} {shape}" if len(shape) < 5 else name)
    memory.check(
        needed,
        f"{shown(path)}: {', '.join(sizes[::2])} and a copy of them need memory",
        "take fewer images, or make them smaller",
    )


def _images(name, x, faults):
    """uint8 [N, H, W, 1 or 3]; what is amiss is added to `faults`."""
    if x.dtype != np.uint8:
        hint = "multiply by 255, round and" if x.dtype.kind == "f" else "if they lie in 0 to 255,"
        faults.append(f"{name} is {x.dtype}; expected uint8, 0 to 255: {hint} .astype(np.uint8)")
        return x
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or not x.size:
        faults.append(f"{name} has the shape {x.shape}; expected [N, H, W, C] or [N, H, W]")
    elif x.shape[-1] not in (1, 3):
        hint = "; channels come last: .transpose(0, 2, 3, 1)" if x.shape[1] in (1, 3) else ""
        faults.append(f"{name} has {x.shape[-1]} channels {x.shape}; expected 1 or 3{hint}")
    elif x.max() <= 1:
        faults.append(f"{name} has no value above 1; expected uint8, 0 to 255: multiply by 255")
    return np.ascontiguousarray(x)


def _labels(split, arrays, faults):
    """Whole numbers [N] of any type, not yet narrowed; what is amiss is added to `faults`."""
    x, y, name = arrays[f"x_{split}"], arrays[f"y_{split}"], f"y_{split}"
    if y.ndim != 1 or y.dtype.kind not in "iu":
        hint = ""
        if y.ndim == 2:
            hint = ": .ravel()" if y.shape[1] == 1 else ": of one-hot labels .argmax(1)"
        elif y.ndim == 1 and y.dtype.kind == "f":
            hint = ": .astype(np.int64)"
        faults.append(f"{name} is {y.dtype} {y.shape}; expected whole numbers [N]{hint}")
    elif not x.ndim or len(x) != len(y):
        faults.append(f"x_{split} has {len(x) if x.ndim else 'no'} images, {name} {len(y)} labels")
    elif len(y) and y.min() < 0:
        faults.append(f"{name} must have classes 0 to Y-1, got {y.min()}")
    return y
