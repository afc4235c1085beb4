"""The runs behind docs/results.md: every method at a scale that two CPU cores train, one after the other.

    python experiments/campaign.py --dataset=svhn_cropped --seed=0 [--runs=nominal,trades]
        [--results=clean,sound] [--list]

Two calls side by side, each on a core of its own (taskset -c 0 ...), fill two cores. Every run is one of
run.py, so a call that was broken off goes on where it was, and what is in results/campaign/ already is not
run again (there are also the weights of `nominal` and `trades`: others start from them).

The budget of a data set is so many gradient passes per training image, of parameters and of inputs alike: a
step of TRADES with three inner steps is five. ClusTR and QTRADES start from the nominal network of the same
seed and come on top of it, `magnet` starts from scratch; `clustr_trades` is what search.py found:
clusters of the features of TRADES, with no training after it.
"""

import argparse
import dataclasses
import importlib
import json
import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import child  # noqa: E402

import clustr_jax  # noqa: E402
from clustr_jax import data  # noqa: E402
from clustr_jax.runtime.errors import UserError  # noqa: E402
from clustr_jax.settings import Recipe, TrainingSettings  # noqa: E402
from clustr_jax.storage import safetensors_file  # noqa: E402
from clustr_jax.storage.files import read_json, write_json  # noqa: E402
from clustr_jax.training import cost  # noqa: E402

# Relative to ROOT, which every command runs in: paths are part of a config, and of its hash.
RUNS, RESULTS = pathlib.Path("runs", "campaign"), pathlib.Path("results", "campaign")
# Outcomes of single images are kept where two methods are compared image by image.
PAIRED = ("trades", "clustr_trades")
MODEL = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Scale:
    """What one data set is run at."""

    config: str
    images: tuple[int, int]  # of the prepared set, training and test: other images are another experiment
    passes: int  # gradient passes per image of the training set
    fine_tuning: int  # further ones, of what starts from `nominal`
    settings: tuple[str, ...] = ()
    source: str = "cifar100"  # of at_pretrain
    own: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # instead of those of SETTINGS
    paired: int = 1000  # test images that TRADES and clustr_trades are compared on
    without: tuple[str, ...] = ()  # what cannot be run


# What search.py found for TRADES.
TUNED = ("--config.train.lr=0.02", "--config.train.beta=9.0", "--config.train.ema=0.99")
# At the paper's lambda (8) a network whose features are not tight yet falls to one class.
GENTLE = ("--config.magnet.samples=8", "--config.train.lr=1e-3", "--config.train.lam=1.0")
SCALES = {
    "svhn_cropped": Scale("svhn", (8001, 1999), 24, 18),
    "cifar10": Scale(
        "cifar10", (50_000, 10_000), 15, 9, ("--config.data.train_size=20000",),
        own={"trades": TUNED, "clustr_qtrades": GENTLE}, paired=2000,
    ),
    "cifar100": Scale(
        "cifar100", (20_000, 4_000), 15, 9, ("--config.data.train_size=10000",), "cifar10",
        own={"trades": TUNED, "clustr_qtrades": GENTLE},
        without=("clustr_trades",),  # a linear head of 100 classes on 64 features is no set of centroids
    ),
}  # fmt: skip
# What starts from another run of the same seed, whose weights are kept.
SOURCES = {"clustr": "nominal", "qtrades": "nominal", "clustr_qtrades": "nominal", "clustr_trades": "trades"}
# What each takes beside the number of epochs; METHOD+VARIANT before METHOD.
SETTINGS = {
    "magnet": ("--config.magnet.samples=8", "--config.train.lr=2e-3"),
    "clustr": ("--config.magnet.samples=8", "--config.train.lr=2e-3"),
    "clustr_qtrades": ("--config.magnet.samples=8", "--config.train.lr=2e-3"),
    # At the paper's lambda on svhn-10k (9.7) everything is drawn to one class; the authors' term is another,
    # and smaller.
    "qtrades": ("--config.train.lr=2e-3", "--config.train.lam=1.0"),
    "qtrades+paper_code": ("--config.train.lr=2e-3",),
    # TRADES' own classifier as one centroid per class; with +kmeans, clusters of its features.
    "clustr_trades": (
        "--config.magnet.fit=linear_head",
        "--config.magnet.k=1",
        "--config.magnet.clusters=10",
    ),
    "clustr_trades+kmeans": (),
}


def source_of(name: str) -> str | None:
    """The run that another starts from; `half` has a warm-up of its own."""
    method, _, variant = name.partition("+")
    return SOURCES.get(method) if variant != "half" else None


def workdir_of(dataset: str, name: str, seed: int, kept: bool = False) -> pathlib.Path:
    """Relative to ROOT."""
    return RUNS / dataset / (f"{name}-{seed}-kept" if kept else f"{name}-{seed}")


