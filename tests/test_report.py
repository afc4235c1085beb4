"""The report: what it says of results made by hand, its HTML, and its pages in a real browser.

The work directories are written file by file, so that every number on the page is known; networks that
were trained come last, and are slow.
"""

import contextlib
import dataclasses
import html.parser
import importlib
import io
import json
import pathlib
import re
import shutil
import xml.etree.ElementTree as ET

import jax
import numpy as np
import pytest

import browser
from clustr_jax import report
from clustr_jax.evaluation import intervals
from clustr_jax.reference import claims
from clustr_jax.report import __main__ as command
from clustr_jax.report import compare, figures, looks, page, pictures, svg, terminal, words
from clustr_jax.report.looks import Victim
from clustr_jax.runtime import provenance
from clustr_jax.runtime.errors import UserError
from clustr_jax.storage import results, workdir
from marks import in_ci
from runs import DIGITS, TOY, read

N, EPS = 40, 0.2
ALL = ("clean", "paper", "sound", "certified", "diagnostics")
LABELS = np.arange(N) % 10
HEADER = {"dataset": "digits", "subset": "", "n": N, "method": "clustr_qtrades", "eps": EPS, "clean": 0.95}
FOOTER = {"head": "clusters", "nearest": 0, "seed": 0, "versions": provenance.versions(), "wall_seconds": 1.5}


