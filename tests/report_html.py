"""A page of the report as a browser and a screen reader see it."""

import base64
import hashlib
import html.parser
import re

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


def assert_sound_page(text, scripts=0):
    """Well formed, nothing from outside, and usable without eyes or a mouse; `scripts` of its own."""
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
    assert text.count("<style") == 1 and text.count("<script") == scripts
    for script in re.findall(r"<script>(.*?)</script>", text, re.S):  # runs by its hash, and no other does
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'\">" in text and "http" not in script
    assert ("script-src" in text) == bool(scripts)
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
