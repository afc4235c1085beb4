"""The report's files and commands: when it is current, comparisons, mistakes."""

import importlib
import shutil

import numpy as np
import pytest

from clustr_jax import report
from clustr_jax.evaluation import intervals
from clustr_jax.report import __main__ as command
from clustr_jax.report import compare, page, paired
from clustr_jax.runtime.errors import UserError
from clustr_jax.storage import results, workdir
from report_directories import (
    FOOTER,
    HEADER,
    LABELS,
    N,
    full_report,  # noqa: F401  fixture `full`
    make,
    planes,
    result,
    shown,
    victims,
)
from report_html import assert_sound_page
from runs import read

pytestmark = pytest.mark.usefixtures("importable")


@pytest.mark.more
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
    document, drawings = assert_sound_page(out.read_text(), scripts=1)
    assert document.row("one") == [
        shown(0.15), shown(0.2), shown(0.95), shown(0.425), "0.2", "40", "digits", "NOT KNOWN",
        "NONE FAILED",
    ]  # fmt: skip
    assert document.row("three")[:4] == ["–", "–", shown(0.95), "–"]
    assert document.row("all together") == [shown(0.15), shown(0.15)]
    assert len(drawings) == 1 and "not run in three" in document.text


def test_versions_are_never_mixed(tmp_path):
    one = report.read(make(tmp_path / "one", ("sound",)))
    two = report.read(make(tmp_path / "two", ("sound",), changes={"sound": {"protocol": "sound-1"}}))
    with pytest.raises(UserError, match=r"sound-2 in .*one and sound-1 in .*two"):
        compare.compare([one, two])


def test_a_quick_figure_beside_a_full_one_has_a_mark(tmp_path):
    """In the full one's column; the attacks' own version (quick-1) has a column. No difference of the two."""
    full = report.read(make(tmp_path / "full", ("clean", "sound")))
    root = make(tmp_path / "short", ("clean", "sound"), changes={"sound": {"protocol": "sound-2-quick"}})
    short = {**HEADER, "robust": 0.4, "protocol": "quick-1", "attacks": {}, **FOOTER, "config_sha": "q"}
    results.save(root / "results", "quick", short, {"y": LABELS})
    for records in ([full, report.read(root)], [report.read(root), full]):
        document, _ = assert_sound_page(compare.compare(records), scripts=1)
        assert document.row("full")[:5] == [shown(0.15), "–", shown(0.95), "–", "–"]
        assert document.row("short")[:5] == [shown(0.15) + " quick", "–", shown(0.95), "–", shown(0.4)]
        assert "sound protocol (sound-2)" in document.text and "quick attacks (quick-1)" in document.text
        assert "the full finds less" in document.text and "Differences" not in document.text
    both = [report.read(root), report.read(shutil.copytree(root, tmp_path / "b"))]
    alone, _ = assert_sound_page(compare.compare(both), scripts=1)
    assert "sound protocol (sound-2-quick)" in alone.text and alone.row("short")[0] == shown(0.15)


def kept(root, ids, robust, **more):
    """A work directory whose sound protocol left these images."""
    content, arrays = result("sound", n=len(ids), robust=float(np.mean(robust)), **more)
    arrays = {"ids": np.asarray(ids, np.int32), "robust": robust, "clean": robust, "y": LABELS[: len(ids)]}
    results.save(root / "results", "sound", content, arrays)
    return report.read(root)


def test_differences_are_of_the_same_images(tmp_path, rng):
    """By id, whatever the order; by the images that both attacked; with the interval of pairs."""
    folders = [make(tmp_path / name, ("clean", "sound")) for name in ("a", "b", "c")]
    robust = rng.random((2, N)) < 0.6
    order = rng.permutation(N)
    first = kept(folders[0], np.arange(N), robust[0])
    second = kept(folders[1], order, robust[1][order])
    (row,) = paired.rows([first, second], ["a", "b"])
    low, high = intervals.paired(*robust)[1:]
    assert row["runs"] == "a minus b" and row["n"] == N
    assert row["value"] == pytest.approx(100 * (robust[0].mean() - robust[1].mean()))
    assert row["interval"] == f"[{intervals.points(low)}, {intervals.points(high)}]"
    assert (row["ours"], row["theirs"]) == ((robust[0] & ~robust[1]).sum(), (robust[1] & ~robust[0]).sum())
    document, _ = assert_sound_page(compare.compare([first, second]), scripts=1)
    assert document.row("a minus b")[2] == f"{row['difference']} {row['interval']}"
    part = kept(folders[1], np.arange(10, N), robust[1][10:])
    assert paired.rows([first, part], ["a", "b"])[0]["n"] == N - 10
    assert paired.rows([first, kept(folders[2], np.arange(N), robust[1], eps=0.1)], ["a", "c"]) == []


@pytest.mark.parametrize(("more", "said"), [(0, "no: 0 is inside"), (2, "no: 0 is inside"), (25, "yes")])
def test_a_difference_is_clear_where_its_interval_leaves_out_0(tmp_path, more, said):
    """A row's `clear` was the method of every dict, which is always true."""
    records = [
        kept(make(tmp_path / name, ("clean", "sound")), np.arange(N), np.arange(N) < count)
        for name, count in (("a", 5 + more), ("b", 5))
    ]
    document, _ = assert_sound_page(compare.compare(records), scripts=1)
    assert document.row("a minus b")[-1] == said


@pytest.mark.parametrize("name", ["clear", "items", "get", "values", "colour"])
def test_entries_come_before_methods_in_templates(name):
    template = page._environment().from_string(f"{{{{ row.{name} }}}}")
    assert template.render(row={name: "mine"}) == "mine"


def test_many_runs_are_held_against_the_best(tmp_path):
    records = [
        kept(make(tmp_path / str(i), ("clean", "sound")), np.arange(N), np.arange(N) < 3 * i)
        for i in range(7)
    ]
    rows = paired.rows(records, [f"run {i}" for i in range(7)])
    assert [row["runs"] for row in rows] == [f"run 6 minus run {i}" for i in range(6)]
    assert len(paired.rows(records[:6], list("abcdef"))) == 15


def test_the_papers_protocol_is_the_worst_of_its_attacks(tmp_path):
    """Image by image, at the main radius."""
    records = []
    for i, name in enumerate(("a", "b")):
        root = make(tmp_path / name, ("clean", "paper"))
        content, arrays = result("paper")
        arrays |= {"pgd20_0.200000": np.arange(N) < 10 + i, "pgd100_0.200000": np.arange(N) > 4}
        arrays |= {"pgd20_0.100000": np.zeros(N, bool)}
        arrays["clean"] = np.arange(N) != 7  # wrong as it is, and left alone by every attack
        results.save(root / "results", "paper", content, arrays)
        records.append(report.read(root))
    (row,) = paired.rows(records, ["a", "b"])
    assert (row["ours"], row["theirs"], row["n"]) == (0, 1, N) and row["protocol"] == "paper-1"
    root = make(tmp_path / "c", ("clean", "paper"))
    arrays["clean"] = np.ones(N, bool)
    results.save(root / "results", "paper", content, arrays)
    (row,) = paired.rows([records[1], report.read(root)], ["b", "c"])
    assert (row["ours"], row["theirs"]) == (0, 1)


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
    assert "2_train" in mistake(root / "2_train")
    (root / "results" / "clean.json").write_text("{}")
    assert "clean.json" in mistake(root)
