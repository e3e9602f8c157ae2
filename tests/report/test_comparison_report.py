"""A comparison as a table, a spreadsheet and a picture, from a record made up for it."""

import csv
import io
from typing import Any

import pytest
from rich.console import Console

from ternlm.report.comparison import WIDTH, as_csv, as_table, baseline_rows, sentences, short_size
from ternlm.report.comparison_picture import draw_comparison


def row(name: str, rank: int | None, bpb: float | None, **facts: Any) -> dict[str, Any]:
    base = {
        "name": name, "rank": rank, "bpb": bpb, "family": "hgrn", "weights": "quantized", "parameters": 1_250_000,
        "ternary_parameters": 10, "state_bytes": 4096, "bytes_per_sec": 12_345.0, "sequence_length": 64,
        "difference": None if bpb is None else bpb - 1.5, "ties_best": False, "difference_ci95": None,
        "bpb_ci95": None if bpb is None else (bpb - 0.02, bpb + 0.04), "checkpoint": f"runs/{name}", "loss": 1.0,
    }  # fmt: skip
    return base | facts


def record(**values: Any) -> dict[str, Any]:
    models = [
        row("first", 1, 1.5),
        row("twin", 2, 1.51, weights="full", ties_best=True, difference_ci95=(-0.01, 0.03)),
        row("third", 3, 2.25, family="bitnet", parameters=999, bytes_per_sec=None, difference_ci95=(0.7, 0.8)),
    ]
    bits = {"uniform": 8.0, "unigram": None, "3-gram": 1.9, "gzip": 2.5, "xz": None, "ngram_training_bytes": 1234}
    return {
        "documents": 17, "bytes": 4321, "protocol": "block", "text_id": "x", "models": models, "baselines": bits,
        "baselines_of": "first", **values,
    }  # fmt: skip


def shown(given: dict[str, Any], ascii_only: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=WIDTH)
    console.print(as_table(given, ascii_only))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


def test_the_table_ranks_models_and_puts_baselines_where_they_would_stand() -> None:
    lines = shown(record())
    first_words = [line.split()[0] for line in lines[1:]]
    assert first_words == ["1", "2=", "3-gram", "3", "gzip", "uniform"]
    assert "1.5000 ±0.0300" in lines[1]
    assert "+0.0100 ±0.0200" in lines[2]
    assert "12.3k" in lines[1]
    assert "4.0 KiB" in lines[1]
    assert "1.2M" in lines[1]
    assert lines[4].split()[-3:] == ["-", "4.0", "KiB"]


def test_a_terminal_without_unicode_gets_ascii() -> None:
    assert "\n".join(shown(record(), ascii_only=True)).isascii()


def test_a_model_without_bits_is_shown_last_without_a_rank() -> None:
    lines = shown(record(models=[row("known", 1, 1.5), row("unknown", None, None)]))
    assert lines[-1].split()[:2] == ["-", "unknown"]
    assert any("unknown token hides text" in line for line in sentences(record(models=[row("u", None, None)])))


def test_sentences_say_what_makes_numbers_unlike() -> None:
    lines = sentences(record())
    assert lines[0].startswith("4,321 bytes in 17 documents; protocol block")
    assert any("1,234 bytes of the text that 'first' was trained on" in line for line in lines)
    assert not any("windows differ" in line for line in lines)
    others = [row("a", 1, 1.0, sequence_length=64), row("b", 2, 2.0, sequence_length=1024)]
    assert any("windows differ (64, 1,024 tokens)" in line for line in sentences(record(models=others)))
    few = [row("a", 1, 1.0, bpb_ci95=None), row("b", 2, 2.0, bpb_ci95=None)]
    assert any("too few documents" in line for line in sentences(record(models=few)))


def test_baselines_that_are_not_known_are_left_out() -> None:
    assert baseline_rows(record()) == [("3-gram", 1.9), ("gzip", 2.5), ("uniform", 8.0)]
    assert baseline_rows(record(baselines=None)) == []


def test_the_spreadsheet_has_one_line_per_model_and_baseline() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(record()))))
    assert [each["name"] for each in rows] == ["first", "twin", "third", "3-gram", "gzip", "uniform"]
    assert float(rows[1]["difference_low"]) == -0.01
    assert float(rows[0]["bpb_high"]) == pytest.approx(1.54)
    assert rows[0]["difference_low"] == ""
    assert rows[3]["family"] == "baseline"


def test_the_picture_shows_the_sizes_only_where_they_differ() -> None:
    assert len(draw_comparison(record()).axes) == 2
    alike = draw_comparison(record(models=[row("a", 1, 1.0), row("b", 2, 1.1)]))
    (axes,) = alike.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a  1", "b  2"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the best on top
    assert draw_comparison(record(models=[row("u", None, None)])) is None


def test_far_baselines_are_not_drawn() -> None:
    texts = {text.get_text() for text in draw_comparison(record()).axes[0].texts}
    assert {"3-gram", "gzip"} <= texts
    assert "uniform" not in texts


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 19, "1.5 MiB"), (1 << 31, "2.0 GiB")]
)
def test_sizes_are_short(count: int, text: str) -> None:
    assert short_size(count) == text
