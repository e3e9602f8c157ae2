"""An analysis as tables and pictures: every number where it belongs, for two blocks and for two dozen."""

import io
from typing import Any

import pytest
from rich.console import Console

from ternlm.report.analysis_pictures import draw_all
from ternlm.report.analysis_tables import csv_rows, full_tables, sentences, summary_table

PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj")


def an_analysis(blocks: int) -> dict[str, Any]:
    """An analysis whose numbers tell block and part."""

    def place(block: int, part: str) -> dict[str, Any]:
        return {"name": f"layers.{block}.{part}", "block": block, "part": part}

    histogram = {"low": -1.0, "high": 1.0, "counts": [1, 2, 4, 0]}
    everywhere = [(block, part) for block in range(blocks) for part in PARTS]
    changed = {"loss": 2.1, "change": 0.1, "error": 0.01}
    return {
        "matrices": [
            place(block, part)
            | {"rows": 4, "columns": 8, "weights": "ternary", "negative": 0.3, "zero": 0.4 + block / 100,
               "positive": 0.3 - block / 100, "dead_rows": 0, "distinct_codes": 3, "relative_error": 0.25,
               "scale_median": 0.5, "scale_q05": 0.4, "scale_q95": 0.6, "threshold_median": 0.5, "unit": "scale",
               "histogram": histogram}
            for block, part in everywhere
        ],
        "sites": [
            place(block, part)
            | {"bits": 4, "codes_used": 9, "utilization": 0.6, "entropy": 0.5, "clip_rate": 0.01, "at_limit": 0.1,
               "step": 0.1, "std": 1.0, "absmax": 3.0, "codes": [1] * 15, "unit": "largest code",
               "histogram": histogram}
            for block, part in everywhere
        ],
        "norms": [
            place(block, "attention_norm")
            | {"clip_rate": 0.0, "saturation": 0.1, "alpha_eff": 0.5, "clip": 3.0, "stream_std": 1.0 + block}
            for block in range(blocks)
        ],
        "stream": [{"name": f"layers.{block}", "block": block, "std": 1.0, "absmax": 2.0} for block in range(blocks)],
        "skips": [place(block, "attention_scale") | {"value": 0.3} for block in range(blocks)],
        "sensitivity": {
            "targets": 100, "loss": 2.0, "full_precision": {"name": "everything", "block": None} | changed,
            "activations": {"name": "activations", "block": None} | changed,
            "blocks": [place(block, "whole block") | changed for block in range(blocks)],
            "layers": [place(block, part) | changed for block, part in everywhere]
            + [{"name": "lm_head", "block": None, "part": "lm_head"} | changed],
        },
        "time": {
            "tokens": 64, "repeats": 3,
            "parts": [{"name": name, "block": None, "forward_ms": 1.0, "backward_ms": 2.0}
                      for name in ("embedding", *(f"block {block}" for block in range(blocks)), "head")],
        },
        "alarms": [],
    }  # fmt: skip


def text_of(*shown: Any, width: int = 100) -> list[str]:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    for part in shown:
        console.print(part)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("blocks", [1, 2, 24])
def test_every_picture_is_drawn_with_a_panel_per_part_and_a_line_per_block(blocks: int) -> None:
    figures = draw_all(an_analysis(blocks))
    assert list(figures) == ["occupancy", "scales", "weights", "activations", "norms", "sensitivity", "time"]
    axes = figures["occupancy"].axes
    assert [panel.get_title() for panel in axes] == [part.replace(".", "\n") for part in PARTS]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == [str(block) for block in range(blocks)]
    last = [bar for bar in axes[0].patches if round(bar.get_y() + bar.get_height() / 2) == blocks - 1]
    assert [round(bar.get_width(), 3) for bar in last] == [
        0.3,
        round(0.39 + blocks / 100, 3),
        round(0.31 - blocks / 100, 3),
    ]
    assert last[2].get_x() + last[2].get_width() == pytest.approx(1.0)
    sensitivity = figures["sensitivity"].axes
    assert [panel.get_title() for panel in sensitivity][0::4] == ["whole block", "lm_head"]
    assert [label.get_text() for label in sensitivity[0].get_yticklabels()][-1] == "none"
    assert len(figures["time"].axes[0].get_yticklabels()) == blocks + 2
    for figure in figures.values():
        for kind in ("png", "svg"):
            picture = io.BytesIO()
            figure.savefig(picture, format=kind)
            assert picture.getbuffer().nbytes > 1000