# Work directories made by hand


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """The configs are files beside the package, not part of it."""
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1])


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
        for stage in ("1_warmup", "2_train") for e in (1, 2, 3)
    ]  # fmt: skip
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


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """(record, report) of a directory with everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(pathlib.Path(__file__).parents[1])
        record = report.read(make(tmp_path_factory.mktemp("full") / "run"))
    return record, page.report(record, page.Looks(planes(), victims(), 1234, (100, 10, 40)))


# HTML as a browser and a screen reader see it

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Document(html.parser.HTMLParser):
    """The elements of a page as (tag, attributes), its text, and what is wrong with it."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.ids, self.words, self.faults = [], [], [], [], []
        self.rows, self._cell = [], None
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is not closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = self.rows[-1]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes another element")
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.words.append(data)
        if self._cell is not None:
            self._cell[-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    def row(self, label):
        (found,) = [row for row in self.rows if row and row[0].strip() == label]
        return [" ".join(cell.split()) for cell in found[1:]]


def assert_sound_page(text):
    """Well formed, nothing from outside, and usable without eyes or a mouse."""
    document = Document(text)
    assert document.faults == []
    assert len(set(document.ids)) == len(document.ids)
    for _, attributes in document.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:", "#")), target
            if target and target.startswith("#") and len(target) > 1:
                assert target[1:] in document.ids, target
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style and "http" not in style[1] and "@import" not in style[1] and "url(" not in style[1]
    assert text.count("<style") == 1 and "<script" not in text
    for image in document.all("img"):
        assert len(image["alt"]) > 5
    drawings = document.all("svg")
    for drawing in drawings:
        assert drawing["role"] == "img" and re.search(r"\d", drawing["aria-label"])
    levels = [int(tag[1]) for tag, _ in document.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    for landmark in ("header", "nav", "main", "footer"):
        assert len(document.all(landmark)) == 1
    assert len(document.all("caption")) == len(document.all("table"))
    assert all(cell.get("scope") in ("col", "row", "rowgroup") for cell in document.all("th"))
    for region in document.all("div"):
        if "scroll" in (region.get("class") or "").split():
            assert region["tabindex"] == "0" and region["role"] == "region" and region["aria-label"]
    assert document.all("html")[0]["lang"] == "en" and document.all("a")[0]["href"] == "#main"
    return document, drawings


def test_a_page_with_everything_is_sound(full):
    record, made = full
    document, drawings = assert_sound_page(made.html)
    assert len(drawings) == len(made.drawings) - 1  # the gallery is HTML here
    assert {d.name for d in made.drawings} == {
        "eps", "restarts", "steps", "attacks", "certified", "gallery",
        "embeddings-1_warmup", "embeddings-2_train", "training-1_warmup-accuracy", "training-1_warmup-loss",
        "training-2_train-accuracy", "training-2_train-loss",
    }  # fmt: skip
    assert len(made.html) < 1e6
    for drawing in made.drawings:
        assert drawing.png.startswith(b"\x89PNG") and len(drawing.png) > 5000
        assert b"<path" in drawing.svg
        ET.fromstring(drawing.svg)


def test_the_numbers_are_those_of_the_results(full):
    record, made = full
    document = Document(made.html)
    assert document.row("worst case") == ["–", shown(0.2), shown(0.15)]
    assert document.row("pgd20") == ["–", shown(0.25), "–"]
    assert document.row("strongest single attack (apgd-t)")[2] == shown(0.175)
    assert document.row("clean, all 40 test images") == ["–", shown(0.95)]
    assert document.row("eps 0.1, pgd100")[1] == shown(0.65)
    assert document.row("eps 0.3, APGD on the margin")[2] == shown(0.0)
    assert document.row("apgd-t")[:3] == [shown(0.175), "4", "1,200"]
    assert document.row("any_d") == [shown(0.425), shown(0.05)]
    assert document.row("left by l2-PGD") == [shown(0.8), "–"]
    check = ["the last restarts gain", "WARN", "1.11 points", "≤ 0.5 points", "few"]
    assert ["9", *check] in document.rows
    text = document.text
    assert "15.00 % robust accuracy, linf, eps 0.2" in text.replace("15.00%", "15.00 %")
    assert record.results["diagnostics"]["verdict"] in text
    assert "6 of 40 test images are classified correctly under every attack" in text
    assert "5.00 points" in text and "constant between 1.25 and 2.5" in text
    for figure in ("eps", "attacks"):
        (drawing,) = [d for d in made.drawings if d.name == figure]
        assert "15.0 %" in drawing.alt
    assert "1: 50.0 %, 2: 30.0 %" in next(d.alt for d in made.drawings if d.name == "restarts")
    assert "0.5: 42.5 %" in next(d.alt for d in made.drawings if d.name == "certified")


def test_the_card_has_the_same_numbers(full):
    record, made = full
    card = made.card
    worst = [re.sub(r"(^[\d.]+)", r"**\1**", shown(value)) for value in (0.2, 0.15)]
    assert f"| eps 0.2, worst case | – | {worst[0]} | {worst[1]} |" in card
    assert "1,234 parameters" in card and "100 training, 10 held out, 40 test" in card
    assert "sound-2" in card and "python run.py --config=a" in card and "MIT" in card and "abc1234" in card
    lines = card.splitlines()
    for i, line in enumerate(lines):  # every table is one, for every reader of Markdown
        if line.startswith("|---"):
            width = lines[i - 1].count("|")
            assert lines[i - 2] == "" and line.count("|") == width
            rows = [row for row in lines[i + 1 :][: lines[i + 1 :].index("")]]
            assert rows and all(row.count("|") == width for row in rows)
    for line, before in zip(lines[1:], lines, strict=False):
        assert not line.startswith("## ") or before == ""


def test_what_users_write_is_escaped(tmp_path):
    nasty = '<script>alert("1")</script>&'
    root = make(tmp_path / "a <b> & c", ("clean", "sound"), variant=nasty)
    environment = read(root / "environment.json") | {"commands": [nasty], "commit": nasty}
    (root / "environment.json").write_text(json.dumps(environment))
    name = f"transfer-{nasty}"
    content, arrays = result("sound")
    content["attacks"][name] = {"robust": 0.5, "unique_kills": 0, "wall_seconds": 1.0}
    results.save(root / "results", "sound", content, arrays)
    made = page.report(report.read(root), page.Looks())
    document, _ = assert_sound_page(made.html)
    assert document.text.count(nasty) >= 4 and "<script" not in made.html
    assert document.row(name)[0].startswith("50.00")
    assert "a <b> & c" in document.text


def _leak(count):
    pairs = [[7, 3]] * count
    return {"train/test": {"images": count, "other_labels": 0, "pairs": pairs}}


@pytest.mark.parametrize(
    ("found", "card", "limit"),
    [
        (None, "", ""),
        (_leak(0), "- Duplicates: none between the splits", ""),
        (
            _leak(2),
            "- Duplicates: 2 test images are among the training images",
            "The same image is on two sides",
        ),
    ],
)
def test_duplicates_and_notes_are_in_the_page_and_the_card(found, card, limit, tmp_path):
    """Results of earlier versions say nothing of them; points have none."""
    fields = {} if found is None else {"duplicates": found, "data_notes": ["not read: a <b> file"]}
    root = make(tmp_path, ("clean", "sound"), changes={"clean": fields, "sound": fields})
    made = page.report(report.read(root), page.Looks())
    assert (card in made.card) if card else ("Duplicates" not in made.card)
    assert ("- Note: not read: a" in made.card) == bool(fields)
    assert bool(limit) == ("The same image is on two sides" in made.card)
    assert ("notes on the data" in made.html) == bool(fields) and "<b> file" not in made.html
    assert ("between the splits" in made.html or "2 test images are" in made.html) == bool(fields)


@pytest.mark.parametrize(
    ("names", "method", "said"),
    [
        ((), "clustr", ("There are no results yet", "nothing is known of its accuracy")),
        (("clean",), "trades", ("No attack was run", "sound protocol was not run", "A linear head has no")),
        (("clean", "paper"), "clustr", ("protocol alone is no evidence", "No certificates were")),
        (("sound",), "clustr", ("The checks were not run", "The paper's protocol was not run")),
    ],
)  # fmt: skip
def test_missing_results_are_said_and_no_figure_is_empty(names, method, said, tmp_path):
    head = "linear" if method == "trades" else "clusters"
    changes = {"clean": {"head": head}, "sound": {"head": head}}
    record = report.read(make(tmp_path / "run", names, method, changes=changes))
    made = page.report(record, page.Looks(reasons={"embeddings": "no data", "gallery": "no data"}))
    document, drawings = assert_sound_page(made.html)
    for text in (*said, "No embeddings: no data.", "No images: no data."):
        assert text in document.text
    assert len(drawings) == len(made.drawings) == 4 + (4 if "sound" in names else 0) + ("paper" in names)
    assert document.text.count("UNCHECKED") == ("sound" in names)


def test_a_quick_evaluation_has_no_curve_over_eps(tmp_path):
    content, arrays = result("sound", protocol="sound-2-quick")
    del content["curves"]["eps"]
    content["sweep"] = {}
    root = make(tmp_path / "run", ())
    results.save(root / "results", "sound", content, arrays)
    quick = {**HEADER, "robust": 0.4, "protocol": "quick-1", "attacks": {}, **FOOTER, "config_sha": "q"}
    results.save(root / "results", "quick", quick, {"y": LABELS})
    made = page.report(report.read(root), page.Looks(planes()[1:], [], 5, None))
    document, _ = assert_sound_page(made.html)
    assert "There is no curve over eps: one radius only was attacked." in document.text
    assert "There is no picture from before" in document.text
    assert document.row("quick attack")[-1].startswith("40.00")
    assert "sound protocol (sound-2-quick)" in document.text and "the full one finds less" in made.card


def test_of_many_classes_it_says_which_are_shown(tmp_path):
    root = make(tmp_path / "run", ("clean",))
    done = read(root / "2_train" / "done.json") | {"num_classes": 100}
    (root / "2_train" / "done.json").write_text(json.dumps(done))
    text = Document(page.report(report.read(root), page.Looks(planes(), victims())).html).text
    assert "Only the first 10 classes are shown." in text and "each of the first 10 classes" in text
    # at_pretrain's first stage has the classes of another set
    root = make(tmp_path / "pretrained", ("clean",), "at_pretrain")
    (root / "1_warmup").mkdir()
    (root / "1_warmup" / "done.json").write_text(json.dumps(done))
    text = Document(page.report(report.read(root), page.Looks(planes(), victims())).html).text
    assert "Only the first 10 classes" not in text


def test_a_run_of_one_epoch_and_a_colour_gallery(tmp_path):
    root = make(tmp_path / "run", ("clean",), dataset="cifar10")
    first = (root / "metrics.jsonl").read_text().splitlines()[0]
    (root / "metrics.jsonl").write_text(first + "\n")
    found = page.Looks([], victims(3, own=float("nan")), 5, None, {"embeddings": "none"})
    made = page.report(report.read(root), found)
    document, _ = assert_sound_page(made.html)
    assert "dog" in document.text and "FOOLED" in document.text and "WITHSTOOD" in document.text
    assert "no centroids" in document.text and "nan" not in document.text
    assert {d.name for d in made.drawings} == {
        "training-1_warmup-accuracy",
        "training-1_warmup-loss",
        "gallery",
    }


# What the words say


def test_the_verdict_follows_the_checks(tmp_path):
    good = words.verdict(report.read(make(tmp_path / "good")))
    assert (good.status, good.tone) == ("NO CHECK FAILED", "info") and "gave a warning: 9" in good.meaning
    failed = {"diagnostics": {"failed": [4, 12], "verdict": "upper bound only"}}
    bad = words.verdict(report.read(make(tmp_path / "bad", changes=failed)))
    assert bad.status == "UPPER BOUND ONLY" and "checks 4, 12 failed" in bad.meaning and bad.tone == "fail"
    idle = {"diagnostics": {"checks": [{**c, "status": "SKIP"} for c in OWN["diagnostics"]["checks"]]}}
    none = words.verdict(report.read(make(tmp_path / "none", changes=idle)))
    assert none.status == "UNCHECKED" and "had nothing to look at" in none.meaning
    low = {"sound": {"robust": 0.1}}
    assert "commonest class would score no less: 10.00 %" in words.verdict(
        report.read(make(tmp_path / "low", changes=low))
    ).meaning  # fmt: skip


def test_checks_of_earlier_results_are_not_shown(tmp_path):
    root = make(tmp_path / "run")
    record = report.read(root)
    assert record.checks is not None
    content, arrays = result("sound", config_sha="another")
    results.save(root / "results", "sound", content, arrays)
    record = report.read(root)
    assert record.checks is None and words.verdict(record).status == "UNCHECKED"
    assert "belong to earlier results" in page.report(record, page.Looks()).html


def test_the_papers_figure_stands_beside_its_own_radius_only():
    eight, four = ({**result("paper")[0], "dataset": "cifar10", "eps": e / 255} for e in (8, 4))
    assert [row.claim for row in terminal.comparison({"paper": eight})][1:3] == [
        claims.claim("cifar10", "clustr_qtrades", name) for name in ("pgd20", "pgd100")
    ]
    rows = terminal.comparison({"paper": four})
    assert [row.claim for row in rows][:3] == [None] * 3
    assert rows[3].claim == claims.claim("cifar10", "clustr_qtrades", "pgd20", 0.1)  # in the paper's sweep


def test_one_class_that_is_predicted_too_often_is_a_fact(tmp_path):
    shares = {"predicted": [0.6] + [0.4 / 9] * 9}
    record = report.read(make(tmp_path / "run", ("clean",), changes={"clean": shares}))
    (fact,) = words.facts(record)
    assert fact[0].startswith("answers of class 0") and fact[1].value == "60.00"


# Planes and figures


def test_principal_axes_are_those_of_the_covariance(rng):
    z = rng.standard_normal((200, 6)) * [5, 3, 1, 1, 0.5, 0.1] + 7
    mean, axes, share, unit = looks.principal(z)
    power, vectors = np.linalg.eigh(np.cov(z.T, bias=True))
    np.testing.assert_allclose(np.abs(axes @ vectors[:, :-3:-1]), np.eye(2), atol=1e-9)
    np.testing.assert_allclose(share, power[:-3:-1] / power.sum())
    np.testing.assert_allclose(unit, np.sqrt(power.sum()))
    assert (axes[np.arange(2), np.abs(axes).argmax(axis=1)] > 0).all()
    flat = looks.plane("s", z, np.zeros(200, int), z[:3], np.arange(3), "", True)
    np.testing.assert_allclose(flat.points.var(axis=0), np.array(share), rtol=1e-9)
    np.testing.assert_allclose(flat.centroids, flat.points[:3])
    for other in (z, -z[::-1] + 14):  # the picture of a mirrored cloud is turned the same way
        assert (looks.principal(other)[1] * axes).sum() > 1.9


@pytest.mark.parametrize("shape", [(1, 16), (1, 1), (5, 1), (2, 2), (3, 16)])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_axes_of_few_points_and_few_dimensions(shape, spread, rng):
    """One test image, embeddings of one number, points that are all equal: a picture all the same."""
    z = 3.0 + spread * rng.standard_normal(shape)
    mean, axes, share, unit = looks.principal(z)
    assert axes.shape == (2, shape[1]) and np.isfinite(axes).all() and unit > 0
    assert sum(share) <= 1 + 1e-9 and min(share) >= 0
    found = looks.plane("2_train", z, np.zeros(len(z), int), z[:1] + 1.0, np.zeros(1, int), "", True)
    np.testing.assert_allclose(found.points, (z - mean) @ axes.T / unit)
    (drawing,) = pictures.planes([found])
    assert not drawing.failed and drawing.png


FIGURES = {
    "Accuracy over the radius": (figures, "over_eps"), "Accuracy over steps": (figures, "over_budget"),
    "Each attack alone": (figures, "attacks"), "Certified accuracy": (figures, "certified"),
    "Warm-up: loss": (figures, "_history"), "After: the trained network": (pictures, "_plane"),
    "Adversarial images": (pictures, "gallery"), "gallery": (page, "_png"),
    "Before: after the warm-up": (pictures, "limits"),
}  # fmt: skip


ERRORS = (
    np.linalg.LinAlgError("SVD <did> not\nconverge"),
    IndexError("index 1 is out of bounds"),
    KeyError(),
)


@pytest.mark.parametrize(
    ("what", "error"),
    [*((what, ERRORS[0]) for what in FIGURES), *(("Each attack alone", e) for e in ERRORS[1:])],
)
def test_a_figure_that_cannot_be_drawn_withholds_nothing(what, error, monkeypatch, full, tmp_path):
    """Its place says why, one line is told, and verdict, tables and all other figures are there."""

    def fail(*_, **__):
        raise error

    record, before = full
    record = report.read(shutil.copytree(record.root, tmp_path / "run"))

    def light(name, title, caption, alt, paint, height=0):
        return svg.Drawing(name, title, caption, alt, svg.Markup(""), b"svg", b"png")

    for module in (figures, pictures):  # what matplotlib makes of them is looked at elsewhere
        monkeypatch.setattr(module, "draw", light)
    monkeypatch.setattr(*FIGURES[what], fail)
    said = []
    path = report.write(record, page.Looks(planes(), victims(), 1234, (100, 10, 40)), said.append)
    lines = [line for line in said if line.startswith(f"report: {what}: ")]
    assert len(lines) == 1 and type(error).__name__ in lines[0]
    assert all("\n" not in line and len(line) < 500 for line in said)
    text = path.read_text()
    # the gallery's picture is a file in figures/ only
    assert ("could not be drawn" in text) == (what != "Adversarial images") and "<did>" not in text
    assert results.diagnosis(record.results)["verdict"] in html.unescape(text)
    assert not report.current(record)  # it is made again
    kept = {d.name for d in before.drawings}
    there = {p.stem for p in (record.root / "figures").glob("*.svg")}
    assert there < kept or (what == "gallery" and there == kept)
    assert {p.stem for p in (record.root / "figures").glob("*.png")} == there


def test_a_comparison_without_its_figure(tmp_path, monkeypatch):
    records = [report.read(make(tmp_path / name)) for name in ("a", "b")]
    monkeypatch.setattr(figures, "_line", lambda *_: 1 / 0)
    text = report.write_comparison(records, tmp_path / "c.html").read_text()
    assert "could not be drawn (ZeroDivisionError" in text and "<table>" in text


def test_every_point_of_the_plane_lies_in_the_cell_of_its_nearest_centroid(rng):
    centroids, box = rng.uniform(-1, 1, (12, 2)), (-1.5, 1.5, -1.0, 2.0)
    found = looks.cells(centroids, box)
    points = rng.uniform((-1.5, -1.0), (1.5, 2.0), (500, 2))
    nearest = np.linalg.norm(points[:, None] - centroids, axis=2).argmin(axis=1)
    for i, cell in enumerate(found):
        edges = np.roll(cell, -1, axis=0) - cell
        offsets = points[:, None] - cell
        inside = np.all(edges[:, 0] * offsets[..., 1] - edges[:, 1] * offsets[..., 0] >= 0, axis=1)
        np.testing.assert_array_equal(inside, nearest == i)


def test_equal_centroids_share_a_cell():
    found = looks.cells(np.zeros((2, 2)), (-1, 1, -1, 1))
    assert [len(cell) for cell in found] == [4, 4]


def test_a_drawing_in_a_page_has_the_colours_and_ids_of_the_page():
    def paint(figure):
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=svg.SERIES[1], label='a "b" <c>')
        axes.legend()

    one, two = (svg.draw(name, "T", "", 'x "1" <2>', paint) for name in ("one", "two"))
    assert svg.draw("one", "T", "", 'x "1" <2>', paint) == one
    assert "var(--c1)" in one.inline and "currentColor" in one.inline and "<style" not in one.inline
    assert not set(svg.SERIES) & set(re.findall(r"#[0-9a-f]{6}", one.inline))
    assert "DejaVu" not in one.inline and "http" not in one.inline.replace("http://www.w3.org", "")
    ids = [set(re.findall(r' id="([^"]*)"', d.inline)) for d in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    used = re.findall(r"url\(#([^)]*)\)", one.inline) + re.findall(r'href="#([^"]*)"', one.inline)
    assert used and set(used) <= ids[0]
    assert svg.SERIES[1].encode() in one.svg  # the file has colours of its own


def test_every_colour_stands_out_in_both_themes():
    """WCAG contrast with the card: 4.5 for text, 3 for lines and marks."""
    css = (pathlib.Path(page.__file__).parent / "templates" / "page.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", part))
        for part in css.split("@media print")[0].split("@media screen", 1)
    )
    assert [light[f"c{i}"] for i in range(10)] == list(svg.SERIES)

    def luminance(colour):
        c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for theme in (light, dark):
        for name in ("ink", "muted", "link"):
            assert min(contrast(theme[name], theme[on]) for on in ("card", "page")) >= 4.5, name
        for name in ("info", "pass", "warn", "fail", "skip"):
            assert contrast(theme[name], theme[f"{name}-soft"]) >= 4.5, name
        assert min(contrast(theme[f"c{i}"], theme["card"]) for i in range(10)) >= 4.5


