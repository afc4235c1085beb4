"""TRADES against clustr_trades: settings of both, tried on images held out from training.

    python experiments/search.py [--only=NAME,...] [--list]

Every setting trains on svhn-10k (7,001 images, 1,000 held out) with the same number of gradient passes
and is then attacked on 500 of the held-out images: sound.run_quick, one restart. The test images are not
looked at. Writes results/search/NAME.json.
"""

import argparse
import pathlib
import subprocess
import sys

import numpy as np
from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from clustr_jax import data, loading, results, sound  # noqa: E402
from clustr_jax.files import read_json, write_json  # noqa: E402
from clustr_jax.objectives import METHODS  # noqa: E402
from clustr_jax.stages import EVALUATE, stage_key  # noqa: E402

RUNS, RESULTS = ROOT / "runs" / "search", ROOT / "results" / "search"
HELD_OUT, ATTACKED = 0.125, 500
WARM = "clustr_trades-1"  # its first stage is shared


def trades(**settings) -> tuple[str, dict]:
    """Six epochs of five passes."""
    return "trades", {"train.epochs": 6, "train.eps_ramp": 2.4} | settings


def clustr_trades(**settings) -> tuple[str, dict]:
    """Five epochs of TRADES, and one of its own: as many passes."""
    fixed = {"warmup.epochs": 5, "warmup.eps_ramp": 2.0, "train.epochs": 1}
    return "clustr_trades", fixed | settings


def again(**settings) -> tuple[str, dict]:
    """The second stage alone, from the TRADES of WARM."""
    return clustr_trades(**{"warmup.epochs": 0, "init_from": f"{RUNS / WARM / '1_warmup'}"} | settings)


def longer(first: int, **settings) -> tuple[str, dict]:
    """`first` epochs of TRADES, and the rest by the clusters, one for each class, in small batches."""
    small = {"magnet.k": 1, "magnet.clusters": 10, "magnet.samples": 8, "train.lr": 0.005}
    weights = {"train.lam": 48.0, "train.xent_lam": 8.0}
    epochs = {"warmup.epochs": first, "warmup.eps_ramp": 2.0, "train.epochs": 6 - first}
    return clustr_trades(**small | weights | epochs | settings)


SETTINGS = {
    "trades-1": trades(),
    "clustr_trades-1": clustr_trades(),
    "clustr_trades-2": again(**{"train.lam": 160.0}),
    "clustr_trades-3": again(**{"magnet.k": 1, "magnet.clusters": 10, "magnet.samples": 16}),
    "clustr_trades-4": again(**{"train.lr": 5e-4}),
    "clustr_trades-5": again(**{"train.lr": 5e-4, "train.lam": 160.0, "magnet.k": 1, "magnet.clusters": 10}),
    "clustr_trades-6": longer(2),
    "clustr_trades-7": longer(3, **{"magnet.sharpness": 4.0}),
    "trades-2": trades(**{"train.lr": 0.02}),
    "trades-3": trades(**{"train.beta": 10.0}),
    "trades-4": trades(**{"train.beta": 3.0}),
    "trades-5": trades(**{"train.lr": 0.005}),
}


def arguments(name: str) -> list[str]:
    """The command line of one training."""
    method, settings = SETTINGS[name]
    return [
        f"--config=configs/svhn.py:{method},cpu", f"--workdir={RUNS / name}",
        f"--config.data.val_size={HELD_OUT}", *(f"--config.{key}={value}" for key, value in settings.items()),
        "--stages=" + ("2_train" if method == "trades" else "1_warmup,2_train"),
    ]  # fmt: skip


def measure(name: str) -> dict:
    """Attack the held-out images of a finished training."""
    root = RUNS / name
    config = ConfigDict(read_json(root / "config.json"))
    config.eval.attack.restarts = 1
    clf = loading.load(root)
    held_out = data.splits(config.data, at_most=False)[1]
    index = data.stratified(held_out.labels, ATTACKED, held_out.num_classes)
    examples = data.Examples(held_out.pixels(index), held_out.labels[index], index.astype(np.int32))
    result, _ = sound.run_quick(stage_key(config.seed, EVALUATE), clf, examples, config, lambda *_: None)
    done = [read_json(path) for path in root.glob("2_train/done.json")]
    if METHODS[config.method].warmup:
        own = root / "1_warmup" / "done.json"
        done.append(read_json(RUNS / WARM / "1_warmup" / "done.json" if config.init_from else own))
    return {
        "dataset": config.data.name, "subset": held_out.subset, "settings": SETTINGS[name][1],
        "method": config.method, "protocol": "quick-1", "images": f"{ATTACKED} held out from training",
        "n": ATTACKED, "clean": result["clean"], "robust": result["robust"],
        "robust_interval": results.wilson(round(result["robust"] * ATTACKED), ATTACKED),
        "gradient_passes": sum(stage["gradient_passes"] for stage in done),
        "seed": config.seed, "config_sha": results.sha(config.to_dict()), "versions": results.versions(),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SETTINGS))
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args()
    for name in args.only.split(","):
        command = ["run.py", *arguments(name)]
        print("python", *command, flush=True)
        if args.list:
            continue
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        found = measure(name)
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_json(RESULTS / f"{name}.json", found)
        print(f"{name}: clean {found['clean']:.3f}, robust {found['robust']:.3f}", flush=True)


if __name__ == "__main__":
    main()
