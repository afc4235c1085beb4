"""The report's planes and figures, and a figure that cannot be drawn."""

import html.parser
import pathlib
import re
import shutil

import numpy as np
import pytest

from clustr_jax import report
from clustr_jax.report import figures, looks, page, pictures, svg
from clustr_jax.storage import results
from report_directories import (
    full_report,  # noqa: F401  fixture `full`
    make,
    planes,
    victims,
)

pytestmark = pytest.mark.usefixtures("importable")


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
    "Accuracy over the radius": (figures, "over_eps"),
    "Accuracy over steps": (figures, "over_budget"),
    "Each attack alone": (figures, "attacks"),
    "Certified accuracy": (figures, "certified"),
    "Warm-up: loss": (figures, "_history"),
    "After: the trained network": (pictures, "_plane"),
    "Adversarial images": (pictures, "gallery"),
    "gallery": (page, "png"),
    "Before: after the warm-up": (pictures, "limits"),
}


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


def test_a_line_for_every_run_has_a_name(tmp_path):
    """matplotlib shows no label that begins with an underscore."""
    records = [report.read(make(tmp_path / name)) for name in ("_old", "new")]
    drawing = figures.compared(records, ["_old", "new"])
    assert drawing is not None and b"_old" in drawing.svg
