"""The figures of a report: what they show, and that nothing a run may hold breaks them."""

import io
import math
import warnings
from collections.abc import Callable
from itertools import combinations

import pytest
from matplotlib.figure import Figure

from ternlm.report.charts import Mark, Series, bars, heat_map, intervals, lines, stacked
from ternlm.report.palette import GROUNDS, PALETTE
from ternlm.report.short_numbers import ShortNumbers, short_number, significant


def texts(figure: Figure) -> list[str]:
    """All letters of a figure, drawn."""
    from matplotlib.text import Text

    figure.savefig(io.BytesIO(), format="svg")
    return [one.get_text() for one in figure.findobj(Text) if one.get_visible() and one.get_text()]


def curves(figure: Figure) -> list[list[tuple[float, float]]]:
    return [[(float(x), float(y)) for x, y in line.get_xydata()] for line in figure.axes[0].get_lines()]


def luminance(color: str) -> float:
    """Relative luminance of WCAG 2.2."""
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_the_measure_of_contrast_is_that_of_wcag() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("name", [name for name in PALETTE if name not in (*GROUNDS, "line")])
def test_every_colour_of_letters_and_curves_stands_out_from_every_ground(name: str, theme: int) -> None:
    for ground in GROUNDS:
        assert contrast(PALETTE[name][theme], PALETTE[ground][theme]) >= 4.5, (name, ground)


def test_no_two_light_colours_are_the_same_so_that_a_page_can_tell_them_apart() -> None:
    assert all(one[0] != other[0] for one, other in combinations(PALETTE.values(), 2))


def test_curves_hold_the_points_they_were_given_and_gaps_where_a_value_is_not_finite() -> None:
    figure = lines([Series("a", [(1, 2.5), (2, math.nan), (3, math.inf), (4, 2.25), (5, 2.0)])], "step", "nats")
    drawn = curves(figure)[0]
    assert [drawn[place] for place in (0, 3, 4)] == [(1, 2.5), (4, 2.25), (5, 2.0)]
    assert all(math.isnan(drawn[place][1]) for place in (1, 2))
    assert (1.0, 2.5) in curves(figure)[1], "a point between gaps is drawn as a dot"


def test_a_long_curve_is_thinned_and_keeps_its_highest_and_lowest_point() -> None:
    points = [(float(step), 3.0 + 0.001 * (step % 7)) for step in range(50_000)]
    points[31_337], points[17] = (31_337.0, 99.0), (17.0, -5.0)
    drawn = curves(lines([Series("a", points)], "step", "nats"))[0]
    assert len(drawn) <= 700
    assert {(31_337.0, 99.0), (17.0, -5.0), points[0], points[-1]} <= set(drawn)
    assert drawn == sorted(drawn)


def test_a_logarithmic_axis_leaves_out_what_it_cannot_show() -> None:
    figure = lines([Series("a", [(0, 0.0), (1, -1.0), (2, 10.0), (3, 1000.0)])], "step", "nats", log_y=True)
    assert figure.axes[0].get_yscale() == "log"
    assert [y for _, y in curves(figure)[0] if math.isfinite(y)] == [10, 1000]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: lines([], "x", "y"),
        lambda: lines([Series("a", []), Series("b", [(1, math.nan)])], "x", "y", [Mark(1, "stage 2")]),
        lambda: lines([Series("a", [(0, 0.0)])], "x", "y", log_y=True),
        lambda: heat_map([], [], [], "x", "y"),
        lambda: heat_map(["a"], [1], [[None]], "x", "y"),
        lambda: intervals(["a"], [None], [None], "x"),
        lambda: bars([], [], "x"),
        lambda: bars(["a"], [math.nan], "x"),
    ],
)
def test_a_figure_without_a_value_says_so(draw: Callable[[], Figure]) -> None:
    assert "no values yet" in texts(draw())


