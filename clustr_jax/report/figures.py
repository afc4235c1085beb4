"""The figures of a report, each from values that are in the results; None where there are none."""

import numpy as np

from clustr_jax.evaluation import intervals
from clustr_jax.reference import claims
from clustr_jax.report.record import Record
from clustr_jax.report.svg import DASHES, MARKERS, SERIES, Drawing, attempt, draw
from clustr_jax.runtime.stage_names import TRAIN, WARMUP

_HALF = 20  # letters of a name that leave room for another beside it
# Of metrics.jsonl: field -> what the legend calls it.
_ACCURACIES = {
    "accuracy": "training images",
    "val_accuracy": "held-out images",
    "adversarial_accuracy": "training adversary",
    "single_step_accuracy": "held out, one step",
    "multi_step_accuracy": "held out, many steps",
    "certified": "certified",
    "paper_accuracy": "held out, paper's protocol",
    "quick_accuracy": "held out, quick attacks",
}
_LOSSES = {
    "loss": "loss",
    "magnet": "Magnet",
    "natural": "cross entropy",
    "consistency": "consistency",
}
# Losses whose largest is so many times the smallest are drawn on a logarithmic axis.
_WIDE = 20
_STAGES = {WARMUP: "Warm-up", TRAIN: "Stage 2"}


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _list(points, unit="") -> str:
    """ "1: 11.7 %, 2: 8.9 %"."""
    return ", ".join(f"{x:.4g}{unit}: {_percent(y)}" for x, y in points)


def _errors(values, n):
    """[2, len] distances to the ends of the Wilson intervals, in percent."""
    ends = np.array([intervals.wilson(round(v * n), n) for v in values])
    return np.maximum(100 * np.abs(ends - np.asarray(values)[:, None]).T, 0)


def _line(axes, i, points, label, n=None, **more):
    """One series: its own colour, marker and dash; intervals where `n` is given."""
    x, y = np.array(points, float).T
    style = dict(color=SERIES[i % 10], marker=MARKERS[i % 10], linestyle=DASHES[i % 6], label=label) | more
    if n is None:
        axes.plot(x, 100 * y, **style)
    else:
        axes.errorbar(x, 100 * y, yerr=_errors(y, n), capsize=2.5, elinewidth=0.9, **style)


def _accuracy_axes(axes, xlabel, legend=True):
    axes.set(xlabel=xlabel, ylabel="accuracy in %", ylim=(-3, 103))
    if legend:
        _legend(axes.figure)


def _legend(figure):
    """Below the axes, in two columns where its words have room for that."""
    names = [text for axes in figure.axes for text in axes.get_legend_handles_labels()[1]]
    longest = max(map(len, names), default=0)
    figure.legend(loc="outside lower center", ncols=2 if longest <= _HALF else 1)


def over_eps(record: Record) -> Drawing | None:
    """Accuracy over the radius: sound, by the paper's protocol, and as the paper reports it."""
    sound, claimed = record.results.get("sound"), record.results.get("paper")
    series = []
    if sound and sound["curves"].get("eps"):
        series.append((f"sound ({sound['protocol']})", sound["curves"]["eps"], sound["n"]))
    if claimed and claimed["sweep"]:
        for name, value in claimed["attacks"].items():
            points = {0.0: claimed["clean"], claimed["eps"]: value}
            points |= {float(e): at[name] for e, at in claimed["sweep"].items() if name in at}
            series.append((f"{name} ({claimed['protocol']})", sorted(points.items()), claimed["n"]))
    if not series:
        return None
    dataset, method = record.data, record.config["method"]
    radii = sorted({e for _, points, _ in series for e, _ in points})
    shown = _interesting(series, radii)
    said = [(e, claims.claim(dataset, method, "pgd100", e)) for e in radii if e]
    said = [(e, v) for e, v in said if v is not None]

    def paint(figure):
        axes = figure.add_subplot()
        for i, (label, points, n) in enumerate(series):
            _line(axes, i, [(e, v) for e, v in points if e <= shown], label, n)
        if said:
            _line(axes, 3, said, "the paper's PGD^100", linestyle="none", markerfacecolor="none")
        _accuracy_axes(axes, "eps, largest change of a pixel (linf)")

    alt = "; ".join(f"{label}, by eps: {_list(points)}" for label, points, _ in series)
    alt += f"; the paper reports: {_list(said)}" if said else ""
    caption = "Bars are 95 % intervals."
    if sound and sound["sweep"]:
        caption += (
            f" Sound: all attacks at {intervals.radius(sound['eps'])}; below it APGD on the margin alone, "
            f"above it what that leaves of what they left."
        )
    if shown < radii[-1]:
        caption += f" Radii beyond {intervals.radius(shown)} are in the table: nothing is left there."
    return draw("eps", "Accuracy over the radius", caption, alt, paint, 3.4)


