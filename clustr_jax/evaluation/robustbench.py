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

    `autoattack_acc` is what this judgement's protocol left, of which AutoAttack's attacks are a part;
    `unreliable` says that a check failed.
    """
    unknown = [name for name in about if name not in ABOUT]
    if unknown:
        known = ", ".join(ABOUT)
        raise UserError(f"unknown field {unknown[0]!r}{nearest(unknown[0], ABOUT)}; known: {known}")
    eps, norm = content["eps"], content["norm"]
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
        "clean_acc": f"{100 * content['clean']:.2f}", "reported": about.get("reported", robust),
        "autoattack_acc": robust, "unreliable": bool(content["failed"]),
        "footnote": "; ".join(filter(None, (about.get("footnote"), note))),
    }  # fmt: skip
