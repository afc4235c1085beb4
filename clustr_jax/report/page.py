"""report.html and MODEL_CARD.md of one work directory: templates filled with words and figures."""

import base64
import dataclasses
import functools
import hashlib
import io
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2
import markupsafe
import numpy as np

from clustr_jax.evaluation import intervals
from clustr_jax.report import figures, pictures, tables, words
from clustr_jax.report.looks import CLASSES, Plane, Victim
from clustr_jax.report.record import VERSION, Record
from clustr_jax.report.svg import Drawing, attempt, reason
from clustr_jax.runtime import provenance
from clustr_jax.runtime.stage_names import TRAIN

_TEMPLATES = pathlib.Path(__file__).parent / "templates"
_SECTIONS = (
    ("verdict", "Verdict"), ("accuracy", "Accuracy"), ("checks", "Checks"), ("attacks", "Attacks"),
    ("curves", "Curves"), ("certified", "Certified"), ("training", "Training"), ("embeddings", "Embeddings"),
    ("gallery", "Images"), ("limits", "Limits"), ("record", "Record"),
)  # fmt: skip
# Images of the gallery are enlarged to about this many pixels, so that print does not blur them.
_SIDE = 96
_CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Looks:
    """What was computed of the network and its data for this report; `reasons` say what could not be."""

    planes: list[Plane] = dataclasses.field(default_factory=list)
    victims: list[Victim] = dataclasses.field(default_factory=list)
    parameters: int | None = None
    sizes: tuple[int, int, int] | None = None  # train, held out, test
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)  # "embeddings" or "gallery" -> why not
    failures: dict[str, str] = dataclasses.field(default_factory=dict)  # of these, errors of this package


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that is written for one directory."""

    html: str
    card: str
    drawings: list[Drawing]
    failures: dict[str, str] = dataclasses.field(default_factory=dict)  # what could not be shown -> why


class _Environment(jinja2.Environment):
    """row.clear is a row's entry of this name, and not the method of every dict."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, Mapping) and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)


@functools.cache
def _environment():
    """Templates that escape what they are given (the card is no HTML) and raise at a name that is missing."""
    return _Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=lambda name: name is None or not name.endswith(".md"),
    )


def render(template: str, **values: Any) -> str:
    """A filled template."""
    css = markupsafe.Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8"))
    package = provenance.versions()["clustr-jax"]
    return _environment().get_template(template).render(css=css, version=VERSION, package=package, **values)


class Script(markupsafe.Markup):
    """A script of templates/ as it stands in a page; `sha` is what the page's policy lets run."""

    @property
    def sha(self) -> str:
        """SHA-256 in base64."""
        return base64.b64encode(hashlib.sha256(self.encode()).digest()).decode()


def script(name: str) -> Script:
    """The script of this name."""
    return Script((_TEMPLATES / name).read_text(encoding="utf-8"))


