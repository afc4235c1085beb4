"""docs/figures/protocols.svg: each run of the campaign by the paper's protocol and by the sound one.

python experiments/picture.py
"""

import pathlib
import sys

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "experiments"))

from result_tables import DATASETS, LABELS, seeds  # noqa: E402

OUT = ROOT / "docs" / "figures" / "protocols.svg"
_MARKERS = {"svhn_cropped": "o", "cifar10": "s", "cifar100": "^"}
# Methods whose head is made of clusters, against all others.
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


def draw() -> Figure:
    """One panel a data set; on the diagonal both protocols agree, above it the paper's was blind."""
    shown = [(dataset, points(dataset)) for dataset in DATASETS]
    shown = [(dataset, found) for dataset, found in shown if found]
    figure = Figure(figsize=(4.2 * len(shown), 4.2), layout="constrained")
    for i, (dataset, found) in enumerate(shown):
        ax = figure.add_subplot(1, len(shown), i + 1)
        top = 1.15 * max(max(sound, paper) for _, sound, paper in found) + 1
        ax.plot([0, top], [0, top], color="0.7", linewidth=1, zorder=0)
        for name, sound, paper in found:
            clusters = name.startswith(("clustr", "magnet"))
            colour = _CLUSTERS if clusters else _OTHERS
            ax.scatter(sound, paper, marker=_MARKERS[dataset], color=colour, s=28)
            right = sound > top / 2
            ax.annotate(
                LABELS[name], (sound, paper), xytext=(-5 if right else 5, 3), textcoords="offset points",
                ha="right" if right else "left", fontsize=7,
            )  # fmt: skip
        ax.set(xlim=(-0.5, top), ylim=(-0.5, top), title=DATASETS[dataset])
        ax.set(xlabel="sound protocol, %", ylabel="paper's protocol (PGD$^{20}$), %")
    return figure


def save(path: pathlib.Path) -> None:
    """The same results, the same bytes."""
    with rc_context({"svg.hashsalt": "clustr_jax"}):
        FigureCanvasSVG(figure := draw())
        figure.savefig(path, metadata={"Date": None})


def main():
    save(OUT)
    print(OUT.relative_to(ROOT))


if __name__ == "__main__":
    main()
