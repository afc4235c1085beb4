"""docs/figures/protocols.svg: each run of the campaign by the paper's protocol and by the sound one.

python experiments/picture.py
"""

import argparse
import pathlib
import sys

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "experiments"))

from result_tables import DATASETS, LABELS, seeds  # noqa: E402

OUT = ROOT / "docs" / "figures" / "protocols.svg"
_MARKERS = {"svhn_cropped": "o", "cifar10": "s", "cifar100": "^"}
# Methods whose head is made of clusters (of the names too), against all others.
_CLUSTERS, _OTHERS = "#cc6677", "#4477aa"


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


def spread(wanted: list[float], gap: float, top: float) -> list[float]:
    """Heights in the order of `wanted`, `gap` apart at least and not above `top`."""
    placed = []
    for value in wanted:
        placed.append(max(value, placed[-1] + gap) if placed else value)
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], top - gap * (len(placed) - 1 - i))
    return placed


def draw() -> Figure:
    """One panel a data set; on the diagonal both protocols agree, above it the paper's was blind."""
    shown = [(dataset, points(dataset)) for dataset in DATASETS]
    shown = [(dataset, found) for dataset, found in shown if found]
    figure = Figure(figsize=(5.4 * len(shown), 4.5), layout="constrained")
    for i, (dataset, found) in enumerate(shown):
        ax = figure.add_subplot(1, len(shown), i + 1)
        top = 1.1 * max(max(sound, paper) for _, sound, paper in found) + 1
        ax.plot([0, top], [0, top], color="0.7", linewidth=1, zorder=0)
        found = sorted(found, key=lambda point: (point[2], -point[1]))  # so that few leaders cross
        heights = spread([paper for _, _, paper in found], top / 20, top)
        for (name, sound, paper), height in zip(found, heights, strict=True):
            clusters = name.startswith(("clustr", "magnet"))
            colour = _CLUSTERS if clusters else _OTHERS
            ax.scatter(sound, paper, marker=_MARKERS[dataset], color=colour, s=28)
            ax.annotate(
                LABELS[name], (sound, paper), xytext=(1.03 * top, height), va="center", fontsize=7.5,
                annotation_clip=False, color=colour,
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "0.6", "shrinkA": 0},
            )  # fmt: skip
        ax.set(xlim=(-0.02 * top, top), ylim=(-0.02 * top, top), title=DATASETS[dataset])
        ax.set(xlabel="sound protocol, %", ylabel="paper's protocol (PGD$^{20}$), %")
    kinds = [("a head made of clusters", _CLUSTERS), ("a linear head", _OTHERS)]
    handles = [Line2D([], [], linestyle="", marker="o", color=colour, label=kind) for kind, colour in kinds]
    handles.append(Line2D([], [], color="0.7", linewidth=1, label="both protocols agree"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8.5
    )
    return figure


def save(path: pathlib.Path) -> None:
    """The same results, the same bytes."""
    with rc_context({"svg.hashsalt": "clustr_jax"}):
        FigureCanvasSVG(figure := draw())
        figure.savefig(path, metadata={"Date": None})


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    save(OUT)
    print(OUT.relative_to(ROOT))


if __name__ == "__main__":
    main()
