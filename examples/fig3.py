"""The paper's Fig. 3 with radii that can be checked: Magnet against ClusTR on two sets in the plane.

    python examples/fig3.py [--runs=runs/fig3] [--out=docs/figures/fig3]

Trains what is not trained yet (configs/toy2d.py, about a minute each on one core), then writes OUT.png
and OUT.json. For every test point there are four radii: certified with the product of the layers'
norms, with the network's exact Lipschitz constant, and with its exact constant on the ball in question;
and the distance at which the prediction really changes, found on a grid.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from sklearn.neighbors import KDTree

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import clustr_jax  # noqa: E402
from clustr_jax import certify, data, lipschitz, stages  # noqa: E402
from clustr_jax.runtime.programs import program  # noqa: E402
from configs import toy2d  # noqa: E402

DATASETS = {"toy2d_moons": "moons", "toy2d_pairs": "pairs"}
METHODS = {"magnet": "Magnet", "clustr": "ClusTR"}
# Grid of the search: its spacing is the error of a distance before the last refinement.
_SPACING, _MARGIN = 0.01, 2.0
_COLOURS = ("#4477aa", "#cc6677")


def train(runs, dataset, method):
    """The finished run's classifier."""
    config = toy2d.get_config(method)
    config.data.name = dataset
    workdir = pathlib.Path(runs) / f"{dataset}-{method}"
    stages.run(config, str(workdir), ("1_warmup", "2_train"))
    return clustr_jax.load(workdir)


def weights(clf):
    """(W1 [2, H], b1, W2 [H, E]) of the toy network; it does not rescale its input."""
    assert set(clf.net.module.std) == {1.0}
    params = clf.variables["params"]
    return params["Dense_0"]["kernel"], params["Dense_0"]["bias"], params["Dense_1"]["kernel"]


def local_radii(rho, x, network, start):
    """sup{r: r L(ball of r around x) < rho}, L exact on the ball; `start` is certified already."""
    limit = lipschitz.planar(*network)
    found = np.zeros(len(x))
    for i, (distance, point, low) in enumerate(zip(rho, x, start, strict=True)):
        high = 4 * max(low, 1e-3)
        while distance > 0 and high < 1e3 and high * lipschitz.planar(*network, point, high) < distance:
            low, high = high, 2 * high
        if high * limit <= distance:  # cannot happen above, kept from looping
            low = high
        for _ in range(20 if distance > 0 else 0):
            middle = (low + high) / 2
            inside = middle * lipschitz.planar(*network, point, middle) * (1 + 1e-6) < distance
            low, high = (middle, high) if inside else (low, middle)
        found[i] = low
    return found


def flip_distances(clf, x, y, box):
    """Distance of each point to the nearest input of the other prediction: grid, then bisection towards it.

    An upper bound of the exact distance: above it by at most the diagonal of a grid cell where the region of
    the other prediction is no narrower than the grid and inside the box. 0 where the point is misclassified.
    """
    axes = [np.arange(low, high, _SPACING) for low, high in box]
    points = np.stack(np.meshgrid(*axes), -1).reshape(-1, 2).astype(np.float32)
    predicted = np.asarray(clf.predict(points))
    found = np.zeros(len(x))
    correct = np.asarray(clf.predict(x)) == y
    for c in (0, 1):
        mine = np.flatnonzero(correct & (y == c))
        others = points[predicted != c]
        if not len(others):
            found[mine] = np.inf
            continue
        nearest = others[KDTree(others).query(x[mine], return_distance=False)[:, 0]]
        low, high = np.zeros(len(mine)), np.ones(len(mine))
        for _ in range(24):
            middle = (low + high) / 2
            at = x[mine] + middle[:, None] * (nearest - x[mine])
            flipped = np.asarray(clf.predict(at.astype(np.float32))) != c
            low, high = np.where(flipped, low, middle), np.where(flipped, middle, high)
        found[mine] = high * np.linalg.norm(nearest - x[mine], axis=1)
    return found


def proposition_1(rng):
    """Proposition 1 as it is true: *there is* an L-Lipschitz f, with the same f(x), fooled just beyond R.

    f(x') = L (x' - x) + f(x). Returns (share of random problems fooled at 1.0001 R, at 0.9999 R).
    """
    beyond = inside = 0
    for _ in range(1000):
        constant, z, mu = 10.0 ** rng.uniform(-2, 2), rng.standard_normal(2), rng.standard_normal((2, 2))
        own, other = mu if np.sum((z - mu[0]) ** 2) < np.sum((z - mu[1]) ** 2) else mu[::-1]
        gap = np.sum((z - other) ** 2) - np.sum((z - own) ** 2)
        r = gap / (2 * constant * np.linalg.norm(other - own))
        direction = (other - own) / np.linalg.norm(other - own)
        for factor in (1.0001, 0.9999):
            f = z + constant * factor * r * direction
            fooled = np.sum((f - other) ** 2) < np.sum((f - own) ** 2)
            beyond, inside = beyond + (fooled and factor > 1), inside + (fooled and factor < 1)
    return beyond / 1000, inside / 1000


