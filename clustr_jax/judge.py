"""Judge any model: one call, one verdict, one bundle that anyone can check.

j = clustr_jax.judge(model, x, y, eps=8/255)
print(j)                    # the verdict in plain words, the figure, the checks, in ten lines
j.save("judgement")         # judgement.json, witness.npz, report.html, CARD.md

python -m clustr_jax.verify judgement        # measures the stored images again, with NumPy alone
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from clustr_jax.attacks import resuming
from clustr_jax.attacks.options import whole
from clustr_jax.attacks.watching import Interrupted
from clustr_jax.evaluation import card, judging, robustbench, witness, wording
from clustr_jax.evaluation import distances as nearest_images
from clustr_jax.evaluation.witness import Witness
from clustr_jax.runtime import callable_module, extras, locks
from clustr_jax.runtime.errors import UserError, shown
from clustr_jax.runtime.promotion import promoting
from clustr_jax.settings import EvalSettings
from clustr_jax.storage.files import write_bytes, write_json

__all__ = ["Judgement", "judge"]

PROTOCOL = "sound-3"
_WIDTH = 80
_SECONDS = 0.5  # between two lines about what is going on


@dataclasses.dataclass(frozen=True, repr=False)
class Judgement:
    """What `judge` found. `content` is judgement.json; `witness` holds the images."""

    content: dict[str, Any]
    witness: Witness

    @property
    def robust(self) -> float:
        """Share of the images that are right and that no attack broke."""
        return self.content["robust"]

    @property
    def clean(self) -> float:
        """Share of the images that are right before any attack."""
        return self.content["clean"]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `robust`."""
        low, high = self.content["robust_interval"]
        return low, high

    @property
    def verdict(self) -> str:
        """In plain words first, then the figure."""
        return self.content["verdict"]

    @property
    def believable(self) -> bool:
        """Whether no check failed; otherwise `robust` is an upper bound only."""
        return not self.content["failed"]

    @property
    def checks(self) -> list[dict[str, Any]]:
        """number, name, status, value, limit, note and advice of each check, by number."""
        return self.content["checks"]

    @property
    def attacks(self) -> dict[str, dict[str, Any]]:
        """By name: the accuracy that an attack leaves, its kills and its cost."""
        return self.content["attacks"]

    @property
    def distances(self) -> Float[np.ndarray, "N"]:
        """How far the nearest adversarial image that is known lies from each image, in the norm.

        0 where it was wrong before, inf where none is known. Each one is an upper bound. Beyond eps only a
        protocol that looks for minimum norms ("sound-3") knows any.
        """
        return nearest_images.of(self.witness)

    @property
    def x_adv(self) -> Float[np.ndarray, "N ..."]:
        """The adversarial image of each image that was broken, and the image itself elsewhere."""
        return self.witness.all_images()

    @property
    def broken_by(self) -> np.ndarray:
        """[N] the attack that broke each image first; "clean" where it was wrong before, "" for none."""
        return self.witness.attack

    def __str__(self):
        """About ten lines of at most 80 columns."""
        content = self.content
        lines = textwrap.wrap(wording.words(content), _WIDTH)
        lines += textwrap.wrap(
            f"{wording.figure(content)} ({content['n']} images, {content['protocol']})", _WIDTH
        )
        lines += filter(None, [wording.distance(content)])
        kills = self.content["counts"]["broken_by"]
        named = ", ".join(f"{name} {count}" for name, count in kills.items())
        lines += textwrap.wrap(f"broken, attack by attack: {named}", _WIDTH, subsequent_indent="  ")[:3]
        statuses = [c["status"] for c in self.checks]
        counts = ", ".join(
            f"{statuses.count(s)} {s}" for s in ("PASS", "WARN", "FAIL", "SKIP") if s in statuses
        )
        lines.append(f"checks: {counts}")
        troubled = sorted((c for c in self.checks if c["advice"]), key=lambda c: c["status"] != "FAIL")
        for check in troubled[:3]:
            value = f"{wording.shown_value(check)} (limit {check['limit']})"
            text = f"{check['status']} {check['number']}: {check['name']} {value}"
            lines.append(textwrap.shorten(text, _WIDTH, placeholder=" ..."))
        if len(troubled) > 3:
            lines.append(f"and {len(troubled) - 3} more; .checks has all, with what to do")
        return "\n".join(lines)

    __repr__ = __str__  # at a prompt as well

    def _repr_html_(self) -> str:
        """The verdict card of a notebook."""
        return card.html(self.content)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Judgement":
        """The judgement that was saved in a folder; UserError where there is none."""
        return cls(*witness.read(os.fspath(folder)))

    def save(self, folder: str | os.PathLike) -> pathlib.Path:
        """judgement.json, witness.npz, and report.html and CARD.md where the extra "report" is installed.

        Without it the two files are written all the same, and a line on stderr names what is missing.
        """
        place = resuming.usable(folder)
        assert place is not None
        witness.write(place / witness.NPZ, self.witness)
        self._write_page(place)
        write_json(place / witness.JSON, self.content)  # last: it says that the rest is there
        return place

    def _write_page(self, place):
        write_bytes(place / "CARD.md", card.markdown(self.content).encode())
        try:
            from clustr_jax.report import judgement_page
        except ImportError as error:
            print(f"no report.html: {extras.explained(error, 'a page')}", file=sys.stderr)
            return
        write_bytes(place / "report.html", judgement_page.page(self.content, self.witness).encode())

    def robustbench(self, **about: str) -> dict[str, Any]:
        """The entry of RobustBench's model_info, for json.dump. `about` says what is not known here: name,
        authors, link, venue, architecture, dataset, additional_data, reported, footnote."""
        return robustbench.model_info(self.content, **about)


