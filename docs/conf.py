"""The documentation as a site: `make docs`, into docs/_build. Sphinx; warnings are errors there.

Pages are the Markdown files of this folder, which GitHub shows as well, so their links are those that work
there. Two things are made before: docstrings, which use Markdown's backticks, are turned into
reStructuredText (napoleon then makes lists of their Args, Returns and Raises), and the notebooks of examples/
into pages.
"""

import base64
import json
import os
import pathlib
import re
import sys
from collections.abc import Mapping

DOCS = pathlib.Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

import clustr_jax  # noqa: E402

project, release = "clustr_jax", clustr_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme, html_title = "furo", f"clustr_jax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "monokai"  # at least 4.5 to 1

myst_heading_anchors = 3  # links to #headings, as on GitHub
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
# what dataclasses and pytrees add to every class
autodoc_default_options = {"members": True, "exclude-members": "replace"}
napoleon_numpy_docstring = False
napoleon_use_param = napoleon_use_rtype = False  # one entry may name several parameters
smartquotes = False
python_maximum_signature_line_length = 80
default_role = "code"
toc_object_entries_show_parents = "hide"

GITHUB = "https://github.com/"


def source(environment: Mapping[str, str]) -> str:
    """Where files that are no pages are linked to, as ADDRESS/blob/REF; "" for copies of the files.

    DOCS_SOURCE says it. On GitHub's own machines the repository is known.
    """
    repository, ref = environment.get("GITHUB_REPOSITORY"), environment.get("GITHUB_REF_NAME", "main")
    known = f"{GITHUB}{repository}/blob/{ref}" if repository else ""
    return environment.get("DOCS_SOURCE", known)


SOURCE = source(os.environ)


# Docstrings


SECTIONS = ("Args:", "Returns:", "Raises:")


def restructured(lines: list[str]) -> list[str]:
    """A docstring with Markdown's `code`, as reStructuredText: everything else in it is plain text.

    Sections keep their form, for napoleon to read: what is indented there is text and no code.
    """
    found, previous, section = [], "", ""
    for line in lines:
        indented, example = line.startswith("    "), line.lstrip().startswith((">>>", "..."))
        if line and not indented:
            section = line if line in SECTIONS else ""
        if section:
            found.append(entry(line) if section != "Returns:" else plain(line))
        elif example or indented or found_example(found):
            if indented and not example and previous == "" and not in_literal(found):
                found[-1:] = ["", "::", ""]
            found.append(line)
        else:
            found.append(plain(line))
        previous = line
    return found


def entry(line):
    """A line of a section: the names before its colon are left as they are."""
    names = re.match(r"    [\w, ]+:", line)
    end = names.end() if names else 0
    return line[:end] + plain(line[end:])


def found_example(found):
    """Whether the last block, up to an empty line, is an example: its output is not touched."""
    for line in reversed(found):
        if not line.strip():
            return False
        if line.lstrip().startswith(">>>"):
            return True
    return False


def in_literal(found):
    """Whether the last text is an indented block already."""
    texts = [line for line in found if line.strip()]
    return bool(texts) and (texts[-1].startswith("    ") or texts[-1] == "::")


def plain(line):
    """Backticks doubled; what means something to reStructuredText escaped outside of them."""
    parts = re.split(r"(`[^`]*`)", line)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"`{part}`"
        else:
            parts[i] = re.sub(r"([\\*|_])", r"\\\1", part)
    return "".join(parts)


def short(signature: str | None) -> str | None:
    """A signature without the modules that its types come from: Float[Array, "B Y"]."""
    return signature and re.sub(r"~?\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", signature).replace("~", "")


def _signature(app, what, name, thing, options, signature, annotation):
    return short(signature), short(annotation)


def _docstring(app, what, name, thing, options, lines):
    lines[:] = restructured(lines)


# Notebooks


