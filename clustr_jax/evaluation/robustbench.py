"""A judgement as an entry of RobustBench (Croce et al. 2021): the fields of its model_info/*.json."""

from typing import Any

from clustr_jax.runtime.errors import UserError, nearest

# What a judgement does not know.
ABOUT = (
    "link", "name", "authors", "venue", "architecture", "dataset", "additional_data", "reported", "footnote",
    "number_forward_passes",
)  # fmt: skip


def model_info(content: dict, **about: Any) -> dict[str, Any]:
    """The entry; accuracies in % with two digits, as they are written there.

    `eps` is that of pixels in [0, 1], as the leaderboards have it; `reported`, what the authors claim, is
    None unless it is given. `autoattack_acc` is what this judgement's protocol left, and the footnote names
    it: sound-3 is not AutoAttack's standard, so run `attacks.autoattack` too before you submit the entry.
    `unreliable` says that a check failed. UserError for a judgement without a box, whose
    radius is in no unit, and for one whose budget is not the protocol's.
    """
    unknown = [name for name in about if name not in ABOUT]
    if unknown:
        known = ", ".join(ABOUT)
        raise UserError(f"unknown field {unknown[0]!r}{nearest(unknown[0], ABOUT)}; known: {known}")
    if content["bounds"] is None:
        raise UserError("RobustBench's eps is of pixels in [0, 1]; judge with the bounds of the pixels")
    if content["protocol"].endswith("-custom"):
        raise UserError(
            f"RobustBench's autoattack_acc wants a standard budget, and this is {content['protocol']}; judge "
            f"without settings="
        )
    low, high = content["bounds"]
    eps, norm = content["eps"] / (high - low), content["norm"]
    scaled = eps * 255
    levels = norm == "linf" and abs(scaled - round(scaled)) < 1e-3
    robust = f"{100 * content['robust']:.2f}"
    note = f"{content['protocol']} of clustr_jax on {content['n']} images"
    if content["failed"]:
        note += f"; failed checks: {', '.join(map(str, content['failed']))}"
    return {
        "link": about.get("link"), "name": about.get("name"), "authors": about.get("authors"),
        "additional_data": about.get("additional_data", False),
        "number_forward_passes": about.get("number_forward_passes", 1),
        "dataset": about.get("dataset"), "venue": about.get("venue"),
        "architecture": about.get("architecture"), "eps": f"{round(scaled)}/255" if levels else f"{eps:g}",
        "clean_acc": f"{100 * content['clean']:.2f}", "reported": about.get("reported"),
        "autoattack_acc": robust, "unreliable": bool(content["failed"]),
        "footnote": "; ".join(filter(None, (about.get("footnote"), note))),
    }  # fmt: skip
