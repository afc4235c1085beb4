"""Where images lie in a folder: its splits, classes and files, and what else is there."""

import dataclasses
import os
import pathlib
import unicodedata

from clustr_jax.runtime.errors import UserError, listed, shown

SUFFIXES = (".png", ".jpg", ".jpeg")
# Pictures of other formats: images that somebody forgot to convert, and no stray files.
PICTURES = (*SUFFIXES, ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
LAYOUT = "expected train/<class>/*.png or *.jpg in it (and test/<class>/...), or a file NAME.npz"
# What folders of splits are called, in any case.
ROLES = {
    "train": ("train",),
    "test": ("test",),
    "val": ("val", "valid", "validation", "dev"),
}
_NEARLY = {"training": "train", "testing": "test", "tests": "test", "eval": "test", "evaluation": "test"}


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that keeps a folder from being read: `kind` is counted, `text` is told of the first one."""

    kind: str  # "1 of these", "2 of these": in the plural
    text: str


@dataclasses.dataclass
class Layout:
    """The image files of each split, by class; what is amiss, and what is not read."""

    files: dict[str, dict[str, list[pathlib.Path]]]  # split -> class -> files by name
    faults: list[Fault]
    notes: list[str]

    @property
    def names(self) -> list[str]:
        """The classes, those of the training images, in alphabetical order."""
        return sorted(self.files["train"])


def look(path: pathlib.Path) -> Layout:
    """What is under `path`; UserError where the splits or classes themselves are not clear."""
    places, notes = _splits(path)
    found = Layout({}, [], notes)
    hidden = _Hidden(path)
    for entry in entries_of(path):
        if entry.startswith("."):
            hidden.see(path / entry)
    for split, place in places.items():
        found.files[split] = _classes(place, found.faults, hidden)
    for split in ("test", "val"):
        for name in sorted(set(found.files.get(split, ())) - set(found.files["train"])):
            alike = [other for other in found.names if reading(other) == reading(name)]
            hint = (
                f", but {ascii(alike[0])}: rename one" if alike else "; take it out, or train on it as well"
            )
            found.faults.append(
                Fault(
                    "classes without training images",
                    f"{shown(places[split] / name)}: there is no class {shown(name, 40)!r} in "
                    f"{shown(places['train'])}{hint}",
                )
            )
    found.notes += [*hidden.notes(), *_alike(found.names)]
    return found


def _alike(names):
    """A note on classes that a reader takes for one: Cat and cat, full-width letters; or none."""
    read = {}
    for name in names:
        read.setdefault(reading(name), []).append(name)
    same = [
        " and ".join(ascii(shown(name, 40)) for name in group[:3]) for group in read.values() if group[1:]
    ]
    if not same:
        return []
    return [
        f"classes that read alike are told apart: {listed(same, at_most=100)}; merge their folders if "
        "they are one"
    ]


# Splits


def roles_of(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """{split: its folder}; UserError where two folders mean the same split."""
    entries, places = entries_of(path), {}
    for split, called in ROLES.items():
        there = [e for e in entries if e.casefold() in called and (path / e).is_dir()]
        if len(there) > 1:
            raise UserError(
                f"{shown(path)} has {listed(there)}, which all mean {split}; keep one, and merge or rename "
                f"the others"
            )
        if there:
            places[split] = path / there[0]
    return places


def nearly(path: pathlib.Path) -> list[str]:
    """The folders whose names are those of splits by another convention: training, tests."""
    return [e for e in entries_of(path) if e.casefold() in _NEARLY and (path / e).is_dir()]


def _splits(path):
    """({split: its folder}, notes on what else is there)."""
    entries, places = entries_of(path), roles_of(path)
    if "train" not in places:
        raise UserError(f"there is no folder {shown(path / 'train')}; {_instead(path, entries)}")
    others = [e for e in entries if path / e not in places.values() and not e.startswith(".")]
    if "test" not in places:
        _expect_no_test(path, places, others)
    notes = [f"not read: {listed(others)}, beside train"] if others else []
    return places, notes


def _expect_no_test(path, places, others):
    """UserError where something else may be the test images: a fifth of train is no stand-in for them."""
    remedy = "rename it to test to test on it, or take it out to have a fifth of train held out for the test"
    if "val" in places:
        raise UserError(f"{shown(path)} has {places['val'].name} and train, and no folder test: {remedy}")
    for entry in others:
        role = pathlib.PurePath(entry).stem.casefold()
        if role in (*ROLES["test"], *ROLES["val"]) or _NEARLY.get(role) == "test":
            raise UserError(
                f"{shown(path / entry)} is no folder test with test images in it: make that of it, or take "
                f"it out to have a fifth of train held out for the test"
            )
        count = pictures_under(path / entry) if (path / entry).is_dir() else 0
        if count:
            raise UserError(
                f"{shown(path / entry)} has {count:,} images and is none of train, test and val: {remedy}"
            )


def _instead(path, entries):
    """What is there where train/ is expected, and how it becomes what is expected."""
    folders = [e for e in entries if (path / e).is_dir() and not e.startswith(".")]
    for entry in folders:
        if _NEARLY.get(entry.casefold()) == "train":
            return f"rename {shown(path / entry)} to train; {LAYOUT}"
        if any(e.casefold() == "train" and (path / entry / e).is_dir() for e in entries_of(path / entry)):
            return f"{shown(path / entry)} has one: set data.dir to that"
    if path.name.casefold() in ROLES["train"] and folders:
        return f"set data.dir to the folder above it, {shown(path.absolute().parent)}"
    loose = [e for e in entries if is_picture(e)]
    if loose:
        return f"it has {len(loose):,} images itself: put those of each class into train/<class>/; {LAYOUT}"
    classes = [e for e in folders if any(is_picture(f) for f in entries_of(path / e))]
    if classes:
        return f"if {listed(classes)} are the classes, move them into a folder train there; {LAYOUT}"
    return LAYOUT


# Classes


def _classes(place, faults, hidden):
    """{class: its files} of one split."""
    found, spelled = {}, {}
    entries = entries_of(place)
    loose = [e for e in entries if not e.startswith(".") and not (place / e).is_dir()]
    for entry in loose:
        faults.append(
            Fault(
                "files beside the folders of classes",
                f"{shown(place / entry)} is not in the folder of a class; move it into one, or take it out",
            )
        )
    for entry in entries:
        if entry in loose:
            continue
        if entry.startswith("."):
            hidden.see(place / entry)
            continue
        try:
            entry.encode()
        except UnicodeEncodeError as error:  # bytes of another system's encoding: they cannot be printed
            raise UserError(
                f"{shown(place)} has a class whose name is not UTF-8, {shown(ascii(entry))}; rename it"
            ) from error
        name = same_name(entry)
        other = spelled.setdefault(visible(name), entry)
        if other != entry:
            raise UserError(
                f"{shown(place)} has two folders called {shown(name, 40)!r}, spelled with different "
                f"Unicode characters ({shown(ascii(other), 60)} and {shown(ascii(entry), 60)}); merge them, "
                f"or rename one"
            )
        found[name] = _files(name, place / entry, faults, hidden)
    if not found:
        count = sum(is_picture(e) for e in loose)
        what = f"has {count:,} images and no folders of classes" if count else "has no folders of classes"
        raise UserError(f"{shown(place)} {what}; {LAYOUT}")
    return found


def _files(name, place, faults, hidden):
    """The image files of one class, by name."""
    files, before = [], len(faults)
    for entry in entries_of(place):
        path = place / entry
        if entry.startswith("."):
            hidden.see(path)
        elif path.is_dir():
            faults.append(_inner(name, path))
        elif entry.lower().endswith(SUFFIXES):
            files.append(path)
        else:
            what = "convert it" if is_picture(entry) else "take it out"
            faults.append(
                Fault("files of other kinds", f"{shown(path)} is no {', '.join(SUFFIXES)} file; {what}")
            )
    if not files and len(faults) == before:
        faults.append(
            Fault(
                "classes without images",
                f"class {shown(name, 40)!r} has no images: {shown(place)} is empty; fill it, or take it out",
            )
        )
    return files


def _inner(name, path):
    """A folder inside that of a class."""
    count = pictures_under(path)
    if not count:
        text = f"{shown(path)} is a folder without images in the class {shown(name, 40)!r}; take it out"
        return Fault("folders inside classes", text)
    return Fault(
        "folders inside classes",
        f"{shown(path)} is a folder with {count:,} images, and images lie in the folder of their class "
        f"itself: move them up into {shown(path.parent)}",
    )


def same_name(name: str) -> str:
    """A name in the one Unicode form (NFC) in which classes are compared; macOS stores another."""
    return unicodedata.normalize("NFC", name)


def visible(name: str) -> str:
    """What is to be seen of a name: one Unicode form, no spaces at its ends, no characters without width."""
    text = "".join(c for c in same_name(name) if unicodedata.category(c) not in ("Cf", "Cc"))
    return " ".join(text.split())


# Capitals of other alphabets that look like Latin ones (the small letters come to them by `upper`).
_LOOK_ALIKES = str.maketrans(
    "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0423\u0425"  # Cyrillic
    "\u0405\u0406\u0408\u04ae\u04ba\u0500\u051a\u051c"
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7",  # Greek
    "ABEKMHOPCTYXSIJYHDQWABEZHIKMNOPTYX",
)


def reading(name: str) -> str:
    """What a name reads as, whatever the case, width (NFKC) and alphabet of its letters."""
    wide = unicodedata.normalize("NFKC", visible(name))
    return visible(unicodedata.normalize("NFKC", wide.upper()).translate(_LOOK_ALIKES))


class _Hidden:
    """What is called .something and has or is an image: it is passed over, and counted."""

    def __init__(self, root):
        self.root, self.found, self.images = root, [], 0

    def see(self, path):
        """One hidden file or folder."""
        count = pictures_under(path) if path.is_dir() else int(is_picture(path.name))
        if count:
            self.found.append(path)
            self.images += count

    def notes(self):
        """One note, or none."""
        names = [str(path.relative_to(self.root)) for path in self.found]
        return [f"not read: {self.images:,} hidden images ({listed(names)})"] if names else []


# Files


def entries_of(folder: pathlib.Path) -> list[str]:
    """What is in a folder, by name."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"cannot read {shown(folder)}: {error.strerror}") from error


def is_picture(name: str) -> bool:
    """Whether a file is an image, by its name."""
    return name.lower().endswith(PICTURES)


def pictures_under(folder: pathlib.Path) -> int:
    """How many images there are in a folder and those inside it."""
    return sum(is_picture(file) for _, _, files in os.walk(folder) for file in files)
