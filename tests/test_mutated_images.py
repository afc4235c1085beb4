"""Folders and .npz files changed at random: read as a whole, or refused in one short line.

Seeded: the changes are the same in each run.
"""

import contextlib
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from clustr_jax import data
from clustr_jax.data import remarks
from clustr_jax.runtime.errors import LONGEST, UserError
from own_images import COMPOSED, DECOMPOSED, arrays, make, section, write

# Any folder, any file

NAMES = (
    "a.png",
    "b.jpg",
    "c.gif",
    ".d.png",
    "notes.txt",
    "x" * 180 + ".png",
    "neu\nline.png",
    "Thumbs.db",
    "e.PNG",
)
FOLDER_NAMES = (
    "val", "Test", "TRAIN", "valid", "testing", ".hidden", "images", "n" * 200, "new\nline", DECOMPOSED,
    COMPOSED, "[b]", "c00 ", "C01", "..x",
)  # fmt: skip
MODES = ("L", "RGB", "RGBA", "LA", "CMYK", "P", "1", "I;16", "I", "F")


def _pick(rng, root, kind="*"):
    there = sorted(p for p in root.rglob(kind) if p != root)
    return there[rng.integers(len(there))] if there else root


def mutate_folder(rng, root):
    """One random change of what is under `root`."""
    place = _pick(rng, root)
    inside = place if place.is_dir() else place.parent
    name = NAMES[rng.integers(len(NAMES))]
    match rng.integers(12):
        case 0:
            shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()
        case 1:
            place.rename(place.parent / FOLDER_NAMES[rng.integers(len(FOLDER_NAMES))])
        case 2:
            (inside / FOLDER_NAMES[rng.integers(len(FOLDER_NAMES))]).mkdir()
        case 3:
            (inside / name).write_bytes(rng.bytes(rng.integers(0, 50)))
        case 4:
            mode = MODES[rng.integers(len(MODES))]
            Image.new(mode, tuple(rng.integers(1, 9, 2).tolist())).save(
                inside / f"new{rng.integers(9)}", format="TIFF" if mode in ("CMYK", "F") else "PNG"
            )
            (inside / f"m{rng.integers(9)}.png").write_bytes(_pick(rng, root, "new*").read_bytes())
        case 5:
            target = _pick(rng, root, "*.png")
            if target.is_file():
                content = bytearray(target.read_bytes())
                for _ in range(rng.integers(1, 6)):
                    content[rng.integers(len(content))] = rng.integers(256)
                target.write_bytes(content[: rng.integers(1, len(content) + 1)])
        case 6:
            shutil.copytree(
                place, inside.parent / f"copy{rng.integers(9)}"
            ) if place.is_dir() else shutil.copy(place, inside.parent / f"copy{rng.integers(9)}.png")
        case 7:
            (inside / f"link{rng.integers(9)}.png").symlink_to(("nowhere", ".", str(root))[rng.integers(3)])
        case 8:
            place.rename(place.parent / place.name.upper())
        case 9:
            for file in list(inside.iterdir()):
                if file.is_file():
                    file.unlink()
        case 10:
            write(inside / f"odd{rng.integers(9)}.png", rng.integers(0, 256, (4, 4), np.uint8))
        case 11:
            (root / ("test.zip", "val.csv", "labels.txt", "test")[rng.integers(4)]).write_text("x")


def mutate_arrays(rng, made):
    """One random change of the arrays of an .npz."""
    name = list(made)[rng.integers(len(made))]
    value = np.asarray(made[name])
    match rng.integers(9):
        case 0:
            del made[name]
        case 1:
            made[name] = value.astype(("f4", "i8", "u1", "?", "c8", "S3", "u8", "f2")[rng.integers(8)])
        case 2:
            made[name] = value[: rng.integers(0, 3)]
        case 3:
            made[name] = value.reshape(-1) if rng.integers(2) else value[None]
        case 4:
            made[name] = made[list(made)[rng.integers(len(made))]]
        case 5:
            big = (2**32, -1, 2**40, 7, 2**31)[rng.integers(5)]
            made[name] = np.where(value.astype("i8") == value.max(initial=0), big, value.astype("i8"))
        case 6:
            made["n" * 200 + str(rng.integers(9))] = value
        case 7:
            made["x_val" if rng.integers(2) else "y_val"] = value
        case 8:
            made[name] = np.moveaxis(value, -1, 0) if value.ndim else value


def mutate_file(rng, path):
    """A damaged byte, a cut, another content."""
    content = bytearray(path.read_bytes())
    match rng.integers(3):
        case 0:
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        case 1:
            del content[rng.integers(1, len(content)) :]
        case 2:
            content[:2000] = rng.bytes(2000)
    path.write_bytes(content)


def verdict(place, rng):
    """What is said of it: "read", or a message, which is a short line that names the place or a setting."""
    sizes = dict(val_size=float(rng.choice([0.0, 0.1, 0.6])), train_size=int(rng.choice([0, 0, 4])))
    try:
        train, val, test = data.splits(section(place, **sizes))
    except UserError as error:
        message = str(error)
        assert "\n" not in message and len(message) < LONGEST, message
        # "own": the folder of this test; a subset is about its setting
        assert "own" in message or "data." in message or "subset of" in message, message
        return message
    for line in remarks.of(train, val, test, attacked=2).lines:
        assert "\n" not in line and len(line) < LONGEST, line
    assert len(train) and len(test) and train.images.dtype == np.uint8
    for split in (train, val, test):
        assert len(split.labels) == len(split.images) and split.labels.max(initial=0) < split.num_classes
    return "read"


@pytest.mark.parametrize("seed", range(10))
def test_mutated_folders(seed, tmp_path):
    """Ten at a time; nothing but a UserError, and nothing is read that has an odd image in it."""
    rng = np.random.default_rng(seed)
    base = make(
        tmp_path / "base",
        rng,
        train=(4, 4, 4),
        test=(2, 2, 2),
        val=(1, 1) if seed % 2 else (),
        size=(4, 4, 3),
    )
    verdicts = []
    for i in range(10):
        own = shutil.copytree(base, tmp_path / f"own{i}")
        for _ in range(rng.integers(1, 4)):
            with contextlib.suppress(OSError):  # a change that the file system refuses is none
                mutate_folder(rng, own)
        verdicts.append(verdict(own, rng))
    assert len(set(verdicts)) > 3


@pytest.mark.parametrize("seed", range(10))
def test_mutated_npz_files(seed, tmp_path):
    rng = np.random.default_rng(seed)
    verdicts = []
    for i in range(10):
        made = arrays(rng)
        for _ in range(rng.integers(1, 3)):
            with contextlib.suppress(ValueError, IndexError, Warning):
                mutate_arrays(rng, made)
        path = tmp_path / f"own{i}.npz"
        np.savez(path, **made)
        if rng.integers(4) == 0:
            mutate_file(rng, path)
        verdicts.append(verdict(path, rng))
    assert len(set(verdicts)) > 3


def test_bytes_of_another_encoding_in_names(tmp_path, rng):
    if sys.platform != "linux":
        pytest.skip("names are text there")
    import os

    make(tmp_path / "own", rng)
    for place in ("own/train", "own/train/c00", "own"):
        target = os.fsencode(tmp_path / place) + b"/caf\xe9.png"
        with open(target, "wb") as file:
            file.write(b"x")
        verdict(tmp_path / "own", rng)
        os.unlink(target)
