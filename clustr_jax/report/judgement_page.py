"""report.html of a judgement: the same looks as the page of a work directory."""

import numpy as np

from clustr_jax.evaluation import intervals, wording
from clustr_jax.evaluation.witness import Witness
from clustr_jax.report import page as pages
from clustr_jax.report import tables
from clustr_jax.report.tables import cell
from clustr_jax.runtime import provenance

# Adversarial images that are shown.
_VICTIMS = 12
_TONES = {"NO CHECK FAILED": "info", "UPPER BOUND ONLY": "fail", "UNCHECKED": "warn"}


def page(content: dict, found: Witness) -> str:
    """The page; of points there are no pictures."""
    n = content["n"]
    pictures = found.x.ndim == 4 and found.x.shape[-1] in (1, 3) and found.bounds is not None
    first = content["counts"]["broken_by"]
    attacks = [
        {
            "name": name,
            "cell": cell(attack["robust"], n),
            "first": first.get(name, 0),
            "gradients": attack.get("gradient_evaluations"),
            "forwards": attack.get("forward_evaluations"),
            "seconds": attack["wall_seconds"],
        }
        for name, attack in content["attacks"].items()
    ]
    distances = content.get("distances") or {}
    curve = distances.get("curve") or content["curves"].get("eps", ())
    radii = [(intervals.radius(eps) if eps else "0", cell(value, n)) for eps, value in curve]
    audit = content["audit"]
    answer, answer_tone = wording.answer(content)
    return pages.render(
        "judgement.html", title="Judgement", identity=provenance.sha(content), j=content,
        lead=f"{n} images of {content['classes']} classes · {content['protocol']} · seed {content['seed']}",
        tone=_TONES.get(content["status"], "warn"), words=wording.words(content), answer=answer,
        answer_tone=answer_tone,
        robust=cell(content["robust"], n), clean=cell(content["clean"], n),
        constant=cell(content["constant"]), audit=cell(audit["robust"]) if audit else None,
        radius=intervals.radius(content["eps"]), check_value=tables.check_value,
        check_limit=tables.check_limit, attacks=attacks, radii=radii,
        nearest=bool(distances), median=distances.get("median"), length=intervals.length,
        cascade=any("added_kills" in attack for attack in content["attacks"].values()),
        victims=_victims(found) if pictures else [],
        no_gallery="No image was broken." if pictures else "These are no grey or colour images in a box.",
        pairs=_origins(content),
    )  # fmt: skip


def _victims(found):
    low, high = found.bounds

    def unit(image):
        return (image - low) / (high - low)

    shown = []
    for place, x_adv in list(zip(found.broken, found.x_adv, strict=True))[:_VICTIMS]:
        x = found.x[place]
        delta = x_adv - x
        change = 0.5 + 0.5 * delta / max(float(np.abs(delta).max()), 1e-12)
        shown.append({
            "id": int(found.ids[place]), "label": int(found.y[place]), "attack": str(found.attack[place]),
            "clean": pages.png(unit(x)), "adversarial": pages.png(unit(x_adv)), "change": pages.png(change),
        })  # fmt: skip
    return shown


def _origins(content):
    pairs = [
        ("versions", ", ".join(f"{k} {v}" for k, v in content["versions"].items())),
        ("commit", content["commit"]),
        ("devices", ", ".join(content["devices"])),
        ("model (hash of its arrays)", content["model_sha"]),
        ("notes", "; ".join(content["notes"])),
        *((f"sha256 of {name}", value) for name, value in content["sha256"].items()),
    ]
    return [(name, value) for name, value in pairs if value]