# Files and commands


def test_a_report_is_current_until_a_result_changes(tmp_path, full):
    root = make(tmp_path / "run")
    record = report.read(root)
    assert not report.current(record)
    path = report.write(record, page.Looks(planes(), victims()))
    assert path == root / "report.html" and report.current(record) and report.current(report.read(root))
    written = {p.stem for p in (root / "figures").iterdir()}
    assert written == {d.name for d in full[1].drawings}
    assert all((root / "figures" / f"{name}.{kind}").exists() for name in written for kind in ("svg", "png"))
    content, arrays = result("sound", config_sha="another")
    del content["curves"]["eps"]
    results.save(root / "results", "sound", content, arrays)
    (root / "results" / "paper.json").unlink()
    (root / "figures" / "notes.txt").write_text("mine")
    changed = report.read(root)
    assert not report.current(changed)
    report.write(changed, page.Looks())
    left = {p.name for p in (root / "figures").iterdir()}
    assert "eps.svg" not in left and "gallery.png" not in left and "notes.txt" in left
    (root / "MODEL_CARD.md").unlink()
    assert not report.current(changed)


def test_commands_are_kept_each_once(tmp_path):
    settings = importlib.import_module("configs.digits").get_config()
    place = workdir.Workdir(tmp_path)
    for text in ("a", "b", "", "a"):
        place.open(settings, text)
    assert read(tmp_path / "environment.json")["commands"] == ["b", "a"]
    (tmp_path / "environment.json").write_text("{")
    place.open(settings, "c")
    assert read(tmp_path / "environment.json")["commands"] == ["c"]


