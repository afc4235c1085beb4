"""Docstrings and comments of the package that can be read once: no sentence of them is long.

Tables, code and the lists of arguments are left out. The rulers are those of test_prose.py.
"""

import ast
import io
import re
import tokenize

import pytest

import test_prose as prose
from runs import ROOT

FILES = sorted((ROOT / "clustr_jax").rglob("*.py"))
ENTRY = re.compile(r"^ {4}|\S {2,}\S", re.MULTILINE)  # indented, or with columns
DOCUMENTED = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def paragraphs(source):
    """(number of a line near it, its text) of each paragraph of docstrings and of each comment."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            told = re.split(r"\n(?:Args|Returns|Raises):|\n>>>", text)[0]
            found += [(node.body[0].lineno, part) for part in re.split(r"\n\s*\n", told)]
    block, last = [], 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        number, said = token.start[0], token.string.lstrip("# ")
        if number == last + 1 and token.line.strip().startswith("#") and block:
            block[-1] = (block[-1][0], f"{block[-1][1]} {said}")
        else:
            block.append((number, said))
        last = number
    return [(number, text) for number, text in found + block if not ENTRY.search(text)]


def long_sentences(source):
    """(line, number of words, sentence) of those above the limit."""
    return [
        (number, len(prose.words(sentence)), sentence)
        for number, text in paragraphs(source)
        for sentence in prose.sentences(" ".join(text.split()))
        if len(prose.words(sentence)) > prose.WORDS
    ]


def test_what_is_measured():
    long = "word " * prose.WORDS + "more."
    assert long_sentences(f'"""Short. {long}"""\n')[0][:2] == (1, prose.WORDS + 1)
    assert long_sentences(f'def f():\n    """Short.\n\n    {long}\n    """\n')[0][0] == 2
    half = ("word " * (prose.WORDS // 2 + 1)).strip()
    assert long_sentences(f"x = 1\n# {half}\n# {half}\n")[0][0] == 2  # one comment over two lines
    assert long_sentences(f"x = 1  # {half}\ny = 1  # {half}\n") == []  # two comments
    for left_out in (f"Args:\n    x: {long}", f"Text.\n\n        {long}", f"a    {long}", f">>> {long}"):
        assert long_sentences(f'def f():\n    """Text.\n\n    {left_out}\n    """\n') == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "clustr_jax")))
def test_sentences_are_short(path):
    assert long_sentences(path.read_text(encoding="utf-8")) == []
