"""The tables of benchmarks/: pure functions of the JSONs under results/benchmarks."""

import json
import re

from result_tables import RESULTS, markdown


def read(path: str) -> dict:
    """A JSON under results/."""
    return json.loads((RESULTS / path).read_text())


def steps() -> str:
    """Step against bare passes, network by network."""
    rows = []
    for name in ("steps", "steps-fast", "steps-resnet18"):
        measured = read(f"benchmarks/{name}.json")
        for row in measured["rows"]:
            gradients = {
                kind: sum(n for what, n in row["passes"].items() if what.startswith(kind))
                for kind in ("forward", "input", "parameter", "both")
            }
            assert sum(gradients.values()) == sum(row["passes"].values())
            rows.append(
                [
                    f"{measured['model']} {row['method']}",
                    str(row["batch"]),
                    ", ".join(f"{n} {kind}" for kind, n in gradients.items() if n),
                    f"{row['ratio']:.2f}",
                    f"{100 * row['rest']:.1f} %",
                    measured["versions"]["jaxlib"],
                ]
            )
    return markdown(
        ["network, method", "batch", "bare passes", "step / passes", "all but the network", "jaxlib"], rows
    )


def network(measured: dict) -> str:
    """The network of benchmarks/epoch.py; width 0 is ResNet-18's usual one."""
    return f"{measured['model']}, width {measured['width'] or 64}"


NETWORKS = ("epoch-fast-64", *(f"epoch-resnet8-{width}" for width in (64, 32, 16)), "epoch-resnet18-64")


def epochs() -> str:
    """An epoch of ClusTR+QTRADES and its parts against PyTorch."""
    rows = []
    for name in NETWORKS:
        measured = read(f"benchmarks/{name}.json")
        ratios = [f"{measured['rows'][what]['ratio']:.2f}" for what in ("epoch", "gradient", "batch")]
        label = f"{network(measured)}, {measured['n']} images"
        rows.append([label, *ratios, str(measured["workers"]), measured["versions"]["jaxlib"]])
    header = [
        "PyTorch's time / ours",
        "whole epoch",
        "parameter gradient alone",
        "drawing a batch alone",
        "PyTorch's best number of workers",
        "jaxlib",
    ]
    return markdown(header, rows)


def tuned() -> str:
    """A step of training by its own forms against one by those of evaluation."""
    rows = []
    for row in read("benchmarks/tuned.json")["rows"]:
        plain, other = row["plain"], row["tuned"]
        ratios = (other[what] / plain[what] for what in ("temporary_bytes", "compile_cpu_seconds"))
        rows.append(
            [
                f"{row['network'].replace('-', ', width ')}, batch {row['batch']}",
                f"{row['cpu_seconds_ratio']:.2f}",
                *(f"{ratio:.2f}" for ratio in ratios),
            ]
        )
    header = ["one step", "plain / training's forms: processor's time"]
    header += [f"training's / plain: {what}" for what in ("temporaries", "compilation")]
    return markdown(header, rows)


def work() -> str:
    """Milliseconds of a device in a training step, by kind of work: before and with training's forms."""
    quiet = ("fast-64", "resnet8-64")  # other processes ran while the others were profiled
    measured = [row for row in read("benchmarks/tuned.json")["rows"] if row["network"] in quiet]
    kinds = list(dict.fromkeys(kind for row in measured for kind in row["plain"]["ms_by_kind"]))
    rows = []
    for kind in kinds:
        cells = ([row[form]["ms_by_kind"].get(kind, 0) for form in ("plain", "tuned")] for row in measured)
        rows.append([kind, *(f"{before:,.0f}, {after:,.0f}" for before, after in cells)])
    names = [row["network"].replace("-", ", width ") for row in measured]
    return markdown(["ms of a device: plain, training's forms", *names], rows)


def kmeans() -> str:
    """k-means++ against scikit-learn."""
    rows = []
    for name in ("kmeans-10x2", "kmeans-100x2"):
        measured = read(f"benchmarks/{name}.json")
        points, size = measured["points"]
        rows.append(
            [
                f"{points} x {size}, {measured['classes']} x {measured['k']} clusters",
                f"{measured['speedup']:.1f}",
                f"{measured['inertia_ratio_max']:.5f}",
            ]
        )
    return markdown(["", "scikit-learn's time / ours", "our inertia / scikit-learn's, at most"], rows)


