"""The tables of docs/results.md: pure functions of the JSONs under results/."""

import json
import pathlib

import numpy as np
from campaign import source_of

from clustr_jax.evaluation import intervals
from clustr_jax.reference import claims
from clustr_jax.storage import results

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
# Rows as in the paper's Table 1, ours after them; METHOD+VARIANT as in experiments/campaign.py.
LABELS = {
    "nominal": "nominal", "free_at": "Free AT", "at_pretrain": "AT, pretrained", "trades": "TRADES",
    "magnet": "Magnet", "clustr": "ClusTR", "qtrades": "QTRADES",
    "qtrades+paper_code": "QTRADES, authors' code", "clustr_qtrades": "ClusTR+QTRADES",
    "clustr_qtrades+paper_code": "ClusTR+QTRADES, authors' code", "clustr+kmeans": "k-means on nominal (E.1)",
    "clustr+half": "ClusTR, half the passes warm-up",
    "pgd_at": "PGD-AT", "fast_at": "Fast AT", "clustr_trades": "clustr_trades, linear head",
    "clustr_trades+kmeans": "clustr_trades, k-means",
}  # fmt: skip
DATASETS = {"svhn_cropped": "svhn-10k", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; the first column is left-aligned, the others are right-aligned."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def check_versions() -> None:
    """ValueError where the campaign has results of two versions of a protocol (quirks have tables) or of JAX.

    Between versions of JAX numbers differ by more than rounding: 0.10.2 adds some squares up wrongly on CPU.
    """
    versions, compilers = {}, {}
    for path in sorted((RESULTS / "campaign").glob("*/*/*.json")):
        content = json.loads(path.read_text())
        compiler = content.get("versions", {}).get("jax")
        if compiler and compilers.setdefault("jax", compiler) != compiler:
            raise ValueError(f"{path} is of jax {compiler}, others of jax {compilers['jax']}; run it again")
        kind, _, rest = content.get("protocol", "").partition("-")
        version = rest.partition("-")[0]
        if kind not in ("", "quirks") and versions.setdefault(kind, version) != version:
            raise ValueError(f"{path} is {kind}-{version}, others {kind}-{versions[kind]}; run it again")


def seeds(dataset: str, name: str, what: str) -> list[dict]:
    """That result of every seed that has it; of the paper's protocol its PGD^20."""
    paths = sorted((RESULTS / "campaign" / dataset).glob(f"{name}-[0-9]/{what}.json"))
    found = [json.loads(path.read_text()) for path in paths]
    return [pgd20(result) for result in found] if what.startswith("paper") else found


def spent(dataset: str, name: str) -> list[int]:
    """Gradient passes of every seed's training, with those of the network that it starts from."""
    found = []
    for run in seeds(dataset, name, "training"):
        source = source_of(name)
        before = seeds(dataset, source, "training") if source else []
        stages = [*run["stages"].values()]
        for other in before:
            stages += other["stages"].values() if other["seed"] == run["seed"] else []
        found.append(sum(stage["gradient_passes"] for stage in stages))
    return found


def percent(value: float) -> str:
    """One decimal."""
    return f"{100 * value:.1f}"


def figure(result: dict, key: str = "robust") -> str:
    """An accuracy with its 95 % interval."""
    low, high = result[f"{key}_interval"]
    return f"{percent(result[key])} [{percent(low)}, {percent(high)}]"


def robust(result: dict) -> str:
    """The same without the interval, where the page says how wide it is."""
    return percent(result["robust"])


def pgd20(result: dict) -> dict:
    """A result of the paper's protocol with PGD^20 alone, as the authors count, as its `robust`.

    `robust` itself is what is right under PGD^20, under PGD^100 where it was run, and without any.
    """
    value, n = result["attacks"]["pgd20"], result["n"]
    return result | {"robust": value, "robust_interval": intervals.wilson(round(value * n), n)}


def by_seed(found: list[dict], show) -> str:
    """One line for each seed."""
    return "<br>".join(show(result) for result in found) or "not run"


def claimed(dataset: str, name: str) -> str:
    """Clean, PGD^20 and PGD^100 accuracy as the paper has them; a star where it took them from others."""
    row = claims.CLAIMS.get(dataset, {}).get(name)
    copied = "*" if name in claims.COPIED.get(dataset, ()) else ""
    return ", ".join(f"{value:.1f}" for value in row) + copied if row else ""


def _largest(clean: dict) -> str:
    """Share of the predictions that the most predicted class has."""
    return percent(max(clean["predicted"]))


def accuracies(dataset: str) -> str:
    """Tables 1 and 3: every method, both protocols."""
    rows = []
    for name, label in LABELS.items():
        clean, told, long, sound = (seeds(dataset, name, w) for w in ("clean", "paper", "pgd100", "sound"))
        if not clean:
            continue
        true = {result["seed"]: result for result in sound}
        both = [(p, true[p["seed"]]) for p in told if p["seed"] in true]
        assert all(results.comparable(*pair) for pair in both)
        short = {result["seed"]: result for result in told}
        # A network whose work directory was lost is attacked longer from its kept weights.
        assert all(abs(r["clean"] - short[r["seed"]]["clean"]) <= 2 / r["n"] for r in long), (dataset, name)
        gaps = [100 * (p["robust"] - s["robust"]) for p, s in both]
        rows.append(
            [
                label, by_seed(clean, lambda r: str(r["seed"])),
                by_seed(clean, lambda r: percent(r["clean"])), by_seed(clean, _largest),
                by_seed(told, robust),
                by_seed(long, lambda r: percent(r["attacks"]["pgd100"])) if long else "",
                by_seed(sound, robust), "<br>".join(f"{gap:+.1f}" for gap in gaps), claimed(dataset, name),
            ]
        )  # fmt: skip
    header = [
        "%",
        "seed",
        "clean",
        "most predicted",
        "paper's protocol, PGD^20",
        "PGD^100",
        "sound protocol",
        "gap",
        "paper claims: clean, PGD^20, PGD^100",
    ]
    return markdown(header, rows)


def _difference(ours: dict, theirs: dict) -> str:
    """Of two accuracies, in points, with the 95 % interval of independent samples (Newcombe 1998, method 10).

    Both are of the same images, so the interval is too wide rather than too narrow.
    """
    a, b = ours["robust"], theirs["robust"]
    (a_low, a_high), (b_low, b_high) = ours["robust_interval"], theirs["robust_interval"]
    low = a - b - np.hypot(a - a_low, b_high - b)
    high = a - b + np.hypot(a_high - a, b - b_low)
    return f"{100 * (a - b):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def effect() -> str:
    """ClusTR+QTRADES against QTRADES by both protocols."""
    rows = []
    for dataset, label in DATASETS.items():
        for told in seeds(dataset, "clustr_qtrades", "paper"):
            found = [
                next((r for r in seeds(dataset, name, what) if r["seed"] == told["seed"]), None)
                for what in ("paper", "sound")
                for name in ("clustr_qtrades", "qtrades")
            ]
            if None not in found:
                cells = [percent(result["robust"]) for result in found]
                rows.append(
                    [
                        f"{label}, seed {told['seed']}",
                        *cells[:2],
                        _difference(*found[:2]),
                        *cells[2:],
                        _difference(*found[2:]),
                    ]
                )
    header = [
        "%", "paper's protocol: ClusTR+QTRADES", "QTRADES", "difference", "sound: ClusTR+QTRADES", "QTRADES",
        "difference",
    ]  # fmt: skip
    return markdown(header, rows)


def _pass_seconds() -> dict[str, float]:
    """Of a gradient pass in each method's training step, as benchmarks/steps.py measured it."""
    measured = json.loads((RESULTS / "benchmarks" / "steps.json").read_text())
    return {
        row["method"]: row["step_seconds"]
        / row["batch"]
        / sum(number for what, number in row["passes"].items() if "gradient" in what)
        for row in measured["rows"]
    }


def times() -> str:
    """Tables 2 and 5: time of the full-size trainings as multiples of TRADES'."""
    found = json.loads((RESULTS / "fullsize.json").read_text())["rows"]
    seconds = _pass_seconds()
    rows = {}
    for dataset, short in (("cifar10", "cifar10"), ("svhn_cropped", "svhn")):
        passes = {row["method"]: row["gradient_passes"] for row in found if row["dataset"] == short}
        minutes = claims.MINUTES[dataset]
        for name, value in minutes.items():
            row = rows.setdefault(name, [LABELS[name], f"{1e3 * seconds[name]:.2f}"])
            ours = passes[name] * seconds[name] / (passes["trades"] * seconds["trades"])
            row += [f"{passes[name] / 1e6:.1f}", f"{ours:.2f}", f"{value / minutes['trades']:.2f}"]
    header = ["time / TRADES'", "ms per pass and image"]
    for label in ("CIFAR-10", "SVHN"):
        header += [f"{label}: passes, millions", "measured", "paper"]
    return markdown(header, [*rows.values()])


def radii() -> str:
    """Table 4: other radii."""
    rows = []
    for radius in (2, 8, 16, 25.5):
        row = [f"{radius}/255"]
        for dataset in ("svhn_cropped", "cifar10"):
            ours = seeds(dataset, "clustr_qtrades", "paper" if radius == 8 else f"paper-eps{radius}")
            true = seeds(dataset, "clustr_qtrades", "sound" if radius == 8 else f"quick-eps{radius}")
            assert {r["protocol"] for r in true} == {"sound-2-quick" if radius == 8 else "quick-1"}
            claim = claims.claim(dataset, "clustr_qtrades", "pgd20", radius / 255)
            row += [
                by_seed(ours, robust),
                by_seed(true, robust),
                percent(claim) if claim is not None else "",
            ]
        rows.append(row)
    header = ["eps"]
    for label in ("svhn-10k", "CIFAR-10"):
        header += [f"{label}: PGD^20", "sound attacks", "paper claims"]
    return markdown(header, rows)


def nearest() -> str:
    """Fig. 4: the D nearest clusters at inference."""
    rows = []
    for d in (1, 2, 4, 10, 0):
        row = [str(d or "all")]
        for dataset in ("svhn_cropped", "cifar10"):
            ours = seeds(dataset, "clustr_qtrades", f"paper-nearest{d}" if d else "paper")
            true = seeds(dataset, "clustr_qtrades", f"quick-nearest{d}" if d else "sound")
            assert true[0]["protocol"] == ("quick-1" if d else "sound-2-quick")
            row += [percent(ours[0]["clean"]), robust(ours[0]), robust(true[0])]
        rows.append(row)
    header = ["D"]
    for label in ("svhn-10k", "CIFAR-10"):
        header += [f"{label}: clean", "PGD^20", "sound attacks"]
    return markdown(header, rows)


_QUIRKS = {
    "none": "the paper's protocol",
    "exp_scores": "log scores instead of exp scores",
    "mean_loss": "each image's own loss, not the mean over 64",
    "max_loss": "any restart that succeeds, not the one with the largest loss",
    "start_outside": "a start inside the box",
    "all": "all four",
}


def quirks() -> str:
    """What each departure of the official protocol is worth; a column names the measurement's version."""
    columns, headers = [], ["points against the first row"]
    for dataset, label in DATASETS.items():
        for name in ("clustr_qtrades", "clustr_qtrades+paper_code"):
            for found in seeds(dataset, name, "quirks"):
                columns.append(found)
                headers.append(f"{LABELS[name]}, {label} ({found['protocol']})")
                assert found["seed"] == 0
    rows = []
    for i, (off, what) in enumerate(_QUIRKS.items()):
        assert all(c["rows"][i]["off"] == off for c in columns)
        rows.append(
            [what, *(f"{percent(c['rows'][i]['robust'])} ({c['rows'][i]['points']:+.1f})" for c in columns)]
        )
    for kind in ("hinged", "unhinged"):
        what = f"adaptive attack: PGD on the Magnet loss, {kind}"
        rows.append([what, *(percent(c["adaptive"][kind]) for c in columns)])
    return markdown(headers, rows)


def _setting(key: str, value) -> str:
    """As one would write it; of a run to start from its name."""
    if key == "init_from":
        return f"from {value.split('/')[-2]}"
    return f"{key}={value:g}" if isinstance(value, int | float) else f"{key}={value}".replace(" ", "")


def _shown(settings: dict) -> str:
    """The settings but those that say nothing: no warm-up where a run starts from another, the usual ramp."""
    hidden = {f"{stage}.eps_ramp" for stage in ("warmup", "train")}
    for stage in ("warmup", "train"):
        epochs, ramp = settings.get(f"{stage}.epochs", 0), settings.get(f"{stage}.eps_ramp")
        if epochs and ramp is not None and abs(ramp - RAMP * epochs) > 1e-9:
            hidden.discard(f"{stage}.eps_ramp")
    if "init_from" in settings and settings.get("warmup.epochs") == 0:
        hidden.add("warmup.epochs")
    return ", ".join(_setting(key, value) for key, value in settings.items() if key not in hidden)


RAMP = 0.4  # of a stage's epochs: how long the radius of training grows, where a table of search is silent


def search(dataset: str) -> str:
    """TRADES and clustr_trades on held-out images."""
    rows = []
    paths = (RESULTS / "search" / dataset).glob("*.json")
    for path in sorted(paths, key=lambda path: (path.stem.split("-")[0], int(path.stem.split("-")[1]))):
        found = json.loads(path.read_text())
        rows.append([path.stem, _shown(found["settings"]), percent(found["clean"]), figure(found)])
    return markdown(["held out", "settings", "clean", "robust (quick-1)"], rows)


def paired() -> str:
    """clustr_trades minus TRADES, image by image."""
    rows = []
    pairs = [(name, dataset) for name in ("clustr_trades", "clustr_trades+kmeans") for dataset in DATASETS]
    for name, dataset in pairs:
        runs, ids = [], None
        for folder in sorted((RESULTS / "campaign" / dataset).glob(f"{name}-[0-9]")):
            other = folder.with_name(f"trades-{folder.name[-1]}")
            if not (other / "sound.npz").exists() or not (folder / "sound.npz").exists():
                continue
            ours, theirs = (np.load(f / "sound.npz") for f in (folder, other))
            ids = ours["ids"] if ids is None else ids
            assert np.array_equal(ours["ids"], ids) and np.array_equal(theirs["ids"], ids)
            runs.append((ours["robust"], theirs["robust"]))
        if not runs:
            continue
        mean, low, high = intervals.over_seeds(*zip(*runs, strict=True))
        differences = [np.mean(a.astype(float) - b.astype(float)) for a, b in runs]
        ours, theirs = (np.mean(spent(dataset, method)) for method in (name, "trades"))
        rows.append(
            [
                f"{LABELS[name]}, {DATASETS[dataset]}",
                ", ".join(f"{100 * d:+.1f}" for d in differences),
                f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
                str(len(ids)), f"{ours / theirs:.2f}",
            ]
        )  # fmt: skip
    header = [
        "minus TRADES, points",
        "by seed",
        "all, with 95 % interval",
        "images",
        "passes / passes",
    ]
    return markdown(header, rows)


def warm_start() -> str:
    """Magnet from scratch and with a nominal warm-up of half the passes: epochs to a held-out accuracy."""
    rows = []
    for dataset, label in DATASETS.items():
        for scratch, warm in zip(
            seeds(dataset, "magnet", "training"), seeds(dataset, "clustr+half", "training"), strict=False
        ):
            assert scratch["seed"] == warm["seed"]
            curves = [
                [value for stage in sorted(run["stages"]) for value in run["stages"][stage]["val_accuracy"]]
                for run in (scratch, warm)
            ]
            first = warm["stages"]["1_warmup"]["epochs"]
            best = max(curves[0])
            cells = []
            for share in (0.9, 1.0):
                for curve, start in zip(curves, (0, first), strict=True):
                    reached = [i + 1 for i, value in enumerate(curve) if i >= start and value >= share * best]
                    cells.append(str(reached[0]) if reached else "never")
            ends = (f"{percent(curve[-1])}" for curve in curves)
            rows.append([f"{label}, seed {scratch['seed']}", percent(best), *cells, str(first), *ends])
    header = [
        "epochs until", "best of Magnet, %", "90 % of it: Magnet", "ClusTR", "all of it: Magnet", "ClusTR",
        "warm-up in these", "at the end, %: Magnet", "ClusTR",
    ]  # fmt: skip
    return markdown(header, rows)


def fullsize() -> str:
    """The paper's own size: passes and estimated hours of each method, for each data set."""
    found = json.loads((RESULTS / "fullsize.json").read_text())
    rows = {}
    for row in found["rows"]:
        assert row["command"] == f"python run.py --config=configs/{row['dataset']}.py:{row['method']}"
        cells = rows.setdefault(row["method"], {})
        cells[row["dataset"]] = f"{row['gradient_passes'] / 1e6:.1f} ({row['gpu_hours']:.1f} h)"
    names = list(dict.fromkeys(row["dataset"] for row in found["rows"]))
    table = [[f"`{method}`", *(cells[name] for name in names)] for method, cells in rows.items()]
    return markdown(["millions of passes (hours)", *(f"`{name}`" for name in names)], table)
