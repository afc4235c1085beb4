"""The tables of experiments/levers.py: pure functions of the JSONs under results/levers."""

import json

from result_tables import RESULTS, markdown

from clustr_jax.evaluation import intervals

FOLDER = RESULTS / "levers"


def share(value: float, n: int) -> str:
    """In %, with its 95 % Wilson interval of n images."""
    low, high = intervals.wilson(round(value * n), n)
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def levers() -> str:
    """What each finished row is worth: attacked are the same test images in every row."""
    rows = []
    for path in sorted(FOLDER.glob("*.start.json")):
        found = json.loads(path.read_text())
        rows.append(["the start", str(found["seed"]), "0", f"{100 * found['clean']:.1f}", *[""] * 6])
    read = [(path, json.loads(path.read_text())) for path in FOLDER.glob("*-[0-9].json")]
    for path, row in sorted(read, key=lambda found: (found[1]["updates"], found[0].name)):
        last = row["curve"][-1]
        rows.append(
            [
                path.stem.rpartition("-")[0],
                str(row["seed"]),
                str(row["updates"]),
                f"{100 * row['clean']:.1f}",
                share(row["paper"], row["n"]),
                share(row["sound"], row["n"]),
                f"{100 * last['adversarial_accuracy']:.0f}",
                f"{last['magnet']:.2f}, {100 * last['hinge_active']:.0f} %",
                f"{last['variance']:.2g}",
                " / ".join(f"{row['tightness'][which][1]:.3g}" for which in ("own", "other")),
            ]
        )
    header = [
        "row", "seed", "updates", "clean", "PGD^20 of the paper, one restart", "sound, quick",
        "adversary of training",
        "Magnet, open hinges", "variance", "d² / 2σ², own / other",
    ]  # fmt: skip
    return markdown(header, rows)


def curve(name: str = "authors", seed: int = 0) -> str:
    """What a row measured after each epoch, on held-out images, finished or not."""
    found = json.loads((FOLDER / f"{name}-{seed}.curve.json").read_text())
    rows = [
        [
            str(m["step"]),
            f"{100 * m['val_accuracy']:.1f}",
            share(m["paper_accuracy"], found["probed"]),
            share(m["quick_accuracy"], found["probed"]),
            f"{100 * m['adversarial_accuracy']:.0f}",
            f"{m['magnet']:.2f}, {100 * m['hinge_active']:.0f} %",
            f"{m['variance']:.2g}",
        ]
        for m in found["curve"]
    ]
    header = [
        "updates", "held out, clean", "PGD^20 of the paper, one restart", "quick-1", "adversary of training",
        "Magnet, open hinges", "variance",
    ]  # fmt: skip
    return markdown(header, rows)
