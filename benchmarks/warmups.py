"""Warm-ups of several seeds on the devices that there are: test accuracies, in one process. See devices.py.

    python benchmarks/warmups.py --set=digits --seeds=20 --folder=runs/warmups/digits-1

Every warm-up is stage 1_warmup of `stages.run`, in a work directory of its own, and resumes. Prints a JSON:
of each seed its accuracy on all test images, and a digest of its parameters and batch statistics.
"""

import argparse
import hashlib
import json
import pathlib
import sys
import time

import jax
import numpy as np
import process  # noqa: F401  finds `configs`

import clustr_jax
from clustr_jax import data, stages
from clustr_jax.classifier import correct
from clustr_jax.runtime import mesh, stage_names
from clustr_jax.storage.files import read_json, write_json
from configs import cifar10, digits


def config_of(name: str, seed: int):
    """The warm-up of ClusTR+QTRADES on this set, as devices.py has it."""
    if name == "digits":
        config = digits.get_config("clustr_qtrades")
    else:
        config = cifar10.get_config("clustr_qtrades,cpu")
        config.data.train_size, config.warmup.epochs = 5000, 6
    config.seed = seed
    return config


def warmed_up(name: str, seed: int, place: pathlib.Path) -> dict:
    """Test accuracy and digest of one seed's warm-up; read where it is there already."""
    found, start = place / "warmed_up.json", time.monotonic()
    if found.exists():
        return read_json(found)
    stages.run(config_of(name, seed), str(place), (stage_names.WARMUP,), quiet=True)
    clf = clustr_jax.load(place)
    x, y = data.load(name, "test")
    with mesh.over(jax.devices()):
        accuracy = float(np.mean(correct(clf, x, y)))
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(clf.variables)))
    row = {"seed": seed, "accuracy": accuracy, "weights": digest.hexdigest()[:16]}
    write_json(found, row)
    print(f"{place.name}: {row}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    args = parser.parse_args()
    folder = args.folder.resolve()
    rows = [warmed_up(args.set, seed, folder / str(seed)) for seed in range(args.seeds)]
    rows.append(warmed_up(args.set, 0, folder / "0-again"))
    print(json.dumps({"devices": len(jax.devices()), "rows": rows[:-1], "again": rows[-1]}))


if __name__ == "__main__":
    main()