def report(record: Record, looks: Looks) -> Report:
    """The page, the card and the figures of one work directory."""
    curves = [attempt("eps", "Accuracy over the radius", figures.over_eps, record)]
    for what in ("restarts", "steps"):
        curves.append(attempt(what, f"Accuracy over {what}", figures.over_budget, record, what))
    single = {
        "attacks": attempt("attacks", "Each attack alone", figures.attacks, record),
        "certified": attempt("certified", "Certified accuracy", figures.certified, record),
    }
    name = functools.partial(class_name, record)
    training, planes = figures.training(record), pictures.planes(looks.planes, name)
    eps = record.config["eval"]["attack"]["eps"]
    gallery = attempt("gallery", "Adversarial images", pictures.gallery, looks.victims, eps, name)
    drawings = [d for d in (*curves, *single.values(), *training, *planes, gallery) if d]
    failures = looks.failures | {d.title: f"could not be drawn ({d.failed})" for d in drawings if d.failed}
    victims, no_gallery = [], looks.reasons.get("gallery", "no image is classified correctly")
    try:
        victims = _shown(record, looks.victims, eps)
    except Exception as error:  # as with figures: no picture is worth a result
        no_gallery = failures["gallery"] = f"they could not be drawn ({reason(error)})"
    shared = {
        "record": record,
        "verdict": words.verdict(record),
        "accuracy": tables.accuracy_table(record),
        "certified": tables.certified_table(record),
        "method": words.method(record),
        "limits": words.limits(record),
        "pairs": origins(record, looks),
        "commands": record.environment.get("commands", []),
    }
    # a page without what the data would have shown is made again as soon as they are there
    unread = any("could not be read" in why for why in looks.reasons.values())
    identity = "incomplete" if unread or failures else record.identity
    html = render(
        "report.html",
        title=f"{record.title}: report",
        identity=identity,
        sections=_SECTIONS,
        lead=_lead(record),
        facts=words.facts(record),
        check_counts=_counts(record),
        check_value=tables.check_value,
        check_limit=tables.check_limit,
        no_checks=_no_checks(record),
        attack_rows=tables.attack_rows(record),
        curves=[d for d in curves if d],
        no_curves=_no_curves(record, curves),
        drawings=single,
        no_certificates=_no_certificates(record),
        training=training,
        planes=planes,
        many=CLASSES if _many(record) else 0,
        borders=any(p.borders for p in looks.planes),
        no_planes=_no_planes(record, looks),
        victims=victims,
        clustered=_clustered(looks.victims),
        eps=intervals.radius(eps),
        gain=f"{pictures.magnification(eps):.3g}",
        no_gallery=f"No images: {no_gallery}.",
        config=json.dumps(record.config, indent=2),
        alarms=words.alarms(record),
        packages="\n".join(f"{k} {v}" for k, v in record.environment.get("packages", {}).items()),
        **shared,
    )
    card = render(
        "card.md", parameters=looks.parameters, sizes=_sizes(looks), subset=words.subset(record),
        duplicates=words.duplicates(record), notes=words.notes(record), alarms=words.alarms(record),
        markdown=_markdown, shape=_shape(record), images=words.in_pixels(record), **shared,
    )  # fmt: skip
    return Report(html, card, [d for d in drawings if not d.failed], failures)


def _many(record):
    """More classes than are shown; the first stage of at_pretrain has those of another set."""
    last = next(reversed(record.stages.values()))
    return last["num_classes"] > CLASSES


def _lead(record):
    parts = [record.config["model"]["name"], f"seed {record.config['seed']}"]
    parts += [f"variant {record.config['variant']}"] if record.config["variant"] else []
    parts += ["smoke run: its numbers mean nothing"] if record.config["smoke"] else []
    return f"{', '.join(parts)} · {record.root.name}"


def _counts(record):
    if record.checks is None:
        return ""
    statuses = [check["status"] for check in record.checks["checks"]]
    return ", ".join(f"{statuses.count(s)} {s}" for s in ("PASS", "WARN", "FAIL", "SKIP") if s in statuses)


def _no_checks(record):
    if "sound" not in record.results:
        return "The checks judge the sound protocol, which was not run."
    if "diagnostics" in record.results:
        return "The checks that are there belong to earlier results and are left out: evaluate again."
    return "The checks were not run (eval.diagnostics)."


def _no_curves(record, curves):
    if "sound" not in record.results:
        return ["The curves over restarts and steps come from the sound protocol, which was not run."]
    reasons = {
        "eps": "one radius only was attacked",
        "restarts": "there was one restart only",
        "steps": "there was one step only",
    }
    return [
        f"There is no curve over {what}: {reasons[what]}."
        for what, curve in zip(reasons, curves, strict=True)
        if curve is None
    ]


def _no_certificates(record):
    if record.results.get("sound", record.results.get("clean", {})).get("head") == "linear":
        return "A linear head has no certificate here: the rules are about distances to centroids."
    return "No certificates were computed (the certify stage)."


def _no_planes(record, looks):
    if not looks.planes:
        return [f"No embeddings: {looks.reasons.get('embeddings', 'there are none')}."]
    texts = []
    if len(looks.planes) == 1:
        shown = looks.planes[0].stage
        if shown == TRAIN:
            texts.append("There is no picture from before: this method has no warm-up stage here.")
        else:
            texts.append("There is no picture of stage 2, which is not finished.")
    if not any(p.borders for p in looks.planes):
        texts.append(
            "A linear head has no clusters, so there are no borders; circles are the classes' means."
        )
    return texts