def test_a_page_compares_several_runs(tmp_path, capsys):
    folders = [make(tmp_path / name) for name in ("one", "two")]
    folders.append(make(tmp_path / "three", ("clean",), "trades"))
    out = tmp_path / "compare.html"
    assert command.main([*map(str, folders), f"--out={out}"]) == 0
    told = capsys.readouterr()
    assert told.out == f"report: {out}\n"
    assert told.err.count("is not known: ") == 3  # there are no weights beside these results
    document, drawings = assert_sound_page(out.read_text())
    assert document.row("one") == [
        shown(0.15), shown(0.2), shown(0.95), shown(0.425), "0.2", "40", "digits", "NONE FAILED",
    ]  # fmt: skip
    assert document.row("three")[:4] == ["–", "–", shown(0.95), "–"]
    assert document.row("all together") == [shown(0.15), shown(0.15)]
    assert len(drawings) == 1 and "The paper's protocol was not run in three." in document.text


def test_versions_are_never_mixed(tmp_path):
    one = report.read(make(tmp_path / "one", ("sound",)))
    two = report.read(make(tmp_path / "two", ("sound",), changes={"sound": {"protocol": "sound-1"}}))
    with pytest.raises(
        UserError, match=r"sound is sound-2 in .*one and sound-1 in .*two; versions are never"
    ):
        compare.compare([one, two])


