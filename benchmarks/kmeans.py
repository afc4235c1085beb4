"""k-means++ per class: ours against scikit-learn's, on CIFAR-10 embeddings: inertia and seconds.

    python benchmarks/kmeans.py [--dataset=cifar10] [--workdir=runs/...] [--n=50000] [--k=2] [--save]

Without a work directory the embeddings are those of an untrained ResNet-18 (512-d).
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import process
from sklearn.cluster import KMeans

import clustr_jax
from clustr_jax import clusters, data, models


def embeddings(workdir, x):
    if workdir:
        return np.asarray(clustr_jax.load(workdir).embed(x))
    net = models.build("resnet18", num_classes=10, input_shape=(32, 32, 3), mean=(0.47,), std=(0.25,))
    f = jax.jit(lambda v, x: net.eval(v, x).embeddings)
    variables = net.init(jax.random.key(0))
    return np.concatenate([f(variables, x[i : i + 500]) for i in range(0, len(x), 500)])


def inertia(z, y, fitted):
    squared = jnp.sum(jnp.square(z[:, None] - fitted.centroids[y]), axis=-1)
    return float(jnp.sum(jnp.min(jnp.where(fitted.valid[y], squared, jnp.inf), axis=1)))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=("cifar10", "cifar100"), default="cifar10")
    parser.add_argument("--workdir")
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--n_init", type=int, default=10)
    parser.add_argument("--max_iter", type=int, default=40)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/kmeans-CLASSESxK.json")
    args = parser.parse_args()
    x, y = data.load(args.dataset, "train")
    x, y = x[: args.n], y[: args.n]
    classes = int(y.max()) + 1
    z = embeddings(args.workdir, x)
    ours, theirs, ratios = [], [], []
    settings = dict(n_init=args.n_init, max_iter=args.max_iter)
    for run in range(-1, args.runs):  # the first run compiles and does not count
        start = time.perf_counter()
        fitted = jax.block_until_ready(
            clusters.fit(jax.random.key(run + 1), z, y, num_classes=classes, k=args.k, **settings)
        )
        middle = time.perf_counter()
        reference = sum(
            KMeans(args.k, random_state=run + 1, **settings).fit(z[y == c]).inertia_ for c in range(classes)
        )
        end = time.perf_counter()
        if run >= 0:
            ours.append(middle - start)
            theirs.append(end - middle)
            ratios.append(inertia(jnp.asarray(z), jnp.asarray(y), fitted) / reference)
    median = {"seconds": statistics.median(ours), "sklearn_seconds": statistics.median(theirs)}
    content = {
        "points": list(z.shape),
        "classes": classes,
        "k": args.k,
        **settings,
        "inertia_ratio_max": max(ratios),
        **median,
        "speedup": median["sklearn_seconds"] / median["seconds"],
        "runs": {"ours": ours, "sklearn": theirs},
    }
    process.finish(f"kmeans-{classes}x{args.k}", content, args.save)


if __name__ == "__main__":
    with process.on_cores():
        main()
