"""Text charts: the right mark at the right place, in braille, blocks and ASCII."""

import math

import pytest

from ternlm.report.chart import Picture, plot, sparkline

RISE = [(float(x), float(x)) for x in range(8)]


def test_a_sparkline_climbs_with_its_values() -> None:
    assert sparkline(RISE, 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([(x, 7 - y) for x, y in RISE], 8, from_zero=True) == "█▇▆▅▄▃▂▁"
    assert sparkline(RISE, 8, ascii_only=True) == "_.-=+*#@"


def test_many_points_become_the_means_of_their_columns() -> None:
    curve = [(float(x), float(x // 50)) for x in range(200)]
    assert Picture(curve, 4).columns == pytest.approx([0.0, 1.0, 2.0, 3.0], abs=0.02)
    assert len(sparkline(curve, 17)) == 17


def test_columns_follow_steps_and_not_the_number_of_points() -> None:
    curve = [(0.0, 1.0), *((90 + x / 10, 2.0) for x in range(100))]
    assert Picture(curve, 4).columns == [1.0, None, None, 2.0]


def test_the_first_tenth_does_not_flatten_the_rest() -> None:
    curve = [(float(x), 100.0 if x < 10 else 2.0 - x / 100) for x in range(100)]
    picture = Picture(curve, 100)
    assert (picture.low, picture.high) == (pytest.approx(1.01), pytest.approx(1.9))
    assert picture.shares()[0] == 1.0, "what lies above is drawn at the top"
    from_zero = Picture(curve, 100, from_zero=True)
    assert (from_zero.low, from_zero.high) == (0.0, 100.0)


def test_a_braille_picture_has_eight_dots_to_the_character() -> None:
    assert plot(Picture([(0.0, 1.0), (1.0, 0.0)], 2), 1) == ["⢱"]
    assert plot(Picture([(0.0, 0.0), (1.0, 1.0)], 2, from_zero=True), 1) == ["⡸"]
    lines = plot(Picture(RISE, 8, from_zero=True), 2)
    assert [len(line) for line in lines] == [4, 4]
    assert lines == ["  ⡠⠊", "⡠⠊  "]


def test_an_ascii_picture_has_one_point_to_the_character() -> None:
    curve = [(float(x), float(x)) for x in range(4)]
    assert plot(Picture(curve, 4, from_zero=True), 4, ascii_only=True) == ["   *", "  * ", " *  ", "*   "]


def test_neighbours_are_joined_and_gaps_are_bridged() -> None:
    curve = [(0.0, 0.0), (8.0, 8.0)]
    lines = plot(Picture(curve, 9, from_zero=True), 9, ascii_only=True)
    assert [line.index("*") for line in lines] == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    steep = plot(Picture([(0.0, 0.0), (1.0, 8.0)], 2, from_zero=True), 9, ascii_only=True)
    assert all("*" in line for line in steep), "one line from bottom to top"


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize(
    "curve",
    [
        [(5.0, 1.0)],
        [(5.0, 1.0), (5.0, 2.0)],
        [(0.0, 3.0), (1.0, 3.0)],
        [(0.0, 1e308), (1.0, -1e308), (2.0, 1e308)],
        [(0.0, 0.0), (1.0, 0.0)],
        [(float(x), math.sin(x)) for x in range(1000)],
    ],
    ids=["one point", "one step", "constant", "huge", "zero", "noise"],
)
def test_any_curve_can_be_drawn(curve: list[tuple[float, float]], ascii_only: bool) -> None:
    for from_zero in (False, True):
        for columns in (1, 2, 37, 80):
            lines = plot(Picture(curve, columns, from_zero), 3, ascii_only)
            assert len(lines) == 3
            assert {len(line) for line in lines} <= set(range(1, columns + 1))
            assert 1 <= len(sparkline(curve, columns, from_zero, ascii_only)) <= columns