def test_mistakes_are_told_in_one_line(tmp_path, capsys):
    root = make(tmp_path / "run", ("clean",))

    def mistake(*arguments):
        assert command.main(list(map(str, arguments))) == 2
        stderr = capsys.readouterr().err
        assert stderr.startswith("error: ") and stderr.count("\n") == 1
        return stderr

    assert "no finished stage" in mistake(tmp_path / "nowhere")
    assert "--out is for several" in mistake(root, "--out=x.html")
    assert "given twice" in mistake(root, root)
    assert "is a stage; expected the work directory" in mistake(root / "2_train")
    (root / "results" / "clean.json").write_text("{}")
    assert "is not what was written there" in mistake(root)


# Networks that were trained


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return tmp_path_factory.mktemp("smoke")


SMOKES = {
    "digits": (f"{DIGITS}:clustr_qtrades",),
    "linear": (f"{DIGITS}:trades", "--config.eval.quick=True"),
    "points": (f"{TOY}:clustr_qtrades",),
}


def on_a_network(test):
    """Marks a test that trains one."""
    kinds = ("DeprecationWarning", "UserWarning", "ResourceWarning")
    return pytest.mark.slow(pytest.mark.filterwarnings(*(f"ignore::{kind}" for kind in kinds))(test))


@pytest.fixture
def trained(smoke, run):
    """trained(name) -> the work directory of a smoke run, made once."""

    def directory(name):
        folder = smoke / name
        if not (folder / "report.html").exists():
            shutil.rmtree(folder, ignore_errors=True)
            stdout, stderr = run(*SMOKES[name], "--config.smoke=True", f"--workdir={folder}")
            assert stderr == "" and stdout.splitlines()[-1] == f"report: {folder / 'report.html'}"
        return folder

    return directory


