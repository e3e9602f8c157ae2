"""A report as Markdown: for a repository, a mail or a terminal; charts are told in words."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from ternlm.report.blocks import Block, Chart, Kind, Numbers, Paragraph, Section, Table, Text
from ternlm.report.plain_text import printable

_SPECIAL = re.compile(r"[\\`*<\[\]|~]|(?<!\w)_|_(?!\w)")
_AT_START = re.compile(r"^(\s*)([#>+-]|\d+(?=[.)]))")
_MARKS: dict[Kind, str] = {"plain": "", "good": "", "warning": "**Warning:** ", "bad": "**Failed:** "}


def markdown(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole file, in the dialect of GitHub.

    Args:
        title, subtitle: Heading and the line below it.
        sections: Those that a page would fold are written out.
    """
    parts = [f"# {_line(title)}", _line(subtitle)]
    for section in sections:
        parts.append(f"## {_line(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(block: Block) -> str:
    return _WRITERS[type(block)](block)


def _paragraph(block: Paragraph) -> str:
    return _MARKS[block.kind] + _line(block.text)


def _numbers(block: Numbers) -> str:
    rows = []
    for number in block.numbers:
        detail = f" ({_line(number.detail)})" if number.detail else ""
        rows.append(f"- **{_line(number.label)}:** {_line(number.value)}{detail}{_source(number.source)}")
    return "\n".join(rows)


def _table(block: Table) -> str:
    caption = f"**{_line(block.caption)}**{_source(block.source)}"
    if not block.rows:
        return f"{caption}\n\nNothing to show."
    rule = ["---:" if place in block.numeric else "---" for place in range(len(block.columns))]
    links = block.links or [""] * len(block.rows)
    rows = [
        [f"[{_line(cell)}]({link})" if link and not place else _line(cell) for place, cell in enumerate(row)]
        for row, link in zip(block.rows, links, strict=True)
    ]
    lines = [[_line(column) for column in block.columns], rule, *rows]
    return f"{caption}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _chart(block: Chart) -> str:
    return f"**{_line(block.title)}.** {_line(block.alt)}{_source(block.source)}"


def _text(block: Text) -> str:
    """A fence longer than any in the text."""
    text = printable(block.text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    caption = f"**{_line(block.caption)}**\n\n" if block.caption else ""
    return f"{caption}{fence}text\n{text}\n{fence}"


def _source(source: str) -> str:
    return f" *from {_line(source)}*" if source else ""


def _line(text: str) -> str:
    """One line that shows as it is written."""
    joined = " ".join(printable(text).split())
    return _AT_START.sub(r"\1\\\2", _SPECIAL.sub(r"\\\g<0>", joined)) if not joined[:1].isdigit() else _numbered(joined)


def _numbered(text: str) -> str:
    """A line that begins with a digit is a list only with a point or bracket and a space behind it."""
    escaped = _SPECIAL.sub(r"\\\g<0>", text)
    return re.sub(r"^(\d+)([.)]) ", r"\1\\\2 ", escaped)


_WRITERS: dict[type[Block], Callable[[Any], str]] = {
    Paragraph: _paragraph, Numbers: _numbers, Table: _table, Chart: _chart, Text: _text,
}  # fmt: skip
