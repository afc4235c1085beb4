"""The pages that `make docs` builds, in a real browser: `make test-docs` builds them and runs this.

SITE names the folder of the site. Without it there is nothing to look at, and everything here is skipped.
"""

import os
import pathlib
import re

import pytest

import browser

SITE = pathlib.Path(os.environ.get("SITE", "nowhere"))
# What Sphinx writes by itself, from the sources, is left to it.
PAGES = sorted(path for path in SITE.rglob("*.html") if path.relative_to(SITE).parts[0] != "_modules")
SMALLEST, CONTRAST = 11, 4.5  # CSS pixels of a text, and its ratio to the ground (WCAG AA)

pytestmark = [
    pytest.mark.skipif(not PAGES, reason="no site; make test-docs builds one"),
    pytest.mark.skipif(browser.find() is None, reason="no Chromium (or Chrome) on the PATH"),
]

_PICTURES = """[...document.querySelectorAll('img')].map(
  e => [e.getAttribute('src'), (e.alt || '').trim(), e.getBoundingClientRect().width])"""
# What sticks out to the right, unless something around it scrolls.
_OUTSIDE = """[...document.querySelectorAll('article *')].filter(e => {
  if (e.getBoundingClientRect().right <= innerWidth + 1) return false;
  for (let p = e; p; p = p.parentElement) if (/auto|scroll/.test(getComputedStyle(p).overflowX)) return false;
  return e.checkVisibility();
}).map(e => e.outerHTML.slice(0, 80))"""


def smallest_text(path, width):
    """CSS pixels of the smallest text of an SVG file, shown `width` pixels wide; None without texts."""
    drawn = path.read_text(encoding="utf-8")
    if 'class="narrow"' in drawn:  # two drawings, of which the style shows one
        wide, narrow = re.findall(r'<g class="(?:wide|narrow)">.*?</g>', drawn, flags=re.DOTALL)
        drawn = drawn.split("<g ")[0] + (narrow if width <= 600 else wide)
    box = re.search(r'viewBox="0 0 ([\d.]+)', drawn)
    sizes = re.findall(r'font-size(?:="|: )([\d.]+)|font: ([\d.]+)px', drawn)
    return min(float(a or b) for a, b in sizes) * width / float(box[1]) if box and sizes else None


@pytest.mark.parametrize("width", [1400, 768, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages(width, dark, tmp_path):
    """No overflow, no small text (in pictures neither), contrast, and words for every picture."""
    faults = []
    with browser.page(tmp_path) as tab:
        for path in PAGES:
            tab.show(path.resolve().as_uri(), width=width, dark=dark)
            name = str(path.relative_to(SITE))
            faults += [f"{name}: {said}" for said in tab.complaints()]
            if tab.run("document.documentElement.scrollWidth") > width:
                faults.append(f"{name} is wider than the window")
            faults += [f"{name} sticks out: {said}" for said in tab.run(_OUTSIDE)[:3]]
            texts = tab.texts()
            assert texts, name
            faults += [f"{name}: {said!r} has {size:.1f} px" for said, size, _ in texts if size < SMALLEST]
            faults += [f"{name}: {said!r} has contrast {c:.1f}" for said, _, c in texts if c < CONTRAST]
            for source, alternative, shown in tab.run(_PICTURES):
                faults += [] if alternative else [f"{name}: {source[:80]} has no text"]
                if source.endswith(".svg"):
                    size = smallest_text(path.parent / source, shown)
                    if size is not None and size < SMALLEST:
                        faults.append(f"{name}: {source} has texts of {size:.1f} px")
    assert faults == []
