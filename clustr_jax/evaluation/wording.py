"""A verdict in plain words: what is known of the robustness, then whether the measurement trusts itself."""

from clustr_jax.evaluation import intervals

# Of the images that are right, the share that has to survive for "robust".
_MOST = 0.9


def words(content: dict) -> str:
    """Two sentences about a judgement or a diagnosis, without a figure.

    `content`: robust, clean, n, constant (the accuracy of the best constant answer, or None), checks.
    """
    wrong = failed(content)
    return f"{_robustness(content, wrong)} {_trust(content, wrong)}"


def failed(content: dict) -> list[int]:
    """The numbers of the checks that failed."""
    return sorted({c["number"] for c in content["checks"] if c["status"] == "FAIL"})


def verdict(content: dict) -> str:
    """The words, then the figure."""
    return f"{words(content)} {figure(content)}"


def answer(content: dict) -> tuple[str, str]:
    """(robust or not in two words, the tone that goes with it): "pass" only for what withstood everything.

    Of a figure that no check could look at, or that a check distrusts, only "not robust" can be said.

    >>> nothing = {"status": "PASS", "number": 1}
    >>> wording.answer({"robust": 0.8, "clean": 0.85, "n": 99, "constant": 0.1, "checks": [nothing]})
    ('ROBUST SO FAR', 'pass')
    """
    said = _robustness(content, failed(content))
    if said.startswith("Not robust"):
        return "NOT ROBUST", "fail"
    if said.startswith("No verdict") or all(c["status"] == "SKIP" for c in content["checks"]):
        return "NOT KNOWN", "skip"
    return ("ROBUST SO FAR", "pass") if said.startswith("Robust") else ("PARTLY ROBUST", "warn")


def _robustness(content, failed) -> str:
    robust, constant = content["robust"], content.get("constant")
    if not content["n"]:
        return "No verdict: there was no image."
    if robust == 0.0:
        return "Not robust: no image withstood the attacks."
    # of images of one class a constant answer is always right: it says nothing of a model
    if constant is not None and robust <= constant < 1:
        return "Not robust: no better than always guessing one class."
    low, _ = intervals.wilson(round(robust * content["n"]), content["n"])
    if constant is not None and low <= constant < 1:
        return "No verdict: so few images cannot tell it from always guessing one class."
    if failed:
        return "No verdict: the figure is an upper bound only."
    if robust >= _MOST * content["clean"]:
        return "Robust against all that was tried: nearly every image that is right stays right."
    share = "most" if robust >= 0.5 * content["clean"] else "fewer than half"
    return (
        f"Partly robust: {share} of the images that are right stay right under every attack that was tried."
    )


def _trust(content, failed) -> str:
    if all(c["status"] == "SKIP" for c in content["checks"]):
        return "No check could look at it."
    if failed:
        which = f"check{'s' * (len(failed) > 1)} {', '.join(map(str, failed))} failed"
        return f"The measurement distrusts itself: {which}, and the truth may be far lower."
    warned = len({c["number"] for c in content["checks"] if c["status"] == "WARN"})
    said = "The measurement found no reason to distrust itself"
    if not warned:
        return f"{said}."
    return f"{said}, but {warned} check{'s warn' if warned > 1 else ' warns'}."


def figure(content: dict) -> str:
    """ "robust accuracy 41.20 % [38.2, 44.3] at linf eps 8/255, clean 85.00 %"."""
    robust = intervals.percent(content["robust"], content).replace(" [", " % [")
    radius = f"{content['norm']} eps {intervals.radius(content['eps'])}"
    return f"robust accuracy {robust} at {radius}, clean {100 * content['clean']:.2f} %"


def distance(content: dict) -> str:
    """ "half of the images that are right break within l2 0.513, or less"; "" where that is not known."""
    found = (content.get("distances") or {}).get("median")
    if found is None:
        return ""
    return f"half of the images that are right break within {content['norm']} {intervals.length(found)}"


def status(content: dict) -> str:
    """One word for how far the figure can be trusted, as a report has it."""
    statuses = [c["status"] for c in content["checks"]]
    if all(s == "SKIP" for s in statuses):
        return "UNCHECKED"
    return "UPPER BOUND ONLY" if "FAIL" in statuses else "NO CHECK FAILED"


def shown_value(check: dict) -> str:
    """The number that was compared with the limit, in the limit's unit."""
    value, limit = check["value"], check["limit"]
    if value is None:
        return "-"
    if "points" in limit:
        return f"{100 * value:.2f} points"
    return f"{100 * value:.1f} %" if "%" in limit or "chance" in limit else f"{value:.3g}"
