"""Pictures of docs/results.md, from the JSONs in results/.

    python experiments/picture.py

docs/figures/protocols.svg: each run of the campaign by the paper's protocol and by the sound one.
docs/figures/levers.svg: what rows of experiments/levers.py measured over the updates.
"""

import argparse
import json
import pathlib
import sys

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "experiments"))

from result_tables import DATASETS, LABELS, RESULTS, seeds  # noqa: E402

FIGURES = ROOT / "docs" / "figures"
# Methods whose head is made of clusters (of the names too), against all others.
_CLUSTERS, _OTHERS = "#cc6677", "#4477aa"
_WIDTH = 4.4  # inches, as wide as the figures of a report: 422 pixels, legible on a phone
_SHORT = {
    "clustr_qtrades+paper_code": "ClusTR+QTR., authors'",
    "qtrades+paper_code": "QTRADES, authors'",
    "clustr+kmeans": "k-means on nominal",
    "clustr+half": "ClusTR, half warm-up",
    "clustr_trades": "clustr_trades, linear",
}


def points(dataset: str) -> list[tuple[str, float, float]]:
    """(method, sound, paper) in percent, the mean of the seeds that have both."""
    found = []
    for name in LABELS:
        by_seed = {}
        for what in ("sound", "paper"):
            for result in seeds(dataset, name, what):
                by_seed.setdefault(result["seed"], {})[what] = 100 * result["robust"]
        both = [pair for pair in by_seed.values() if len(pair) == 2]
        if both:
            mean = {what: sum(pair[what] for pair in both) / len(both) for what in ("sound", "paper")}
            found.append((name, mean["sound"], mean["paper"]))
    return found


def draw() -> Figure:
    """One panel a data set, one line a method: from the sound protocol to the paper's."""
    shown = [(dataset, points(dataset)) for dataset in DATASETS]
    shown = [(dataset, found) for dataset, found in shown if found]
    rows = [len(found) for _, found in shown]
    figure = Figure(figsize=(_WIDTH, 0.23 * sum(rows) + 0.9 * len(shown) + 0.7), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=[count + 1 for count in rows])[:, 0]
    for ax, (dataset, found) in zip(panels, shown, strict=True):
        found = sorted(found, key=lambda point: point[1:])  # what the sound protocol leaves most of is on top
        for row, (name, sound, paper) in enumerate(found):
            colour = _CLUSTERS if name.startswith(("clustr", "magnet")) else _OTHERS
            ax.plot([sound, paper], [row, row], color=colour, linewidth=2)
            ax.scatter([sound], [row], color=colour, s=30, zorder=3)
            ax.scatter([paper], [row], color="white", edgecolors=colour, linewidths=1.5, s=30, zorder=3)
        ax.set_yticks(range(len(found)), [_SHORT.get(name, LABELS[name]) for name, _, _ in found])
        ax.set(xlim=(-1.5, None), ylim=(-0.7, len(found) - 0.3), title=DATASETS[dataset])
        ax.grid(axis="x", color="0.9")
        ax.set_axisbelow(True)
        ax.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
    panels[-1].set_xlabel("accuracy under attack, %")
    kinds = [("head of clusters", _CLUSTERS), ("linear head", _OTHERS)]
    handles = [Line2D([], [], color=colour, linewidth=4, label=kind) for kind, colour in kinds]
    grey = {"linestyle": "", "marker": "o", "color": "0.35"}
    handles.append(Line2D([], [], label="sound", **grey))
    handles.append(Line2D([], [], label="paper's protocol", markerfacecolor="white", **grey))
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False)
    return figure


# Rows of experiments/levers.py: the form of the consistency term, and its colour.
FORMS = {
    "text": ("log scores (the text)", "#cc6677"),
    "exp": ("exp scores", "#4477aa"),
    "clean-statistics": ("exp, clean statistics", "#aa3377"),
    "authors": ("authors' switches", "#228833"),
    "lr-3e-4": ("exp, rate 3e-4", "#ccaa33"),
}
_LINES = {"val_accuracy": "--", "paper_accuracy": "-", "quick_accuracy": ":"}


def curves(seed: int = 0) -> dict[str, list[dict]]:
    """Row -> what it measured after each epoch, of the rows that have begun."""
    found = {}
    for name in FORMS:
        path = RESULTS / "levers" / f"{name}-{seed}.curve.json"
        if path.exists():
            found[name] = json.loads(path.read_text())["curve"]
    return found


def draw_curves() -> Figure:
    """Held-out images over the updates: clean, after the paper's attack, and after a sound one."""
    figure = Figure(figsize=(_WIDTH, 4.2), layout="constrained")
    ax = figure.subplots()
    for name, measured in curves().items():
        steps = [m["step"] for m in measured]
        for key, line in _LINES.items():
            values = [100 * m[key] for m in measured]
            ax.plot(steps, values, line, color=FORMS[name][1], linewidth=2, marker="o", markersize=3)
    ax.set(
        xlabel="updates of the second stage", ylabel="held-out accuracy, %", ylim=(-3, 100), xlim=(0, None)
    )
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    handles = [Line2D([], [], color=colour, linewidth=4, label=form) for form, colour in FORMS.values()]
    styles = zip(("clean", "paper's, 1 restart", "sound (quick-1)"), _LINES.values(), strict=True)
    handles += [Line2D([], [], color="0.35", linestyle=line, label=what) for what, line in styles]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False)
    return figure


def save(path: pathlib.Path, draw=draw) -> None:
    """The same results, the same bytes."""
    with rc_context({"svg.hashsalt": "clustr_jax", "svg.fonttype": "none", "font.size": 11}):
        FigureCanvasSVG(figure := draw())
        figure.savefig(path, metadata={"Date": None})


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for name, drawn in (("protocols", draw), ("levers", draw_curves)):
        save(FIGURES / f"{name}.svg", drawn)
        print((FIGURES / f"{name}.svg").relative_to(ROOT))


if __name__ == "__main__":
    main()
