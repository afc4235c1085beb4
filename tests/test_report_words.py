"""What the report says in words, and which results it leaves out."""

import io
import json

import pytest
from rich.console import Console

from clustr_jax import report
from clustr_jax.evaluation import intervals
from clustr_jax.reference import claims
from clustr_jax.report import compare, page, terminal, words
from clustr_jax.runtime import provenance
from clustr_jax.storage import results
from report_directories import ALL, OWN, make, planes, result, shown, victims
from report_html import Document

pytestmark = pytest.mark.usefixtures("importable")


def test_the_verdict_follows_the_checks(tmp_path):
    good = words.verdict(report.read(make(tmp_path / "good")))
    assert (good.status, good.tone) == ("NO CHECK FAILED", "info") and "gave a warning: 9" in good.meaning
    assert good.meaning.startswith("Partly robust: fewer than half. ")
    failed = {"diagnostics": {"failed": [4, 12], "verdict": "upper bound only"}}
    bad = words.verdict(report.read(make(tmp_path / "bad", changes=failed)))
    assert bad.status == "UPPER BOUND ONLY" and "checks 4, 12 failed" in bad.meaning and bad.tone == "fail"
    idle = {"diagnostics": {"checks": [{**c, "status": "SKIP"} for c in OWN["diagnostics"]["checks"]]}}
    none = words.verdict(report.read(make(tmp_path / "none", changes=idle)))
    assert none.status == "UNCHECKED" and "nothing" in none.meaning
    low = {"sound": {"robust": 0.1}}
    assert (
        "commonest class would score no less: 10.00 %"
        in words.verdict(report.read(make(tmp_path / "low", changes=low))).meaning
    )


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
    called = {d.name: d for d in made.drawings}
    assert "2 bird 2, 3 bird 3" in called["embeddings-2_train"].caption
    assert b">bird 3<" in called["gallery"].svg and b">bird 5<" in called["gallery"].svg
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


def test_what_was_trained_is_said(tmp_path):
    """Free AT's perturbation, AWP, the source of a pre-training, the epochs that were made."""
    free = report.read(make(tmp_path / "free", ("clean",), "free_at"))
    assert "each batch 8 times" in " ".join(words.method(free))
    root = make(tmp_path / "pre", ("clean",), "at_pretrain", pretrain={"name": "digits"}, train={"awp": 0.01})
    (root / "1_warmup").mkdir()
    (root / "1_warmup" / "done.json").write_text(json.dumps({"epochs": 3, "reason": "target reached"}))
    first, second, _ = words.method(report.read(root))
    assert "3 epochs" in first and "Data: digits." in first and "gamma 0.01" in second


@pytest.mark.parametrize("names", [ALL, ("clean", "sound", "diagnostics"), ("clean", "paper"), ("clean",)])
def test_what_a_run_ends_with_fits_a_terminal(names, tmp_path):
    """80 columns, no word broken, no empty cell where there is a figure; checks that passed are counted."""
    make(tmp_path, names=names)
    record = report.read(tmp_path)
    found = {name: record.results[name] for name in ("clean", "paper", "sound") if name in names}
    console = Console(file=io.StringIO(), width=terminal.WIDTH)
    console.print(terminal.side_by_side(found))
    checks = {"checks": [{**check, "advice": "look " * 40} for check in OWN["diagnostics"]["checks"]]}
    console.print(terminal.checks_text(checks), soft_wrap=True)
    console.print(terminal.verdict_text({**OWN["diagnostics"], "words": "plain " * 40}), soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert max(map(len, said.splitlines())) <= terminal.WIDTH
    assert "1 passed, 1 warn, 1 skipped" in said and "inside the ball" not in said
    assert "1.11 points (limit <= 0.5 points)" in said and "0.0111" not in said
    (clean,) = [line for line in said.splitlines() if "clean, all" in line]
    assert clean.count("95.00") == 2
    if {"paper", "sound"} <= set(names):
        (worst,) = [line for line in said.splitlines() if "worst case" in line]
        assert shown(0.2) in worst and shown(0.15) in worst
        (other,) = [line for line in said.splitlines() if "eps 0.1" in line]
        assert shown(0.65) in other and shown(0.6) in other
    for word in ("paper's protocol", "sound protocol"):
        assert word in said


@pytest.mark.parametrize(
    ("sound", "statuses", "answer", "tone"),
    [
        (0.95, "PPW", "ROBUST SO FAR", "pass"),
        (0.95, "PPF", "NOT KNOWN", "skip"),
        (0.95, "SSS", "NOT KNOWN", "skip"),
        (0.5, "PPP", "PARTLY ROBUST", "warn"),
        (0.1, "PPP", "NOT ROBUST", "fail"),  # one class for every image scores as much
        (0.0, "PPF", "NOT ROBUST", "fail"),
    ],
)
@pytest.mark.one_in(3)
def test_green_is_only_what_withstood_everything(sound, statuses, answer, tone, tmp_path):
    known = {"P": "PASS", "W": "WARN", "F": "FAIL", "S": "SKIP"}
    checks = [{**c, "status": known[s]} for c, s in zip(OWN["diagnostics"]["checks"], statuses, strict=True)]
    failed = [c["number"] for c in checks if c["status"] == "FAIL"]
    changes = {"sound": {"robust": sound}, "diagnostics": {"checks": checks, "failed": failed}}
    record = report.read(make(tmp_path, changes=changes))
    found = words.verdict(record)
    assert (found.answer, found.answer_tone) == (answer, tone)
    made = page.report(record, page.Looks())
    assert f'<section id="verdict" class="verdict {tone}"' in made.html
    assert f'<span class="badge {tone}">{answer}</span>' in made.html


def test_without_a_sound_result_nothing_is_known(tmp_path):
    found = words.verdict(report.read(make(tmp_path, names=("clean", "paper"))))
    assert (found.answer, found.answer_tone) == ("NOT KNOWN", "skip")


def test_the_card_has_a_header_and_says_how_to_load_it(tmp_path):
    card = page.report(report.read(make(tmp_path / "run")), page.Looks()).card
    start, header, text = card.split("---\n", 2)
    fields = [line.partition(":")[0] for line in header.splitlines() if not line.startswith("- ")]
    assert start == "" and fields == [
        "license",
        "library_name",
        "pipeline_tag",
        "tags",
        "datasets",
        "metrics",
    ]
    assert "- digits\n" in header and "- clustr_qtrades\n" in header
    assert text.lstrip().startswith("# Model card") and 'clustr_jax.load("run")' in text
    assert "[N, 8, 8, 1], pixels in [0, 1]\n" in text