@on_a_network
@pytest.mark.parametrize(
    ("where", "error", "code"),
    [
        ("report.looks.embeddings", ZeroDivisionError(), 0),
        ("report.figures._line", IndexError("index 1 is out of bounds"), 0),
        ("evaluation.certificates.draw", ValueError("no font"), 0),
        ("stages.reporting.run", UserError("the page is not made"), 2),
        ("stages.reporting.run", OSError(28, "No space left on device"), 2),
    ],
)
def test_a_failure_while_drawing_never_withholds_the_verdict(
    where, error, code, trained, attempt, tmp_path, monkeypatch
):
    """One line, and everything else as it was."""

    def fail(*_, **__):
        raise error

    folder = tmp_path / "run"
    shutil.copytree(trained("points"), folder)
    for path in (folder / "report.html", folder / "results" / "certified.json"):
        path.unlink()
    monkeypatch.setattr(f"clustr_jax.{where}", fail)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        found, stderr = attempt(*SMOKES["points"], "--config.smoke=True", f"--workdir={folder}")
    assert found == code and stderr.count("\n") == (1 if code else 0)
    stdout = " ".join(output.getvalue().split())
    assert results.load(folder / "results", "diagnostics")["verdict"] in stdout
    assert f"results: {folder / 'results'}" in stdout
    if not code:
        assert str(error) in stdout and "could not be" in stdout and (folder / "report.html").exists()


@on_a_network
@pytest.mark.parametrize("name", in_ci(SMOKES, "digits"))
def test_a_run_ends_with_its_report(name, trained, run):
    folder = trained(name)
    document, drawings = assert_sound_page((folder / "report.html").read_text())
    sound = read(folder / "results" / "sound.json")
    assert f"{100 * sound['robust']:.2f}" in document.text and "--config.smoke=True" in document.text
    assert "numbers mean nothing" in document.text and "A smoke run" in (folder / "MODEL_CARD.md").read_text()
    images = document.all("img")
    assert len(images) % 3 == 0 and (len(images) > 0) == (name != "points")
    shown = {p.stem for p in (folder / "figures").glob("*.svg")}
    assert {"1_warmup", "2_train"} - {n[11:] for n in shown if n.startswith("embeddings")} == (
        {"1_warmup"} if name == "linear" else set()
    )
    before = (folder / "report.html").stat().st_mtime_ns
    stdout, _ = run(*SMOKES[name], "--config.smoke=True", f"--workdir={folder}")
    assert "report: was made before" in stdout and (folder / "report.html").stat().st_mtime_ns == before
    (folder / "report.html").unlink()
    stdout, _ = run(*SMOKES[name], "--config.smoke=True", "--stages=report", f"--workdir={folder}")
    assert "report: made" in stdout and (folder / "report.html").exists()