def class_name(record: Record, label: int) -> str:
    """A word where the data set has words for its classes, else the number."""
    words = _CIFAR10 if record.data == "cifar10" else record.results.get("clean", {}).get("class_names")
    return words[label] if words else str(label)


def _clustered(victims):
    return any(math.isfinite(v.own[0]) for v in victims)


def _shown(record, victims, eps):
    """The gallery's entries: images as data, names for classes, and what the sound protocol says of each."""
    broken_by = {}
    if victims and "sound" in record.results:
        outcomes = record.outcomes("sound")
        broken_by = dict(zip(outcomes["ids"].tolist(), outcomes["broken_by"].tolist(), strict=True))
        same = record.results["sound"]["eps"] == eps
    return [
        {
            "index": v.index,
            "file": v.file,
            "fooled": v.after != v.label,
            "linf": v.linf,
            "l2": v.l2,
            "own": v.own,
            "other": v.other,
            "label": class_name(record, v.label),
            "before": class_name(record, v.before),
            "after": class_name(record, v.after),
            "clean": png(v.x),
            "adversarial": png(v.x_adv),
            "change": png(pictures.magnified(v, eps)),
            "sound": _fate(broken_by.get(v.index)) if broken_by and same else "",
        }
        for v in victims
    ]


def _fate(attack):
    if attack is None:
        return "not attacked"
    if attack == "smaller-eps":
        return "broken at a smaller eps"
    return f"broken by {attack}" if attack else "not broken"


def png(image: np.ndarray) -> str:
    """A data URI of an image with values in [0, 1], [H, W, 1 or 3], enlarged without smoothing."""
    import PIL.Image

    factor = max(1, _SIDE // image.shape[0])
    pixels = np.clip(np.rint(255 * image), 0, 255).astype(np.uint8)
    pixels = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _shape(record):
    """Of one image, as the stage that was last finished took it."""
    stages = [*record.stages.values()]
    return stages[-1].get("input_shape", ["..."]) if stages else ["..."]


def _sizes(looks):
    if looks.sizes is None:
        return ""
    return ", ".join(
        f"{n:,} {what}" for n, what in zip(looks.sizes, ("training", "held out", "test"), strict=True)
    )


def origins(record: Record, looks: Looks | None = None) -> list[tuple[str, str]]:
    """Provenance as (name, value)."""
    environment, config = record.environment, record.config
    first = next(iter(record.results.values()), None)
    versions = first["versions"] if first else environment.get("versions", {})
    protocols = sorted(r["protocol"] for r in record.results.values())
    stages = [f"{name}: {done['epochs']} epochs, {done['reason']}" for name, done in record.stages.items()]
    pairs = [
        ("data", f"{record.data}: {words.subset(record)}"),
        ("duplicates", words.duplicates(record)),
        ("notes on the data", "; ".join(words.notes(record))),
        ("seed", str(config["seed"])),
        ("stages", "; ".join(stages)),
        ("alarms", "; ".join(words.alarms(record))),
        ("results", ", ".join(protocols) or "none"),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
    ]
    if looks is not None:
        pairs.insert(1, ("sizes", _sizes(looks)))
        pairs.insert(2, ("parameters", f"{looks.parameters:,}" if looks.parameters else ""))
    made = {r.get("commit") for r in (*record.results.values(), *record.stages.values())}
    commits = ", ".join(sorted(commit for commit in made if commit))
    pairs.append(("commit", commits))
    if environment:
        last = environment.get("commit", "")
        last_machine = f"{', '.join(environment.get('devices', []))} on {environment.get('platform', '')}"
        pairs += [
            ("commit at the last command", last if last != commits else ""),
            ("Python", environment.get("python", "")),
            ("machine", "; ".join(environment.get("machines") or [last_machine])),
        ]
    return [(name, value) for name, value in pairs if value]


def _markdown(cell, kind):
    if cell is None:
        return "–"
    value = f"**{cell.value}**" if kind == "worst" else cell.value
    return f"{value} {cell.interval}".strip() + " |" * (cell.span - 1)
