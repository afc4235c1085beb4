"""The pictures of the network itself: its embeddings in the plane, and adversarial images."""

from collections.abc import Callable

import numpy as np

from clustr_jax.report.looks import Plane, Victim, cells, limits
from clustr_jax.report.svg import INK, MUTED, SERIES, Drawing, attempt, draw
from clustr_jax.runtime.errors import cut, shown
from clustr_jax.runtime.stage_names import TRAIN, WARMUP

_WHEN = {WARMUP: "Before: after the warm-up", TRAIN: "After: the trained network"}


# Letters of a class's name in a picture, and of all names under one.
_NAME, _NAMES = 22, 160


def planes(found: list[Plane], name: Callable[[int], str] = str) -> list[Drawing]:
    """Embeddings with centroids and the borders between their cells, one drawing per stage, same limits.

    `name`: what a class is called.
    """
    made = [
        attempt(f"embeddings-{p.stage}", _WHEN.get(p.stage, p.stage), _plane, p, found, name) for p in found
    ]
    return [drawing for drawing in made if drawing]


def _plane(plane: Plane, found: list[Plane], name: Callable[[int], str]) -> Drawing:
    box = limits(found)
    classes = np.unique(np.concatenate([plane.labels, plane.owners]))

    def paint(figure):
        axes = figure.add_subplot()
        if plane.borders:
            for owner, cell in zip(plane.owners, cells(plane.centroids, box), strict=True):
                if len(cell) > 2:
                    axes.fill(*cell.T, facecolor=SERIES[owner % 10], alpha=0.1, linewidth=0)
                    axes.fill(*cell.T, facecolor="none", edgecolor=MUTED, linewidth=0.7)
        for c in classes:
            points = plane.points[plane.labels == c]
            axes.plot(
                *points.T,
                linestyle="none",
                marker=f"${c}$",
                color=SERIES[c % 10],
                markersize=3.8,
                markeredgewidth=0.2,
            )
        axes.plot(
            *plane.centroids.T,
            linestyle="none",
            marker="o",
            markersize=8,
            markerfacecolor="#ffffff",
            markeredgecolor=INK,
            markeredgewidth=1.0,
        )
        for owner, (x, y) in zip(plane.owners, plane.centroids, strict=True):
            axes.text(
                x,
                y,
                str(owner),
                ha="center",
                va="center_baseline",
                fontsize=6,
                weight="bold",
                color=SERIES[owner % 10],
            )
        axes.set(xlim=box[:2], ylim=box[2:], aspect="equal")
        axes.set_xlabel(f"first axis, {100 * plane.share[0]:.0f} % of the variance")
        axes.set_ylabel(f"second axis, {100 * plane.share[1]:.0f} %")
        axes.grid(visible=False)

    share = sum(plane.share)
    means = [plane.points[plane.labels == c].mean(axis=0) for c in np.unique(plane.labels)]
    spread = np.linalg.norm(means, axis=1)
    alt = (
        f"{len(plane.points)} test images of {len(means)} classes, each drawn as the number of its class, "
        f"and {len(plane.centroids)} circles: {plane.source}. The two axes hold {100 * share:.1f} % of the "
        f"variance of {plane.dimensions} dimensions. The classes' means lie {spread.min():.2f} to "
        f"{spread.max():.2f} units from the centre."
    )
    named = ", ".join(f"{c} {shown(name(c), _NAME)}" for c in classes if name(c) != str(c))
    told = f"Circles: {plane.source}." + (f" Classes: {cut(named, _NAMES)}." if named else "")
    ratio = (box[3] - box[2]) / (box[1] - box[0])
    return draw(
        f"embeddings-{plane.stage}",
        _WHEN.get(plane.stage, plane.stage),
        told,
        alt,
        paint,
        float(np.clip(0.5 + 3.72 * ratio, 2.6, 6.0)),
    )


def gallery(victims: list[Victim], eps: float, name: Callable[[int], str] = str) -> Drawing | None:
    """The gallery as one picture, for the figures' folder: clean, perturbation, adversarial.

    `name`: what a class is called.
    """
    if not victims:
        return None
    gain = magnification(eps)

    def called(label):
        return f"class {label}" if name(label) == str(label) else shown(name(label), _NAME)

    def paint(figure):
        grid = figure.subplots(len(victims), 3, squeeze=False)
        for row, victim in zip(grid, victims, strict=True):
            images = (victim.x, magnified(victim, eps), victim.x_adv)
            words = (called(victim.before), f"change x {gain:.3g}", called(victim.after))
            for axes, image, text in zip(row, images, words, strict=True):
                pixels = image[..., 0] if image.shape[-1] == 1 else image
                axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axes.set_title(text, fontsize=8, parse_math=False)  # a name may hold dollars
                axes.set_axis_off()

    changed = sum(victim.after != victim.label for victim in victims)
    alt = (
        f"{len(victims)} images of as many classes, changed by at most {eps:.4g}; {changed} fool the network."
    )
    return draw("gallery", "Adversarial images", "", alt, paint, 1.35 * len(victims))


def magnification(eps: float) -> float:
    """How often the change is enlarged: eps becomes half of the range."""
    return 0.5 / eps if eps else 1.0


def magnified(victim: Victim, eps: float) -> np.ndarray:
    """The change about mid-grey, which stands for none; at eps it is black or white."""
    return np.clip(0.5 + magnification(eps) * (victim.x_adv - victim.x), 0, 1)