def startup() -> str:
    """Time to the first record, empty and full cache."""
    measured = read("benchmarks/startup.json")
    rows = [
        [
            label,
            f"{row['first_record_seconds']:.1f}",
            f"{row['trained_seconds']:.1f}",
            f"{row['programs_seconds']:.1f}",
            f"{row['new_in_cache']:.0f}",
        ]
        for label, row in (("empty cache", measured["empty"]), ("full cache", measured["full_median"]))
    ]
    header = ["digits", "first epoch, s", "trained, s", "getting programs, s", "programs new to the cache"]
    return markdown(header, rows)


def refits() -> str:
    """What clustering between epochs takes, against a forward pass of the set and against an epoch."""
    measured = read("benchmarks/refit.json")
    name = f"{network(measured)}, {measured['size']} images"
    row = [name, *(f"{measured[k]:.2f}" for k in ("embedding_of_forward", "refit_of_forward"))]
    row += [f"{100 * measured[k]:.2f} %" for k in ("kmeans_of_epoch", "refit_of_epoch")]
    header = [
        "", "embedding / forward pass", "refit / forward pass", "k-means, of an epoch", "refit, of an epoch",
    ]  # fmt: skip
    return markdown(header, [row])


def attack_speed() -> str:
    """Seconds and evaluations of PyTorch's libraries as multiples of ours, on two networks."""
    measured = read("benchmarks/attacks-speed.json")
    robust, nominal = measured["robust_speed"], measured["nominal_speed"]
    rows = [
        [
            a["library"],
            *(f"{v:.2f}" for r in (a, b) for v in (r["times_ours"], 1 / r["ours_share_of_evaluations"])),
        ]
        for a, b in zip(robust[1:], nominal[1:], strict=True)
    ]
    left = [f"{100 * part[0]['robust']:.1f} %" for part in (robust, nominal)]
    header = [
        "", f"seconds, {left[0]} left", "evaluations", f"seconds, {left[1]} left", "evaluations",
    ]  # fmt: skip
    return markdown(header, rows)


def sound_again() -> str:
    """The same evaluation of the same weights, when the campaign was run and now."""
    first, now = read("campaign/cifar10/trades-0/sound.json"), read("benchmarks/sound-again.json")
    rows = []
    for name in (*first["attacks"], ""):
        a, b = (found["attacks"][name] if name else found for found in (first, now))
        spent = [
            (r["gradient_evaluations"] + r["forward_evaluations"]) / 1e3 if name else None for r in (a, b)
        ]
        rows.append(
            [name or "all"]
            + [f"{100 * r['robust']:.2f}" for r in (a, b)]
            + ["" if v is None else f"{v:.1f}" for v in spent]
            + [f"{r['wall_seconds']:.0f}" for r in (a, b)]
        )
    versions = [f"jaxlib {found['versions']['jaxlib']}" for found in (first, now)]
    header = ["", *(f"{what}, {v}" for what in ("robust, %", "thousand evaluations", "s") for v in versions)]
    return markdown(header, rows)


def growth() -> str:
    """Exponents of time, and memory."""
    rows = []
    for row in read("benchmarks/growth.json")["rows"]:
        memory = ", ".join(f"{found['peak_bytes'] / 1e6:.0f}" for found in row["measured"])
        values = ", ".join(map(str, row["values"]))
        rows.append([row["series"], values, f"{row['exponent']:.2f}", memory])
    return markdown(["what grows", "values", "exponent of time", "peak memory, MB"], rows)


def certificates() -> str:
    """Radii per second."""
    rows = {}
    for row in read("benchmarks/certificates.json")["rows"]:
        cells = rows.setdefault(f"{row['classes']} x {row['k']}", {})
        cells[row["rule"]] = f"{row['per_second'] / 1000:,.0f}"
    rules = ("hard", "soft", "any_d", "paper")
    table = [[label, *(cells[rule] for rule in rules)] for label, cells in rows.items()]
    return markdown(["thousands of radii a second, by rule", *(f"`{rule}`" for rule in rules)], table)


