"""How strong each attack of the registry is on a committed network, alone, and what it costs.

    python benchmarks/strength.py [--n=200] [--first=5000] [--row=cifar10/trades-0] [--save]

Needs the prepared data set of the row. Every attack with 100 steps, on the same test images at 8/255:
robust accuracy, the images that only it broke, and the gradients that no schedule could leave out. Then
adaptive restarts of PMA, and minimum norms (of which those within 8/255 count as broken).
"""

import argparse
import time

import jax
import numpy as np
import process

import clustr_jax
from clustr_jax import attacks, data
from clustr_jax.attacks import adaptive, scheduler
from clustr_jax.attacks.models import as_partial
from clustr_jax.attacks.registry import ATTACKS, Budget
from clustr_jax.attacks.targets import CHOOSERS

EPS, SLOTS = 8 / 255, 64
NAMES = ("apgd-ce", "apgd-margin", "apgd-pm", "apgd-t", "apgd-malt", "pma", "fab-t")


def run_entry(entry, model, x, y, logits, ids):
    """(broken [N], what it cost) of one attack."""
    started = time.perf_counter()
    targets = None
    if entry.targets is not None:
        targets = CHOOSERS[entry.targets](model, x, y, logits, "linf", slots=SLOTS)
    attack = entry.make(Budget(eps=EPS, restarts=entry.restarts), None)
    outcome = scheduler.run(
        attack, jax.random.key(0), model, x, y, ids=ids, targets=targets, restarts=entry.restarts, slots=SLOTS
    )
    return outcome.broken, {"gradients_needed": outcome.needed, "seconds": time.perf_counter() - started}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--first", type=int, default=5000)
    parser.add_argument("--row", default="cifar10/trades-0")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    x, y = data.load(args.row.split("/")[0], "test")
    clf = clustr_jax.load(process.ROOT / "results" / "campaign" / args.row / "model.safetensors")
    index = np.arange(args.first, args.first + args.n)
    clean = np.asarray(clf.logits(x[index])).argmax(axis=1) == y[index]
    ids = index[clean].astype(np.int32)
    x, y, model = x[ids], y[ids], as_partial(clf.logits)
    logits = scheduler.forward(model, x, SLOTS)
    broken, found = {}, {}
    for name in NAMES:
        broken[name], found[name] = run_entry(ATTACKS[name], model, x, y, logits, ids)
        print(name, int(broken[name].sum()), found[name], flush=True)
    started = time.perf_counter()
    progress = adaptive.run(
        ATTACKS["pma"].make(Budget(eps=EPS), None), jax.random.key(0), model, x, y, ids=ids, slots=SLOTS
    )
    broken["pma, adaptive"] = progress.outcome.broken
    found["pma, adaptive"] = {
        "gradients_needed": int(progress.outcome.spent.sum()),
        "seconds": time.perf_counter() - started,
        "attacked": progress.attacked,
        "broken_by_round": progress.broken,
    }
    print(found["pma, adaptive"], int(progress.outcome.broken.sum()), flush=True)
    for name, targeted in (("fmn", False), ("fmn, 9 targets", True)):
        started = time.perf_counter()
        nearest = attacks.fmn(jax.random.key(0), clf.logits, x, y, targeted=targeted, ids=ids, slots=SLOTS)
        broken[name] = nearest.distance <= EPS
        found[name] = {
            "median_distance": float(np.median(nearest.distance)),
            "not_found": int(np.isinf(nearest.distance).sum()),
            "seconds": time.perf_counter() - started,
        }
        print(name, int(broken[name].sum()), found[name], flush=True)
    union = np.any(list(broken.values()), axis=0)
    for name, own in broken.items():
        others = np.any([b for other, b in broken.items() if other != name], axis=0)
        found[name] |= {
            "robust": float(np.sum(~own) / args.n),
            "broken": int(own.sum()),
            "only_it_broke": ids[own & ~others].tolist(),
            "missed": ids[union & ~own].tolist(),
        }
    content = {
        "row": args.row, "n": args.n, "first": args.first, "eps": EPS, "clean": float(clean.mean()),
        "robust": float(np.sum(~union) / args.n), "attacks": found,
    }  # fmt: skip
    process.finish(f"strength-{args.row.replace('/', '-')}", content, args.save)


if __name__ == "__main__":
    main()
