"""clustr_at against its linear twin and the baselines, at equal gradient passes and equal tuning budgets.

    python experiments/beyond.py [--recipes=4] [--only=NAME,...]      # tune: images held out
    python experiments/beyond.py --final --scale=half [--seed=0] [--attacked=1000] [--only=METHOD,...]
    python experiments/beyond.py --table                              # with --list: the commands alone

Tuning trains the first --recipes recipes of every method (experiments/beyond_rows.py) with a small budget and
attacks 500 images held out from training, sound.run_quick with one restart. A final run takes the best of
them by that (--recipe=NAME: another), if as many recipes of each method were tried. It trains on all images
but the 2 % that are held out, and is judged on test images: PMA, which is about
as strong as AutoAttack for a fraction of its cost, on --screened of them; AutoAttack standard on --attacked;
the package's own judgement with its checks on --judged. NAME-SEED.npz has the outcomes image by image. A part
of the test images is stratified, and the same for all rows.

Everything goes on where it was stopped (SIGTERM saves), and what has its JSON under results/beyond is not
made again.
"""

import argparse
import functools
import pathlib
import signal
import sys
from collections.abc import Callable, Iterable

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import beyond_rows  # noqa: E402
import beyond_tables  # noqa: E402
import child  # noqa: E402

import clustr_jax  # noqa: E402
from clustr_jax import attacks, data  # noqa: E402
from clustr_jax.attacks.registry import STANDARD  # noqa: E402
from clustr_jax.evaluation import intervals, sound_protocol  # noqa: E402
from clustr_jax.runtime import provenance  # noqa: E402
from clustr_jax.runtime.errors import UserError  # noqa: E402
from clustr_jax.runtime.programs import program  # noqa: E402
from clustr_jax.settings import DataSettings, EvalSettings  # noqa: E402
from clustr_jax.stages import EVALUATE, stage_key  # noqa: E402
from clustr_jax.storage import loading, results  # noqa: E402
from clustr_jax.storage.files import read_json, write_json  # noqa: E402
from clustr_jax.storage.workdir import Workdir  # noqa: E402

# Relative to ROOT, which every command runs in: paths are part of a config, and of its hash.
RUNS, RESULTS = pathlib.Path("runs", "beyond"), pathlib.Path("results", "beyond")
TUNE = "tune"
HELD_OUT, SCREENED, ATTACKED, JUDGED = 500, 10_000, 10_000, 200
DRY = "dry"
SLOTS = 256


def workdir(scale: str, name: str, seed: int) -> pathlib.Path:
    """Of one row."""
    return RUNS / scale / f"{name}-{seed}"


def command(scale: str, name: str, seed: int) -> list[str]:
    """The words that train a row."""
    method, _ = beyond_rows.row(name)
    changes = beyond_rows.settings(name, scale) | {"seed": seed, "train.monitor": scale != TUNE}
    return [
        "run.py",
        f"--config=configs/cifar10.py:{method},fast",
        f"--workdir={workdir(scale, name, seed)}",
        *(f"--config.{key}={value}" for key, value in changes.items()),
        "--stages=2_train",
    ]


def trained(scale: str, name: str, seed: int) -> dict:
    """What is known of a finished training; UserError where it spent other passes than planned."""
    root = ROOT / workdir(scale, name, seed)
    config, done = read_json(root / "config.json"), read_json(root / "2_train" / "done.json")
    records = [m for m in Workdir(root).records() if m["stage"] == "2_train"]
    images = len(data.splits(DataSettings.of(config["data"]))[0])
    spent, planned = done["gradient_passes"] / images, beyond_rows.SCALES[scale].passes
    # batches that do not divide the set leave a rest of it out
    rest = config["train"]["batch_size"] / images
    if abs(spent - planned) > (beyond_rows.TOLERANCE + rest) * planned:
        raise UserError(f"{root} spent {spent:.1f} gradient passes per image, not {planned} within 5 %")
    return {
        "scale": scale, "row": name, "method": config["method"], "settings": beyond_rows.row(name)[1],
        "seed": seed, "gradient_passes": done["gradient_passes"], "images": images,
        "passes_per_image": spent, "epochs": done["epochs"],
        "training_seconds": sum(m["epoch_seconds"] for m in records),
        "alarms": sorted({kind for m in records for kind in m.get("alarms", ())}),
        "config_sha": provenance.sha(config), "versions": provenance.versions(), "commit": done["commit"],
    }  # fmt: skip


