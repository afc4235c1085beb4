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
import jax.numpy as jnp
import numpy as np
import process  # noqa: F401  finds `configs`

import clustr_jax
from clustr_jax import data, stages
from clustr_jax.classifier import correct
from clustr_jax.runtime import mesh, stage_names
from clustr_jax.settings import DataSettings, Settings
from clustr_jax.stages import configuration
from clustr_jax.storage import loading
from clustr_jax.storage.files import read_json, write_json
from clustr_jax.training import train, train_state, trainers
from clustr_jax.training.objectives import METHODS
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


def drift(name: str, wide: bool, epochs: int = 0) -> dict:
    """One seed's warm-up on one device and on all of them, from one start: how far apart after each epoch.

    The difference of the parameters is relative, in the Euclidean norm. In float64 (`wide`) rounding is 5e-17
    of a number, so that what is left is not rounding.
    """
    jax.config.update("jax_enable_x64", wide)
    config = configuration.resolve(config_of(name, 0))
    part, _, test = data.splits(DataSettings.of(config.data))
    known = Settings.of(configuration.complete(config, part, test))
    net = loading.build_net(known.model, part)
    trainer = trainers.Trainer(net, METHODS["nominal"], known.training, known.warmup, len(part))
    key, per_epoch = jax.random.key(0), trainer.steps_per_epoch
    start = jax.tree.map(lambda a: a.astype(jnp.float64 if wide else jnp.float32), net.init(key))
    images, labels = jnp.asarray(part.images), jnp.asarray(part.labels)
    kept = []
    for devices in (jax.devices()[:1], jax.devices()):
        with mesh.over(devices):
            train_set = mesh.place(train_state.TrainSet(images, labels, part.scale, config.data.augment))
            state = mesh.place(train.with_totals(trainer, train.create(trainer, start), train_set, key))
            weights = []
            for epoch in range(epochs or known.warmup.epochs):
                order = train.epoch_order(key, trainer.size, epoch)
                state = train.run_steps(trainer, state, train_set, order, key, per_epoch)
                weights.append(jax.device_get(state.variables))
            kept.append(weights)
    predicted = [
        np.concatenate(
            [np.argmax(net.eval(weights[-1], x).logits, axis=1) for x in np.array_split(test.pixels(), 20)]
        )
        for weights in kept
    ]
    return {
        "set": name,
        "bits": 64 if wide else 32,
        "apart": [apart(one, other) for one, other in zip(*kept, strict=True)],
        "moved": apart(start, kept[0][-1]),
        "equal_predictions": float(np.mean(predicted[0] == predicted[1])),
    }


def apart(one: dict, other: dict) -> float:
    """|one - other| / |one| over all leaves."""
    flat = [
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
        for tree in (one, other)
    ]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0]))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--folder", type=pathlib.Path)
    parser.add_argument("--drift", type=int, choices=(32, 64), help="compare one seed instead, so many bits")
    parser.add_argument("--epochs", type=int, default=0, help="of --drift: only so many")
    args = parser.parse_args()
    if args.drift:
        print(json.dumps(drift(args.set, args.drift == 64, args.epochs)))
        return
    folder = args.folder.resolve()
    rows = [warmed_up(args.set, seed, folder / str(seed)) for seed in range(args.seeds)]
    rows.append(warmed_up(args.set, 0, folder / "0-again"))
    print(json.dumps({"devices": len(jax.devices()), "rows": rows[:-1], "again": rows[-1]}))


if __name__ == "__main__":
    main()
