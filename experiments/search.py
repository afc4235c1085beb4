"""TRADES against clustr_trades: settings of both, tried on images held out from training.

    python experiments/search.py [--dataset=cifar10] [--only=NAME,...] [--list]

Every setting of a data set trains on the same images with the same number of gradient passes (CIFAR-10:
10,000 images, 15 passes each; svhn-10k: 7,001 and 30) and is then attacked on 500 of 1,000 images held
out: sound.run_quick, one restart. The test images are not looked at. Writes results/search/DATASET/NAME.json.
"""

import argparse
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import child  # noqa: E402

from clustr_jax import data  # noqa: E402
from clustr_jax.evaluation import intervals, sound_protocol  # noqa: E402
from clustr_jax.runtime import provenance  # noqa: E402
from clustr_jax.runtime.errors import UserError  # noqa: E402
from clustr_jax.runtime.programs import program  # noqa: E402
from clustr_jax.settings import DataSettings, EvalSettings  # noqa: E402
from clustr_jax.stages import EVALUATE, stage_key  # noqa: E402
from clustr_jax.storage import loading, results  # noqa: E402
from clustr_jax.storage.files import read_json, write_json  # noqa: E402

# Relative to ROOT, which every command runs in: paths are part of a config, and of its hash.
RUNS, RESULTS = pathlib.Path("runs", "search"), pathlib.Path("results", "search")
ATTACKED = 500
WARM = "clustr_trades-1"  # its first stage is shared
# Epochs of TRADES, of five passes each, and what leaves 1,000 images held out.
EPOCHS = {"svhn": 6, "cifar10": 3}
IMAGES = {
    "svhn": {"data.val_size": 0.125},
    "cifar10": {"data.train_size": 11000, "data.val_size": 1 / 11},
}


def trades(dataset: str, **settings) -> tuple[str, dict]:
    """TRADES, all of the epochs."""
    return "trades", {"train.epochs": EPOCHS[dataset], "train.eps_ramp": 0.4 * EPOCHS[dataset]} | settings


def clustr_trades(dataset: str, own: int = 1, **settings) -> tuple[str, dict]:
    """The last `own` epochs by the clusters: as many passes."""
    first = EPOCHS[dataset] - own
    fixed = {"warmup.epochs": first, "warmup.eps_ramp": 0.4 * first, "train.epochs": own}
    return "clustr_trades", fixed | settings


def again(dataset: str, **settings) -> tuple[str, dict]:
    """The second stage alone, from the TRADES of WARM."""
    start = {"warmup.epochs": 0, "init_from": f"{RUNS / dataset / WARM / '1_warmup'}"}
    return clustr_trades(dataset, **start | settings)


def head(dataset: str, source: str = "trades-1", **settings) -> tuple[str, dict]:
    """All epochs of TRADES, then k-means on its features and no more: those of `source`."""
    start = {"init_from": f"{RUNS / dataset / source / '2_train'}"}
    return again(dataset, **start | {"train.epochs": 0} | settings)