def page(notebook: dict, name: str, folder: pathlib.Path) -> str:
    """A notebook with its outputs as Markdown; pictures go into `folder`."""
    blocks, pictures = [], 0
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(text)
            continue
        blocks.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                pictures += 1
                file = folder / f"{name}-{pictures}.png"
                file.write_bytes(base64.b64decode("".join(data["image/png"])))
                before = blocks[-2].splitlines()[0].strip("# ") if len(blocks) > 1 else name
                blocks.append(f"![figure of the code above: {before}]({file.name})")
            elif "text" in output or "text/plain" in data:
                printed = "".join(output.get("text", data.get("text/plain", "")))
                if blocks[-1].startswith("```text"):  # printed in pieces
                    blocks[-1] = blocks[-1].removesuffix("\n```") + f"\n{printed.rstrip()}\n```"
                else:
                    blocks.append(f"```text\n{printed.rstrip()}\n```")
    blocks.insert(1, f"The notebook itself is `examples/{name}.ipynb`.{colab(name)}")
    return "\n\n".join(blocks) + "\n"


def colab(name: str) -> str:
    """The link that opens a notebook in Colab and what to run there first; "" where GitHub has no source."""
    if not SOURCE.startswith(GITHUB):
        return ""
    place = f"https://colab.research.google.com/github/{SOURCE.removeprefix(GITHUB)}/examples/{name}.ipynb"
    badge = "https://colab.research.google.com/assets/colab-badge.svg"
    address, _, ref = SOURCE.partition("/blob/")
    install = f'%pip install "clustr_jax[all] @ git+{address}@{ref}"'
    return f" [![Open {name} in Colab]({badge})]({place}) Run this there first:\n\n```text\n{install}\n```"


def _tutorials(app):
    folder = DOCS / "tutorials"
    folder.mkdir(exist_ok=True)
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        text = page(json.loads(path.read_text()), path.stem, folder)
        (folder / f"{path.stem}.md").write_text(text)


# Links to what is no page


def links(text: str, place: pathlib.PurePath) -> str:
    """Relative links of a page in `place` that leave docs/: to the repository, or to a copy of the file.

    Those to notebooks go to the pages that are made of them.
    """

    def outside(match):
        label, target = match[1], match[2]
        path, _, anchor = target.partition("#")
        file = (DOCS / place / path).resolve()
        if "://" in target or not path or file.suffix in (".md", ".png") and file.is_relative_to(DOCS):
            return match[0]
        if not file.exists():
            return match[0]  # Sphinx says that it is missing
        if file.suffix == ".ipynb":
            return f"[{label}](/tutorials/{file.stem}.md)"
        name = file.relative_to(ROOT).as_posix()
        if SOURCE:
            return f"[{label}]({SOURCE}/{name}{'#' + anchor if anchor else ''})"
        if file.is_file():
            return f"{{download}}`{label.replace('`', '')} </../{name}>`"
        return f"{label} (`{name}`)" if label.strip("`") != name else f"`{name}`"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", outside, text)


# In a page: the pictures of the notebooks' outputs, which are files of the site alone.
NOTEBOOKS = "<!-- notebooks -->"


def pictures(folder: pathlib.Path) -> str:
    """The pictures of the notebooks' pages, each a link to its page."""
    found = []
    for page in sorted(folder.glob("*.md")):
        title = page.read_text(encoding="utf-8").splitlines()[0].strip("# ")
        for alt, name in re.findall(r"!\[([^\]]*)\]\(([\w-]+\.png)\)", page.read_text(encoding="utf-8")):
            place = f"/{folder.relative_to(DOCS).as_posix()}"
            found.append(f"![{alt}]({place}/{name})\n\n[{title}]({place}/{page.name})")
    return "\n\n".join(found)


def _source(app, docname, source):
    source[0] = links(source[0], pathlib.PurePath(docname).parent)
    if NOTEBOOKS in source[0]:
        source[0] = source[0].replace(NOTEBOOKS, pictures(DOCS / "tutorials"))


def setup(app):
    from pygments.lexers.special import TextLexer

    app.add_lexer("mermaid", TextLexer)  # GitHub draws these; here they are shown as they are
    app.connect("builder-inited", _tutorials)
    app.connect("source-read", _source)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # before napoleon
