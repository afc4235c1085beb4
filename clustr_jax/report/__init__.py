"""A page about a work directory: report.html, its figures, and MODEL_CARD.md.

    python -m clustr_jax.report runs/digits-clustr_qtrades               # the page of one run, again
    python -m clustr_jax.report runs/a runs/b --out=compare.html         # one page about several

    record     what the directory holds            looks      what is computed of the network for it
    tables     cells; words  sentences             figures    results drawn; pictures  the network drawn
    svg        how a drawing enters a page         page, compare   one run, several: they fill templates/

`read`, then `look` (all processes together), then `write` (the leader).
"""

import pathlib
from collections.abc import Callable

import jax
import numpy as np

from clustr_jax import data
from clustr_jax.report import compare, looks, page
from clustr_jax.report.page import Looks, Report
from clustr_jax.report.record import VERSION, Record, read
from clustr_jax.report.svg import reason
from clustr_jax.runtime import mesh, streams
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.stage_names import TRAIN
from clustr_jax.settings import DataSettings, EvalSettings, MagnetSettings
from clustr_jax.storage.files import write_bytes

__all__ = ["Looks", "Record", "Report", "current", "look", "read", "write", "write_comparison"]


def current(record: Record) -> bool:
    """Whether report.html and MODEL_CARD.md are there, and were made of just these results."""
    path = record.root / "report.html"
    if not (path.exists() and (record.root / "MODEL_CARD.md").exists()):
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return f'content="clustr_jax {VERSION} {record.identity}"' in file.read(2000)


def look(record: Record, key: jax.Array, splits: tuple[data.Split, data.Split, data.Split] | None) -> Looks:
    """Embeddings of each finished stage, and a few adversarial images; `splits` None reads the data.

    Without the data there is a report all the same, which says so.
    """
    from clustr_jax.storage import loading  # a judgement's page does without what "train" brings

    images, config = DataSettings.of(record.config["data"]), record.config
    stages = {name: mesh.place(loading.load(record.root / name)) for name in record.stages}
    last = next(reversed(stages.values()))
    reasons, count = {}, looks.parameters(last)
    try:
        train, held_out, test = splits or data.splits(images, smoke=config["smoke"])
    except UserError as error:
        why = f"the data could not be read ({error})"
        return Looks(parameters=count, reasons={"embeddings": why, "gallery": why})
    if len(test.images.shape) != 4:
        reasons["gallery"] = f"{images.name} has points, not images"
    elif TRAIN not in stages:
        reasons["gallery"] = f"{TRAIN} is not finished"
    failures = {}

    def attempt(what, compute, *args):
        """What it computes, or [] and the reason: no picture is worth a result."""
        try:
            return compute(*args)
        except Exception as error:
            if jax.process_count() > 1:  # the others would wait for this one
                raise
            reasons[what] = failures[what] = f"they could not be computed ({reason(error)})"
            return []

    victims = []
    if not reasons:  # of the images that were attacked, if any were
        attacked = record.outcomes("sound")["ids"] if "sound" in record.results else np.arange(len(test))
        victims = attempt(
            "gallery",
            looks.gallery,
            jax.random.fold_in(key, streams.Report.GALLERY),
            last,
            EvalSettings.of(config["eval"]),
            test,
            attacked,
        )
    planes = attempt(
        "embeddings",
        looks.embeddings,
        jax.random.fold_in(key, streams.Report.EMBEDDINGS),
        stages,
        MagnetSettings.of(config["magnet"]),
        train,
        test,
    )
    return Looks(planes, victims, count, (len(train), len(held_out), len(test)), reasons, failures)


def write(record: Record, found: Looks, say: Callable[[str], None] | None = None) -> pathlib.Path:
    """report.html, figures/ and MODEL_CARD.md; returns the first. Figures of an earlier report go.

    `say` is told, in a line each, what could not be drawn; the page has the reason in its place.
    """
    made = page.report(record, found)
    for what, why in made.failures.items():
        if say is not None:
            say(f"report: {what}: {why}")
    folder = record.root / "figures"
    names = {f"{d.name}.{kind}" for d in made.drawings for kind in ("svg", "png")}
    for path in folder.glob("*"):
        if path.suffix in (".svg", ".png") and path.name not in names:
            path.unlink()
    for drawing in made.drawings:
        write_bytes(folder / f"{drawing.name}.svg", drawing.svg)
        write_bytes(folder / f"{drawing.name}.png", drawing.png)
    write_bytes(record.root / "MODEL_CARD.md", made.card.encode(errors="backslashreplace"))
    path = record.root / "report.html"
    write_bytes(path, made.html.encode(errors="backslashreplace"))  # last: it says that the rest is there
    return path


def write_comparison(records: list[Record], path: pathlib.Path) -> pathlib.Path:
    """The page that compares them."""
    write_bytes(path, compare.compare(records).encode())
    return path
