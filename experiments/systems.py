"""The paper's systems and their baselines at its operating point: one network, all of CIFAR-10, equal passes.

    python experiments/systems.py [--only=NAME,...] [--seed=0] [--trained | --paper | --long] [--list]
    python experiments/systems.py --table
    python experiments/systems.py --more=NAME [--seed=0]

The network is that of the variant `fast`, with an ordinary first convolution where an adversary trains it
from the first step. What the paper fine-tunes starts from `nominal` (16 epochs, seed 0, kept in
results/operating-point) and takes 12 epochs, which are 6,120 updates of its clusters' batches. With an
adversary that is 52 gradient passes per image in all, and baselines get as many within 5 %. `trades` has
three inner steps, `trades+one_step` the one of QTRADES.
Rows called -short take 6 passes per image after the same start, which are 1,020 updates of ClusTR+QTRADES.
`clustr_trades` is the network of `trades` with its linear head as one centroid per class, and no training.
`clustr_qtrades+moved_statistics` is deployed with batch statistics of the adversary's images.
Each row is evaluated on 1,000 test images at 8/255 by the paper's protocol (PGD^20, with --long PGD^100
too) and by the sound one, and on all test images without an attack. Writes results/systems/NAME-SEED.json,
and the outcomes image by image beside it. What is there is not made again, and what was interrupted goes
on.

--trained leaves the evaluation out. --paper leaves the sound protocol out, which takes some two hours of one
core where many images withstand it; the same command without --paper adds it. Rows of ClusTR+QTRADES are
those of experiments/levers.py.

--more evaluates a trained row at other radii and with the D nearest clusters (NAME-SEED.more.json), and
measures what each departure of the paper's protocol is worth and the adaptive attack (NAME-SEED.quirks.json).
"""

import argparse
import dataclasses
import functools
import pathlib
import shutil
import sys
from collections.abc import Sequence

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import beyond_rows  # noqa: E402
import campaign  # noqa: E402
import child  # noqa: E402
import levers  # noqa: E402
import system_tables  # noqa: E402

from clustr_jax.evaluation import intervals  # noqa: E402
from clustr_jax.runtime import provenance  # noqa: E402
from clustr_jax.storage import results  # noqa: E402
from clustr_jax.storage.files import read_json, write_json  # noqa: E402
from clustr_jax.storage.workdir import Workdir  # noqa: E402
from configs import cifar10  # noqa: E402

# Relative to ROOT, which every command runs in: paths are part of a config, and of its hash.
RUNS, RESULTS = pathlib.Path("runs", "systems"), pathlib.Path("results", "systems")
WARM, TUNING = 16, 12  # epochs of the warm start, and of what starts from it
PASSES = WARM + 3 * TUNING
SHORT = 6  # gradient passes per image after the warm start, of the rows that take less
_ROBUST = beyond_rows.SHARED
EVALUATION = {"eval.n": 1000, "eval.diagnostics": False}
PAPER = {"eval.protocols": "('paper',)"}
LONG = {"eval.paper_steps": "(20,100)", "eval.protocols": "('paper',)"}  # after the rest


@dataclasses.dataclass(frozen=True)
class Row:
    """A system: its method and settings, the row that it starts from, or the row of levers.py that it is.

    What starts from `nominal` starts from its kept weights, whatever the seed.
    `config`: the module of configs/ that has its data set.
    """

    method: str
    settings: dict = dataclasses.field(default_factory=dict)
    start: str = ""
    lever: str = ""
    config: str = "cifar10"


def _baseline(method: str, passes: int, settings: dict) -> Row:
    """`passes` gradient passes per image and epoch."""
    epochs = round(PASSES / passes)
    ramp = {} if method == "magnet" else {"train.eps_ramp": round(beyond_rows.RAMP * epochs, 1)}
    return Row(method, settings | {"train.epochs": epochs} | ramp)


def _short(method: str, epochs: int, settings: dict) -> Row:
    """From `nominal`, with its network; an average over the last 100 updates or so, of some 800."""
    own = {"train.epochs": epochs, "train.eps_ramp": round(beyond_rows.RAMP * epochs, 1)}
    return Row(method, _ROBUST | settings | own | {"train.ema": 0.99, "model.name": "fast"}, "nominal")