def _interesting(series, radii):
    """The radius from which on no series has anything left, or the largest one."""
    for e in radii:
        if all(v == 0 for _, points, _ in series for at, v in points if at >= e):
            return e
    return radii[-1]


def over_budget(record: Record, what: str) -> Drawing | None:
    """Accuracy over "restarts" or "steps" of the two plain PGD attacks of the sound protocol."""
    sound = record.results.get("sound")
    if not sound:
        return None
    found = {name: c[what] for name, c in sound["curves"].items() if what in c}
    if not found or max(map(len, found.values())) < 2:
        return None
    names = {"ce": "PGD on the cross entropy", "margin": "PGD on the margin"}

    def paint(figure):
        axes = figure.add_subplot()
        for i, (name, points) in enumerate(found.items()):
            _line(axes, i, points, names.get(name, name), sound["n"] if what == "restarts" else None)
        _accuracy_axes(axes, what if what == "restarts" else "steps of the first restart")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if what == "restarts":  # what is left is often little
            highest = max(
                intervals.wilson(round(v * sound["n"]), sound["n"])[1] for p in found.values() for _, v in p
            )
            axes.set_ylim(-4 * highest, min(103, 110 * highest))

    alt = "; ".join(f"{names.get(name, name)}, after so many: {_list(p)}" for name, p in found.items())
    caption = {
        "restarts": "Where a line still falls at its right end, more restarts would find more. "
        "Bars are 95 % intervals.",
        "steps": "Where a line still falls at its right end, more steps would find more.",
    }[what]
    return draw(what, f"Accuracy over {what}", caption, alt, paint)


def attacks(record: Record) -> Drawing | None:
    """Each attack's own accuracy, the strongest at the top, and the worst case of all together."""
    sound = record.results.get("sound")
    if not sound or not sound["attacks"]:
        return None
    order = sorted(sound["attacks"].items(), key=lambda item: item[1]["robust"])
    values = [attack["robust"] for _, attack in order]

    def paint(figure):
        axes = figure.add_subplot()
        places = np.arange(len(order))
        axes.errorbar(
            np.multiply(100, values),
            places,
            xerr=_errors(values, sound["n"]),
            fmt="o",
            color=SERIES[0],
            capsize=2.5,
            elinewidth=1.2,
            label="this attack alone",
        )
        axes.axvline(100 * sound["robust"], color=SERIES[1], linestyle=DASHES[1], label="all together")
        axes.set(xlabel="accuracy in %", ylim=(len(order) - 0.4, -0.6))
        most = max(intervals.wilson(round(v * sound["n"]), sound["n"])[1] for v in values)
        axes.set_xlim(-3 * most, 104 * most)
        axes.set_yticks(places, [_short(name) for name, _ in order])
        axes.grid(axis="y", visible=False)
        _legend(figure)

    alt = ", ".join(f"{name} {_percent(v)}" for (name, _), v in zip(order, values, strict=True))
    return draw(
        "attacks",
        "Each attack alone",
        "Lower is stronger. Bars are 95 % intervals.",
        f"Accuracy under each attack of {sound['protocol']}: {alt}; all together "
        f"{_percent(sound['robust'])}.",
        paint,
        1.1 + 0.23 * len(order),
    )


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]


def certified(record: Record) -> Drawing | None:
    """Certified accuracy over the l2 radius, by each sound rule, and what l2-PGD left."""
    from matplotlib.ticker import MaxNLocator

    result = record.results.get("certified")
    if not result:
        return None
    radii, empirical = record.outcomes("certified"), result["empirical"]
    rules = {r: np.sort(radii[f"radius_{r}"]) for r in result["rules"] if r not in result["unsound_rules"]}
    left = [(0.0, empirical["clean"])] + [(float(e), v["robust"]) for e, v in empirical["at"].items()]
    end = 1.05 * max([*(float(r[-1]) for r in rules.values()), *(e for e, _ in left)]) or 1.0

    def paint(figure):
        axes = figure.add_subplot()
        for i, (rule, ends) in enumerate(rules.items()):
            at = np.concatenate([[0.0], ends, [end]])
            kept = np.array([np.mean(ends > r) for r in at])
            axes.step(
                at, 100 * kept, where="post", color=SERIES[i], linestyle=DASHES[i], label=f"certified, {rule}"
            )
        if empirical["at"]:
            _line(axes, 3, left, "left by l2-PGD", empirical["n"], linestyle="none")
        _accuracy_axes(axes, "l2 radius, pixels in [0, 1]")
        axes.set_xlim(0, end)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")

    table = _list((float(e), v) for e, v in result["sweep"].items())
    alt = (
        f"Certified by {result['rule']} at clean accuracy {_percent(result['clean'])}, by l2 radius: {table}"
    )
    alt += f"; half of the images are certified up to {result['median_radius']:.3g}"
    if empirical["at"]:
        alt += f"; l2-PGD leaves, by radius: {_list(left)}"
    caption = "Below the lines nothing can change the prediction; above the markers something did."
    return draw(
        "certified",
        "Certified accuracy",
        caption if empirical["at"] else caption.split(";")[0] + ".",
        alt + ".",
        paint,
        3.3,
    )


