"""The witness of a judgement: every adversarial image, and what is said of them, checked with NumPy alone.

    judgement.json     the figure, and the hashes of the arrays below
    witness.npz        x [N, ...], y, ids; broken [M] (places in x), x_adv [M, ...]; attack [N], restart [N];
                       eps, norm, bounds

`attack` names what broke each image first, "clean" where it was misclassified before, "" where nothing did.
`check` needs no trust in whoever wrote it, and no JAX: it measures distances, compares hashes, and counts.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable

import numpy as np

from clustr_jax.evaluation import intervals
from clustr_jax.runtime.errors import UserError, first_line, shown

JSON, NPZ = "judgement.json", "witness.npz"
# What the attacks allow for rounding of x + delta in float32, as attacks.scheduler has it.
TOLERANCE = 1e-6
# Two frameworks add up in other orders: below this part of the largest logit a margin is a tie.
_TIE = 1e-4
_BATCH = 64


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
) -> Witness:
    """Of all images [N, ...]: those that an attack broke are kept."""
    attack = np.asarray(attack).astype(str)
    broken = np.flatnonzero((attack != "") & (attack != "clean")).astype(np.int32)
    x, x_adv = np.asarray(x, np.float32), np.asarray(x_adv, np.float32)
    ids, restart = np.asarray(ids, np.int32), np.asarray(restart, np.int32)
    y = np.asarray(y, np.int32)
    return Witness(x, y, ids, broken, x_adv[broken], attack, restart, float(eps), norm, bounds)


def hashes(found: Witness) -> dict[str, str]:
    """SHA-256 of each array that a judgement is about, with its type and shape."""
    return {name: sha256(getattr(found, name)) for name in ("x", "y", "ids", "x_adv", "attack", "restart")}


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
    folder = pathlib.Path(folder)
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
        names = [f.name for f in dataclasses.fields(Witness)]
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


def check(content: dict, found: Witness, model: Callable | None = None) -> Verification:
    """All that the files say, measured again; with `model` (images -> logits [B, Y]) its answers too."""
    done = Verification()
    n = len(found.y)
    lengths = {name: len(getattr(found, name)) for name in ("x", "y", "ids", "attack", "restart")}
    same = set(lengths.values()) == {n} and len(found.broken) == len(found.x_adv)
    done.add("arrays are of one length", same, f"{n} images, {len(found.broken)} adversarial ones")
    if not same:
        return done
    if found.broken.size and not 0 <= found.broken.min() <= found.broken.max() < n:
        done.add("adversarial images belong to images", False, f"places up to {found.broken.max()}")
        return done
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
    _counts(done, content, found)
    if model is not None:
        _answers(done, found, model)
    return done


def _inside(done, found):
    finite = bool(np.isfinite(found.x).all() and np.isfinite(found.x_adv).all())
    done.add("pixels are finite", finite, finite)
    delta = (found.x_adv.astype(np.float64) - found.x[found.broken]).reshape(len(found.broken), -1)
    size = np.abs(delta).max(axis=1, initial=0.0) if found.norm == "linf" else np.linalg.norm(delta, axis=1)
    largest, rounding = (
        float(size.max(initial=0.0)),
        TOLERANCE * max(1.0, float(np.abs(found.x).max(initial=0.0))),
    )
    good = found.norm in ("linf", "l2") and largest <= found.eps * (1 + TOLERANCE) + rounding
    done.add(f"changes are inside the {found.norm} ball", good, f"{largest:.8g} of {found.eps:.8g}")
    if found.bounds is not None:
        low, high = (
            min(a.min(initial=np.inf) for a in (found.x, found.x_adv)),
            max(a.max(initial=-np.inf) for a in (found.x, found.x_adv)),
        )
        good = not found.x.size or (low >= found.bounds[0] and high <= found.bounds[1])
        done.add("images are inside the box", good, f"{low:.6g} to {high:.6g}")


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


def _answers(done, found, model):
    clean = _logits(model, found.x)
    right = found.attack != "clean"
    _agree(done, "images that count as right are classified correctly", clean[right], found.y[right], True)
    _agree(done, "images that count as wrong are misclassified", clean[~right], found.y[~right], False)
    attacked = _logits(model, found.x_adv)
    _agree(done, "adversarial images are misclassified", attacked, found.y[found.broken], False)


def _agree(done, what, logits, y, right):
    """Whether the model says so of all of them, but for ties within rounding."""
    if not len(y):
        return done.add(what, True, "none")
    margin = logits[np.arange(len(y)), y]
    rest = np.array(logits)
    rest[np.arange(len(y)), y] = -np.inf
    margin = margin - rest.max(axis=1)
    said = logits.argmax(axis=1) == y
    off = said != right
    tie = np.abs(margin) <= _TIE * np.abs(logits).max(initial=1e-30)
    bad, ties = int(np.sum(off & ~tie)), int(np.sum(off & tie))
    done.add(
        what,
        bad == 0,
        f"{len(y) - bad - ties} of {len(y)}" + (f", {ties} ties within rounding" if ties else ""),
    )


def _logits(model, x):
    if not len(x):
        return np.zeros((0, 2))
    parts = []
    for start in range(0, len(x), _BATCH):
        logits = np.asarray(model(x[start : start + _BATCH]), np.float64)
        if logits.ndim != 2 or len(logits) != len(x[start : start + _BATCH]):
            raise UserError(f"the model must return logits [B, Y], got shape {logits.shape}")
        parts.append(logits)
    return np.concatenate(parts)
