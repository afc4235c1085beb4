"""The witness of a judgement: every adversarial image, and what is said of them, checked with NumPy alone.

    judgement.json     the figure, and the hashes of the arrays below
    witness.npz        x [N, ...], y, ids; broken [M] (places in x), x_adv [M, ...]; attack [N], restart [N];
                       eps, norm, bounds; near [K], x_near [K, ...]: nearer ones, or beyond eps

`attack` names what broke each image first, "clean" where it was misclassified before, "" where nothing did.
`check` needs no trust in whoever wrote it, and no JAX (nor jaxtyping, which brings it): it measures
distances, compares hashes, and counts.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from clustr_jax.evaluation import answers, distances, intervals, wording
from clustr_jax.runtime import rounding
from clustr_jax.runtime.errors import UserError, first_line, shown
from clustr_jax.runtime.paths import local

JSON, NPZ = "judgement.json", "witness.npz"


@dataclasses.dataclass(frozen=True)
class Witness:
    """The arrays of witness.npz."""

    x: np.ndarray
    y: np.ndarray
    ids: np.ndarray
    broken: np.ndarray
    x_adv: np.ndarray
    attack: np.ndarray
    restart: np.ndarray
    eps: float
    norm: str
    bounds: tuple[float, float] | None
    near: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    x_near: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 1), np.float32))

    def all_images(self) -> np.ndarray:
        """[N, ...] the adversarial image of each one, x where there is none."""
        full = self.x.copy()
        full[self.broken] = self.x_adv
        return full


def of(
    x: np.ndarray,
    y: np.ndarray,
    ids: np.ndarray,
    x_adv: np.ndarray,
    attack: np.ndarray,
    restart: np.ndarray,
    *,
    eps: float,
    norm: str,
    bounds: tuple[float, float] | None,
    near: Any = None,
) -> Witness:
    """Of all images [N, ...]: those that an attack broke are kept; of `near` (found.Near) what is nearer."""
    attack = np.asarray(attack).astype(str)
    broken = np.flatnonzero((attack != "") & (attack != "clean")).astype(np.int32)
    x, x_adv = np.asarray(x, np.float32), np.asarray(x_adv, np.float32)
    ids, restart = np.asarray(ids, np.int32), np.asarray(restart, np.int32)
    y = np.asarray(y, np.int32)
    found = Witness(x, y, ids, broken, x_adv[broken], attack, restart, float(eps), norm, bounds)
    if near is None:
        return found
    place = np.flatnonzero(near.distance < distances.of(found)).astype(np.int32)
    return dataclasses.replace(found, near=place, x_near=near.images[place])


def hashes(found: Witness) -> dict[str, str]:
    """SHA-256 of each array that a judgement is about, with its type and shape."""
    names = ("x", "y", "ids", "x_adv", "attack", "restart", *(("near", "x_near") if len(found.near) else ()))
    return {name: sha256(getattr(found, name)) for name in names}


def sha256(array: np.ndarray) -> str:
    """Of an array's type, shape and bytes."""
    array = np.ascontiguousarray(array)
    if array.dtype.kind == "U":  # whatever length the longest name has
        content = "\n".join(array.ravel().tolist()).encode()
        return hashlib.sha256(f"text {array.shape} ".encode() + content).hexdigest()
    return hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode() + array.tobytes()).hexdigest()


def write(path: pathlib.Path, found: Witness) -> None:
    """witness.npz, in one piece."""
    box = np.zeros(0) if found.bounds is None else np.array(found.bounds, np.float64)
    arrays = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)} | {"bounds": box}
    temporary = path.with_name(f"{path.name}.tmp.npz")
    np.savez_compressed(temporary, **arrays)  # pyright: ignore[reportArgumentType]
    temporary.replace(path)


