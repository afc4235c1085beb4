"""docs/figures/digits-*.svg: what a report draws of README's network on digits, from results/digits.

python experiments/gallery.py
"""

import json
import pathlib
import sys
import types

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from clustr_jax.report import figures  # noqa: E402
from clustr_jax.report.svg import Drawing  # noqa: E402

OUT = ROOT / "docs" / "figures"


def drawings() -> dict[str, Drawing]:
    """By the name of their file: the figures that need no more than the results."""
    names = ("clean", "paper", "sound")
    found = {n: json.loads((ROOT / "results" / "digits" / f"{n}.json").read_text()) for n in names}
    record = types.SimpleNamespace(results=found, config={"method": found["sound"]["method"]}, data="digits")
    made = (
        figures.over_eps(record),  # pyright: ignore[reportArgumentType]  of a Record it is what they look at
        figures.attacks(record),  # pyright: ignore[reportArgumentType]
        figures.over_budget(record, "restarts"),  # pyright: ignore[reportArgumentType]
        figures.over_budget(record, "steps"),  # pyright: ignore[reportArgumentType]
    )
    return {f"digits-{d.name}.svg": d for d in made if d is not None}


if __name__ == "__main__":
    for name, drawing in drawings().items():
        (OUT / name).write_bytes(drawing.svg)
        print(f"{name}: {drawing.alt}")