def _small(config: str, epochs: int) -> Row:
    """The paper's own command on another data set; no probe after its many short epochs."""
    settings = {"train.epochs": epochs, "train.probe": 0}
    return Row("clustr_qtrades", settings, f"{config}-nominal", config=config)


_FROM_ZERO = {"train.lr": 2e-3, "train.schedule": "onecycle"}  # as experiments/campaign.py has it
# At the paper's lambda QTRADES falls to one class (docs/lab-notes.md).
_GENTLE = {"train.lr": 2e-3, "train.lam": 1.0}
_LINEAR_HEAD = {"magnet.fit": "linear_head", "magnet.k": 1, "magnet.clusters": 10}
ROWS = {
    "nominal": Row("nominal"),
    "magnet": _baseline("magnet", 1, _FROM_ZERO),
    "clustr": Row("clustr", start="nominal"),
    "clustr+kmeans": Row("clustr", {"train.epochs": 0}, "nominal"),  # appendix E.1
    "qtrades": Row("qtrades", _GENTLE | {"train.epochs": TUNING, "model.name": "fast"}, "nominal"),
    "clustr_qtrades": Row("clustr_qtrades", lever="clean-statistics"),
    "clustr_qtrades+moved_statistics": Row("clustr_qtrades", lever="exp"),
    "clustr_qtrades+paper_code": Row("clustr_qtrades", lever="authors"),
    "trades": _baseline("trades", 5, _ROBUST | beyond_rows.RECIPES["trades"][1]),
    "trades+one_step": _baseline("trades", 3, _ROBUST | beyond_rows.RECIPES["trades"][0]),
    "pgd_at": _baseline("pgd_at", 3, _ROBUST | beyond_rows.RECIPES["pgd_at"][0]),
    "fast_at": _baseline("fast_at", 2, _ROBUST | beyond_rows.RECIPES["fast_at"][0]),
    "free_at": _baseline("free_at", 4, _ROBUST | {"train.replays": 4}),
    "clustr_trades": Row("clustr_trades", _LINEAR_HEAD | {"train.epochs": 0}, "trades"),
    # Two epochs of three passes, or as many passes in other shares, after one start.
    "magnet-short": Row("magnet", _FROM_ZERO | {"train.epochs": WARM + SHORT}),
    "clustr-short": Row("clustr", {"train.epochs": SHORT}, "nominal"),
    "qtrades-short": Row("qtrades", _GENTLE | {"train.epochs": 2, "model.name": "fast"}, "nominal"),
    "clustr_qtrades-short": Row("clustr_qtrades", lever="clean-statistics-short"),
    "trades-short": _short("trades", 2, beyond_rows.RECIPES["trades"][0]),
    "pgd_at-short": _short("pgd_at", 2, beyond_rows.RECIPES["pgd_at"][0]),
    "fast_at-short": _short("fast_at", 3, beyond_rows.RECIPES["fast_at"][0]),
    "free_at-short": _short("free_at", 2, {"train.replays": 3}),
    # All images of the prepared sets, and as many updates as on CIFAR-10: 76 of 81, and 30 of 204.
    "svhn-nominal": Row("nominal", {"train.epochs": 64}, config="svhn"),
    "svhn-clustr_qtrades": _small("svhn", 76),
    "cifar100-nominal": Row("nominal", {"train.epochs": 32}, config="cifar100"),
    "cifar100-clustr_qtrades": _small("cifar100", 30),
}


def workdir(name: str, seed: int) -> pathlib.Path:
    """Of one row."""
    lever = ROWS[name].lever
    return levers.RUNS / f"{lever}-{seed}" if lever else RUNS / f"{name}-{seed}"


def source(name: str, seed: int) -> pathlib.Path | None:
    """The weights that a row starts from; None for a row that starts from nothing."""
    if ROWS[name].start == "nominal" or (name, seed) == ("nominal", 0):
        return levers.START
    return workdir(ROWS[name].start, seed) / "2_train" if ROWS[name].start else None