def held_out(scale: str, name: str, seed: int) -> dict:
    """Of images held out from training: clean, and after sound.run_quick."""
    root = ROOT / workdir(scale, name, seed)
    config = read_json(root / "config.json")
    config["eval"] |= {"slots": SLOTS, "quick": True}
    config["eval"]["attack"]["restarts"] = 1
    clf = loading.load(root)
    split = data.splits(DataSettings.of(config["data"]))[1]
    index = data.stratified(split.labels, min(HELD_OUT, len(split)), split.num_classes)
    examples = data.Examples(split.pixels(index), split.labels[index], index.astype(np.int32))
    result, _ = sound_protocol.run_quick(
        stage_key(seed, EVALUATE), clf, examples, EvalSettings.of(config["eval"]), lambda *_: None
    )
    n = result["n"]
    return {
        "protocol": results.PROTOCOLS["quick"], "on": "held out", "n": n, "eps": result["eps"],
        "clean": result["clean"], "robust": result["robust"],
        "robust_interval": intervals.wilson(round(result["robust"] * n), n),
    }  # fmt: skip


def attacked(root: pathlib.Path, clf, seed: int, size: int, *, names: tuple[str, ...], folder: str):
    """(figures, outcomes by image) of a stratified part of the test images under an ensemble of attacks."""
    split, eps = data.load_split("cifar10", "test"), read_json(root / "config.json")["train"]["attack"]["eps"]
    index = data.stratified(split.labels, min(size, len(split)), split.num_classes)
    found = attacks.autoattack(
        stage_key(seed, EVALUATE),
        clf.logits,
        split.pixels(index),
        split.labels[index],
        eps=eps,
        attacks=names,
        ids=index.astype(np.int32),
        slots=SLOTS,
        folder=root / folder,
    )
    n, kinds = len(index), np.unique(found.broken_by, return_counts=True)
    content = {
        "n": n, "eps": eps, "robust": float(np.mean(found.robust)), "notes": list(found.notes),
        "robust_interval": intervals.wilson(int(found.robust.sum()), n),
        "broken_by": {str(k): int(v) for k, v in zip(*kinds, strict=True) if k},
    }  # fmt: skip
    return content, {"ids": index, "robust": found.robust, "broken_by": found.broken_by}


def judged(root: pathlib.Path, clf, seed: int, size: int, *, folder: str) -> tuple[dict, dict]:
    """The package's own judgement of a stratified part of the test images."""
    split, eps = data.load_split("cifar10", "test"), read_json(root / "config.json")["train"]["attack"]["eps"]
    some = data.stratified(split.labels, min(size, len(split)), split.num_classes)
    found = clustr_jax.judge(
        clf, split.pixels(some), split.labels[some], eps=eps, ids=some.astype(np.int32), seed=seed,
        folder=root / folder,
    )  # fmt: skip
    return {
        "n": len(some), "protocol": found.content["protocol"], "robust": found.robust,
        "failed": found.content["failed"],
    }, {}  # fmt: skip


def kept(root: pathlib.Path, name: str, make: Callable[[], tuple[dict, dict]]) -> tuple[dict, dict]:
    """What `make` gives (figures, outcomes by image), made once: later calls read it."""
    path = root / "tested" / f"{name}.json"
    if path.exists():
        with np.load(path.with_suffix(".npz")) as outcomes:
            return read_json(path), dict(outcomes)
    figures, outcomes = make()
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path.with_suffix(".npz"), **outcomes)
    write_json(path, figures)
    return figures, outcomes


def tested(scale: str, name: str, seed: int, sizes: dict[str, int]) -> tuple[dict, dict]:
    """(of test images: clean, PMA, AutoAttack standard, the package's own judgement; outcomes by image)."""
    root = ROOT / workdir(scale, name, seed)
    clf, split = loading.load(root), data.load_split("cifar10", "test")
    clean = np.asarray(clf.predict(split.pixels())) == split.labels
    content: dict = {"on": "test", "clean": float(np.mean(clean)), "clean_n": len(clean), "judgement": {}}
    parts = {
        "screened": functools.partial(attacked, names=("pma",)),
        "attacked": functools.partial(attacked, names=STANDARD),
        "judged": judged,
    }
    left = {}
    for what, part in parts.items():
        if size := sizes[what]:
            named = f"{what}-{size}"
            left[what] = kept(root, named, functools.partial(part, root, clf, seed, size, folder=named))
    outcomes = {"clean": clean}
    if "screened" in left:
        content["screen"], found = left["screened"]
        outcomes |= {f"screen_{key}": value for key, value in found.items()}
    figures, found = left["attacked"]
    content |= {"protocol": "AutoAttack standard", **figures}
    content["judgement"], _ = left.get("judged", ({}, {}))
    return content, outcomes | found


def tuned(method: str) -> list[dict]:
    """What was tried of a method; UserError for nothing."""
    there = [read_json(path) for path in (ROOT / RESULTS / TUNE).glob(f"{method}-*.json")]
    if not there:
        raise UserError(f"{method} has not been tuned; do so without --final, or name a --recipe")
    return there


