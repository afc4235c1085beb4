"""How time and memory grow: with the set, the clusters, the batch; with restarts, steps, slots.

    python benchmarks/growth.py [--only=...] [--runs=3] [--save]

An epoch of ClusTR+QTRADES (resnet8, random pixels of CIFAR-10's shape, refit included) and PGD through the
scheduler on 256 images that nothing breaks (radius 1e-6: every restart runs to its end). Each setting is a
process of its own; seconds are the median after one call that compiles, memory is the most that the
process ever held. The exponent is the slope of log seconds over log size, fitted by least squares.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import process

EPOCH = {"n": 2400, "k": 2, "samples": 20}
ATTACK = {"images": 256, "restarts": 2, "steps": 10, "slots": 64}
# What is varied, and over which values; the others stay as above.
SERIES = {
    "epoch: training images": ("n", (1200, 2400, 4800, 9600)),
    "epoch: clusters per class": ("k", (1, 4, 16, 64)),
    "epoch: images per cluster and batch": ("samples", (5, 10, 20, 40)),
    "PGD: images": ("images", (128, 256, 512)),
    "PGD: restarts": ("restarts", (1, 2, 4, 8)),
    "PGD: steps": ("steps", (5, 10, 20, 40)),
    "PGD: slots": ("slots", (16, 32, 64, 128)),
}


def epoch(n, k, samples):
    """One epoch and the refit after it, as a function."""
    import jax
    import jax.numpy as jnp

    from clustr_jax import data
    from clustr_jax.settings import ModelSettings, Recipe, TrainingSettings
    from clustr_jax.stages import configuration
    from clustr_jax.storage import loading
    from clustr_jax.training import refit, train, train_state, trainers
    from clustr_jax.training.objectives import METHODS
    from configs import cifar10

    config = cifar10.get_config("clustr_qtrades")
    config.model.name, config.magnet.k, config.magnet.samples = "resnet8", k, samples
    config.magnet.clusters = 10  # with K = 1 there are no more
    config = configuration.resolve(config)
    images = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    labels = (np.arange(n) % 10).astype(np.int32)
    net = loading.build_net(
        ModelSettings.of(config.model), data.Split(images, labels, 10, 255.0, (0.0, 1.0), "")
    )
    train_set = train_state.TrainSet(jnp.asarray(images), jnp.asarray(labels), 255.0, config.data.augment)
    trainer = trainers.Trainer(
        net, METHODS["clustr_qtrades"], TrainingSettings.of(config), Recipe.of(config.train), n
    )
    key = jax.random.key(0)
    state = refit.refit(trainer, train.create(trainer, net.init(key)), train_set, key)
    state = train.with_totals(trainer, state, train_set, key)
    order = train.epoch_order(key, n, 0)

    def once():
        after = train.run_steps(trainer, state, train_set, order, key, trainer.steps_per_epoch)
        jax.block_until_ready(refit.refit(trainer, after, train_set, key))

    return once


def attack(images, restarts, steps, slots):
    """PGD that never succeeds, as a function."""
    import jax
    import jax.numpy as jnp

    from clustr_jax import losses, models
    from clustr_jax.attacks import attack_losses, scheduler
    from clustr_jax.attacks.pgd import as_partial
    from clustr_jax.attacks.scheduled_pgd import PGD
    from clustr_jax.classifier import Classifier

    net = models.build("resnet8", num_classes=10, input_shape=(32, 32, 3), mean=(0.5,), std=(0.25,))
    clf = Classifier(net.init(jax.random.key(0)), None, net)
    x = np.random.default_rng(0).uniform(0.1, 0.9, (images, 32, 32, 3)).astype(np.float32)
    y = np.asarray(clf.predict(x))
    pgd = PGD(
        eps=jnp.float32(1e-6),
        steps=steps,
        norm="linf",
        bounds=(0.0, 1.0),
        step_size=jnp.float32(2e-7),
        loss=attack_losses.one(attack_losses.untargeted(losses.cross_entropy)),
    )

    def once():
        outcome = scheduler.run(
            pgd, jax.random.key(1), as_partial(clf.logits), x, y, restarts=restarts, slots=slots
        )
        assert not outcome.broken.any()

    return once


def measure(what, settings, runs):
    """One setting, in this process: median seconds and peak memory in bytes."""
    once = {"epoch": epoch, "PGD": attack}[what](**settings)
    once()
    taken = []
    for _ in range(runs):
        started = time.perf_counter()
        once()
        taken.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(taken), "peak_bytes": peak}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="series whose name contains this")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/growth.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    process.restart(GLIBC_TUNABLES="glibc.malloc.hugetlb=1")  # as run.py does
    if args.child:
        what, settings = json.loads(args.child)
        with process.on_cores():
            print(json.dumps(measure(what, settings, args.runs)))
        return
    rows = []
    print("| what grows | values | seconds | exponent | peak memory, MB |")
    print("|---|---|---|---|---|")
    for series, (name, values) in SERIES.items():
        if args.only not in series:
            continue
        what = series.split(":")[0]
        base = EPOCH if what == "epoch" else ATTACK
        found = []
        for value in values:
            child = json.dumps([what, {**base, name: value}])
            command = [sys.executable, __file__, f"--runs={args.runs}", f"--child={child}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
        seconds = [row["seconds"] for row in found]
        exponent = float(np.polyfit(np.log(values), np.log(seconds), 1)[0])
        rows.append(
            {"series": series, "values": values, "exponent": exponent, "base": base, "measured": found}
        )
        print(
            f"| {series} | {', '.join(map(str, values))} | {', '.join(f'{s:.2f}' for s in seconds)} "
            f"| {exponent:.2f} | {', '.join(format(row['peak_bytes'] / 1e6, '.0f') for row in found)} |",
            flush=True,
        )
    process.finish("growth", {"rows": rows}, args.save)


if __name__ == "__main__":
    main()