def measure(clf, x, y, box):
    """All radii of one network, and its constants."""
    network = weights(clf)
    product = lipschitz.bound(clf.net.describe(clf.variables), clf.net.input_shape)
    exact = lipschitz.planar(*network) * (1 + 1e-6)
    z = np.asarray(clf.embed(x))
    radii = {
        "product": certify.radius(clf.clusters, z, y, lipschitz=product),
        "exact": certify.radius(clf.clusters, z, y, lipschitz=exact),
    }
    rho = certify.radius(clf.clusters, z, y, lipschitz=1.0)
    radii["local"] = local_radii(rho, x, network, radii["exact"])
    radii["distance"] = flip_distances(clf, x, y, box)
    worst = np.max(radii["local"] - radii["distance"])
    assert worst <= 1e-5, f"a certified radius exceeds the true distance by {worst}"
    return {"product": product, "exact": exact, "regions": len(lipschitz.regions(*network[:2]))}, radii


def summary(constants, radii):
    """What the JSON says of one network."""
    certain = radii["exact"] > 0
    ratio = {
        name: radii[name][certain] / radii["distance"][certain] for name in ("product", "exact", "local")
    }
    return {
        "lipschitz": constants,
        "accuracy": float(np.mean(radii["distance"] > 0)),
        "median_radius": {name: float(np.median(r)) for name, r in radii.items()},
        "certified_over_true_distance": {
            name: {"median": float(np.median(r)), "max": float(np.max(r))} for name, r in ratio.items()
        },
    }


def draw(found, path):
    """One row per data set: the regions of both networks in input space, and the certified accuracies."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(DATASETS), 3, width_ratios=(1, 1, 1.25))
    for row, (dataset, title) in enumerate(DATASETS.items()):
        curves = axes[row, 2]
        reach = 0.0
        for column, (method, name) in enumerate(METHODS.items()):
            clf, x, y, box, constants, radii = found[dataset, method]
            _regions(axes[row, column], clf, x, y, box)
            axes[row, column].set_title(
                f"{name}: {100 * np.mean(radii['distance'] > 0):.1f} % correct, "
                f"constant {constants['exact']:.2f}",
                fontsize="medium",
            )
            reach = max(reach, np.quantile(radii["distance"], 0.99))
            for kind, style in _STYLES.items():
                r = np.sort(radii[kind])
                curves.step(
                    np.concatenate([[0], r]),
                    100 * np.linspace(1, 0, len(r) + 1),
                    style,
                    where="post",
                    color=f"C{column}",
                    label=f"{name}: {_LABELS[kind]}",
                )
        curves.set(
            xlim=(0, 1.05 * reach),
            ylim=(0, 101),
            xlabel="radius r (l2, units of the plane)",
            ylabel=f"{title}: accuracy at r in %",
        )
        curves.grid(alpha=0.3)
    lines, labels = axes[0, 2].get_legend_handles_labels()
    figure.legend(lines, labels, ncols=4, loc="outside lower center", fontsize="small")
    figure.savefig(path, dpi=130)


_LABELS = {
    "product": "certified, product of norms",
    "exact": "certified, exact constant",
    "local": "certified, exact constant of the ball",
    "distance": "true distance (grid)",
}
_STYLES = {"product": ":", "exact": "-.", "local": "--", "distance": "-"}


def _regions(axes, clf, x, y, box):
    """Which class owns each input: the Voronoi cells of feature space, seen through the network."""
    (left, right), (bottom, top) = box
    columns, rows = np.linspace(left, right, 400), np.linspace(bottom, top, 400)
    points = np.stack(np.meshgrid(columns, rows), -1).reshape(-1, 2).astype(np.float32)
    scores = np.asarray(clf.logits(points))
    margin = (scores[:, 1] - scores[:, 0]).reshape(400, 400)
    axes.contourf(
        columns, rows, margin > 0, levels=[-0.5, 0.5, 1.5], cmap=ListedColormap(_COLOURS), alpha=0.25
    )
    axes.contour(columns, rows, margin, levels=[0], colors="black", linewidths=1.2)
    for c in (0, 1):
        axes.plot(*x[y == c].T, ".", color=_COLOURS[c], markersize=3)
    low, high = x.min(axis=0) - 0.4, x.max(axis=0) + 0.4
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")


@program
def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", default="runs/fig3", help="where the four runs are, or go")
    parser.add_argument("--out", default=str(ROOT / "docs" / "figures" / "fig3"))
    args = parser.parse_args(argv)
    found, report = {}, {}
    for dataset in DATASETS:
        x, y = data.load(dataset, "test")
        box = list(zip(x.min(axis=0) - _MARGIN, x.max(axis=0) + _MARGIN, strict=True))
        for method in METHODS:
            clf = train(args.runs, dataset, method)
            constants, radii = measure(clf, x, y, box)
            found[dataset, method] = (clf, x, y, box, constants, radii)
            report[f"{dataset}-{method}"] = summary(constants, radii)
    beyond, inside = proposition_1(np.random.default_rng(0))
    report["proposition_1"] = {
        "f": "x' -> L (x' - x) + f(x), chosen for the proof",
        "fooled_at_1.0001_R": beyond,
        "fooled_at_0.9999_R": inside,
    }
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    draw(found, out.with_suffix(".png"))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