@on_a_network
def test_what_is_shown_of_a_network_is_true(trained):
    """The gallery's images are in the ball, and are classified as it says; distances are those of clf."""
    import clustr_jax
    from clustr_jax import data

    folder = trained("digits")
    record, clf = report.read(folder), clustr_jax.load(folder)
    found = report.look(record, jax.random.key(0), None)
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(clf.variables["params"]))
    x, y = data.load("digits", "test")
    assert found.sizes is not None and found.sizes[2] <= len(y)
    assert len({v.label for v in found.victims}) == len(found.victims) > 0
    for v in found.victims:
        assert np.abs(v.x_adv - v.x).max() <= 0.2 + 1e-6 and 0 <= v.x_adv.min() <= v.x_adv.max() <= 1
        assert clf.predict(np.stack([v.x, v.x_adv])).tolist() == [v.before, v.after] and v.before == v.label
        z = np.asarray(clf.embed(v.x_adv[None]))[0]
        mu, valid = np.asarray(clf.clusters.centroids), np.asarray(clf.clusters.valid)
        distance = np.where(valid, np.linalg.norm(mu - z, axis=2), np.inf)
        np.testing.assert_allclose(v.own[1], distance[v.label].min(), rtol=1e-4)
        np.testing.assert_allclose(v.other[1], np.delete(distance, v.label, 0).min(), rtol=1e-4)
    first, last = found.planes
    assert first.borders and last.borders
    assert "k-means" in first.source or "one cluster" in first.source
    assert last.points.shape == first.points.shape and (last.labels == first.labels).all()


@pytest.mark.long
@on_a_network
def test_without_the_data_there_is_a_report_that_says_so(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained("digits"), folder)
    config = read(folder / "config.json")
    config["data"] |= {"name": "cifar10", "dir": str(tmp_path / "empty")}
    (folder / "config.json").write_text(json.dumps(config))
    record = dataclasses.replace(report.read(trained("digits")), config=config)
    found = report.look(record, jax.random.key(0), None)
    assert found.planes == [] and found.victims == [] and found.parameters
    made = page.report(record, found)
    document, _ = assert_sound_page(made.html)
    assert "the data could not be read" in document.text


WITHOUT = pytest.mark.skipif(
    browser.find() is None, reason="no Chromium (or Chrome) on the PATH; CHROMIUM names one"
)


@pytest.mark.slow
@WITHOUT
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_in_a_browser(width, dark, full, tmp_path):
    """No complaint, no request, no overflow, and nothing that is shown without a size."""
    record, made = full
    other = report.read(shutil.copytree(record.root, tmp_path / "other"))
    pages = {"report": made.html, "compare": compare.compare([record, other])}
    with browser.page(tmp_path / "profile") as tab:
        for name, text in pages.items():
            path = tmp_path / f"{name}.html"
            path.write_text(text)
            tab.show(path.as_uri(), width=width, dark=dark)
            assert tab.complaints() == []
            assert [url for url in tab.requests() if not url.startswith("data:")] == [path.as_uri()]
            assert tab.run("document.documentElement.scrollWidth") <= width
            sizes = tab.run(
                "[...document.querySelectorAll('svg, img')].map(e => e.getBoundingClientRect())"
                ".map(b => [b.width, b.height, b.left, b.right])"
            )
            assert len(sizes) == text.count("<svg ") + text.count("<img ")
            assert all(w > 40 and h > 40 and left >= 0 and right <= width for w, h, left, right in sizes)
            edges = tab.run(
                "[...document.querySelectorAll('h1, h2, p')].map(e => e.getBoundingClientRect().x)"
            )
            assert min(x for x in edges if x > 0) >= 15  # words keep away from the edge
            background = tab.run("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", background))) < 200) == dark
            ink = tab.run("getComputedStyle(document.querySelector('figure svg text')).fill")
            assert (sum(map(int, re.findall(r"\d+", ink))) > 500) == dark
            assert len(tab.screenshot()) > 20_000