def passes(module: str, method: str) -> int:
    """Gradient passes per image and epoch of the cpu variant; of at_pretrain those of its first stage."""
    config = importlib.import_module(f"configs.{module}").get_config(f"{method},cpu")
    method = "pgd_at" if method == "at_pretrain" else method
    recipe = Recipe.of(config.train)
    return cost.gradients(method, TrainingSettings.of(config), recipe) * recipe.replays


def run(dataset: str, name: str, seed: int, kept: bool = False) -> list[str]:
    """The command line of one run.

    METHOD+VARIANT: with a fidelity preset; with `kmeans` and no training; or with `half` of the passes for a
    warm-up of its own. `kept`: of the weights in results/campaign/ that an earlier call of it left, no
    training, in a work directory of its own.
    """
    scale = SCALES[dataset]
    method, _, variant = name.partition("+")
    source = name if kept else source_of(name)
    epochs = round((scale.fine_tuning if source else scale.passes) / passes(scale.config, method))
    more = list(scale.own.get(method) or SETTINGS.get(name, SETTINGS.get(method, ())))
    stages = "2_train,evaluate"
    if method == "at_pretrain":  # the last of the epochs is the second stage
        stages = f"1_warmup,{stages}"
        more += [f"--config.warmup.epochs={epochs - 1}", f"--config.warmup.eps_ramp={0.4 * (epochs - 1):.1f}"]
        more += ["--config.train.epochs=1", f"--config.pretrain.name={scale.source}"]
    elif kept or variant == "kmeans" or method == "clustr_trades":  # the source's network as it is
        more += ["--config.train.epochs=0"]
    elif variant == "half":
        more += [f"--config.train.epochs={scale.passes - scale.passes // 2}"]
    else:
        more += [f"--config.train.epochs={epochs}"]
    if method in ("fast_at", "pgd_at", "trades", "free_at") and not kept:
        more += [f"--config.train.eps_ramp={0.4 * epochs:.1f}"]
    if source:
        more += [f"--config.init_from={RESULTS / dataset / f'{source}-{seed}' / MODEL}"]
    if method in PAIRED:
        more += [f"--config.eval.n={scale.paired}"]
    if method.startswith("clustr"):  # the first stage is empty where its model is the source's
        stages = f"1_warmup,{stages}"
        more += [f"--config.warmup.epochs={scale.passes // 2 if variant == 'half' else 0}"]
    if variant == "paper_code":
        more += ["--config.fidelity.preset=paper_code"]
    elif method == "clustr_qtrades":  # these rows are of what was the default then
        more += ["--config.fidelity.scores=log", "--config.fidelity.epoch_statistics=keep"]
    return [
        f"--config=configs/{scale.config}.py:{method},cpu",
        f"--workdir={workdir_of(dataset, name, seed, kept)}",
        f"--stages={stages}",
        f"--config.seed={seed}",
        *scale.settings,
        *more,
    ]


NAMES = (
    "nominal", "trades", "clustr_trades", "clustr_trades+kmeans", "clustr_qtrades",
    "clustr_qtrades+paper_code", "clustr", "clustr+kmeans", "clustr+half", "qtrades", "qtrades+paper_code",
    "magnet", "fast_at", "free_at", "pgd_at", "at_pretrain",
)  # fmt: skip
# What is asked of a run: name of the result -> (its protocol, settings).
MAIN = {
    "clean": ("clean", ()),
    "paper": ("paper", ("--config.eval.quick=True",)),
    "sound": ("sound", ("--config.eval.quick=True",)),
}
LONG = {"pgd100": ("paper", ("--config.eval.paper_steps=(20,100)", "--config.eval.sweep=()"))}
RADII, NEAREST = (2, 16, 25.5), (1, 2, 4, 10)