def read(folder: str | pathlib.Path) -> tuple[dict, Witness]:
    """(judgement.json, witness.npz) of a folder; UserError where one is missing or cannot be read."""
    folder = local(folder, "folder")
    for name in (JSON, NPZ):
        if not (folder / name).is_file():
            raise UserError(
                f"{shown(folder, 150)} has no {name}; give the folder that clustr_jax.judge(..., folder=) or "
                f"Judgement.save wrote"
            )
    try:
        content = json.loads((folder / JSON).read_text(encoding="utf-8"))
        with np.load(folder / NPZ, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        optional = {"near", "x_near"} - arrays.keys()  # which earlier ones do not have
        names = [f.name for f in dataclasses.fields(Witness) if f.name not in optional]
        box = arrays["bounds"]
        arrays["bounds"] = (float(box[0]), float(box[1])) if box.size else None
        arrays |= {"eps": float(arrays["eps"]), "norm": str(arrays["norm"])}
        return content, Witness(**{name: arrays[name] for name in names})
    except Exception as error:  # JSON, zip and NumPy raise many types for damaged files
        raise UserError(f"{shown(folder, 150)} cannot be read: {first_line(error, 150)}") from error


@dataclasses.dataclass
class Verification:
    """`ok`, and what was looked at in order: (what, whether it holds, what was found)."""

    lines: list[tuple[str, bool, str]] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all of it holds."""
        return all(good for _, good, _ in self.lines)

    def add(self, what: str, good: bool | np.bool_, found: object = "") -> None:
        """One more line."""
        self.lines.append((what, bool(good), str(found)))

    def __str__(self):
        rows = [f"{'ok  ' if good else 'FAIL'}  {what}: {found}" for what, good, found in self.lines]
        return "\n".join([*rows, "verified" if self.ok else "NOT verified"])


def check(content: dict, found: Witness, model: Callable | Any = None) -> Verification:
    """All that the files say, measured again; with `model` (images -> logits [B, Y]) its answers too."""
    done = Verification()
    try:
        found, whole = _files(done, content, found)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        done.add(f"{JSON} is as a judgement is written", False, first_line(error, 80))
        return done
    if whole and model is not None:
        answers.check(done, found, model)
    return done


def _files(done: Verification, content: dict, found: Witness) -> tuple[Witness, bool]:
    """What can be asked without the model; (what it may be asked about, whether the arrays fit together)."""
    n = len(found.y)
    lengths = {name: len(getattr(found, name)) for name in ("x", "y", "ids", "attack", "restart")}
    same = set(lengths.values()) == {n} and len(found.broken) == len(found.x_adv)
    done.add("arrays are of one length", same, f"{n} images, {len(found.broken)} adversarial ones")
    if not same:
        return found, False
    if found.broken.size and not 0 <= found.broken.min() <= found.broken.max() < n:
        done.add("adversarial images belong to images", False, f"places up to {found.broken.max()}")
        return found, False
    for name, digest in hashes(found).items():
        done.add(f"sha256 of {name}", digest == content.get("sha256", {}).get(name), digest[:16])
    for name in ("eps", "norm"):
        done.add(
            f"{name} is that of the judgement",
            getattr(found, name) == content.get(name),
            getattr(found, name),
        )
    box = None if content.get("bounds") is None else tuple(content["bounds"])
    done.add("box is that of the judgement", found.bounds == box, found.bounds)
    _inside(done, found)
    if (content.get("distances") is not None or len(found.near)) and not _near(done, content, found):
        found = dataclasses.replace(found, near=found.near[:0])  # nothing to ask the model
    _distinct(done, found)
    _counts(done, content, found)
    _figures(done, content, found)
    return found, True


def _inside(done, found):
    finite = bool(np.isfinite(found.x).all() and np.isfinite(found.x_adv).all())
    done.add("pixels are finite", finite, finite)
    pixels = int(np.prod(found.x.shape[1:]))  # where nothing was broken -1 has no answer
    delta = (found.x_adv.astype(np.float64) - found.x[found.broken]).reshape(len(found.broken), pixels)
    size = np.abs(delta).max(axis=1, initial=0.0) if found.norm == "linf" else np.linalg.norm(delta, axis=1)
    largest = float(size.max(initial=0.0))
    inside = bool(np.all(rounding.outside(found.x_adv, found.x[found.broken], found.eps, found.norm) <= 0))
    good = found.norm in ("linf", "l2") and inside
    done.add(f"changes are inside the {found.norm} ball", good, f"{largest:.8g} of {found.eps:.8g}")
    if found.bounds is not None:
        low, high = (
            min(a.min(initial=np.inf) for a in (found.x, found.x_adv)),
            max(a.max(initial=-np.inf) for a in (found.x, found.x_adv)),
        )
        good = not found.x.size or (low >= found.bounds[0] and high <= found.bounds[1])
        done.add("images are inside the box", good, f"{low:.6g} to {high:.6g}")


def _near(done, content, found):
    """The nearest images, and the curve over the radius that they make; returns whether they can be shown."""
    n, pixels = len(found.y), found.x_near
    good = len(found.near) == len(pixels) and len(np.unique(found.near)) == len(found.near)
    good = good and (not len(pixels) or pixels.shape[1:] == found.x.shape[1:])
    good = good and (not len(pixels) or (found.near.min() >= 0 and found.near.max() < n))
    done.add("nearest images belong to images that are right", good, f"{len(found.near)} of {n}")
    if not good:
        return False
    if len(pixels):
        box = found.bounds or (-np.inf, np.inf)
        finite = bool(np.isfinite(pixels).all() and pixels.min() >= box[0] and pixels.max() <= box[1])
        done.add("nearest images are finite and inside the box", finite, finite)
    distance = distances.of(found)
    kept = found.attack == ""
    nearest = float(distance[kept].min(initial=np.inf))
    done.add("of an image that is left none is within eps", nearest > found.eps, f"{nearest:.6g}")
    told = content.get("distances") if isinstance(content.get("distances"), dict) else {}
    try:
        own = distances.summary(distance, [float(radius) for radius, _ in told.get("curve", ())])
    except (TypeError, ValueError):
        own = {"curve": [], "median": -1.0, "known": -1.0}
    for name in ("median", "known", "curve"):
        what = own[name] if name != "curve" else f"{len(own[name])} radii"
        done.add(f"distances: {name} is that of the images", _close(told.get(name), own[name]), what)
    return True


def _distinct(done, found):
    """Nothing is counted twice; a data set may have a few copies of an image."""
    copies = [
        len(a) - len(np.unique(a.reshape(len(a), -1), axis=0)) if a.size else 0 for a in (found.ids, found.x)
    ]
    done.add("ids are distinct", not copies[0], f"{copies[0]} copies")
    most = answers.most_ties(len(found.x))
    done.add("images are distinct", copies[1] <= most, f"{copies[1]} copies (at most {most})")


def _figures(done, content, found):
    """What follows from the arrays and the checks: counted, and worded, again."""
    n, kept = len(found.y), int(np.sum(found.attack == ""))
    right = n - int(np.sum(found.attack == "clean"))
    constant = float(np.unique(found.y, return_counts=True)[1].max() / n) if n else None
    own = {"n": n, "clean": right / n if n else 0.0, "clean_interval": intervals.wilson(right, n)}
    own["constant"] = constant
    for name, value in own.items():
        shown_value = value if name == "n" or value is None else np.round(value, 4)
        done.add(f"{name} is counted from the arrays", _close(content.get(name), value), shown_value)
    done.add("images left", _member(content, "counts", "robust") == kept, f"{kept} of {n}")
    counted = content | own | {"robust": kept / n if n else 0.0, "eps": found.eps, "norm": found.norm}
    for name, make in (("failed", wording.failed), ("status", wording.status), ("verdict", wording.verdict)):
        try:
            wanted = make(counted)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # checks that are none
            done.add(f"{name} is that of the checks", False, first_line(error, 80))
            continue
        done.add(f"{name} is that of the checks", content.get(name) == wanted, wanted)


def _close(given, wanted) -> bool:
    """Equal numbers, or lists of them, but for rounding; False for what is none."""
    if wanted is None or given is None:
        return given is wanted
    try:
        given, wanted = np.asarray(given, np.float64), np.asarray(wanted, np.float64)
    except (TypeError, ValueError):
        return False
    return given.shape == wanted.shape and bool(np.all(np.abs(given - wanted) < 1e-9))


def _member(content, *names):
    """content[a][b]..., None where there is none."""
    for name in names:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _counts(done, content, found):
    n, classes = len(found.y), content.get("classes")
    whole = found.y.dtype.kind in "iu"
    good = whole and (not n or (classes and 0 <= found.y.min() <= found.y.max() < classes))
    done.add("labels are classes", good, f"{classes} classes")
    attacked = np.flatnonzero((found.attack != "") & (found.attack != "clean"))
    done.add(
        "each image that was broken has its adversarial one",
        np.array_equal(attacked, found.broken),
        len(attacked),
    )
    kept, wrong = int(np.sum(found.attack == "")), int(np.sum(found.attack == "clean"))
    robust = kept / n if n else 0.0
    done.add("robust accuracy is the count", abs(robust - content.get("robust", -1)) < 1e-9, f"{kept} of {n}")
    counts = content.get("counts", {})
    done.add("misclassified before", counts.get("clean_wrong") == wrong, f"{wrong} of {n}")
    own = {
        str(name): int(count)
        for name, count in zip(*np.unique(found.attack, return_counts=True), strict=True)
    }
    own = {name: count for name, count in own.items() if name not in ("", "clean")}
    told = {name: count for name, count in counts.get("broken_by", {}).items() if count}
    done.add(
        "what each attack broke first",
        own == told,
        ", ".join(f"{k} {v}" for k, v in own.items()) or "nothing",
    )
    low, high = intervals.wilson(kept, n)
    given = content.get("robust_interval", (-1, -1))
    good = abs(given[0] - low) < 1e-9 and abs(given[1] - high) < 1e-9
    done.add("95 % interval is Wilson's", good, f"{100 * low:.1f} to {100 * high:.1f} %")
