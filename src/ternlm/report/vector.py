"""A figure as SVG inside a page: colours by the page's variables, letters of the page, ids of its own."""

import io
import re
import warnings
from html import escape

from matplotlib import rc_context
from matplotlib.figure import Figure

from ternlm.report.palette import PALETTE
from ternlm.report.plain_text import printable

_HEAD = re.compile(r"\A.*?(?=<svg)|<metadata>.*?</metadata>|<!--.*?-->", re.DOTALL)
_SIZE = re.compile(r'<svg [^>]*?viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>')
_ID = re.compile(r' id="([^"]+)"')
_REFERENCE = re.compile(r'(url\(#|href="#)([^")]+)')
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_PATH = re.compile(r' d="[^"]*"')
_FONT = re.compile(r"font: ([\d.]+)px [^;\"]*")
_FAMILY = re.compile(r" font-family: [^;\"]*;?")
_COLOR = re.compile("|".join(light for light, _ in PALETTE.values()))
_VARIABLES = {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}


def inline_svg(figure: Figure, name: str, title: str, alt: str) -> str:
    """The SVG element, with a title and a description for those who do not see it.

    Args:
        figure: Drawn in the light colours of `palette.PALETTE`.
        name: A word that no other picture of the page has; it begins every id.
        title: What the picture shows.
        alt: What a reader sees in it.
    """
    content = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify": True}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page's letters have it, or show a box
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    svg = _HEAD.sub("", content.getvalue())
    used = {reference for _, reference in _REFERENCE.findall(svg)}
    svg = _ID.sub(lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", svg)
    svg = _REFERENCE.sub(rf"\1{name}-\2", svg)
    svg = _PATH.sub(lambda match: _NUMBER.sub(_rounded, match[0]).replace("\n", ""), svg)
    svg = _FAMILY.sub("", _FONT.sub(r"font-size: \1px", svg))
    svg = _COLOR.sub(lambda match: _VARIABLES[match[0]], svg)
    return _SIZE.sub(lambda match: _opening(match[1], match[2], name, title, alt), svg, count=1).strip()


def _opening(width: str, height: str, name: str, title: str, alt: str) -> str:
    shown, described = escape(printable(title)), escape(printable(alt))
    return (
        f'<svg viewBox="0 0 {width} {height}" style="--width: {float(width):.0f}px" role="img" '
        f'aria-labelledby="{name}-title" aria-describedby="{name}-alt" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">\n'
        f'<title id="{name}-title">{shown}</title>\n<desc id="{name}-alt">{described}</desc>'
    )


def _rounded(match: re.Match[str]) -> str:
    return f"{float(match[0]):.1f}".removesuffix(".0")
