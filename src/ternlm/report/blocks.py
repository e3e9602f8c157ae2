"""What a report is made of: sections of paragraphs, tables and charts, which pages and Markdown render alike.

Plain data and no layout: `page` makes HTML of it, `markdown` text. Every table and chart names the file of the run
that its numbers are from, so that a reader can look them up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["plain", "good", "warning", "bad"]


@dataclass(frozen=True)
class Paragraph:
    """A few sentences.

    Attributes:
        text: Plain text; the renderers escape it.
        kind: ``warning`` and ``bad`` stand out.
    """

    text: str
    kind: Kind = "plain"


@dataclass(frozen=True)
class Number:
    """One of the numbers that matter, shown large.

    Attributes:
        label: What it is, in a few words.
        value: With its unit, as it is shown.
        detail: What it is compared with, or how sure it is.
        source: File of the run, relative to its folder.
    """

    label: str
    value: str
    detail: str = ""
    source: str = ""


@dataclass(frozen=True)
class Numbers:
    """The numbers that matter, side by side."""

    numbers: Sequence[Number]


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        columns: Titles.
        rows: Cells, as many as columns.
        caption: What the table shows, in one sentence.
        numeric: Places of the columns that hold numbers, set flush right.
        source: Files of the run that the numbers are from.
        kinds: How each row is set off; as many as rows, or none.
        links: Addresses of the first cells; as many as rows, or none.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    numeric: Sequence[int] = ()
    source: str = ""
    kinds: Sequence[Kind] = ()
    links: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """A picture.

    Attributes:
        title: What it shows.
        alt: What a reader sees in it, in words with its main numbers: for those who do not see it, and for Markdown.
        draw: Makes the figure, at about 420 x 260 points, in the colours of `charts`; called only where it is shown.
        source: Files of the run that the numbers are from.
        wide: Whether it takes the whole width.
    """

    title: str
    alt: str
    draw: "Callable[[], Figure]"
    source: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Text:
    """Text as a model wrote it, or a command as it was typed, in letters of one width.

    Attributes:
        text: The text.
        caption: What it is.
        emphasis: How many of its first characters were given, not written.
    """

    text: str
    caption: str = ""
    emphasis: int = 0


Block = Paragraph | Numbers | Table | Chart | Text


@dataclass(frozen=True)
class Section:
    """A part of a report with a heading.

    Attributes:
        title: The heading.
        blocks: What it holds, in order.
        is_folded: Whether a page shows only the heading until it is asked for more.
    """

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
    is_folded: bool = False
