"""What a report shows of the network itself: embeddings in the plane, and adversarial examples.

Pure of files: a classifier and images go in, arrays come out. Of several processes all call it together.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from clustr_jax import clusters, data
from clustr_jax.attacks import scheduler
from clustr_jax.attacks.pgd import as_partial
from clustr_jax.classifier import Classifier
from clustr_jax.evaluation.plans import attack_on
from clustr_jax.evaluation.subject import of_classifier
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.stage_names import TRAIN
from clustr_jax.settings import EvalSettings, MagnetSettings

# Test images in the plane, training images that clusters are fitted to where the network has none.
_POINTS, _FITTED = 600, 2000
# Classes of the gallery, and of the plane: more than these cannot be told apart.
CLASSES = 10
# Images of a class that are tried for the gallery.
_TRIED = 50
# The plane reaches this far beyond the outermost point, in units of the embeddings' root mean square.
_ROOM = 0.15


@dataclasses.dataclass(frozen=True)
class Plane:
    """Embeddings of one stage on their first two principal axes, in units of their root mean square norm."""

    stage: str
    points: Float[np.ndarray, "N 2"]
    labels: Int[np.ndarray, "N"]
    centroids: Float[np.ndarray, "C 2"]
    owners: Int[np.ndarray, "C"]  # the class of each centroid
    share: tuple[float, float]  # of the variance, along each axis
    source: str  # what the centroids are
    borders: bool  # whether these centroids decide anything, or will
    dimensions: int


@dataclasses.dataclass(frozen=True)
class Victim:
    """One attacked test image; distances are in embedding space, NaN without clusters."""

    index: int  # in the test split
    label: int
    before: int  # predicted class of the image
    after: int  # ... of the adversarial one
    x: Float[np.ndarray, "H W C"]
    x_adv: Float[np.ndarray, "H W C"]
    linf: float
    l2: float
    own: tuple[float, float]  # distance to the nearest centroid of its class: before, after
    other: tuple[float, float]  # ... of another class
    file: str = ""  # of own images: its name


def principal(z: Float[np.ndarray, "N E"]):
    """(mean [E], axes [2, E], share of the variance along each, root mean square distance to the mean).

    By the singular values in float64; the largest entry of each axis is positive, so that the same
    embeddings always give the same picture. An axis that they do not have (of one point, say) is zero.
    """
    z = np.asarray(z, np.float64)
    mean = z.mean(axis=0)
    _, singular, found = np.linalg.svd(z - mean, full_matrices=False)
    axes, power = np.zeros((2, z.shape[1])), np.zeros(2)  # of one point, or one dimension, there is no second
    axes[: len(found[:2])] = found[:2]
    axes *= np.sign(axes[np.arange(2), np.abs(axes).argmax(axis=1)])[:, None]
    power[: len(found[:2])] = singular[:2] ** 2
    total = float(np.sum(singular**2))
    share = power / max(total, 1e-300)
    unit = float(np.sqrt(total / len(z)))
    return mean, axes, (float(share[0]), float(share[1])), unit if unit > 1e-12 else 1.0


def plane(
    stage: str,
    z: Float[np.ndarray, "N E"],
    labels: Int[np.ndarray, "N"],
    centroids: Float[np.ndarray, "C E"],
    owners: Int[np.ndarray, "C"],
    source: str,
    borders: bool,
) -> Plane:
    """Embeddings z [N, E] and centroids [C, E] on the principal axes of z."""
    mean, axes, share, unit = principal(z)

    def flat(points):
        return (np.asarray(points, np.float64) - mean) @ axes.T / unit

    return Plane(
        stage,
        flat(z),
        np.asarray(labels),
        flat(centroids),
        np.asarray(owners),
        share,
        source,
        borders,
        np.shape(z)[1],
    )


def limits(planes: list[Plane]) -> tuple[float, float, float, float]:
    """(left, right, bottom, top) that hold all points of all planes, so that they can be compared."""
    points = np.concatenate([np.concatenate([p.points, p.centroids]) for p in planes])
    low, high = points.min(axis=0) - _ROOM, points.max(axis=0) + _ROOM
    return float(low[0]), float(high[0]), float(low[1]), float(high[1])


def cells(
    centroids: Float[np.ndarray, "C 2"], box: tuple[float, float, float, float]
) -> list[Float[np.ndarray, "V 2"]]:
    """Voronoi cells in the plane, clipped to (left, right, bottom, top); [0, 2] where nothing is left.

    The box is cut by the bisector to every other centroid (Sutherland and Hodgman 1974).
    """
    left, right, bottom, top = box
    corners = np.array([(left, bottom), (right, bottom), (right, top), (left, top)])
    found = []
    for i, own in enumerate(centroids):
        cell = corners
        for j, other in enumerate(centroids):
            normal = other - own
            if i != j and np.any(normal):
                cell = _cut(cell, normal, float(normal @ (own + other) / 2))
        found.append(cell)
    return found


def _cut(polygon, normal, limit):
    """The part of a convex polygon where normal . p <= limit."""
    if not len(polygon):
        return polygon
    side, kept = polygon @ normal - limit, []
    for i, p in enumerate(polygon):
        j = (i + 1) % len(polygon)
        if side[i] <= 0:
            kept.append(p)
        if (side[i] < 0 < side[j]) or (side[j] < 0 < side[i]):
            kept.append(p + side[i] / (side[i] - side[j]) * (polygon[j] - p))
    return np.array(kept).reshape(-1, 2)


def embeddings(
    key: Array, stages: dict[str, Classifier], magnet: MagnetSettings, train: data.Split, test: data.Split
):
    """A `Plane` for each stage's classifier, of the same test images (of the first classes, if many).

    A stage before the clusters shows those that the next one starts from: k-means++ on training images.
    """
    classes = min(test.num_classes, CLASSES)
    few = np.flatnonzero(test.labels < classes)
    index = few[data.stratified(test.labels[few], min(_POINTS, len(few)), classes)]
    x, y = test.pixels(index), test.labels[index]
    found = []
    for stage, clf in stages.items():
        z = np.asarray(clf.embed(x))
        if clf.clusters is not None:
            centroids, valid = np.asarray(clf.clusters.centroids), np.asarray(clf.clusters.valid)
            source, borders = "the clusters of the trained network", True
        elif any(c.clusters is not None for c in stages.values()):
            centroids, valid, source = _first_clusters(key, clf, magnet, train)
            borders = True
        else:
            present = np.unique(y)
            centroids = np.stack([z[y == c].mean(axis=0) for c in present])[:, None]
            valid, source, borders = np.ones((len(present), 1), bool), "the mean of each class", False
        owners = np.repeat(np.arange(len(centroids)), centroids.shape[1]).reshape(valid.shape)
        shown = valid & (owners < classes)
        found.append(plane(stage, z, y, centroids[shown], owners[shown], source, borders))
    return found


def _first_clusters(key, clf, magnet, train):
    """(centroids [Y, K, E], valid [Y, K], what they are): k-means++ as at the start of the next stage."""
    size = min(_FITTED, len(train))
    index = data.stratified(train.labels, size, train.num_classes)
    k = magnet.k_per_class or magnet.k
    z, y = clf.embed(train.pixels(index)), train.labels[index]
    try:
        fitted = clusters.fit(key, z, y, num_classes=train.num_classes, k=k, max_iter=magnet.max_iter)
        source = f"k-means++ on {size:,} training images"
        if magnet.fit == "linear_head":
            source += f" ({TRAIN} starts from the linear head's instead)"
        else:
            source += f", as at the start of {TRAIN}"
    except UserError:  # of so few images a class has fewer than k
        fitted = clusters.fit(key, z, y, num_classes=train.num_classes, k=1)
        source = f"one cluster per class, fitted to {size:,} training images"
    return np.asarray(fitted.centroids), np.asarray(fitted.valid), source


def gallery(
    key: Array, clf: Classifier, settings: EvalSettings, test: data.Split, ids: Int[np.ndarray, "M"]
) -> list[Victim]:
    """Of the test images `ids` the first correctly classified one of each class, and PGD on the margin.

    From one start. The attack is the sound protocol's own, with its steps and its main eps. Where it
    fails, `x_adv` is where it ended.
    """
    budget, slots = settings.attack, settings.slots
    first = [ids[test.labels[ids] == c][:_TRIED] for c in range(min(test.num_classes, CLASSES))]
    candidates = np.concatenate(first).astype(np.int32)
    y = test.labels[candidates]
    view = scheduler.forward(as_partial(clf.view), test.pixels(candidates), slots)
    right = (view.deployed.argmax(axis=1) == y) & (view.logits.argmax(axis=1) == y)
    chosen = [candidates[right & (y == c)][:1] for c in np.unique(y)]
    index = np.concatenate([*chosen, np.zeros(0, np.int32)]).astype(np.int32)
    if not len(index):
        return []
    x, y = test.pixels(index), test.labels[index]
    ends = x.copy()

    def collect(example, restart, image, fooled):
        ends[example] = image

    subject = of_classifier(clf)
    attack = attack_on(subject, "margin", eps=budget.eps, steps=budget.steps, step_size=budget.step_size)
    scheduler.run(attack, key, as_partial(clf.view), x, y, ids=index, slots=slots, collect=collect)
    before, after = (np.asarray(clf.predict(images)) for images in (x, ends))
    delta = (ends - x).reshape(len(x), -1).astype(np.float64)
    own, other = np.full((2, len(x)), np.nan), np.full((2, len(x)), np.nan)
    if clf.clusters is not None:
        for i, images in enumerate((x, ends)):
            own[i], other[i] = _distances(clf, images, y)
    return [
        Victim(
            int(index[i]),
            int(y[i]),
            int(before[i]),
            int(after[i]),
            x[i],
            ends[i],
            float(np.abs(delta[i]).max()),
            float(np.linalg.norm(delta[i])),
            (float(own[0, i]), float(own[1, i])),
            (float(other[0, i]), float(other[1, i])),
            test.files[index[i]] if test.files else "",
        )
        for i in range(len(x))
    ]


def _distances(clf, x, y):
    """Distance of each embedding to the nearest centroid of its class, and of any other class."""
    valid = np.asarray(clf.clusters.valid)
    squared = np.asarray(clf.clusters.squared_distances(clf.embed(x)), np.float64)
    nearest = np.sqrt(np.where(valid, squared, np.inf)).min(axis=2)
    mine = np.arange(nearest.shape[1]) == y[:, None]
    return nearest[mine], np.where(mine, np.inf, nearest).min(axis=1)


def parameters(clf: Classifier) -> int:
    """Trained numbers of the network, its batch statistics not counted."""
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(clf.variables["params"]))
