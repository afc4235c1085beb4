"""What the paper reports (arXiv 2006.07682 v2, Tables 1 to 5), for printing beside measured figures.

CLAIMS: data set -> method -> (clean, PGD^20, PGD^100) in % at 8/255. Rows the authors took
from other publications (other networks and protocols) are in COPIED.
"""

CLAIMS = {
    "cifar10": {
        "nominal": (95.01, 0.00, 0.00),
        "free_at": (85.96, 46.33, 46.19),
        "at_pretrain": (87.30, 57.40, 57.20),
        "trades": (84.92, 56.61, 56.43),
        "magnet": (83.14, 23.71, 22.54),
        "clustr": (87.34, 49.04, 47.76),
        "qtrades": (81.07, 44.18, 43.42),
        "clustr_qtrades": (91.03, 74.44, 74.04),
    },
    "svhn_cropped": {
        "nominal": (98.38, 0.00, 0.00),
        "free_at": (86.98, 46.52, 46.06),
        "at_pretrain": (85.12, 47.18, 46.72),
        "trades": (91.63, 57.45, 55.28),
        "magnet": (91.95, 40.73, 38.59),
        "clustr": (94.28, 50.78, 50.77),
        "qtrades": (86.36, 43.05, 42.24),
        "clustr_qtrades": (95.06, 84.76, 84.75),
    },
    "cifar100": {
        "nominal": (78.84, 0.00, 0.00),
        "free_at": (62.13, 25.88, 25.58),
        "at_pretrain": (59.23, 34.22, 33.91),
        "trades": (55.36, 28.11, 27.96),
        "clustr_qtrades": (69.25, 52.47, 52.40),
    },
}
SWEEP = {  # Table 4, ClusTR+QTRADES: eps in 1/255 -> (PGD^20, PGD^100)
    "cifar10": {2.0: (81.99, 81.54), 16.0: (57.67, 57.05), 25.5: (35.88, 34.98)},
    "svhn_cropped": {2.0: (87.48, 87.47), 16.0: (80.04, 80.00), 25.5: (71.56, 71.45)},
    "cifar100": {2.0: (60.15, 59.77), 16.0: (33.32, 33.25), 25.5: (17.76, 17.65)},
}
MINUTES = {  # Tables 2 and 5: training on a GTX 1080Ti
    "cifar10": {
        "free_at": 147, "trades": 534, "qtrades": 42, "magnet": 106, "clustr": 83, "clustr_qtrades": 115,
    },
    "svhn_cropped": {
        "free_at": 25, "trades": 763, "qtrades": 12, "magnet": 150, "clustr": 52, "clustr_qtrades": 192,
    },
}  # fmt: skip
COPIED = {  # known to be so: the README of free_adv_train, TRADES (Zhang et al. 2019), Hendrycks et al. 2019
    "cifar10": ("nominal", "free_at", "at_pretrain", "trades"),
    "cifar100": ("nominal", "free_at", "at_pretrain"),
}


def claim(dataset: str, method: str, what: str, eps: float | None = None) -> float | None:
    """The paper's figure as a fraction, or None: what = "clean", "pgd20" or "pgd100"; eps None = 8/255."""
    row = CLAIMS.get(dataset, {}).get(method)
    if what == "clean":
        return row and row[0] / 100
    column = {"pgd20": 0, "pgd100": 1}.get(what)
    if column is None:
        return None
    if eps is None or abs(eps * 255 - 8) < 1e-3:
        return row and row[1 + column] / 100
    if method != "clustr_qtrades":
        return None
    for radius, pair in SWEEP.get(dataset, {}).items():
        if abs(eps * 255 - radius) < 1e-3:
            return pair[column] / 100
    return None
