"""The chunks of a text in a terminal, on a page and in a picture."""

import re
import warnings
from html.parser import HTMLParser
from io import BytesIO, StringIO
from typing import Any

import pytest
from matplotlib.colors import to_hex
from rich.console import Console

from ternlm.report.chunk_page import chunk_page
from ternlm.report.chunk_picture import SHOWN, draw_chunks, draw_statistics
from ternlm.report.chunk_text import characters, marked_texts, printable, statistics_table


def stage(number: int, raw: bytes, starts: list[int], probability: list[float | None]) -> dict[str, Any]:
    ends = [*starts[1:], len(raw)]
    chunks = [
        {"start": start, "end": end, "text": raw[start:end].decode("utf-8", "backslashreplace"),
         "probability": probability[start] if start else None}
        for start, end in zip(starts, ends, strict=True)
    ]  # fmt: skip
    lengths = [0] * (max(end - start for start, end in zip(starts, ends, strict=True)) + 1)
    for start, end in zip(starts, ends, strict=True):
        lengths[end - start] += 1
    return {
        "stage": number, "chunks": chunks, "probability": probability, "number": len(starts),
        "bytes_per_chunk": len(raw) / len(starts), "length_p50": 3, "length_p90": 5, "length_max": 6,
        "lengths": lengths, "whitespace_agreement": 0.5, "whitespace_recall": None,
        "word_agreement": 0.75, "word_recall": None, "near_half": 0.125,
        "mean_probability": 0.4, "histogram": {"low": 0.0, "high": 1.0, "counts": [3, 0, 1, 2]},
    }  # fmt: skip


def record(text: str = 'Hé <b>\n"你" 🙂 & x', times: int = 1) -> dict[str, Any]:
    """Two stages: one cuts every three bytes, through characters, the other every second of these."""
    raw = (text * times).encode()
    outer = [0.9 if place % 3 == 0 else 0.1 for place in range(len(raw))]
    inner = [None if place % 3 else 0.6 if place % 6 == 0 else 0.3 for place in range(len(raw))]
    stages = [stage(0, raw, [*range(0, len(raw), 3)], outer), stage(1, raw, [*range(0, len(raw), 6)], inner)]
    return {"text": raw.decode(), "bytes": len(raw), "hex": raw.hex(), "stages": stages}


def test_the_terminal_shows_every_chunk_of_every_stage_between_lines() -> None:
    outer, inner = (text.plain for text in marked_texts(record("The fox\nran")))
    assert outer == "The│ fo│x↵\nr│an"
    assert inner == "The fo│x↵\nran"


def test_doubtful_boundaries_look_different_from_clear_ones() -> None:
    outer, inner = marked_texts(record("The fox ran"))
    styles = [{str(span.style) for span in text.spans if text.plain[span.start] == "│"} for text in (outer, inner)]
    assert styles == [{"dim"}, {"bold red"}]


def test_what_a_terminal_might_obey_is_spelled_out_and_ascii_is_enough() -> None:
    assert printable("a\x1b[2J\tb\n") == "a\\x1b[2J\\tb↵\n"
    assert printable("é\n🙂", ascii_only=True) == "\\xe9\\n\n\\U0001f642"
    for text in marked_texts(record(), ascii_only=True):
        assert text.plain.isascii() and "|" in text.plain


def test_the_statistics_fit_eighty_columns() -> None:
    made = Console(width=80, file=StringIO())
    made.print(statistics_table(record()["stages"]))
    lines = made.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 3 and not any("…" in line for line in lines)
    assert lines[1].split() == ["0", "8", "2.75", "3", "5", "6", "75.0%", "-", "12.5%"]


def test_bytes_become_characters_where_they_can() -> None:
    raw = "é".encode() + b"\xffa" + "🙂".encode()[:3]
    assert list(characters(raw)) == [
        (0, "é".encode(), "é"), (2, b"\xff", ""), (3, b"a", "a"), (4, b"\xf0", ""), (5, b"\x9f", ""), (6, b"\x99", ""),
    ]  # fmt: skip


