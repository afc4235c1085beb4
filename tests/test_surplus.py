"""experiments/surplus.py: calibration and rejection against slow references, and the table of a file."""

import math

import numpy as np
import pytest

from centroid_classifiers import linear_classifier
from clustr_jax.storage.files import write_json
from experiment_modules import imported


@pytest.fixture(scope="module")
def surplus():
    with imported("surplus") as modules:
        yield modules["surplus"]


def _softmax(row):
    values = [math.exp(v - max(row)) for v in row]
    return [v / sum(values) for v in values]


def _calibration_error(logits, labels, bins):
    """Guo et al. 2017, Eq. 3, bin by bin."""
    total = 0.0
    for b in range(bins):
        inside = []
        for row, label in zip(logits, labels, strict=True):
            probs = _softmax(row)
            confidence = max(probs)
            if b / bins < confidence <= (b + 1) / bins:
                inside.append((confidence, probs.index(confidence) == label))
        if inside:
            accuracy = sum(right for _, right in inside) / len(inside)
            total += len(inside) / len(labels) * abs(accuracy - sum(c for c, _ in inside) / len(inside))
    return total


@pytest.fixture
def outputs():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 300)
    return rng.normal(size=(300, 5)) * 3 + 2 * np.eye(5)[labels], labels


def test_calibration_error_and_likelihood(surplus, outputs):
    logits, labels = outputs
    for bins in (5, 15):
        found = surplus.calibration_error(logits, labels, bins)
        assert found == pytest.approx(_calibration_error(logits.tolist(), labels.tolist(), bins), abs=1e-12)
    expected = -np.mean([math.log(_softmax(r)[y]) for r, y in zip(logits.tolist(), labels, strict=True)])
    assert surplus.nll(logits, labels) == pytest.approx(expected, abs=1e-12)
    assert surplus.nll(1e4 * logits, labels) > 100  # no overflow
    certain = 100.0 * np.eye(5)[labels]
    assert surplus.calibration_error(certain, labels) == 0.0
    assert surplus.calibration_error(certain, (labels + 1) % 5) == 1.0


def test_temperature_undoes_a_scale(surplus, outputs):
    logits, labels = outputs
    once, twice = (surplus.best_temperature(s * logits, labels) for s in (1.0, 4.0))
    step = surplus.TEMPERATURES[1] / surplus.TEMPERATURES[0]
    assert step**-1.1 < twice / once / 4 < step**1.1  # both are on the grid
    assert surplus.nll(4 * logits / twice, labels) < surplus.nll(4 * logits, labels)


def test_area_under_the_curve_counts_pairs(surplus):
    rng = np.random.default_rng(1)
    own, strange = rng.integers(0, 9, 60) / 2, rng.integers(0, 7, 40) / 2  # with ties
    pairs = [(a > b) + 0.5 * (a == b) for a in own for b in strange]
    assert surplus.auroc(own, strange) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert surplus.auroc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert surplus.auroc(np.zeros(3), np.zeros(5)) == 0.5


def test_attacks_of_another_network_are_transferred(surplus):
    """Nearest-centroid heads on two pixels: an attack moves along its own axis alone, and to the ball's end.

    `near` has its border at 0.5 and `own` at 0.55: where near's attack stopped at once, own would withstand.
    """
    heads = {
        "own": ([[1.0], [0.0]], [[[0.0]], [[1.1]]]),
        "across": ([[0.0], [1.0]], [[[0.0]], [[1.0]]]),
        "near": ([[1.0], [0.0]], [[[0.0]], [[1.0]]]),
    }
    networks = {name: linear_classifier(w, centroids, 1.0) for name, (w, centroids) in heads.items()}
    x, y, ids = np.full((16, 2), 0.4, np.float32), np.zeros(16, int), np.arange(16, dtype=np.int32)
    found = surplus.transferred(networks["own"], "own", networks, x, y, ids, 0.2, 0)
    assert found["own"] == found["near"] == 0.0
    # what it does along the other axis is where it started: beyond 0.55 for one in eight
    assert 0.5 < found["across"] and found["all others"] == 0.0
    few = {name: networks[name] for name in ("own", "across")}
    again = surplus.transferred(networks["own"], "own", few, x, y, ids, 0.2, 0)
    assert again["all others"] == again["across"] == found["across"]
    assert surplus.transferred(networks["own"], "own", {"own": networks["own"]}, x, y, ids, 0.2, 0) == {
        "own": 0
    }


def test_images_look_like_the_training_sets_where_a_centroid_is_near(surplus):
    clf = linear_classifier(np.eye(2), [[[0.0, 0.0]], [[1.0, 1.0]]], 1.0)
    found = surplus.scores(clf, np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]], np.float32))
    assert found["nearest centroid"] == pytest.approx([0.0, -0.5, -0.25])  # -d^2 / 2 sigma^2
    assert found["log-sum-exp"] == pytest.approx(
        [np.log(1 + np.exp(-1.0)), np.log(2 * np.exp(-0.5)), np.log(2 * np.exp(-0.25))], abs=1e-6
    )
    assert found["largest probability"][1] == found["largest probability"][2] == pytest.approx(0.5)


def test_the_table_of_a_file(surplus, tmp_path):
    found = {
        "row": "clustr_at-1", "seed": 0,
        "calibration": {k: {"ece": 0.012, "nll": 1.234} for k in ("plain", "tempered")},
        "rejection": {
            "svhn_cropped": {"n": 10, "largest probability": 0.7, "nearest centroid": 0.8},
            "cifar100": {"n": 10, "largest probability": 0.6, "nearest centroid": 0.65},
        },
        "twice_the_radius": 0.1, "twice_the_radius_interval": [0.08, 0.12],
        "transfer": {"clustr_at-1": 0.3, "trades-1": 0.55, "linear_at-1": 0.5, "all others": 0.45},
    }  # fmt: skip
    write_json(tmp_path / "clustr_at-1-0.json", found)
    line = surplus.table(tmp_path).splitlines()[2]
    for cell in (
        "| 1.2, 1.2 |",
        "| 0.700 / 0.800 |",
        "| 0.600 / 0.650 |",
        "| 10.0 [8.0, 12.0] |",
        "| 45.0 |",
    ):
        assert cell in line