def sound3() -> str:
    """`sound-3` against AutoAttack's standard: what each leaves, image by image, and gradients per image."""
    rows = []
    for name in ("trades-0", "clustr_qtrades"):
        found = read(f"benchmarks/sound3-{name}.json")
        own, standard, theirs = found["sound_3"], found["autoattack"], found["theirs"]
        right = round(found["clean"] * found["n"])
        in_the_ball = own["in_the_ball"]["gradient_evaluations"]
        rows.append(
            [
                name,
                f"{100 * found['clean']:.1f}",
                f"{100 * own['robust']:.1f}, {100 * standard['robust']:.1f}",
                f"{len(found['only_sound_3_broke'])}, {len(found['only_autoattack_broke'])}",
                f"{len(theirs['only_ours_broke'])}, {len(theirs['only_theirs_broke'])} of {theirs['n']}",
                f"{in_the_ball / right:.0f} + {(own['gradient_evaluations'] - in_the_ball) / right:.0f}",
                f"{standard['gradient_evaluations'] / right:.0f}",
                f"{theirs['passes']['with_gradient'] / theirs['right']:.0f}",
                f"{own['seconds']:.0f}, {standard['seconds']:.0f}",
            ]
        )
    header = [
        "network",
        "clean",
        "left by `sound-3`, by the standard",
        "broken by one, by the other alone",
        "the same against pyautoattack",
        "gradients per image: `sound-3`, + distances",
        "the standard",
        "pyautoattack",
        "seconds: `sound-3`, the standard",
    ]
    return markdown(header, rows)


def devices() -> str:
    """Accuracies on eight devices and on one."""
    rows = []
    for row in read("benchmarks/devices.json")["rows"]:
        low, high = row["prediction_interval"]
        eight, one, stage_2 = (
            ", ".join(f"{100 * value:.2f}" for value in row[key])
            for key in ("eight_devices", "one_device", "stage_2_on_eight_devices")
        )
        equal = 100 * min(row["equal_outcomes"].values())
        rows.append(
            [
                row["set"], one, f"{100 * low:.1f} to {100 * high:.1f}", eight,
                f"{sum(row['inside_prediction_interval'])} of {len(row['eight_devices'])}",
                f"{row['p_of_equal_means']:.2f}", stage_2,
                f"{equal:.2f} % of {row['n']}", f"{100 * row['robust']:.1f} %",
            ]
        )  # fmt: skip
    header = [
        "clean accuracy, %", "1 device, by seed", "where one more seed lies (95 %)", "8 devices, by seed",
        "inside", "p of equal means (Welch)", "stage 2 alone on 8", "equal attack outcomes", "withstand",
    ]  # fmt: skip
    return markdown(header, rows)


def warmups() -> str:
    """Warm-ups of the same seeds on one device and on eight."""
    rows = []
    for row in read("benchmarks/warmups.json")["rows"]:
        one, eight = (
            f"{100 * sum(row[key]) / row['seeds']:.2f} ± {100 * spread:.2f}"
            for key, spread in zip(("one_device", "eight_devices"), row["spread"], strict=True)
        )
        tests = row["p_of_equal_variances"]
        drift = [f"{found['apart'][-1]:.0e}" for found in row["drift"]] or ["", ""]
        rows.append(
            [
                f"{row['set']}, {row['seeds']} seeds", one, eight,
                *(f"{tests[name]:.2f}" for name in ("F", "Levene", "Pitman-Morgan")),
                f"{row['correlation']:.2f}", *drift,
            ]
        )  # fmt: skip
    header = [
        "accuracy after the warm-up, %", "1 device", "8 devices", "p of equal spread: F", "Levene",
        "Pitman-Morgan", "correlation", "weights apart, float32", "float64",
    ]  # fmt: skip
    return markdown(header, rows)


def heaviest() -> str:
    """The operations of a training step that take longest, in training's forms, network by network."""
    rows = []
    for row in read("benchmarks/tuned.json")["rows"]:
        for one in row["tuned"]["largest"][:3]:
            where = [part for part in one["where"].split("/") if re.match(r"(conv|Conv|Block)_\d", part)]
            adversary = " of the adversary" if "pgd_restart" in one["where"] else ""
            what = one["what"].rstrip("s") + adversary
            rows.append(
                [
                    row["network"],
                    " ".join(where),
                    what,
                    f"{one['ms']:.0f}",
                    f"{100 * one['ms'] / sum(row['tuned']['ms_by_kind'].values()):.0f} %",
                    f"{one['bytes'] / 1e6:.1f}",
                ]
            )
    header = ["network", "layer", "operation", "ms of a device", "of the step", "MB written"]
    return markdown(header, rows)


TABLES = {
    f.__name__: f
    for f in (
        steps, epochs, tuned, work, heaviest, kmeans, startup, refits, attack_speed, sound_again, growth,
        certificates, devices, warmups, sound3,
    )
}  # fmt: skip