@pytest.mark.parametrize("blocks", [2, 24])
def test_texts_of_a_picture_neither_overlap_nor_leave_it(blocks: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for name, figure in draw_all(an_analysis(blocks)).items():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        texts = [figure._suptitle, figure._supxlabel, *(t for legend in figure.legends for t in legend.get_texts())]
        for axes in figure.axes:
            low, high = sorted(axes.get_xlim())
            ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
            texts += [
                axes.title,
                axes.xaxis.label,
                *axes.get_yticklabels(minor=True),
                *(label for tick, label in ticks if low <= tick <= high),
            ]
        drawn = [text for text in texts if text is not None and text.get_text()]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in drawn]
        for number, (first, box) in enumerate(boxes):
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, (name, first)
            for second, other in boxes[number + 1 :]:
                assert not box.overlaps(other), f"{name}: '{first}' and '{second}' overlap"


def test_a_code_of_a_small_codebook_is_a_line_and_of_a_large_one_the_ends_are() -> None:
    analysis = an_analysis(2)
    (panel, *_) = draw_all(analysis)["activations"].axes
    assert len([line for line in panel.lines if list(line.get_ydata()) == [0, 1]]) == 15
    for row in analysis["sites"]:
        row["bits"] = 8
    (panel, *_) = draw_all(analysis)["activations"].axes
    lines = [line.get_xdata()[0] for line in panel.lines if list(line.get_ydata()) == [0, 1]]
    assert lines == [-1, 0, 1]


def test_pictures_that_would_be_empty_are_left_out() -> None:
    analysis = an_analysis(2) | {"norms": [], "sensitivity": None, "time": None}
    for row in analysis["matrices"]:
        row |= {"negative": None, "zero": None, "positive": None, "scale_median": None, "threshold_median": None}
    for row in analysis["sites"]:
        row |= {"bits": None}
    assert list(draw_all(analysis)) == ["weights", "activations"]


def test_the_summary_says_where_the_extremes_are_and_does_not_grow_with_the_model() -> None:
    small, large = (text_of(summary_table(an_analysis(blocks))) for blocks in (2, 24))
    assert len(small) == len(large) <= 18
    zeros = next(line.split() for line in large if line.startswith("weights at 0"))
    assert zeros[3:] == ["40.0%", "0.q_proj", "52.0%", "63.0%", "23.gate_proj"]


def test_a_place_in_the_summary_is_never_two_places() -> None:
    analysis = an_analysis(2)
    for row in analysis["matrices"]:
        row["part"] = row["part"].replace("q_proj", "in").replace("gate_proj", "in")
    zeros = next(line.split() for line in text_of(summary_table(analysis)) if line.startswith("weights at 0"))
    assert zeros[3:] == ["40.0%", "0.self_attn.in", "41.0%", "41.0%", "1.mlp.in"]


def test_full_tables_hold_every_row() -> None:
    analysis = an_analysis(24)
    lines = text_of(*full_tables(analysis), width=140)
    for rows in csv_rows(analysis).values():
        for row in rows:
            assert any(line.startswith(f"{row['name']} ") for line in lines), row["name"]
    assert not any("…" in line for line in lines)


def test_rows_for_spreadsheets_are_flat() -> None:
    for rows in csv_rows(an_analysis(2)).values():
        assert all(not isinstance(value, dict | list) for row in rows for value in row.values())


def test_sentences_say_the_loss_and_one_alarm_of_each_kind() -> None:
    analysis = an_analysis(2)
    assert sentences(analysis, full=False) == [
        "loss 2.0000 nats per target over 100 targets; +0.1000 with activations in full precision; "
        "+0.1000 with everything in full precision",
        "no alarms",
    ]
    alarm = {"kind": "dead_rows", "name": "a", "value": 1, "limit": 0, "sentence": "a: 1 row is dead."}
    worse = alarm | {"name": "b", "value": 7, "sentence": "b: 7 rows are dead."}
    analysis["alarms"] = [alarm, worse]
    assert sentences(analysis, full=False)[1:] == ["ALARM b: 7 rows are dead. And 1 more like it (--full)."]
    assert sentences(analysis, full=True)[1:] == ["ALARM a: 1 row is dead.", "ALARM b: 7 rows are dead."]


def test_full_precision_is_said_in_a_sentence() -> None:
    analysis = an_analysis(1)
    for row in analysis["matrices"]:
        row["weights"] = "none"
    assert sentences(analysis, full=False)[0] == "Nothing is quantized: this model computes in full precision."
