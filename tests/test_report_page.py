"""The report's page and card: sound HTML, the numbers of the results, and what is missing is said."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ET

import pytest

from clustr_jax import report
from clustr_jax.report import page
from clustr_jax.storage import results
from report_directories import (
    FOOTER,
    HEADER,
    LABELS,
    full_report,  # noqa: F401  fixture `full`
    make,
    planes,
    result,
    shown,
    victims,
)
from report_html import Document, assert_sound_page
from runs import read

pytestmark = pytest.mark.usefixtures("importable")


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
    assert "6 of 40 test images" in text
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


def test_names_of_files_and_classes_may_be_anything(full):
    """Neither HTML nor formulas of the drawings; long ones lose their middle in a picture."""
    record, _ = full
    nasty = ["<b>$x_1$</b>", "a" * 60, *map(str, range(8))]
    clean = record.results["clean"] | {"class_names": nasty}
    record = dataclasses.replace(record, results=record.results | {"clean": clean})
    shown = [dataclasses.replace(v, label=0, before=0, after=1, file="test/<i> $a$.png") for v in victims()]
    made = page.report(record, page.Looks(planes(), shown, 1234))
    assert made.failures == {}
    document, _ = assert_sound_page(made.html)
    assert "test/<i> $a$.png" in document.text and "<b>$x_1$</b>" in document.text
    (gallery,) = [d for d in made.drawings if d.name == "gallery"]
    assert b"&lt;b&gt;$x_1$&lt;/b&gt;" in gallery.svg and b"a" * 60 not in gallery.svg


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
        (
            _leak(0) | {"train": {"images": 3, "contents": 1, "pairs": [[0, 4]]}},
            "- Duplicates: 1 image is among the training images under several labels, 3 times in all",
            "",
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
    assert bool(limit) == ("same image" in made.card)
    assert ("notes on the data" in made.html) == bool(fields) and "<b> file" not in made.html
    said = ("between the splits", "2 test images are", "under several labels")
    assert any(text in made.html for text in said) == bool(fields)


@pytest.mark.parametrize(
    ("names", "method", "said"),
    [
        ((), "clustr", ("There are no results yet", "nothing is known of its accuracy")),
        (("clean",), "trades", ("No attack was run", "sound protocol was not run", "A linear head has no")),
        (("clean", "paper"), "clustr", ("protocol alone is no evidence", "No certificates were")),
        (("sound",), "clustr", ("The checks were not run", "The paper's protocol was not run")),
    ],
)
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
    assert "no curve over eps" in document.text and "no picture" in document.text
    assert document.row("quick attack")[-1].startswith("40.00")
    assert "sound protocol (sound-2-quick)" in document.text and "the full one finds less" in made.card


def test_of_many_classes_it_says_which_are_shown(tmp_path):
    root = make(tmp_path / "run", ("clean",))
    done = read(root / "2_train" / "done.json") | {"num_classes": 100}
    (root / "2_train" / "done.json").write_text(json.dumps(done))
    text = Document(page.report(report.read(root), page.Looks(planes(), victims())).html).text
    assert text.count("first 10 classes") >= 2
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
