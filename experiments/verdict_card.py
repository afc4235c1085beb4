"""docs/figures/verdict.svg: the verdict of README's network on digits as a card, from results/digits.

python experiments/verdict_card.py
"""

import argparse
import json
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from clustr_jax import data  # noqa: E402
from clustr_jax.evaluation import intervals  # noqa: E402

OUT = ROOT / "docs" / "figures" / "verdict.svg"
_WIDTH, _HEIGHT = 820, 268
_BARS = (250, 430)  # where a bar begins, and how long 100 % is
# Light, and dark where the reader's page is; text is at least 4.5 to 1 on its ground in both.
_STYLE = """\
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1c2128; }
.card { fill: #ffffff; stroke: #d1d9e0; } .edge, .bad { fill: #a40e26; } .track { fill: #eef2f6; }
.bar { fill: #59636e; } .muted { fill: #59636e; } .badge { fill: #ffe3e3; } .on { fill: #a40e26; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6eaee; } .card { fill: #171b21; stroke: #333c46; } .edge, .bad { fill: #ff9d9d; }
  .track { fill: #28303a; } .bar { fill: #a2adb8; } .muted { fill: #a2adb8; } .badge { fill: #431519; }
  .on { fill: #ff9d9d; }
}
.narrow { display: none; }
@media (max-width: 600px) { .wide { display: none; } .narrow { display: inline; } }"""  # of the picture


def draw() -> str:
    """The card: whether it is robust, by how much the protocols differ, whether the checks believe it."""
    clean, paper, sound, checks = (
        json.loads((ROOT / "results" / "digits" / f"{name}.json").read_text())
        for name in ("clean", "paper", "sound", "diagnostics")
    )
    labels = data.load("digits", "test")[1]
    constant = float(np.bincount(labels).max() / len(labels))
    assert sound["n"] == len(labels) and sound["robust"] < constant, "the sentences are about such a result"
    failed = [c["number"] for c in checks["checks"] if c["status"] == "FAIL"]
    warned = [str(c["number"]) for c in checks["checks"] if c["status"] == "WARN"]
    assert not failed and warned
    eps, n = intervals.radius(sound["eps"]), sound["n"]
    rows = (
        ("clean", clean["clean"], "bar"),
        ("the paper's protocol", paper["robust"], "bar"),
        ("the sound protocol", sound["robust"], "bad"),
    )
    parts = [
        f'<rect class="card" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{_HEIGHT - 1}" rx="10"/>',
        f'<rect class="edge" x="0.5" y="0.5" width="7" height="{_HEIGHT - 1}" rx="3.5"/>',
        '<g class="wide">',
        _text(30, 36, f"digits, ClusTR + QTRADES, linf eps {eps}, {n} test images", 15, "muted"),
        '<rect class="badge" x="30" y="54" width="132" height="30" rx="15"/>',
        _text(96, 75, "NOT ROBUST", 15, "on", weight=700, anchor="middle"),
        _text(178, 76, "Worse than always naming one class.", 19, weight=600),
    ]
    start, length = _BARS
    for i, (label, value, look) in enumerate(rows):
        y = 108 + 38 * i
        interval = intervals.percent(value, {"n": n}).partition(" ")[2]
        parts += [
            _text(30, y + 16, label, 16, weight=600 if look == "bad" else 400),
            _bar("track", start, y, length),
            _bar(look, start, y, length * value),
            _text(start + length + 12, y + 16, f"{100 * value:.2f} %", 16, weight=700),
        ]
        if look == "bad":
            parts.append(_text(start + length * value + 12, y + 16, f"95 % interval {interval}", 14, "muted"))
    said = f"No check failed; {' and '.join(warned)} warn. "
    said += "The figure is an upper bound: stronger attacks may lower it."
    parts += [_text(30, 246, said, 15, "muted"), "</g>", *_narrow(rows, eps)]
    sound_share, paper_share = (f"{100 * result['robust']:.2f} %" for result in (sound, paper))
    title = f"Not robust: {sound_share} by the sound protocol, {paper_share} by the paper's"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" role="img" aria-label="{title}">\n<title>{title}</title>\n'
        f"<style>\n{_STYLE}\n</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _narrow(rows, eps):
    """The same where the picture is as narrow as a phone: texts of 11 pixels there, so fewer words."""
    parts = [
        '<g class="narrow">',
        '<rect class="badge" x="28" y="18" width="232" height="44" rx="22"/>',
        _text(144, 50, "NOT ROBUST", 28, "on", weight=700, anchor="middle"),
        _text(276, 51, "Worse than naming one class.", 30, weight=600),
    ]
    start, length = 350, 300
    for i, (label, value, look) in enumerate(rows):
        y = 82 + 48 * i
        parts += [
            _text(28, y + 25, label, 29, weight=600 if look == "bad" else 400),
            _bar("track", start, y, length, 30),
            _bar(look, start, y, length * value, 30),
            _text(start + length + 12, y + 25, f"{100 * value:.2f} %", 29, weight=700),
        ]
    parts.append(_text(28, 248, f"digits, linf eps {eps}. No check failed; an upper bound.", 28, "muted"))
    return [*parts, "</g>"]


def _bar(look, x, y, width, height=22):
    return f'<rect class="{look}" x="{x}" y="{y}" width="{width:.1f}" height="{height}" rx="4"/>'


def _text(x, y, said, size, look="", weight=400, anchor="start"):
    shown = said.replace("&", "&amp;").replace("<", "&lt;")
    kind = f' class="{look}"' if look else ""
    return (
        f'<text{kind} x="{x:.1f}" y="{y}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{shown}</text>'
    )


def save(path: pathlib.Path) -> None:
    """The same results, the same bytes."""
    path.write_text(draw(), encoding="utf-8")


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    save(OUT)
    print(OUT.relative_to(ROOT))


if __name__ == "__main__":
    main()