def others() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Table 4 (other radii) and Fig. 4 (other D), by both protocols."""
    found = {}
    for radius in RADII:
        eps = f"--config.eval.attack.eps={radius / 255}"
        step = f"--config.eval.attack.step_size={radius / 255 / 4}"
        found[f"paper-eps{radius}"] = ("paper", (eps, "--config.eval.quick=True"))
        found[f"quick-eps{radius}"] = ("quick", (eps, step))
    for d in NEAREST:
        found[f"paper-nearest{d}"] = ("paper", (f"--config.eval.nearest={d}", "--config.eval.quick=True"))
        found[f"quick-nearest{d}"] = ("quick", (f"--config.eval.nearest={d}",))
    return found


def wanted(name: str, seed: int) -> dict[str, tuple[str, tuple[str, ...]]]:
    """All that is asked of one run."""
    if seed != 0:
        return MAIN
    return MAIN | LONG | (others() if name == "clustr_qtrades" else {})


def trained(workdir: pathlib.Path) -> dict:
    """What the training of a finished run took, and where it ended."""
    config, clean = read_json(workdir / "config.json"), read_json(workdir / "results" / "clean.json")
    done = {path.parent.name: read_json(path) for path in workdir.glob("*/done.json")}
    metrics = workdir / "metrics.jsonl"  # not there where no epoch was trained
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return {
        "seed": config["seed"],
        "config_sha": clean["config_sha"],
        "versions": clean["versions"],
        "stages": {
            stage: {
                "epochs": done[stage]["epochs"],
                "gradient_passes": done[stage]["gradient_passes"],
                "seconds": sum(r["epoch_seconds"] for r in records if r["stage"] == stage),
                "epoch_seconds": [r["epoch_seconds"] for r in records if r["stage"] == stage],
                "val_accuracy": [r["val_accuracy"] for r in records if r["stage"] == stage],
                "last": [r for r in records if r["stage"] == stage][-1:],
            }
            for stage in sorted(done)
        },
    }


def start(command: list[str]) -> bool:
    """Whether it ended well; leaves with 75 where it was stopped, so that the same call goes on."""
    print("python", *command, flush=True)
    code = child.run(command)
    if code == child.STOPPED:
        sys.exit(code)
    if code:
        print(f"exit code {code}", flush=True)
    return code == 0


def perform(dataset: str, name: str, seed: int, only: set[str]) -> bool:
    """One run: what is not in results/campaign/ yet; of `only`, or all. Whether all of it ended well."""
    target = ROOT / RESULTS / dataset / f"{name}-{seed}"
    target.mkdir(parents=True, exist_ok=True)
    # Trained elsewhere, where its work directory stayed: what is still to be evaluated needs no training.
    kept = (target / MODEL).exists() and (target / "clean.json").exists()
    kept = kept and not (ROOT / workdir_of(dataset, name, seed)).exists()
    workdir = ROOT / workdir_of(dataset, name, seed, kept)
    for what, (protocol, settings) in wanted(name, seed).items():
        if (target / f"{what}.json").exists() or (only and what not in only):
            continue
        protocols = f"--config.eval.protocols={(protocol,) if protocol != 'clean' else ()}"
        command = ["run.py", *run(dataset, name, seed, kept), *settings, protocols]
        if not start([*command, "--config.eval.diagnostics=False"]):
            return False
        if what == "sound" and name.partition("+")[0] in PAIRED:
            shutil.copy(workdir / "results" / "sound.npz", target)
        if what == "clean":
            write_json(target / "training.json", trained(workdir))
            if name in SOURCES.values():
                safetensors_file.save(clustr_jax.load(workdir), target / MODEL)
        # Last: it says that the rest is there.
        shutil.copy(workdir / "results" / f"{protocol}.json", target / f"{what}.json")
    if only and "quirks" not in only:
        return True
    if seed == 0 and name.startswith("clustr_qtrades") and not (target / "quirks.json").exists():
        # Every restart of every image is run, eight times: three instead of the paper's ten.
        # The radius is said: the work directory's config is that of whichever evaluation came last.
        radius = [f"--eps={8 / 255}", f"--step_size={2 / 255}"]
        if not start(["-m", "clustr_jax.quirks", str(workdir), "--n=1000", "--restarts=3", *radius]):
            return False
        shutil.copy(workdir / "results" / "quirks.json", target)
    return True


def check_images(dataset: str) -> None:
    """UserError where the prepared set is not the one whose results are in results/campaign/."""
    found = tuple(len(data.load_split(dataset, part)) for part in ("train", "test"))
    if found != SCALES[dataset].images:
        raise UserError(
            f"{dataset} is prepared with {found} training and test images, and the results in {RESULTS} are "
            f"of {SCALES[dataset].images} (docs/results.md, scale); use run.py with a --workdir of your own"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=SCALES, default="svhn_cropped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", default="", help="default: all that the set has")
    parser.add_argument("--results", default="", help="some only: clean,paper,sound,quirks,...")
    parser.add_argument("--list", action="store_true", help="print the trainings and run nothing")
    args = parser.parse_args()
    names = args.runs.split(",") if args.runs else NAMES
    names = [name for name in names if args.runs or name not in SCALES[args.dataset].without]
    try:
        unknown = set(names) - set(NAMES)
        if unknown:
            raise UserError(f"--runs: unknown {sorted(unknown)[0]!r}; known: {', '.join(NAMES)}")
        known = (*wanted("clustr_qtrades", 0), "quirks")
        unknown = set(filter(None, args.results.split(","))) - set(known)
        if unknown:
            raise UserError(f"--results: unknown {sorted(unknown)[0]!r}; known: {', '.join(known)}")
        if not args.list:
            check_images(args.dataset)
            if "at_pretrain" in names:
                check_images(SCALES[args.dataset].source)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if args.list:
        for name in names:
            print("python run.py", *run(args.dataset, name, args.seed))
        return
    only = set(filter(None, args.results.split(",")))
    failed = [name for name in names if not perform(args.dataset, name, args.seed, only)]
    if failed:
        sys.exit(f"did not end well: {', '.join(failed)}")


if __name__ == "__main__":
    main()