@pytest.mark.slow
@WITHOUT
def test_a_page_can_be_walked_by_keyboard_and_printed(full, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(full[1].html)
    with browser.page(tmp_path / "profile") as tab:
        tab.show(path.as_uri(), width=1280, dark=True)
        press = {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
        for kind in ("keyDown", "keyUp"):
            tab.call("Input.dispatchKeyEvent", type=kind, **press)
        assert tab.run("document.activeElement.className") == "skip-link"
        assert tab.run("document.activeElement.getBoundingClientRect().top") >= 0  # it has come into view
        tree = tab.call("Accessibility.getFullAXTree")["nodes"]
        roles = [node["role"]["value"] for node in tree if not node["ignored"]]
        assert {"banner", "navigation", "main", "contentinfo", "heading", "table"} <= set(roles)
        pictures = [
            n
            for n in tree
            if not n["ignored"] and n["role"]["value"] in ("image", "img", "graphics-document")
        ]
        assert len(pictures) >= len(full[1].drawings) - 1 and all(n["name"]["value"] for n in pictures)
        assert tab.pdf().startswith(b"%PDF")
        tab.call("Emulation.setEmulatedMedia", media="print")
        assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_results_of_another_network_are_left_out(tmp_path):
    """Trained again, and not evaluated: the old figures are not this network's."""
    changes = {name: {"network_sha": "old"} for name in ("clean", "sound", "certified")}
    root = make(tmp_path / "run", ("clean", "sound", "certified"), changes=changes)
    assert report.read(root, "old").results.keys() == {"clean", "sound", "certified"}
    record = report.read(root, "new")
    assert record.results == {} and record.outdated == ("certified", "clean", "sound")
    assert record.identity != report.read(root, "old").identity
    assert any("certified, clean, sound" in text for text in words.limits(record))
    changes["clean"] = {"network_sha": "new"}  # an evaluation that has begun
    other = report.read(make(tmp_path / "other", ("clean", "sound", "certified"), changes=changes))
    assert other.results.keys() == {"clean"}
    text = compare.compare([other, record])
    assert "Left out in run" in text and "certified, clean, sound" in text and "Left out in other" in text


def test_results_of_another_rule_are_left_out(tmp_path):
    """With another D the clusters are another classifier: its accuracy stands in no row with the first's."""
    one = {name: {"nearest": 1} for name in ("paper", "clean")}
    root = make(tmp_path / "run", ALL[:4], changes=one, eval={"nearest": 1})
    record = report.read(root)
    assert record.results.keys() == {"clean", "paper"}
    assert record.outdated == ("certified", "sound")
    assert "eval.nearest" in " ".join(words.limits(record))
    # a linear head has no D
    linear = {name: {"head": "linear", "nearest": 0} for name in ALL}
    root = make(tmp_path / "linear", changes=linear, method="trades", eval={"nearest": 1})
    assert not report.read(root).outdated


def test_own_images_are_called_after_their_folder(tmp_path):
    """And two folders are two data sets, though both are "folder" in the config."""
    sets = {name: {"name": "folder", "dir": f"/sets/{name}", "sha": name} for name in ("birds", "cars")}
    names = {"clean": {"class_names": [f"bird {i}" for i in range(10)]}}
    records = [
        report.read(make(tmp_path / name, ("clean",), changes=names, data=data))
        for name, data in sets.items()
    ]
    assert [record.title for record in records] == ["clustr_qtrades on birds", "clustr_qtrades on cars"]
    made = page.report(records[0], page.Looks(planes(), victims()))
    assert "- Set: birds" in made.card and "clustr_qtrades on birds" in made.html and "bird 3" in made.html
    different = "The runs are on different data"
    assert different in compare.compare(records) and different not in compare.compare(records[:1])
    part = make(tmp_path / "part", ("clean",), changes={"clean": {"subset": "400 train"}}, data=sets["birds"])
    assert different in compare.compare([records[0], report.read(part)])


def test_certificates_at_different_radii_say_theirs(tmp_path):
    root = make(tmp_path / "other", changes={"certified": {"eps": 0.1}})
    text = compare.compare([report.read(make(tmp_path / "one")), report.read(root)])
    rule = OWN["certified"]["rule"]
    for eps in (OWN["certified"]["eps"], 0.1):
        assert f"at {intervals.radius(eps)} ({rule})" in Document(text).text
    assert "l2 radius of its own" in text


def test_the_commit_is_that_of_the_results(tmp_path):
    """environment.json has the last command's, which may have made nothing."""
    root = make(tmp_path / "run", ("clean",))
    pairs = dict(page.origins(report.read(root)))
    assert pairs["commit at the last command"] == "abc1234"
    assert pairs.get("commit", "") == provenance.commit()


def test_a_line_for_every_run_has_a_name(tmp_path):
    """matplotlib shows no label that begins with an underscore."""
    records = [report.read(make(tmp_path / name)) for name in ("_old", "new")]
    drawing = figures.compared(records, ["_old", "new"])
    assert drawing is not None and b"_old" in drawing.svg


def test_what_was_trained_is_said(tmp_path):
    """Free AT's perturbation, AWP, the source of a pre-training, the epochs that were made."""
    free = report.read(make(tmp_path / "free", ("clean",), "free_at"))
    assert "each batch 8 times" in " ".join(words.method(free))
    root = make(tmp_path / "pre", ("clean",), "at_pretrain", pretrain={"name": "digits"}, train={"awp": 0.01})
    (root / "1_warmup").mkdir()
    (root / "1_warmup" / "done.json").write_text(json.dumps({"epochs": 3, "reason": "target reached"}))
    first, second, _ = words.method(report.read(root))
    assert "3 epochs" in first and "Data: digits." in first and "gamma 0.01" in second
