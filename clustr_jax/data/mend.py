"""python -m clustr_jax.data.mend DIR OUT [--size HxW]: a copy of an image folder that clustr_jax can read.

Every picture under DIR/<split>/<class>/, in folders inside it as well, becomes an 8-bit PNG in OUT. It gets
the size (or --size) and the kind, grey or colour, that most of them have. It is turned as its EXIF says;
transparency becomes white; of 16 bits the upper 8 are kept (where any file uses them), of animations the
first frame. Left out are pictures that cannot be read, classes that are not in train, and training images
whose pixels are in another split as well. All of it is told. Other files and hidden ones stay behind, and DIR
is not changed.
"""

import argparse
import collections
import pathlib
import re
import sys
import warnings

import numpy as np
from PIL import Image, ImageOps

from clustr_jax.data import shares
from clustr_jax.data.folder_layout import (
    entries_of,
    is_picture,
    nearly,
    pictures_under,
    roles_of,
    same_name,
)
from clustr_jax.runtime.errors import UserError, first_line, listed, shown
from clustr_jax.runtime.paths import local
from clustr_jax.runtime.programs import program

_DEEP = ("I", "I;16", "I;16B")  # Pillow's modes of 16 bits
_SPLITS = ("test", "val", "train")  # the last one gives up what the others have as well


@program(computes=False)
def main(argv: list[str]) -> None:
    """The copy, and what was done; UserError where there is nothing to read, or OUT is not empty."""
    parser = argparse.ArgumentParser(
        prog="python -m clustr_jax.data.mend",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dir", help="the image folder")
    parser.add_argument("out", help="where the copy goes: a folder that is empty or not there")
    parser.add_argument("--size", help="height x width of all images, e.g. 32x32; that of most without it")
    args = parser.parse_args(argv)
    source, out = local(args.dir, "DIR"), local(args.out, "OUT")
    for line in copy(source, out, _size(args.size)):
        print(line)


def copy(source: pathlib.Path, out: pathlib.Path, size: tuple[int, int] | None = None) -> list[str]:
    """Write the copy; what was done, a sentence each. `size` is (height, width)."""
    if not source.is_dir():
        raise UserError(f"{shown(source)} is no folder; expected one of images")
    if out.exists() and (not out.is_dir() or entries_of(out)):
        raise UserError(f"{shown(out)} is there already; name a folder that is not")
    files = _files(source)
    if not files:
        raise UserError(f"{shown(source)} has no images in train/<class>/, and none in <class>/")
    done, left_out, sizes, modes = collections.Counter(), [], collections.Counter(), collections.Counter()
    deep = 0  # the most levels that a picture of 16 bits uses: one shift for all
    for _, _, file in files:
        head = _head(file)
        if head is not None:
            sizes[head[0]] += 1
            modes[head[1]] += 1
            deep = max(deep, head[2])
    if not sizes:
        raise UserError(f"none of the {len(files):,} images under {shown(source)} can be read")
    size, mode = size or sizes.most_common(1)[0][0], modes.most_common(1)[0][0]
    trained = {name for split, name, _ in files if split == "train"}
    seen, names = set(), collections.Counter()
    for split, name, file in sorted(files, key=lambda entry: _SPLITS.index(entry[0])):
        try:
            image = _picture(file, size, mode, deep, done) if name in trained else None
            why = "its class has no training images"
        except Exception as error:  # Pillow raises many types for damaged files
            image, why = None, first_line(error, 80)
        content = None if image is None else int(shares.contents(np.asarray(image)[None])[0])
        if image is not None and split == "train" and content in seen:
            image, why = None, "another split has the same pixels"
        if image is None:
            left_out.append(f"{shown(file)} ({why})")
            continue
        if split != "train":
            seen.add(content)
        place = out / split / name
        place.mkdir(parents=True, exist_ok=True)
        names[place, file.stem] += 1
        count = names[place, file.stem]
        image.save(place / (f"{file.stem}.png" if count == 1 else f"{file.stem}-{count}.png"))
    told = [f"{len(files) - len(left_out):,} images of {size[0]}x{size[1]}, {mode}, in {shown(out)}"]
    told += [f"{count:,} {what}" for what, count in sorted(done.items())]
    return told + ([f"{len(left_out):,} left out: {listed(left_out, 10, 200)}"] if left_out else [])


def _size(text):
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not match:
        raise UserError(f"--size is HEIGHTxWIDTH, e.g. 32x32, got {shown(text)}")
    return int(match[1]), int(match[2])


def _files(source):
    """[(split, class, file)]; a folder of classes without splits is all train."""
    places, others = roles_of(source), nearly(source)
    if others or (places and "train" not in places):
        there = [*others, *(place.name for place in places.values())]
        raise UserError(
            f"{shown(source)} has {listed(there)}; expected splits called train, test and val, or folders of "
            f"classes alone: rename them, so that no split is taken for a class"
        )
    places = places or {"train": source}
    found = []
    for split, place in places.items():
        for entry in entries_of(place):
            if entry.startswith(".") or not (place / entry).is_dir() or not pictures_under(place / entry):
                continue
            inside = sorted(p for p in (place / entry).rglob("*") if is_picture(p.name) and p.is_file())
            found += [
                (split, same_name(entry), p)
                for p in inside
                if not any(part.startswith(".") for part in p.relative_to(place).parts)
            ]
    return found


def _head(file):
    """((height, width) as it is to be seen, "L" or "RGB", its largest level of 16 bits or 0).

    None where it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                grey = image.mode in ("1", "L", "LA", "I", "I;16", "I;16B", "F")
                turned = image.getexif().get(274, 1) in (5, 6, 7, 8)
                deep = int(np.asarray(image).max()) if image.mode in _DEEP else 0
                return (image.size if turned else image.size[::-1]), "L" if grey else "RGB", deep
    except Exception:  # it is left out, and named, when its pixels are wanted
        return None


def _picture(file, size, mode, deep, done):
    """The image as all others are, `deep` the largest level of them; what was done to it is counted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if opened.getexif().get(274, 1) != 1:
                done["turned as their EXIF says"] += 1
    if image.mode in _DEEP:
        levels = np.asarray(image).astype(np.int64)
        image = Image.fromarray((levels >> 8 if deep > 255 else levels).astype(np.uint8))
        done["made of 8 bits"] += 1
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert(mode)
        done["put on white where they were transparent"] += 1
    if image.mode != mode:
        done[f"made {'grey' if mode == 'L' else 'RGB'}"] += image.mode not in ("1", "P")
        image = image.convert(mode)
    if image.size != size[::-1]:
        done["resized"] += 1
        image = image.resize(size[::-1], Image.Resampling.LANCZOS)
    return Image.fromarray(np.asarray(image))  # without what was said about it


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