@promoting
def judge(
    model: Callable | Any,
    x: Float[np.ndarray, "N ..."],
    y: Int[np.ndarray, "N"],
    *,
    eps: float,
    norm: str = "linf",
    protocol: str = PROTOCOL,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    ids: Int[np.ndarray, "N"] | None = None,
    folder: str | os.PathLike | None = None,
    progress: bool | Callable[[str], None] | None = None,
    seed: int = 0,
    slots: int = 64,
    audit: bool = False,
    settings: EvalSettings | None = None,
) -> Judgement:
    """The robust accuracy of a model on these images, and whether it can be believed.

    A protocol of many attacks runs on all images, then the checks look for reasons to distrust it; what
    cannot be looked at says SKIP and why.

    Args:
        model: a function of images -> logits [B, Y], a model of nnx, linen (bound), equinox, haiku, Keras 3
            or HuggingFace Flax (`attacks.wrap` says what it takes), or a `Classifier`.
        x: images [N, ...], pixels in `bounds`.
        y: labels [N].
        eps: radius of the ball, in the units of the pixels: 8/255, not 8.
        norm: "linf" or "l2".
        protocol: "sound-3" (docs/attacks.md).
        bounds: box of the pixels, (low, high); None for no box.
        ids: numbers of the images in their data set [N], which randomness goes by; default 0 to N - 1.
        folder: saves the results here, and records on the way. The same call goes on where it was
            interrupted, bit for bit, and reads the results once it is done.
        progress: None tells a terminal what is going on, True any stderr; a function gets the lines.
        seed: of all draws.
        slots: images that are attacked side by side: they decide the memory. What it takes is said in one
            line before it starts, and there are fewer where they would not fit.
        audit: runs the protocol once more with another seed, order and number of slots.
        settings: other budgets; the protocol is then called ...-custom.

    Returns:
        a `Judgement`.

    Raises:
        UserError: for bad input, and for models whose logits are no function of the image.
        Interrupted: on Ctrl-C (`attacks.Interrupted`).

    >>> def logits(x):  # class 0 for bright images, 1 for dark ones; [B, H, W, C] -> [B, Y]
    ...     z = 10 * (x.mean(axis=(1, 2, 3))[:, None] - 0.5)
    ...     return jnp.concatenate([z, -z], axis=1)
    >>> x = np.stack([np.full((4, 4, 1), v) for v in (0.55, 0.9)]).astype(np.float32)
    >>> j = clustr_jax.judge(logits, x, np.array([0, 0]), eps=0.1, slots=2)
    >>> j.robust, [round(v, 2) for v in j.interval], j.broken_by.tolist()
    (0.5, [0.09, 0.91], ['pma', ''])
    >>> print(j.verdict)
    Partly robust: ... robust accuracy 50.00 % [9.5, 90.5] at linf eps 0.1, clean 100.00 %
    >>> import tempfile
    >>> done = clustr_jax.verify(j.save(tempfile.mkdtemp()), logits)  # judgement.json, witness.npz, ...
    >>> print(done.ok, done.lines[-2])
    True ('adversarial images are misclassified', True, '1 of 1')
    """
    place, seed = resuming.usable(folder), whole("seed", seed, -(2**63))
    count = np.shape(x)[0] if np.ndim(x) else 0
    slots = min(whole("slots", slots, 1), max(1, count))
    case = judging.prepare(
        model, x, y, eps=eps, norm=norm, bounds=bounds, ids=ids, protocol=protocol, settings=settings,
        slots=slots, seed=seed,
    )  # fmt: skip
    say = _Teller(progress)
    with contextlib.nullcontext() if place is None else locks.held(place, leave=False):
        return _judged(case, place, say, audit)