def training(name: str, seed: int) -> list[str]:
    """The command that trains a row; `evaluation` adds what is asked of it."""
    found = ROWS[name]
    if found.lever:
        words = levers.command(found.lever, seed)
        return [*words[:-1], "--stages=1_warmup,2_train"]
    settings, stages = found.settings | {"seed": seed}, "2_train"
    if (name, seed) == ("nominal", 0):
        settings |= {"train.epochs": 0}  # the kept weights are this row's
    if weights := source(name, seed):
        settings |= {"init_from": weights}
        if found.method.startswith("clustr"):
            settings |= {"warmup.epochs": 0}
            stages = "1_warmup,2_train"
    return [
        "run.py",
        f"--config=configs/{found.config}.py:{found.method},fast",
        f"--workdir={workdir(name, seed)}",
        *levers.words(settings),
        f"--stages={stages}",
    ]


def evaluation(name: str, seed: int, more: dict | None = None) -> list[str]:
    """The command that evaluates a trained row; of two settings of the same name the last one counts."""
    *words, _ = training(name, seed)
    fresh = {"eval.quick": False, "eval.attack.restarts": 10} | EVALUATION | (more or {})
    names = {f"--config.{key}=" for key in fresh}
    kept = [w for w in words if not any(w.startswith(n) for n in names)]
    return [*kept, *levers.words(fresh), "--stages=evaluate"]


def kept_passes() -> int:
    """Gradient passes of the kept weights: whole batches of every epoch."""
    config = cifar10.get_config("nominal,fast")
    images, batch = round(50_000 * (1 - config.data.val_size)), config.train.batch_size
    return WARM * (images // batch) * batch


def spent(name: str, seed: int) -> dict[str, int]:
    """Gradient passes by row and stage, those of what it starts from included."""
    own = {
        f"{name} {path.parent.name}": read_json(path)["gradient_passes"]
        for path in sorted((ROOT / workdir(name, seed)).glob("*/done.json"))
    }
    if ROWS[name].lever or source(name, seed) == levers.START:
        return {"nominal 2_train": kept_passes()} | {k: v for k, v in own.items() if v or name != "nominal"}
    return (spent(ROWS[name].start, seed) if ROWS[name].start else {}) | own


def commands(name: str, seed: int, evaluations: Sequence[dict]) -> list[list[str]]:
    """All that a row needs and that is not there yet, in order: what it starts from first.

    `evaluations`: the settings of each evaluation, none for a row that is only trained.
    """
    weights = source(name, seed)
    found = commands(ROWS[name].start, seed, ()) if weights not in (None, levers.START) else []
    if Workdir(ROOT / workdir(name, seed)).finished("2_train") is None:
        found.append(training(name, seed))
    return [*found, *(evaluation(name, seed, settings) for settings in evaluations)]


def measured(name: str, seed: int) -> dict:
    """What a finished row is worth, and what it cost."""
    root = ROOT / workdir(name, seed)
    config = read_json(root / "config.json")
    found = {key: results.load(root / "results", key) or {} for key in ("clean", "paper", "sound")}
    records = [m for m in Workdir(root).records() if m["stage"] == "2_train"]
    n, paper, sound = found["paper"]["n"], found["paper"], found["sound"]
    outcomes = {key: np.load(root / "results" / f"{key}.npz") for key, value in found.items() if value}
    left = {"clean": outcomes["clean"]["clean"]} | ({"sound": outcomes["sound"]["robust"]} if sound else {})
    left |= {k.partition("_")[0]: outcomes["paper"][k] for k in outcomes["paper"] if k.startswith("pgd")}
    np.savez_compressed(ROOT / RESULTS / f"{name}-{seed}.npz", ids=outcomes["paper"]["ids"], **left)
    return {
        "method": config["method"], "row": name, "seed": seed, "n": n, "eps": paper["eps"],
        "updates": records[-1]["step"] if records else 0,
        "gradient_passes": spent(name, seed),
        "training_seconds": sum(m["epoch_seconds"] for m in records),
        "dataset": config["data"]["name"], "clean": found["clean"]["clean"], "clean_n": found["clean"]["n"],
        "paper": {key: float(np.mean(v)) for key, v in left.items() if key.startswith("pgd")},
        "sound": sound.get("robust"), "protocols": [paper["protocol"], sound.get("protocol")],
        "sound_interval": intervals.wilson(int(left["sound"].sum()), n) if sound else None,
        "notes": sound.get("notes", []),
        "alarms": [{"step": m["step"], "alarms": m["alarms"]} for m in records if m.get("alarms")],
        "config_sha": provenance.sha(config), "versions": provenance.versions(),
        "commit": read_json(root / "2_train" / "done.json")["commit"],
    }  # fmt: skip


def further(name: str, seed: int) -> dict[str, tuple[str, list[str]]]:
    """Key -> (protocol, command) of Table 4 and Fig. 4. The last command, of the key "", puts the settings
    back that the work directory is deployed with."""
    *words, stages = evaluation(name, seed)
    found = {}
    for key, (protocol, settings) in campaign.others().items():
        changed = {word.partition("=")[0] for word in settings}
        kept = [word for word in words if word.partition("=")[0] not in changed]
        found[key] = (protocol, [*kept, *settings, f"--config.eval.protocols={(protocol,)}", stages])
    return found | {"": ("", [*words, "--config.eval.protocols=()", stages])}


def more(name: str, seed: int) -> int:
    """Table 4, Fig. 4 and the departures of one trained row; the exit code of what failed, or 0."""
    root, folder = ROOT / workdir(name, seed), ROOT / RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}-{seed}.more.json"
    found = read_json(target) if target.exists() else {"row": name, "seed": seed, "results": {}}
    for key, (protocol, words) in further(name, seed).items():
        if key in found["results"]:
            continue
        if code := child.run(words):
            return code
        if protocol:
            result = read_json(root / "results" / f"{protocol}.json")
            kept = ("protocol", "n", "eps", "clean", "robust", "robust_interval", "versions", "config_sha")
            found["results"][key] = {k: result[k] for k in kept}
            write_json(target, found)
    target = folder / f"{name}-{seed}.quirks.json"
    if not target.exists():
        radius = [f"--eps={8 / 255}", f"--step_size={2 / 255}"]
        if code := child.run(["-m", "clustr_jax.quirks", str(root), "--n=1000", "--restarts=3", *radius]):
            return code
        shutil.copy(root / "results" / "quirks.json", target)
    return 0


