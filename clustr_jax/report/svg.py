"""One matplotlib figure as a PNG, as an SVG file, and as SVG inside a page that is light or dark."""

import dataclasses
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from clustr_jax.runtime.errors import first_line

# Drawn in these; inside a page each becomes the CSS variable that page.css gives a value for either theme.
INK, MUTED, LINE, PAPER = "#1c2128", "#59636e", "#d1d9e0", "#ffffff"
# Wong 2011 (Okabe and Ito), darkened until each stands out from white by 4.5 : 1. Never the only sign: lines
# have dashes and markers of their own, points the number of their class.
SERIES = (
    "#0068a8", "#b84a00", "#00735a", "#9c3f78", "#6b5b00",
    "#3f4fb0", "#8f1d1d", "#007088", "#6d4a9c", "#555555",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (9, 3)), (0, (1, 1)))
_VARIABLES = {INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--card)"} | {
    colour: f"var(--c{i})" for i, colour in enumerate(SERIES)
}
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "clustr_jax", "font.size": 11.2, "font.family": "sans-serif",
    "text.color": INK, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "xtick.color": MUTED,
    "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.grid": True,
    "grid.color": LINE, "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 11.2, "lines.linewidth": 1.6,
    "lines.markersize": 4.5, "axes.linewidth": 0.8, "legend.handlelength": 2.6,
}  # fmt: skip
_WIDTH, _DPI = 4.4, 200


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure with its words: `caption` is shown, `alt` says what there is to see, with the numbers."""

    name: str
    title: str
    caption: str
    alt: str
    inline: Markup
    svg: bytes
    png: bytes
    failed: str = ""  # why there is no picture, if there is none


def draw(name: str, title: str, caption: str, alt: str, paint: Callable, height: float = 3.1) -> Drawing:
    """`paint(figure)` on a new figure, `height` inches high; the same input gives the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=_DPI)
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    inline = _inline(svg.getvalue(), name, f"{title}. {alt}")
    return Drawing(name, title, caption, alt, inline, svg.getvalue(), png.getvalue())


def attempt(name: str, title: str, make: Callable[..., Drawing | None], *args: Any) -> Drawing | None:
    """make(*args), or where it raises a place-holder that says why: no picture is worth a result.

    >>> drawing = svg.attempt("eps", "Accuracy over the radius", lambda: 1 / 0)
    >>> print(drawing.failed)
    ZeroDivisionError: division by zero
    """
    try:
        return make(*args)
    except Exception as error:  # whatever NumPy, matplotlib and its fonts have to say
        why = reason(error)
        inline = Markup('<p class="muted">This figure could not be drawn ({}).</p>').format(why)
        return Drawing(name, title, "", f"could not be drawn ({why})", inline, b"", b"", why)


def reason(error: Exception) -> str:
    """ "ValueError: what it says", in one short line."""
    return f"{type(error).__name__}: {first_line(error, at_most=160)}"


def _inline(svg: bytes, name: str, alt: str) -> Markup:
    """As an element of a page: ids of its own, colours and fonts of the page, and a text alternative."""
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)  # a style in here would be one of the whole page
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if "id" in element.attrib:
            element.set("id", f"{name}-{element.get('id')}")
        target = element.attrib.pop(_XLINK, None)
        if target is not None:
            element.set("href", f"#{name}-{target[1:]}")
        for attribute in ("style", "clip-path"):
            if attribute in element.attrib:
                text = element.attrib[attribute].replace("url(#", f"url(#{name}-")
                text = re.sub(r"#[0-9a-f]{6}\b", lambda m: _VARIABLES.get(m[0], m[0]), text)
                text = re.sub(r"(font: [^;]*?[\d.]+px) [^;]*", r"\1 var(--sans)", text)
                element.set(attribute, re.sub(r"font-family: [^;]*;?", "", text))
        if element.tag == "text" and "fill:" not in element.get("style", ""):
            element.set("fill", "currentColor")
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib |= {"role": "img", "aria-label": alt}
    return Markup(ET.tostring(root, encoding="unicode"))
