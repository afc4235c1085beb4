"""Work directories made by hand, file by file, so that every number on a page of theirs is known."""

import importlib
import json
import pathlib

import numpy as np
import pytest

from clustr_jax import report
from clustr_jax.evaluation import intervals
from clustr_jax.report import looks, page
from clustr_jax.report.looks import Victim
from clustr_jax.runtime import provenance
from clustr_jax.storage import results, workdir

N, EPS = 40, 0.2
ALL = ("clean", "paper", "sound", "certified", "diagnostics")
LABELS = np.arange(N) % 10
HEADER = {"dataset": "digits", "subset": "", "n": N, "method": "clustr_qtrades", "eps": EPS, "clean": 0.95}
FOOTER = {"head": "clusters", "nearest": 0, "seed": 0, "versions": provenance.versions(), "wall_seconds": 1.5}


def survivors(count):
    return np.arange(N) < count


ATTACK = {"unique_kills": 0, "gradient_evaluations": 1200, "forward_evaluations": 0, "wall_seconds": 0.5}
CURVES = {
    "ce": {"restarts": [[1, 0.5], [2, 0.3]], "steps": [[0, 0.9], [20, 0.5]]},
    "margin": {"restarts": [[1, 0.5], [2, 0.35]], "steps": [[0, 0.9], [20, 0.5]]},
    "eps": [[0.0, 0.95], [0.1, 0.6], [EPS, 0.15], [0.3, 0.0], [1.0, 0.0]],
}
OWN = {
    "clean": {"eps": 0.0, "robust": 0.95, "attacks": {}, "predicted": [0.1] * 10, "labelled": [0.1] * 10},
    "paper": {
        "robust": 0.2, "attacks": {"pgd20": 0.25, "pgd100": 0.2},
        "sweep": {"0.100000": {"pgd20": 0.7, "pgd100": 0.65}}, "successes_lost_by_max_loss_rule": 3,
    },
    "sound": {
        "robust": 0.15, "curves": CURVES,
        "attacks": {
            "ce": {**ATTACK, "robust": 0.3}, "apgd-t": {**ATTACK, "robust": 0.175, "unique_kills": 4},
        },
        "sweep": {"0.100000": {"robust": 0.6}, "0.300000": {"robust": 0.0}, "1.000000": {"robust": 0.0}},
    },
    "certified": {
        "robust": 0.425, "eps": 0.5, "rule": "any_d", "norm": "l2", "unsound_rules": ["paper"],
        "median_radius": 0.1, "lipschitz": {"lower": 1.25, "upper": 2.5},
        "sweep": {"0.500000": 0.425, "1.000000": 0.05},
        "rules": {rule: {"0.500000": 0.425, "1.000000": 0.05} for rule in ("any_d", "hard", "paper")},
        "empirical": {"n": N, "clean": 0.95, "at": {"0.500000": {"robust": 0.8, "certified": 0.425}}},
    },
    "diagnostics": {
        "verdict": "robust accuracy 15.00 [7.1, 29.1] % at eps 0.2 (no check failed)", "failed": [],
        "words": "Partly robust: fewer than half. The measurement found no reason to distrust itself.",
        "masking_gap": 0.05,
        "checks": [
            dict(zip(("number", "name", "status", "value", "limit", "note"), check, strict=True))
            for check in (
                (1, "inside the ball", "PASS", 0.0, "<= 1e-6", ""),
                (9, "the last restarts gain", "WARN", 0.0111, "<= 0.5 points", "few"),
                (18, "certified", "SKIP", None, "", "no certificate"),
            )
        ],
    },
}  # fmt: skip


def result(name, **changes):
    """(a result, its outcomes): 6 of 40 images survive everything, 8 the paper's protocol."""
    arrays = {"clean": survivors(38), "y": LABELS, "ids": np.arange(N, dtype=np.int32)}
    if name == "sound":
        arrays |= {"broken_by": np.where(survivors(6), "", "ce"), "robust": survivors(6)}
    if name == "certified":
        radii = np.linspace(0, 1.1, N).astype(np.float32)
        arrays |= {f"radius_{rule}": radii for rule in OWN[name]["rules"]}
    own = json.loads(json.dumps(OWN[name]))  # callers may change it
    content = {**HEADER, "protocol": results.PROTOCOLS[name], **own, **FOOTER, "config_sha": name, **changes}
    return content, arrays


def shown(value):
    """The fraction of N images as the page writes it."""
    low, high = intervals.wilson(round(value * N), N)
    return f"{100 * value:.2f} [{100 * low:.1f}, {100 * high:.1f}]"


def make(root, names=ALL, method="clustr_qtrades", dataset="digits", changes=None, **config):
    """A work directory with these results."""
    settings = importlib.import_module("configs.digits").get_config(method)
    settings.data.name = dataset
    with settings.unlocked():
        settings.update(config)
    content = workdir.config_dict(settings)
    (root / "2_train").mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(content))
    environment = {"commands": ["python run.py --config=a"], "commit": "abc1234", "python": "3.11.7"}
    (root / "environment.json").write_text(json.dumps(environment))
    lines = [
        {"stage": stage, "epoch": e, "step": 10 * e, "loss": 1 / e, "accuracy": 0.9, "val_accuracy": 0.8}
        for stage in ("1_warmup", "2_train")
        for e in (1, 2, 3)
    ]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = {
        "reason": "all epochs",
        "epochs": 3,
        "step": 30,
        "num_classes": 10,
        "input_shape": [8, 8, 1],
    }
    (root / "2_train" / "done.json").write_text(json.dumps(done))
    made = {}
    for name in names:
        content, arrays = result(name, **(changes or {}).get(name, {}))
        if name == "diagnostics":
            sources = (made.get(source) for source in ("sound", "paper", "certified"))
            content = {"config_sha": results.diagnosis_sha(*sources), **(changes or {}).get(name, {})} | {
                k: v for k, v in content.items() if k != "config_sha"
            }
        results.save(root / "results", name, content, arrays)
        made[name] = content
    return root


def planes():
    rng = np.random.default_rng(0)

    def one(stage, what):
        z, centroids = rng.standard_normal((60, 5)), rng.standard_normal((20, 5))
        return looks.plane(stage, z, np.arange(60) % 10, centroids, np.arange(20) // 2, what, True)

    return [one("1_warmup", "k-means++"), one("2_train", "the clusters")]


def victims(channels=1, own=1.0):
    x = np.full((8, 8, channels), 0.5, np.float32)
    return [
        Victim(7, 3, 3, 5, x, x + 0.2, 0.2, 1.6, (own, 2.0), (3.0, 1.5)),
        Victim(2, 2, 2, 2, x, x - 0.1, 0.1, 0.8, (own, 1.2), (3.0, 2.5)),
    ]


@pytest.fixture(scope="module", name="full")
def full_report(tmp_path_factory):
    """(record, report) of a directory with everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(pathlib.Path(__file__).parents[1])
        record = report.read(make(tmp_path_factory.mktemp("full") / "run"))
    return record, page.report(record, page.Looks(planes(), victims(), 1234, (100, 10, 40)))