@pytest.mark.parametrize(
    "points",
    [
        [(5.0, 2.5)],
        [(0.0, 0.0), (1.0, 0.0)],
        [(step, 10.0**step) for step in range(38)],
        [(0.0, 1e99), (1.0, -1e99)],
        [(0.0, 1e-30), (1.0, 2e-30)],
        [(1e12, 3.0), (1e12 + 1, 3.0)],
        [(1.0, 3.0), (math.nan, 2.0), (2.0, 2.5)],
    ],
)
@pytest.mark.parametrize("log_y", [False, True])
def test_no_values_of_a_run_break_a_figure(points: list[tuple[float, float]], log_y: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        marks = [Mark(points[0][0], "loss_spike", "anomaly"), Mark(points[0][0], "stage 2")]
        assert texts(lines([Series("a", points)], "step", "nats", marks, log_y))


def test_steps_are_whole_numbers_also_where_there_are_few() -> None:
    axes = lines([Series("a", [(1, 3.0), (2, 2.5), (3, 2.25)])], "step", "nats").axes[0]
    assert {float(tick).is_integer() for tick in axes.get_xticks()} == {True}
    axes = lines([Series("a", [(12, 3.0)], "dots")], "step", "nats").axes[0]
    assert {float(tick).is_integer() for tick in axes.get_xticks()} == {True}
    axes = lines([Series("a", [(0.5, 3.0), (2, 2.5)])], "hours", "nats").axes[0]
    assert {float(tick).is_integer() for tick in axes.get_xticks()} == {True, False}


def test_stages_are_named_above_without_running_into_each_other_and_anomalies_once_in_the_legend() -> None:
    marks = [Mark(100, "warm-up ends"), Mark(101, "stage 2"), Mark(900, "stage 3"),
             Mark(40, "loss_spike", "anomaly"), Mark(50, "loss_spike", "anomaly")]  # fmt: skip
    shown = texts(lines([Series("a", [(step, 3.0) for step in range(1000)])], "step", "nats", marks))
    assert shown.count("loss_spike") == 1
    assert {"warm-up ends", "stage 2\n", "stage 3"} <= set(shown)


def test_a_heat_map_shows_each_value_where_its_step_is_nearest() -> None:
    figure = heat_map(["first", "second"], [0, 10, 100], [[1, 2, 3], [4, None, 6]], "step", "share", low=0, high=10)
    picture = figure.axes[0].images[0]
    (left, right, _, _), values = picture.get_extent(), picture.get_array().filled(math.nan)
    width = (right - left) / values.shape[1]
    for row, known in enumerate([[1, 2, 3], [4, None, 6]]):
        for step, value in zip([0, 10, 100], known, strict=True):
            shown = values[row][int((step - left) / width)]
            assert math.isnan(shown) if value is None else shown == value
    assert picture.get_clim() == (0, 10)


def test_of_many_rows_only_some_are_named() -> None:
    rows = [f"layer {number}" for number in range(170)]
    figure = heat_map(rows, [1, 2], [[0.1, 0.2]] * 170, "step", "share")
    named = [text for text in texts(figure) if text.startswith("layer")]
    assert named[0] == "layer 0"
    assert 10 < len(named) < 30


def test_intervals_and_bars_write_their_values_and_say_where_there_is_none() -> None:
    shown = texts(intervals(["validation", "novel"], [0.3104, None], [(0.28, 0.34), None], "nats", zero_line=True))
    assert {"0.3104", "no value", "validation", "novel"} <= set(shown)
    assert {"1.91M", "no value"} <= set(texts(bars(["packed", "bf16"], [1.91e6, None], "bytes")))


def test_parts_of_a_bar_stand_behind_each_other_and_their_sum_beside_them() -> None:
    figure = stacked(["ternary", "full"], {"ternary": [7.0, None], "other": [2.0, 9.5]}, "parameters")
    assert {"9", "9.5"} <= set(texts(figure))
    edges = [(patch.get_x(), patch.get_width()) for patch in figure.axes[0].patches]
    assert edges == [(0, 7), (0, 0), (7, 2), (0, 9.5)]


def test_a_name_with_dollars_or_control_characters_is_shown_as_it_is() -> None:
    assert any("a$b$c\\x07" in text.replace("\\$", "$") for text in texts(bars(["a$b$c\x07"], [1.0], "x")))


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [(0, 1, "0"), (2.25, 0.25, "2.25"), (15_000, 5_000, "15k"), (12_500, 2_500, "12.5k"), (2.5e-4, 5e-5, "2.5e-4"),
     (2.5e20, 2.5e20, "2.5e20"), (800, 400, "800"), (-3, 1, "-3"), (1_500_000, 500_000, "1.5M")],
)  # fmt: skip
def test_a_tick_has_as_many_digits_as_its_neighbours_need(value: float, step: float, text: str) -> None:
    assert short_number(value, step) == text


def test_ticks_of_one_axis_share_their_unit() -> None:
    assert ShortNumbers().format_ticks([0, 2500, 7500, 10_000, 12_500]) == ["0", "2.5k", "7.5k", "10.0k", "12.5k"]
    assert ShortNumbers().format_ticks([2500, 5000, 7500]) == ["2500", "5000", "7500"]
    assert ShortNumbers().format_ticks([0, 0.0005, 0.001, 0.0015]) == ["0", "0.0005", "0.0010", "0.0015"]
    assert ShortNumbers().format_ticks([2e-4, 4e-4]) == ["2e-4", "4e-4"]
    assert ShortNumbers().format_ticks([]) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.310449, "0.3104"), (0.31, "0.31"), (12_345, "12.35k"), (1.91e6, "1.91M"), (0, "0"), (100, "100"),
     (-2.5e-7, "-2.5e-7"), (9999.9, "10000"), (math.inf, "inf")],
)  # fmt: skip
def test_a_number_has_four_digits_and_no_zeros_behind_them(value: float, text: str) -> None:
    assert significant(value) == text
