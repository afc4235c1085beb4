"""Reports of networks that were trained, and their pages in a real browser. Slow."""

import contextlib
import dataclasses
import io
import json
import re
import shutil

import jax
import numpy as np
import pytest

import browser
from clustr_jax import report
from clustr_jax.report import compare, page
from clustr_jax.runtime.errors import UserError
from clustr_jax.storage import results
from marks import in_ci
from report_directories import full_report, make  # noqa: F401  fixture `full`
from report_html import assert_sound_page
from runs import DIGITS, TOY, read

pytestmark = pytest.mark.usefixtures("importable")


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


SMALLEST, CONTRAST = 11, 4.5  # CSS pixels of a text, and its ratio to the ground (WCAG AA)


@pytest.mark.slow
@WITHOUT
@pytest.mark.parametrize("width", [390, 768, 1400])
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
            texts = tab.texts()
            assert len(texts) > 100
            assert [(said, size) for said, size, _ in texts if size < SMALLEST] == []
            assert [(said, ratio) for said, _, ratio in texts if ratio < CONTRAST] == []
            outside = tab.run(
                "[...document.querySelectorAll('figure svg text')].filter(e => e.closest('figure')"
                ".getBoundingClientRect().right < e.getBoundingClientRect().right).map(e => e.textContent)"
            )
            assert outside == []  # a legend that is wider than its figure
            told = tab.run(
                "[...document.querySelectorAll('.scroll')].map(e => [e.scrollWidth > e.clientWidth,"
                " getComputedStyle(e.querySelector('.sideways')).display !== 'none'])"
            )
            assert told and all(scrolls for scrolls, says in told if says)
            assert width > 640 or all(says for _, says in told)
            assert len(tab.screenshot()) > 20_000


@pytest.mark.slow
@WITHOUT
def test_a_comparison_is_sorted_by_a_column(tmp_path):
    """Numbers from the largest, words from A, again the other way round; what is empty stays last."""
    shares = {"b": 0.1, "c": 0.9, "a": 0.2}
    roots = [make(tmp_path / n, changes={"sound": {"robust": share}}) for n, share in shares.items()]
    roots.append(make(tmp_path / "d", ("clean",)))
    path = tmp_path / "compare.html"
    path.write_text(compare.compare([report.read(root) for root in roots]))
    order = "[...document.querySelectorAll('#accuracy tbody tr')].map(r => r.cells[0].textContent).join('')"
    click = "document.querySelectorAll('#accuracy th button')[{}].click()"
    with browser.page(tmp_path / "profile") as tab:
        tab.show(path.as_uri(), width=1400)
        assert tab.run(order) == "bcad"
        for column, wanted in ((1, "cabd"), (1, "bacd"), (0, "abcd"), (0, "dcba"), (1, "cabd")):
            tab.run(click.format(column))
            assert tab.run(order) == wanted
            sorts = tab.run("[...document.querySelectorAll('#accuracy th')].filter(h => h.ariaSort).length")
            assert sorts == 1
        assert tab.complaints() == []


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