def _judged(case, place, say, audit):
    """The judgement of `case`; with a folder the one that is there, or what goes on from its records."""
    if place is None:
        kept, parts = resuming.Kept(None, {}), {}
    else:
        parts = judging.parts(case, audit)
        if (place / witness.JSON).exists():
            found = _of_before(place, parts)
            resuming.forget(place, parts)
            return found
        kept = resuming.kept_in(place, parts)
    try:
        say.line(str(case.footprint))
        content, evidence = judging.judge(case, kept, say, audit=audit)
    except KeyboardInterrupt as stopped:
        told = "" if place is None else f"; the same call with folder={shown(place, 200)} goes on"
        raise Interrupted(None, f"interrupted{told}") from stopped
    finally:
        say.end()
    found = Judgement(content | {"parts": parts}, evidence)
    if place is not None:
        found.save(place)
        kept.clear()
    return found


def _of_before(place, parts):
    """The judgement that is there, if it is of the same call."""
    found = Judgement.load(place)
    theirs = found.content.get("parts") or {}
    different = [name for name in parts if theirs.get(name) != parts[name]]
    if different:
        told = [name for name in different if name != "gradients or loss"] or different
        raise UserError(
            f"{shown(place, 200)} has the judgement of another call (different: {', '.join(told)}); give "
            f"another folder, or delete {witness.JSON} there"
        )
    return found


class _Teller:
    """Says what is going on: report(share unbroken, what)."""

    def __init__(self, progress):
        self._tell, self._line, self._said = None, False, 0.0
        if callable(progress):
            self._tell = progress
        elif progress or (progress is None and sys.stderr.isatty()):
            self._line = True
        self._started = time.monotonic()

    def line(self, text: str) -> None:
        """A line of its own, that stays."""
        if self._tell:
            self._tell(text)
        elif self._line:
            print(text, file=sys.stderr, flush=True)

    def __call__(self, left: float, what: str) -> None:
        """At most twice a second."""
        now = time.monotonic()
        if not (self._tell or self._line) or now - self._said < _SECONDS:
            return
        self._said = now
        text = f"judge  {what}  unbroken {left:.1%}  {now - self._started:.0f} s"
        if self._tell:
            self._tell(text)
        else:
            end = "" if sys.stderr.isatty() else "\n"
            print(f"\r{text:<79}" if not end else text, end=end, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leaves a clean line."""
        if self._line and sys.stderr.isatty() and self._said:
            print("\r" + " " * 79 + "\r", end="", file=sys.stderr, flush=True)


callable_module.make(__name__)
