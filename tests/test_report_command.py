"""The report's files and commands: when it is current, comparisons, mistakes."""

import importlib

import pytest

from clustr_jax import report
from clustr_jax.report import __main__ as command
from clustr_jax.report import compare, page
from clustr_jax.runtime.errors import UserError
from clustr_jax.storage import results, workdir
from report_directories import (
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


@pytest.mark.slow
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
        shown(0.15), shown(0.2), shown(0.95), shown(0.425), "0.2", "40", "digits", "PARTLY ROBUST",
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
