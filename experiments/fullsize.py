"""What the paper's own runs would take on one GPU: commands, passes and estimated hours; nothing is run.

    python experiments/fullsize.py

Gradient passes follow from each config; one costs three times the operations of the forward pass, as XLA
counts them. RATE is an assumption, not a measurement: half of what an A100 has by its data
sheet for float32 by tensor cores (156 TFLOP/s) is rarely seen with small images: a fifth of it is taken.
Writes results/fullsize.json.
"""

import argparse
import importlib
import json
import pathlib
import sys

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from clustr_jax import models  # noqa: E402
from clustr_jax.runtime import provenance  # noqa: E402
from clustr_jax.settings import Settings  # noqa: E402
from clustr_jax.stages import configuration  # noqa: E402
from clustr_jax.training import cost  # noqa: E402
from clustr_jax.training.objectives import METHODS  # noqa: E402

RATE = 0.2 * 156e12
# Training images of the full sets, 2 % of which are held out.
IMAGES = {"cifar10": 50000, "cifar100": 50000, "svhn": 73257, "imagenet": 1281167}


def forward_flops(classes: int) -> float:
    """Of one 32 x 32 image, by XLA's count for a batch of 8."""
    net = models.build("resnet18", num_classes=classes, input_shape=(32, 32, 3), mean=(0.0,), std=(1.0,))
    variables = jax.eval_shape(net.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    return jax.jit(net.eval).lower(variables, x).cost_analysis()["flops"] / 8


def row(dataset: str, method: str, flops: float) -> dict:
    """One method: gradient passes of all its stages, and hours at RATE."""
    config = importlib.import_module(f"configs.{dataset}").get_config(method)
    config = configuration.resolve(config)
    held_in = 1 - config.data.val_size
    passes = config.train.epochs * config.train.replays * IMAGES[dataset] * held_in
    known = Settings.of(config)
    passes *= cost.gradients(method, known.training, known.recipe)
    warmup = METHODS[method].warmup
    if warmup:
        images = IMAGES["imagenet" if METHODS[method].source else dataset]
        passes += (
            config.warmup.epochs * images * held_in * cost.gradients(warmup, known.training, known.warmup)
        )
    return {
        "dataset": dataset,
        "method": method,
        "command": f"python run.py --config=configs/{dataset}.py:{method}",
        "warmup_epochs": config.warmup.epochs if warmup else 0,
        "epochs": config.train.epochs,
        "gradient_passes": passes,
        "gpu_hours": 3 * flops * passes / RATE / 3600,
        "seed": config.seed,
        "config_sha": provenance.sha(config.to_dict()),
    }


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    rows = []
    for dataset, classes in (("cifar10", 10), ("cifar100", 100), ("svhn", 10)):
        flops = forward_flops(classes)
        rows += [row(dataset, method, flops) for method in METHODS if not method.endswith("_certified")]
        print(f"{dataset}: {flops / 1e9:.3f} GFLOP an image forward")
    found = {"rate": RATE, "flops": flops, "rows": rows, "versions": provenance.versions(), "seed": 0}
    (ROOT / "results" / "fullsize.json").write_text(json.dumps(found, indent=2) + "\n")
    for r in rows:
        print(
            f"{r['dataset']:9} {r['method']:15} {r['gradient_passes'] / 1e6:7.1f} M {r['gpu_hours']:6.2f} h"
        )


if __name__ == "__main__":
    main()
