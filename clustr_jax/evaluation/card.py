"""A judgement in short, without templates: HTML for a notebook, a text to put beside the model."""

import html as escaping

from clustr_jax.evaluation import intervals, wording

_TONES = {"NO CHECK FAILED": "#1f5fbf", "UPPER BOUND ONLY": "#b3261e", "UNCHECKED": "#8a6100"}


def html(content: dict) -> str:
    """The verdict card: plain words, the figure and its interval, what warns and fails."""
    tone = _TONES.get(content["status"], "#555")
    low, high = content["robust_interval"]
    where = f"{_e(content['norm'])} eps {_e(intervals.radius(content['eps']))}"
    rows = "".join(
        f"<li><b>{c['status']} {c['number']}</b> {_e(c['name'])}: {_e(wording.shown_value(c))} "
        f"(limit {_e(c['limit'])}). {_e(c['advice'])}</li>"
        for c in content["checks"]
        if c["advice"]
    )
    share = f"{100 * content['robust']:.2f}"
    return (
        f'<div style="border:1px solid #ccc;border-left:6px solid {tone};border-radius:8px;padding:.8em 1em;'
        f'max-width:46em;font-family:system-ui,sans-serif">'
        f'<div style="color:{tone};font-weight:700;font-size:.8em">{_e(content["status"])}</div>'
        f"<p style='margin:.4em 0;font-weight:600'>{_e(wording.words(content))}</p>"
        f'<p style="margin:.2em 0"><span style="font-size:2em;font-weight:700">{share}'
        f"</span> % robust [{100 * low:.1f}, {100 * high:.1f}] at {where}; "
        f"clean {100 * content['clean']:.2f} %; {content['n']} images; {_e(content['protocol'])}</p>"
        f'<p style="margin:.2em 0">{_e(wording.distance(content))}</p>'
        f"<ul style='margin:.4em 0;padding-left:1.2em;font-size:.9em'>{rows}</ul></div>"
    )


def markdown(content: dict) -> str:
    """CARD.md: the verdict, the attacks, the checks and how to check all of it."""
    attacks = "\n".join(
        f"| {name} | {100 * found['robust']:.2f} | {content['counts']['broken_by'].get(name, 0)} |"
        for name, found in content["attacks"].items()
    )
    listed = "\n".join(
        f"| {c['number']} | {c['name']} | {c['status']} | {wording.shown_value(c)} | {c['limit']} |"
        for c in content["checks"]
    )
    advice = "\n".join(
        f"- {c['status']} {c['number']}: {c['advice']}" for c in content["checks"] if c["advice"]
    )
    audit = content["audit"]
    told = (
        ""
        if audit is None
        else f"\nAn audit (other seed, order and slots) left {100 * audit['robust']:.2f} %.\n"
    )
    told += _over_the_radius(content)
    return f"""# Judgement

{wording.words(content)}

**{wording.figure(content)}**
{told}
{content["n"]} images of {content["classes"]} classes, protocol {content["protocol"]}, seed {content["seed"]}.
The figure is an upper bound: a stronger attack can lower it, and none can raise it.

| attack | accuracy left in % | images it broke first |
|---|---:|---:|
{attacks}

| no. | check | status | value | limit |
|---:|---|---|---:|---|
{listed}

{advice}

Check it again: `python -m clustr_jax.verify FOLDER [--model=module:function]`.
"""


def _over_the_radius(content):
    """The curve of minimum norms, where there is one."""
    found = content.get("distances")
    if not found:
        return ""
    curve = [(intervals.radius(radius) if radius else "0", 100 * left) for radius, left in found["curve"]]
    rows = "\n".join(f"| {radius} | {left:.2f} |" for radius, left in curve)
    median = wording.distance(content)
    said = f"{median[0].upper()}{median[1:]}.\n" if median else ""
    return f"\n{said}\n| {content['norm']} radius | accuracy in %, at most |\n|---:|---:|\n{rows}\n"


def _e(text) -> str:
    return escaping.escape(str(text))