def check_budgets(methods: Iterable[str]) -> None:
    """UserError where more runs were made to tune one method than another: the best of more is better."""
    runs = {method: len(tuned(method)) for method in methods}
    if len({*runs.values()}) > 1:
        said = ", ".join(f"{method} {count}" for method, count in runs.items())
        raise UserError(f"tuned by unequal numbers of runs: {said}; run --recipes={max(runs.values())} first")


def best(method: str) -> str:
    """The recipe of a method that left most held-out images right; of equal ones the one tried first."""
    there = tuned(method)
    return max(there, key=lambda r: (r["robust"], -int(r["row"].rpartition("-")[2])))["row"]


def asked(found: dict, sizes: dict[str, int] | None) -> bool:
    """Whether a row's figures are of the images asked for; UserError where they are of another kind."""
    on = "test" if sizes else "held out"
    if found["on"] != on:
        raise UserError(
            f"results of {found['row']} at scale {found['scale']} are of images {found['on']}, not {on}; "
            "move them away, or take another --scale"
        )
    if not sizes:
        return True
    there = {"attacked": found["n"], "screened": (found.get("screen") or {}).get("n", 0)}
    there["judged"] = (found.get("judgement") or {}).get("n", 0)
    return there == {key: min(size, 10_000) for key, size in sizes.items()}


def make(scale: str, name: str, seed: int, sizes: dict[str, int] | None) -> int:
    """Train and measure one row, unless its JSON is there; the exit code. No `sizes`: held-out images."""
    folder = ROOT / RESULTS / scale
    target = folder / f"{name}-{seed}.json"
    if target.exists() and asked(read_json(target), sizes):
        return 0
    words = command(scale, name, seed)
    print("python", *words, flush=True)
    if code := child.run(words):
        return code
    jax.clear_caches()
    content, outcomes = trained(scale, name, seed), {}
    if sizes:
        found, outcomes = tested(scale, name, seed, sizes)
    else:
        found = held_out(scale, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    if outcomes:
        np.savez_compressed(target.with_suffix(".npz"), **outcomes)
    write_json(target, content | found)
    print(f"{name}, seed {seed}: clean {found['clean']:.1%}, robust {found['robust']:.1%}", flush=True)
    return 0


def _stop(*_):
    """SIGTERM as Ctrl-C: attacks save their records of the moment."""
    raise KeyboardInterrupt


@program
def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--final", action="store_true", help="the best recipe of each method, on test images")
    parser.add_argument("--scale", choices=beyond_rows.SCALES, help="default: tune, of --final half")
    parser.add_argument("--recipes", type=int, default=12, help="of every method, from the first (tuning)")
    parser.add_argument("--recipe", default="", help="METHOD-NUMBER, instead of the best (--final)")
    parser.add_argument("--only", default="", help="rows (tuning) or methods (--final), comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--screened", type=int, default=SCREENED, help="test images for PMA, 0: none (--final)"
    )
    parser.add_argument("--attacked", type=int, default=ATTACKED, help="... for AutoAttack (--final)")
    parser.add_argument("--judged", type=int, default=JUDGED, help="... for judge, 0: none (--final)")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there")
    args = parser.parse_args(argv)
    if args.table:
        print(beyond_tables.tables(ROOT / RESULTS))
        return 0
    wanted = args.only.split(",") if args.only else []
    scale = args.scale or ("half" if args.final else TUNE)
    if not args.final:
        most = min(len(recipes) for recipes in beyond_rows.RECIPES.values())
        if not 1 <= args.recipes <= most:
            raise UserError(f"--recipes must be from 1 to {most}, got {args.recipes}")
        rows = wanted or beyond_rows.names(args.recipes)
    elif args.recipe:
        rows = [args.recipe]
    else:
        if unknown := set(wanted) - set(beyond_rows.RECIPES):
            known = ", ".join(beyond_rows.RECIPES)
            raise UserError(f"--only: unknown {sorted(unknown)[0]!r}; known: {known}")
        check_budgets(wanted or beyond_rows.RECIPES)
        rows = [best(method) for method in wanted or beyond_rows.RECIPES]
    commands = {name: command(scale, name, args.seed) for name in rows}  # all mistakes before any work
    if args.list:
        print(*("python " + " ".join(words) for words in commands.values()), sep="\n")
        return 0
    sizes = {"screened": args.screened, "attacked": args.attacked, "judged": args.judged}
    if min(args.screened, args.judged) < 0 or args.attacked < 1:
        raise UserError(f"--screened and --judged must be >= 0, --attacked >= 1; got {sizes}")
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        codes = (make(scale, name, args.seed, sizes if args.final else None) for name in commands)
        return next((code for code in codes if code), 0)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