class Page(HTMLParser):
    """Checks that elements nest, and collects boxes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.boxes: list[tuple[int, str]] = []
        self.text = ""
        self.foreign: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.foreign += [value for name, value in values.items() if name in ("src", "href")]
        if tag in ("meta", "wbr"):
            return
        if values.get("class", "").startswith("box") and "title" in values:
            depth = sum(kind.startswith("box") for _, kind in self.open)
            self.boxes.append((depth, values["title"]))
        self.open.append((tag, values.get("class", "")))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][1].startswith("u "):
            self.text += data


def read(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def test_the_page_nests_the_chunks_of_all_stages_and_needs_nothing_else() -> None:
    html = chunk_page(record("The fox ran far"), "run <1>")
    page = read(html)
    assert [depth for depth, _ in page.boxes] == [0, 1, 1, 0, 1, 1, 0, 1]
    assert page.boxes[0][1] == "stage 1: 6 bytes"
    assert page.boxes[3][1] == "stage 1: 6 bytes, p = 0.600"
    assert page.text == "The fox ran far"
    assert page.foreign == [] and "url(" not in html and "<script" not in html
    assert "run &lt;1&gt;" in html


def test_the_page_shows_any_text_as_text() -> None:
    page = read(chunk_page(record(), "x"))
    assert page.text == 'Hé <b>\n"你" F09F9982 & x'
    assert "byte 0 = 0x48: stage 0 p = 0.900, stage 1 p = 0.600" in chunk_page(record(), "x")


def test_a_long_text_takes_one_pass() -> None:
    text = record("word and more ", 400)
    page = read(chunk_page(text, "x"))
    assert page.text == text["text"]
    assert len(page.boxes) == sum(len(stage["chunks"]) for stage in text["stages"])


@pytest.mark.parametrize("times", [1, 3, 60])
def test_the_picture_shows_the_beginning_of_any_text_without_missing_glyphs(times: int) -> None:
    made = record("Hé $5 你🙂\t_", times)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_chunks(made)
        figure.savefig(content := BytesIO(), format="png")
    assert content.getvalue().startswith(b"\x89PNG")
    panels = figure.get_axes()
    assert len(panels) == -(-min(made["bytes"], SHOWN) // 60)
    names = [label.get_text() for label in panels[0].get_xticklabels()]
    assert names[:8] == ["H", "é", "·", "␣", r"\$", "5", "␣", "E4"]
    title = figure.get_suptitle()
    assert (f"the first {SHOWN} of {made['bytes']:,} bytes" in title) is (made["bytes"] > SHOWN)


def test_the_key_shows_every_colour_where_a_text_has_only_one() -> None:
    raw = b"ab"
    made = {"bytes": 2, "hex": raw.hex(), "stages": [stage(0, raw, [0, 1], [0.9, 0.8])]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_chunks(made)
        figure.savefig(BytesIO(), format="png")
    colors = {text.get_text(): handle for text, handle in zip(
        figure.legends[0].get_texts(), figure.legends[0].legend_handles, strict=True
    )}  # fmt: skip
    assert to_hex(colors["stage 0, no chunk begins"].get_facecolor()) == "#b4bac2"
    assert to_hex(colors["stage 0, a chunk begins"].get_facecolor()) == "#3b6fb6"


def test_a_picture_of_statistics_has_two_histograms_per_stage() -> None:
    figure = draw_statistics(record()["stages"])
    figure.savefig(BytesIO(), format="svg")
    assert len(figure.get_axes()) == 4
    left, right = figure.get_axes()[:2]
    assert [bar.get_height() for bar in left.patches] == record()["stages"][0]["lengths"]
    assert [round(bar.get_x() + bar.get_width() / 2, 3) for bar in right.patches] == [0.125, 0.375, 0.625, 0.875]
    assert re.search("stage 1", figure.get_axes()[2].get_xlabel())