def training(record: Record) -> list[Drawing]:
    """Accuracies and losses of each stage over its epochs."""
    found = []
    for stage in dict.fromkeys(r["stage"] for r in record.metrics):
        lines = [r for r in record.metrics if r["stage"] == stage]
        for kind, fields in (("accuracy", _ACCURACIES), ("loss", _LOSSES)):
            name, title = f"training-{stage}-{kind}", f"{_STAGES.get(stage, stage)}: {kind}"
            drawing = attempt(name, title, _history, stage, lines, kind, fields)
            found += [drawing] if drawing else []
    return found


def _history(stage, lines, kind, fields):
    series = {
        label: [(r["epoch"], r[field]) for r in lines if r.get(field) is not None]
        for field, label in fields.items()
    }
    series = {label: points for label, points in series.items() if points}
    if not series:
        return None
    scale, values = 100 if kind == "accuracy" else 1, [y for p in series.values() for _, y in p]

    def paint(figure):
        axes = figure.add_subplot()
        for i, (label, points) in enumerate(series.items()):
            x, y = np.array(points, float).T
            axes.plot(
                x,
                scale * y,
                color=SERIES[i % 10],
                linestyle=DASHES[i % 6],
                marker=MARKERS[i % 10],
                label=label,
                markevery=max(len(x) // 8, 1),
                markersize=4,
            )
        updates = lines[0]["step"] // lines[0]["epoch"]
        axes.set(
            xlabel=f"epoch ({updates} updates each)",
            ylabel="accuracy in %" if kind == "accuracy" else "loss, in nats",
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(lines) == 1:
            axes.set_xlim(lines[0]["epoch"] - 1, lines[0]["epoch"] + 1)
        if kind == "accuracy":
            axes.set_ylim(-3, 103)
        elif min(values) > 0 and max(values) > _WIDE * min(values):
            axes.set_yscale("log")
        _legend(figure)

    def ends(points):
        (_, a), (_, b) = points[0], points[-1]
        return f"{_percent(a)} to {_percent(b)}" if kind == "accuracy" else f"{a:.3g} to {b:.3g}"

    epochs = f"epoch {lines[0]['epoch']} to {lines[-1]['epoch']}"
    alt = f"From {epochs}: " + "; ".join(f"{label} {ends(points)}" for label, points in series.items()) + "."
    title = f"{_STAGES[stage]}: {kind}"
    return draw(f"training-{stage}-{kind}", title, "", alt, paint, 3.4)


def compared(records: list[Record], names: list[str]) -> Drawing | None:
    """The sound curves over eps of several directories."""
    found = [
        (name, r.results["sound"]["curves"]["eps"], r.results["sound"]["n"])
        for name, r in zip(names, records, strict=True)
        if r.results.get("sound", {"curves": {}})["curves"].get("eps")
    ]
    if not found:
        return None

    def paint(figure):
        axes = figure.add_subplot()
        for i, (name, points, n) in enumerate(found):
            label = _short(name, 40)
            _line(axes, i, points, f" {label}" if label[:1] == "_" else label, n)  # matplotlib hides _labels
        _accuracy_axes(axes, "eps, largest change of a pixel (linf)", legend=False)
        figure.legend(loc="outside lower center", ncols=1)

    alt = "; ".join(f"{name}, by eps: {_list(points)}" for name, points, _ in found)
    caption = (
        "All attacks at a run's main radius; below it APGD on the margin alone, above it what that leaves of "
        "what they left. Bars are 95 % intervals."
    )
    return draw("eps", "Accuracy over the radius", caption, alt, paint, 3.0 + 0.2 * len(found))