def lacking(target: pathlib.Path, asked: list[dict]) -> bool:
    """Of a row's JSON: whether one of the evaluations that are asked for has not been made."""
    found = read_json(target) if target.exists() else None
    return (
        found is None
        or ({} in asked and found["sound"] is None)
        or (LONG in asked and "pgd100" not in found["paper"])
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows, comma-separated; default: all")
    parser.add_argument("--seed", type=int, default=0)
    evaluations = parser.add_mutually_exclusive_group()
    evaluations.add_argument("--long", action="store_true", help="PGD^100 too, also of rows that are there")
    evaluations.add_argument("--paper", action="store_true", help="without the sound protocol")
    parser.add_argument("--more", metavar="NAME", help="other radii, nearest clusters, quirks of a row")
    parser.add_argument("--trained", action="store_true", help="train and do not evaluate")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there")
    args = parser.parse_args()
    if args.table:
        print(system_tables.systems(), system_tables.claims(), sep="\n\n")
        return 0
    asked = [] if args.trained else [PAPER] if args.paper else [{}, LONG] if args.long else [{}]
    option = "--more" if args.more else "--only"
    names = child.chosen(args.more or args.only, ROWS, option)
    if args.more:
        return more(args.more, args.seed)
    for name in names:
        target = ROOT / RESULTS / f"{name}-{args.seed}.json"
        found = commands(name, args.seed, asked)
        if args.list:
            print(child.listed(found))
        elif args.trained:
            for words in found:
                print("python", *words, flush=True)
                if code := child.run(words):
                    return code
        elif lacking(target, asked):
            target.parent.mkdir(parents=True, exist_ok=True)
            if code := child.make(target, found, functools.partial(measured, name, args.seed)):
                return code
            print(system_tables.systems(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
