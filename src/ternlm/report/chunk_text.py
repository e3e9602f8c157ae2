"""The chunks of a text in a terminal: shades and lines between them, and a table of statistics."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]

_SHADES = ("black on #bcd6f5", "black on #f6dfae")
_UNSURE, _SURE = "bold red", "dim"
_CLEAR = 0.7

_COLUMNS = {
    "number": ("chunks", ","),
    "bytes_per_chunk": ("mean", ".2f"),
    "length_p50": ("median", "d"),
    "length_p90": ("90%", "d"),
    "length_max": ("longest", "d"),
    "word_agreement": ("at words", ".1%"),
    "word_recall": ("words cut", ".1%"),
    "near_half": ("near .5", ".1%"),
}


def marked_texts(record: Row, ascii_only: bool = False) -> Iterator[Text]:
    """The text once for each stage, a line before each chunk; a red one where the router was not sure.

    Args:
        record: As `evaluation.chunks.find_chunks` returns it.
        ascii_only: Whether the terminal cannot show UTF-8.
    """
    for stage in record["stages"]:
        text = Text()
        for number, chunk in enumerate(stage["chunks"]):
            if number:
                sure = chunk["probability"] is None or chunk["probability"] >= _CLEAR
                text.append("|" if ascii_only else "│", _SURE if sure else _UNSURE)
            text.append(printable(chunk["text"], ascii_only), _SHADES[number % 2])
        yield text


def statistics_table(stages: list[Row]) -> Table:
    """One row per stage.

    Args:
        stages: With the statistics of `evaluation.chunks.ChunkCounts`.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage", justify="right", no_wrap=True)
    for label, _ in _COLUMNS.values():
        table.add_column(label, justify="right", no_wrap=True)
    for stage in stages:
        table.add_row(str(stage["stage"]), *(shown(stage, name) for name in _COLUMNS))
    return table


def labels() -> dict[str, str]:
    """What the statistics are called, by name."""
    return {name: label for name, (label, _) in _COLUMNS.items()}


def shown(stage: Row, name: str) -> str:
    """One statistic as text."""
    return "-" if stage[name] is None else format(stage[name], _COLUMNS[name][1])


def printable(text: str, ascii_only: bool = False) -> str:
    """The text with what a terminal might obey spelled out; lines stay lines."""
    spelled = "".join(
        "\n" if character == "\n" else character if character.isprintable() else repr(character)[1:-1]
        for character in text
    )
    marked = spelled.replace("\n", "\\n\n" if ascii_only else "↵\n")
    return marked.encode("ascii", "backslashreplace").decode() if ascii_only else marked


def characters(raw: bytes) -> Iterator[tuple[int, bytes, str]]:
    """Place, bytes and character of what bytes spell; of a byte that is part of no whole character, no character."""
    place = 0
    while place < len(raw):
        size, character = 1, ""
        for longer in range(1, min(4, len(raw) - place) + 1):
            try:
                character = raw[place : place + longer].decode()
            except UnicodeDecodeError:
                continue
            size = longer
            break
        yield place, raw[place : place + size], character
        place += size