_ONE = {"magnet.k": 1, "magnet.clusters": 10, "magnet.samples": 8}
# One centroid per class where TRADES' own head has it; KL and cross entropy as 9 to 1, as in trades-8.
_OF_HEAD = {"magnet.fit": "linear_head", "train.lr": 0.005, "train.lam": 36.0, "train.xent_lam": 4.0}
_BOTH_TUNED = {"warmup.lr": 0.02, "warmup.ema": 0.99, "train.beta": 9.0, "train.ema": 0.99}
_FIRST = f"{RUNS / 'cifar10' / 'clustr_trades-11' / '1_warmup'}"
_LATER = _ONE | _OF_HEAD | {"train.ema": 0.99, "init_from": _FIRST}
_SVHN = {
    "trades-1": trades("svhn"),
    "clustr_trades-1": clustr_trades("svhn"),
    "clustr_trades-2": again("svhn", **{"train.lam": 160.0}),
    "clustr_trades-3": again("svhn", **_ONE | {"magnet.samples": 16}),
    "clustr_trades-4": again("svhn", **{"train.lr": 5e-4}),
    "clustr_trades-6": clustr_trades(
        "svhn", own=4, **_ONE | {"train.lr": 0.005, "train.lam": 48.0, "warmup.eps_ramp": 2.0}
    ),
    "clustr_trades-7": head("svhn"),
    # As many clusters as the class has images: its score is a sum over them.
    "clustr_trades-8": head("svhn", **{"magnet.k_per_class": (2, 6, 5, 4, 3, 3, 3, 3, 2, 2)}),
}
_CIFAR10 = {
    "trades-1": trades("cifar10"),
    "clustr_trades-1": clustr_trades("cifar10"),
    "clustr_trades-2": again("cifar10", **_ONE),
    "clustr_trades-3": again("cifar10", **_ONE | {"train.lam": 48.0}),
    "clustr_trades-4": again("cifar10", **_ONE | {"train.lam": 160.0}),
    "clustr_trades-5": head("cifar10", **_ONE),
    "clustr_trades-6": head("cifar10"),
    "trades-2": trades("cifar10", **{"train.lr": 0.02}),
    "trades-3": trades("cifar10", **{"train.beta": 3.0}),
    "trades-4": trades("cifar10", **{"train.lr": 0.005}),
    "trades-5": trades("cifar10", **{"train.lr": 0.02, "train.ema": 0.99}),
    "trades-6": trades("cifar10", **{"train.lr": 0.04}),
    "trades-7": trades("cifar10", **{"train.lr": 0.02, "train.beta": 9.0}),
    "trades-8": trades("cifar10", **{"train.lr": 0.02, "train.beta": 9.0, "train.ema": 0.99}),
    "clustr_trades-7": head("cifar10", "trades-8"),
    "clustr_trades-8": head("cifar10", "trades-8", **{"magnet.k": 4, "magnet.clusters": 40}),
    "clustr_trades-9": head("cifar10", "trades-8", **_ONE | {"magnet.fit": "linear_head"}),
    "clustr_trades-10": again("cifar10", **_ONE | _OF_HEAD),
    "clustr_trades-11": clustr_trades("cifar10", **_ONE | _OF_HEAD | _BOTH_TUNED),
    "clustr_trades-12": again("cifar10", **_LATER | {"train.lr": 0.01}),
    "clustr_trades-13": again("cifar10", **_LATER | {"train.lam": 9.0, "train.xent_lam": 1.0}),
}
SETTINGS = {"svhn": _SVHN, "cifar10": _CIFAR10}


def arguments(dataset: str, name: str) -> list[str]:
    """The command line of one training."""
    method, settings = SETTINGS[dataset][name]
    return [
        f"--config=configs/{dataset}.py:{method},cpu",
        f"--workdir={RUNS / dataset / name}",
        *(f"--config.{key}={value}" for key, value in (IMAGES[dataset] | settings).items()),
        "--stages=" + ("2_train" if method == "trades" else "1_warmup,2_train"),
    ]


def measure(dataset: str, name: str) -> dict:
    """Attack the held-out images of a finished training."""
    root = ROOT / RUNS / dataset / name
    config = read_json(root / "config.json")
    config["eval"]["attack"]["restarts"] = 1
    clf = loading.load(root)
    held_out = data.splits(DataSettings.of(config["data"]))[1]
    index = data.stratified(held_out.labels, ATTACKED, held_out.num_classes)
    examples = data.Examples(held_out.pixels(index), held_out.labels[index], index.astype(np.int32))
    result, _ = sound_protocol.run_quick(
        stage_key(config["seed"], EVALUATE), clf, examples, EvalSettings.of(config["eval"]), lambda *_: None
    )
    done = [read_json(path) for path in root.glob("*/done.json")]
    if config["init_from"]:  # the stage that it started from
        done.append(read_json(ROOT / config["init_from"] / "done.json"))
    return {
        "dataset": config["data"]["name"], "subset": held_out.subset, "settings": SETTINGS[dataset][name][1],
        "method": config["method"], "protocol": results.PROTOCOLS["quick"],
        "images": f"{ATTACKED} held out from training",
        "n": ATTACKED, "clean": result["clean"], "robust": result["robust"],
        "robust_interval": intervals.wilson(round(result["robust"] * ATTACKED), ATTACKED),
        "gradient_passes": sum(stage["gradient_passes"] for stage in done),
        "seed": config["seed"], "config_sha": provenance.sha(config), "versions": provenance.versions(),
    }  # fmt: skip


@program
def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=SETTINGS, default="cifar10")
    parser.add_argument("--only", default="", help="names, comma-separated; default: all")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args(argv)
    known = SETTINGS[args.dataset]
    names = args.only.split(",") if args.only else [*known]
    if unknown := set(names) - set(known):
        raise UserError(f"--only: unknown {sorted(unknown)[0]!r}; known: {', '.join(known)}")
    for name in names:
        command = ["run.py", *arguments(args.dataset, name)]
        print("python", *command, flush=True)
        if args.list:
            continue
        if code := child.run(command):
            sys.exit(code)
        found = measure(args.dataset, name)
        target = ROOT / RESULTS / args.dataset / f"{name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, found)
        print(f"{name}: clean {found['clean']:.3f}, robust {found['robust']:.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
