"""Square by AutoAttack's schedule against pyautoattack's, image by image, on a committed network.

    python benchmarks/square.py [--n=200] [--queries=5000] [--row=cifar10/trades-0]
        [--our_seeds=2] [--their_seeds=1] [--threads=1] [--save]

Needs requirements-doors.txt and a prepared TFDS CIFAR-10. The network is that of a row of results/campaign,
the images are the first n of the test split, the radius is 8/255. Run are theirs, ours
with AutoAttack's schedule, and ours with the schedule stretched over the queries. Both are random searches,
so that two seeds of one and the same attack differ as well: `theirs_again` and `ours_again` say by how much.
All verdicts are PyTorch's: an image is broken where it is misclassified, in the ball and in the box.
"""

import argparse
import time

import jax
import numpy as np
import process
import torch

import clustr_jax
from clustr_jax import attacks, data
from clustr_jax.doors.pytorch import to_torch

EPS = 8 / 255
_ROUNDING = 1e-6  # of float32 pixels


def ours(clf, x, y, seed, queries, rescale):
    """Our images of one run."""
    return attacks.square(
        jax.random.key(seed), clf.logits, x, y, eps=EPS, queries=queries, rescale_schedule=rescale
    )


def theirs(net, x, y, seed, queries):
    """pyautoattack's images, NHWC, with the settings that Square has in its "standard"."""
    from pyautoattack import AutoAttack

    suite = AutoAttack(net, norm="Linf", eps=EPS, version="standard", seed=seed, device="cpu")
    suite.attacks_to_run = ["square"]
    assert not suite.square.rescale_schedule
    suite.square.n_queries = queries
    tx, ty = torch.tensor(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(y).long()
    found = suite.run_standard_evaluation(tx, ty, batch_size=len(y))
    found = found[0] if isinstance(found, tuple) else found
    return found.permute(0, 2, 3, 1).numpy()


def broken(net, x_adv, x, y) -> np.ndarray:
    """Bool [N] by PyTorch: misclassified, and an image within the radius."""
    with torch.no_grad():
        wrong = net(torch.tensor(np.asarray(x_adv)).permute(0, 3, 1, 2)).argmax(1).numpy() != y
    axes = (1, 2, 3)
    inside = np.abs(x_adv - x).max(axis=axes) <= EPS + _ROUNDING
    image = (x_adv.min(axis=axes) >= -_ROUNDING) & (x_adv.max(axis=axes) <= 1 + _ROUNDING)
    return wrong & inside & image


def compare(one, other) -> dict:
    """How two verdicts per image agree."""
    return {
        "agreement": float(np.mean(one == other)),
        "only_first_broke": int(np.sum(one & ~other)),
        "only_second_broke": int(np.sum(~one & other)),
        "differ": np.flatnonzero(one != other).tolist(),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--queries", type=int, default=attacks.ensemble.QUERIES)
    parser.add_argument("--row", default="cifar10/trades-0")
    parser.add_argument("--our_seeds", type=int, default=2)
    parser.add_argument("--their_seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x, y = data.load("cifar10", "test")
    clf = clustr_jax.load(process.ROOT / "results" / "campaign" / args.row / "model.safetensors")
    net = to_torch(clf).eval()
    x, y = x[: args.n], y[: args.n]
    with torch.no_grad():
        logits = net(torch.tensor(x).permute(0, 3, 1, 2)).numpy()
    attack = {
        "theirs": lambda seed: theirs(net, x, y, seed, args.queries),
        "ours": lambda seed: ours(clf, x, y, seed, args.queries, False),
        "ours_rescaled": lambda seed: ours(clf, x, y, seed, args.queries, True),
    }
    verdicts, spent = {}, {}
    for name, run in attack.items():
        verdicts[name] = []
        for seed in range(args.their_seeds if name == "theirs" else args.our_seeds):
            started = time.perf_counter()
            verdicts[name].append(broken(net, run(seed), x, y))
            spent[f"{name}-{seed}"] = time.perf_counter() - started
            print(name, seed, verdicts[name][-1].sum(), f"{spent[f'{name}-{seed}']:.0f} s", flush=True)
    own, other, stretched = (verdicts[name] for name in ("ours", "theirs", "ours_rescaled"))
    content = {
        "row": args.row,
        "n": len(y),
        "queries": args.queries,
        "eps": EPS,
        "torch": torch.__version__,
        "logits_differ_by": float(np.abs(np.asarray(clf.logits(x)) - logits).max()),
        "attacked": int(np.sum(logits.argmax(1) == y)),  # the others count as broken by all
        "robust": {name: [float(np.mean(~v)) for v in found] for name, found in verdicts.items()},
        "broken": {name: [np.flatnonzero(v).tolist() for v in found] for name, found in verdicts.items()},
        "ours_theirs": [compare(a, b) for a in own for b in other],
        "ours_again": [compare(own[0], v) for v in own[1:]],
        "theirs_again": [compare(other[0], v) for v in other[1:]],
        "rescaled_theirs": [compare(a, b) for a in stretched for b in other],
        "seconds": spent,
    }
    process.finish(f"square-{args.row.replace('/', '-')}", content, args.save)


if __name__ == "__main__":
    main()
