"""What the gate costs an attack: PGD with 20 steps on 512 images, resnet8 of width 16.

    python benchmarks/gate.py [--images=512] [--steps=20] [--runs=5] [--save]

The gate is everything that `attacks.pgd` does before its compiled program: settings, pixels, opening the
model, a few passes of at most sixteen images. A classifier's method, a function that captures the weights and
flax.nnx are timed; medians after compilation, the runs of the kinds in turns. The radius is tiny, so that no
slot stops early.
"""

import argparse
import statistics
import time

import jax
import numpy as np
import process
from flax import nnx

from clustr_jax import Classifier, attacks, models
from clustr_jax.attacks import gate


class Small(nnx.Module):
    """Convolutions of resnet8's sizes."""

    def __init__(self, rngs):
        widths = (3, 16, 16, 16, 32, 32, 64, 64)
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.layers = nnx.List([nnx.Conv(a, b, (3, 3), strides=1 + (b > a > 3), rngs=rngs) for a, b in pairs])
        self.norms = nnx.List([nnx.BatchNorm(b, use_running_average=True, rngs=rngs) for b in widths[1:]])
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nnx.relu(norm(layer(x)))
        return self.head(x.mean(axis=(1, 2)))


def kinds():
    """name -> logits_fn."""
    net = models.build(
        "resnet8", num_classes=10, input_shape=(32, 32, 3), mean=(0.5,) * 3, std=(0.2,) * 3, width=16
    )
    variables = net.init(jax.random.key(0))
    clf = Classifier(variables, None, net)
    return {
        "classifier": clf.logits,
        "captured": lambda x: net.eval(variables, x).logits,
        "nnx": Small(nnx.Rngs(0)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    x = np.random.default_rng(0).uniform(size=(args.images, 32, 32, 3)).astype(np.float32)
    key, settings = jax.random.key(0), dict(eps=1e-5, step_size=1e-6)
    total, spent = ({name: [] for name in kinds()} for _ in range(2))
    labels = {name: np.asarray(f(x)).argmax(axis=1) for name, f in kinds().items()}
    for run in range(args.runs + 1):  # the first one compiles
        for name, f in kinds().items():
            started = time.perf_counter()
            gate.admit(key, f, x, labels[name], **settings)
            between = time.perf_counter()
            attacks.pgd(key, f, x, labels[name], steps=args.steps, **settings).block_until_ready()
            if run:
                spent[name].append(between - started)
                total[name].append(time.perf_counter() - between)
    found = {}
    for name in total:
        gates, attack = statistics.median(spent[name]), statistics.median(total[name])
        found[name] = {"gate_seconds": gates, "attack_seconds": attack, "share": gates / attack}
    content = {"images": args.images, "steps": args.steps, "device": jax.devices()[0].device_kind, **found}
    process.finish("gate", content, args.save)


if __name__ == "__main__":
    main()
