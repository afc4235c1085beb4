"""`sound-3` against AutoAttack's standard on a committed network, image by image, and what they cost.

    python benchmarks/sound3.py [FILE] [--n=1000] [--first=5000] [--theirs=300] [--save]

FILE: .safetensors of a CIFAR-10 network (default: results/campaign/cifar10/trades-0/model.safetensors). Needs
the prepared data set, and requirements-doors.txt for --theirs, the images that pyautoattack is run on
(0: none of them, and no PyTorch). The radius is 8/255. Ours and theirs run on the same test images; every
image that `sound-3` counts as broken is asked again in PyTorch by `clustr_jax.verify`. What was found is kept
in runs/sound3, so that the same command goes on where it was stopped.
"""

import argparse
import json
import pathlib
import time

import jax
import numpy as np
import process

import clustr_jax
from clustr_jax import attacks, data

EPS, MODEL = 8 / 255, "model.safetensors"
NEAREST = ("fmn", "ddn")  # minimum norms, on every image that is right


def theirs(net, x, y):
    """(images [N, ...] of pyautoattack's standard, passes with a gradient and without)."""
    import torch
    from pyautoattack import AutoAttack

    passes = {True: 0, False: 0}

    def count(module, inputs):
        passes[inputs[0].requires_grad] += len(inputs[0])

    handle = net.register_forward_pre_hook(count)
    suite = AutoAttack(net, norm="Linf", eps=EPS, version="standard", seed=0, device="cpu")
    tx, ty = torch.tensor(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(y).long()
    found = suite.run_standard_evaluation(tx, ty, batch_size=len(y))
    handle.remove()
    found = found[0] if isinstance(found, tuple) else found
    return found.permute(0, 2, 3, 1).numpy(), {"with_gradient": passes[True], "without": passes[False]}


def spent(costs: dict) -> dict[str, int]:
    """Sums over attacks of the counts that each one has."""
    names = ("gradient_evaluations", "forward_evaluations", "evaluations_needed")
    return {name: sum(cost.get(name, 0) for cost in costs.values()) for name in names}


def torch_part(clf, x, y, ids, folder) -> dict:
    """Their attack on the first images, and every image of ours asked in PyTorch."""
    import torch

    from clustr_jax.doors.pytorch import to_torch
    from clustr_jax.verify import verify

    net = to_torch(clf).eval()

    def answers(images):
        with torch.no_grad():
            return net(torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)).numpy()

    checked = verify(folder, answers)
    kept, started = folder.parent / f"theirs-{len(y)}.npz", time.perf_counter()
    if not kept.exists():
        x_adv, passes = theirs(net, x, y)
        np.savez(kept, x_adv=x_adv, seconds=time.perf_counter() - started, **passes)
    found = np.load(kept)
    x_adv, passes = found["x_adv"], {name: int(found[name]) for name in ("with_gradient", "without")}
    robust = answers(x_adv).argmax(axis=1) == y
    ours = clustr_jax.Judgement.load(folder).broken_by[: len(y)] == ""
    inside = np.abs(x_adv - x).max(axis=(1, 2, 3)) <= EPS + 1e-6
    return {
        "torch": torch.__version__,
        "verified": {"ok": bool(checked.ok), "lines": str(checked).splitlines()},
        "theirs": {
            "n": len(y), "right": int(np.sum(answers(x).argmax(axis=1) == y)),
            "robust": float(robust.mean()), "passes": passes, "inside": bool(inside.all()),
            "seconds": float(found["seconds"]),
            "only_theirs_broke": ids[ours & ~robust].tolist(),
            "only_ours_broke": ids[~ours & robust].tolist(),
        },
    }  # fmt: skip


def our_part(clf, x, y, ids, folder) -> dict:
    """What `sound-3` and AutoAttack's standard leave, both ours, and what they cost."""
    kept = folder / "ours.json"
    if kept.exists():
        return json.loads(kept.read_text())
    started = time.perf_counter()
    judged = clustr_jax.judge(clf.logits, x, y, eps=EPS, ids=ids, folder=folder / "judgement")
    took = time.perf_counter() - started
    print(judged, flush=True)
    started = time.perf_counter()
    standard = attacks.autoattack(
        jax.random.key(0), clf.logits, x, y, eps=EPS, ids=ids, folder=folder / "autoattack"
    )
    ours = judged.broken_by == ""
    found = {
        "clean": judged.clean,
        "sound_3": {
            "robust": float(ours.mean()), "seconds": took, **spent(judged.attacks),
            "in_the_ball": spent({k: v for k, v in judged.attacks.items() if k not in NEAREST}),
            "attacks": judged.attacks,
        },
        "autoattack": {
            "robust": float(standard.robust.mean()), "seconds": time.perf_counter() - started,
            **spent(standard.cost), "attacks": standard.cost,
        },
        "only_autoattack_broke": ids[ours & ~standard.robust].tolist(),
        "only_sound_3_broke": ids[~ours & standard.robust].tolist(),
    }  # fmt: skip
    for name in ("gradient_evaluations", "evaluations_needed"):
        whole = found["autoattack"][name]
        found["sound_3"][f"{name}_of_autoattack"] = found["sound_3"][name] / whole
        found["sound_3"]["in_the_ball"][f"{name}_of_autoattack"] = (
            found["sound_3"]["in_the_ball"][name] / whole
        )
    kept.write_text(json.dumps(found))
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", default=process.ROOT / "results/campaign/cifar10/trades-0" / MODEL)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--first", type=int, default=5000)
    parser.add_argument("--theirs", type=int, default=300)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    x, y = data.load("cifar10", "test")
    ids = np.arange(args.first, args.first + args.n, dtype=np.int32)
    x, y = x[ids], y[ids]
    file = pathlib.Path(args.file)
    clf, name = clustr_jax.load(file), file.parent.name if file.name == MODEL else file.stem
    folder = pathlib.Path("runs", "sound3", f"{name}-{args.first}-{args.n}")
    with process.on_cores():
        content = {"network": name, "n": args.n, "first": args.first, "eps": EPS}
        content |= our_part(clf, x, y, ids, folder)
    if args.theirs:
        few = slice(0, min(args.theirs, args.n))
        content |= torch_part(clf, x[few], y[few], ids[few], folder / "judgement")
    process.finish(f"sound3-{name}", content, args.save)


if __name__ == "__main__":
    main()
