"""Prose that can be read once: no sentence of README.md and docs/ is long, and no line of their source is.

Tables and code are left out: a row cannot be broken, and code has its own limit. Numbers of both kinds are in
this file and nowhere else.
"""

import re

import pytest

from runs import ROOT

WORDS = 40  # of a sentence
COLUMNS = 160  # of a line
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "docs/api").glob("*.md"),
    ]
)
# A full stop after one of these ends no sentence.
ABBREVIATIONS = ("al", "e.g", "i.e", "Fig", "Eq", "Eqs", "Thm", "App", "vs", "cf")
ITEM = re.compile(r"(?:[-*+]|\d+\.) +")


def prose(text):
    """(number, line) of the lines of a Markdown text that are neither code nor table nor comment."""
    fence, previous_blank, in_item = None, True, False
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        opening = re.match(r"(`{3,}|~{3,})", stripped)
        if fence:
            if opening and opening[1].startswith(fence):
                fence = None
            continue
        if opening:
            fence = opening[1]
            continue
        if not stripped:
            previous_blank = True
            yield number, ""
            continue
        in_item = (
            bool(ITEM.match(stripped)) or (in_item and line[0] == " ") or (in_item and not previous_blank)
        )
        indented_code = line.startswith("    ") and previous_blank and not in_item
        if indented_code:  # the next line of the block follows no blank one
            continue
        previous_blank = False
        if stripped.startswith("|") or stripped.startswith("<!--"):
            yield number, ""
            continue
        yield number, line


def paragraphs(text):
    """(number of its first line, paragraph on one line); an item of a list and a heading are paragraphs."""
    first, collected = 0, []
    for number, line in [*prose(text), (0, "")]:
        stripped = line.strip()
        if collected and (not stripped or ITEM.match(stripped) or stripped.startswith("#")):
            yield first, " ".join(collected)
            collected = []
        if stripped:
            first = number if not collected else first
            collected.append(ITEM.sub("", stripped, count=1) if ITEM.match(stripped) else stripped)
            if stripped.startswith("#"):
                yield first, stripped
                collected = []


def sentences(paragraph):
    """Its sentences. Code in backticks and the address of a link count as one word each."""
    plain = re.sub(r"`[^`]*`", "code", paragraph)
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", plain)
    for short in ABBREVIATIONS:
        plain = re.sub(rf"\b{re.escape(short)}\. ", f"{short} ", plain)
    return [part for part in re.split(r"(?<=[.?!])[\"')*_]* +", plain) if part]


def words(sentence):
    return [word for word in sentence.split() if re.search(r"\w", word)]


def long_sentences(text):
    """(line, number of words, sentence) of those above WORDS."""
    return [
        (number, len(words(sentence)), sentence)
        for number, paragraph in paragraphs(text)
        for sentence in sentences(paragraph)
        if len(words(sentence)) > WORDS
    ]


def long_lines(text):
    """(line, columns) of those above COLUMNS."""
    return [(number, len(line)) for number, line in prose(text) if len(line) > COLUMNS]


def test_what_is_measured():
    """The rulers themselves: what they must find, and what they must leave."""
    long = "word " * WORDS + "more."
    assert [found[:2] for found in long_sentences(f"# Title\n\nShort one. {long}\n")] == [(3, WORDS + 1)]
    assert long_sentences(f"- {'word ' * 30}\n- {'word ' * 30}\n") == []  # two items are two sentences
    assert len(long_sentences(f"- {'word ' * 25}\n  {'word ' * 25}\n")) == 1  # an item over two lines
    assert len(long_sentences("by Croce et al. 2020 " + "word " * WORDS)) == 1
    for left_out in (
        f"```sh\n{long * 3}\n```\n",
        f"| {long * 3} |\n",
        f"text\n\n    {long * 3}\n    {long * 3}\n",
    ):
        assert long_sentences(left_out) == [] and long_lines(left_out) == []
    assert long_lines("a " * 81 + "\n") == [(1, 162)] and long_lines("a" * COLUMNS) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_and_lines_are_short(page):
    text = page.read_text(encoding="utf-8")
    sentences_ = [
        f"{page.name}:{number}: {count} words: {said[:100]} ..."
        for number, count, said in long_sentences(text)
    ]
    lines = [f"{page.name}:{number}: {columns} columns" for number, columns in long_lines(text)]
    assert sentences_ + lines == []
