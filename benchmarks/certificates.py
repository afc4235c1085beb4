"""Certified radii per second: each rule, by number of classes and clusters, on random features.

    python benchmarks/certificates.py [--n=2000] [--embedding=64] [--runs=3] [--save]

In float64 NumPy, as the certify stage computes them (the network's pass over the images is not included).
"""

import argparse
import statistics
import time

import jax.numpy as jnp
import numpy as np
import process

from clustr_jax import certify
from clustr_jax.clusters import Clusters


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--embedding", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/certificates.json")
    args = parser.parse_args()
    rng, rows = np.random.default_rng(0), []
    print("| classes x clusters | rule | radii per second |")
    print("|---|---|---|")
    for classes, k in ((10, 1), (10, 2), (100, 2)):
        centroids = rng.standard_normal((classes, k, args.embedding)).astype(np.float32)
        y = rng.integers(0, classes, args.n).astype(np.int32)
        near = centroids[y, rng.integers(0, k, args.n)]
        z = near + 0.1 * rng.standard_normal(near.shape).astype(np.float32)
        head = Clusters(jnp.asarray(centroids), jnp.asarray(1.0))
        for rule in ("hard", "soft", "any_d", "paper"):
            taken = []
            certify.radius(head, z, y, lipschitz=1.0, rule=rule)
            for _ in range(args.runs):
                started = time.perf_counter()
                radii = certify.radius(head, z, y, lipschitz=1.0, rule=rule)
                taken.append(time.perf_counter() - started)
            row = {
                "classes": classes,
                "k": k,
                "rule": rule,
                "per_second": args.n / statistics.median(taken),
                "positive": float(np.mean(radii > 0)),
            }
            rows.append(row)
            print(f"| {classes} x {k} | {rule} | {row['per_second']:.0f} |", flush=True)
    process.finish("certificates", {"n": args.n, "embedding": args.embedding, "rows": rows}, args.save)


if __name__ == "__main__":
    main()
