"""Figures of a report: small, in the report's colours, legible on a phone; plain data in, matplotlib out.

Drawn in the light half of `palette.PALETTE`; a page puts its variables in place of these very colours, so one drawing
serves light, dark and paper. A figure holds no title: that is the page's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, LogLocator, NullLocator

from ternlm.report.chart_frame import (
    BAD,
    HEIGHT,
    LEGEND_LETTERS,
    LETTERS,
    LINE,
    QUIET,
    SERIES,
    WIDTH,
    draw_legend,
    even_ticks,
    is_finite,
    make_plain,
    nothing,
    plain_figure,
    row_figure,
    short,
    write_values,
)  # fmt: skip
from ternlm.report.short_numbers import ShortNumbers

_DASHES: tuple[Any, ...] = ("-", "-", (0, (5, 1.5)), (0, (2, 1.2)), (0, (7, 1.5, 2, 1.5)))
_MOST_POINTS, _COLUMNS, _MOST_ROWS = 600, 240, 26

Style = Literal["line", "dots", "thin"]


@dataclass(frozen=True)
class Series:
    """Values over time.

    Attributes:
        name: In the legend; empty leaves it out.
        points: Of x and y; a y that is None or not finite leaves a gap.
        style: ``line``; ``dots`` for values that are few; ``thin`` for raw values behind a line.
        color: Number of a colour, the same for what belongs together; None is its place among the series.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: Style = "line"
    color: int | None = None


@dataclass(frozen=True)
class Mark:
    """Something that happened at one place.

    Attributes:
        x: The place.
        label: A word or two.
        kind: A ``stage`` is a line named above the plot, an ``anomaly`` a triangle named in the legend.
    """

    x: float
    label: str
    kind: Literal["stage", "anomaly"] = "stage"


def lines(
    series: Sequence[Series], x_label: str, y_label: str, marks: Sequence[Mark] = (), log_y: bool = False
) -> Figure:
    """Curves over one axis.

    Args:
        series: Drawn in this order, thinned so that the page stays small; without a value the plot says so.
        x_label, y_label: Quantity and unit.
        marks: Stages and anomalies.
        log_y: Whether y is logarithmic; values up to 0 are then left out.
    """
    figure, axes = plain_figure()
    drawn = [_draw_series(axes, one, number, log_y) for number, one in enumerate(series)]
    if not any(drawn):
        return nothing(figure, axes)
    if log_y:
        axes.set_yscale("log")
        _locate_logarithmic(axes)
    else:
        axes.yaxis.set_major_locator(even_ticks(6))
    xs = [x for one in series for x, _ in one.points]
    axes.xaxis.set_major_locator(even_ticks(5, _are_whole(xs)))
    _draw_marks(axes, marks)
    axes.grid(axis="y", color=LINE, lw=0.7)
    axes.set_xlabel(x_label)
    axes.set_ylabel(f"{y_label}, log scale" if log_y else y_label)
    draw_legend(figure, axes)
    return figure


def heat_map(
    rows: Sequence[str],
    columns: Sequence[float],
    values: Sequence[Sequence[float | None]],
    x_label: str,
    value_label: str,
    low: float | None = None,
    high: float | None = None,
) -> Figure:
    """Values of many rows over time as colours, with a scale on the right.

    Args:
        rows: Names, the first on top.
        columns: Places on the x axis, ascending; a value is shown where its place is the nearest.
        values: Of each row at each column; None is left blank.
        x_label: Quantity and unit of the columns.
        value_label: Quantity and unit of the values.
        low, high: Values of the first and last colour; None takes the smallest and the largest.
    """
    known = [value for row in values for value in row if is_finite(value)]
    figure = Figure(figsize=(WIDTH / 72, max(HEIGHT, 90 + 10 * min(len(rows), 34)) / 72), layout="constrained")
    axes, scale = figure.subplots(1, 2, width_ratios=[1, 0.045])
    make_plain(axes)
    if not known or not columns:
        scale.set_axis_off()
        return nothing(figure, axes)
    bottom = min(known) if low is None else low
    top = max(known) if high is None else high
    top = top if top > bottom else bottom + (abs(bottom) or 1.0) * 0.01
    half = (columns[-1] - columns[0]) / max(len(columns) - 1, 1) / 2 or 0.5
    first, last = columns[0] - half, columns[-1] + half
    picture = _even_columns(columns, values, first, last)
    frame = (first, last, len(rows) - 0.5, -0.5)
    axes.imshow(picture, cmap="viridis", vmin=bottom, vmax=top, extent=frame, aspect="auto", interpolation="none")
    axes.xaxis.set_major_locator(even_ticks(4, _are_whole(columns)))
    every = -(-len(rows) // _MOST_ROWS)
    axes.set_yticks(range(0, len(rows), every), [short(name) for name in rows[::every]], fontsize=LETTERS - 1)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(x_label)
    scale.imshow([[i / 63] for i in range(64)], cmap="viridis", extent=(0, 1, bottom, top), aspect="auto",
                 interpolation="none", origin="lower")  # fmt: skip
    make_plain(scale)
    scale.spines[:].set_visible(False)
    scale.xaxis.set_major_locator(NullLocator())
    scale.yaxis.set_major_locator(even_ticks(5))
    scale.yaxis.tick_right()
    scale.yaxis.set_label_position("right")
    scale.set_ylabel(value_label)
    return figure


def intervals(
    names: Sequence[str],
    values: Sequence[float | None],
    ends: Sequence[tuple[float, float] | None],
    x_label: str,
    zero_line: bool = False,
) -> Figure:
    """A point per name with the interval it is known to, the first on top, the values written beside them.

    Args:
        names: What each point is.
        values: None for one that is not known.
        ends: Of each interval; None where there is none.
        x_label: Quantity and unit.
        zero_line: Whether 0 is shown, as for differences.
    """
    figure, axes = row_figure(names)
    known = [(place, value) for place, value in enumerate(values) if value is not None and math.isfinite(value)]
    if not known:
        return nothing(figure, axes)
    for place, value in known:
        interval = ends[place]
        if interval is not None and all(math.isfinite(end) for end in interval):
            axes.plot(interval, [place, place], color=SERIES[0], lw=2.2, solid_capstyle="butt")
        axes.plot([value], [place], "o", ms=5.5, color=SERIES[0])
    if zero_line:
        axes.axvline(0, color=QUIET, lw=1, ls=(0, (4, 2)), zorder=0)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(even_ticks(4))
    axes.grid(axis="x", color=LINE, lw=0.7)
    axes.set_xlabel(x_label)
    write_values(axes, names, values)
    return figure


def bars(names: Sequence[str], values: Sequence[float | None], x_label: str) -> Figure:
    """A bar per name from 0, the first on top, the values written beside them.

    Args:
        names: What each bar is.
        values: None for one that is not known.
        x_label: Quantity and unit.
    """
    return stacked(names, {"": [value if is_finite(value) else math.nan for value in values]}, x_label)


def stacked(names: Sequence[str], parts: Mapping[str, Sequence[float | None]], x_label: str) -> Figure:
    """A bar per name made of parts, the first on top, the sums written beside them.

    Args:
        names: What each bar is.
        parts: By name, a length for each bar; all of one sign.
        x_label: Quantity and unit.
    """
    figure, axes = row_figure(names)
    lengths = {part: [float(one) if one is not None and is_finite(one) else 0.0 for one in row]
               for part, row in parts.items()}  # fmt: skip
    known = [any(is_finite(row[place]) for row in parts.values()) for place in range(len(names))]
    if not any(known):
        return nothing(figure, axes)
    starts = [0.0] * len(names)
    for number, (part, row) in enumerate(lengths.items()):
        axes.barh(range(len(names)), row, 0.62, left=starts, color=SERIES[number % len(SERIES)], label=part)
        starts = [start + length for start, length in zip(starts, row, strict=True)]
    axes.xaxis.set_major_locator(even_ticks(4))
    axes.grid(axis="x", color=LINE, lw=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label)
    write_values(axes, names, [total if is_known else None for total, is_known in zip(starts, known, strict=True)])
    if len(parts) > 1:
        draw_legend(figure, axes)
    return figure


def _draw_series(axes: Axes, series: Series, number: int, log_y: bool) -> bool:
    """Whether there was anything to draw."""
    points = [(x, float(y) if is_finite(y) and (y > 0 or not log_y) else math.nan)
              for x, y in series.points if is_finite(x)]  # fmt: skip
    if not any(math.isfinite(y) for _, y in points):
        return False
    xs, ys = zip(*_thinned(points), strict=True)
    place = number if series.color is None else series.color
    color = SERIES[place % len(SERIES)]
    if series.style == "thin":
        axes.plot(xs, ys, color=color, lw=0.8, alpha=0.4, label=series.name)
    elif series.style == "dots":
        axes.plot(xs, ys, color=color, lw=0.8, marker="o", ms=4, label=series.name)
    else:
        alone = [i for i, y in enumerate(ys) if math.isfinite(y) and not _has_neighbour(ys, i)]
        axes.plot(xs, ys, color=color, lw=1.8, ls=_DASHES[place % len(_DASHES)], label=series.name)
        axes.plot([xs[i] for i in alone], [ys[i] for i in alone], "o", ms=4, color=color)
    return True


def _has_neighbour(ys: Sequence[float], place: int) -> bool:
    return any(math.isfinite(y) for y in (*ys[max(place - 1, 0) : place], *ys[place + 1 : place + 2]))


def _are_whole(places: Sequence[float]) -> bool:
    """Whether places are counted, as steps are."""
    return all(is_finite(place) and float(place).is_integer() for place in places)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of each stretch its lowest and highest point, so that no peak is lost."""
    if len(points) <= _MOST_POINTS:
        return points
    length = -(-2 * len(points) // _MOST_POINTS)
    kept = [points[0]]
    for start in range(0, len(points), length):
        stretch = points[start : start + length]
        finite = [point for point in stretch if math.isfinite(point[1])]
        chosen = {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])} if finite else set()
        kept += sorted(chosen) or stretch[:1]
    return [*kept, points[-1]]


def _locate_logarithmic(axes: Axes) -> None:
    """Ticks at 1, 2, 5 of each decade, or closer where the values span less than a few."""
    low, high = axes.get_ylim()
    is_wide = high > 6 * low
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8) if is_wide else even_ticks(6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ShortNumbers())


def _draw_marks(axes: Axes, marks: Sequence[Mark]) -> None:
    """Stages as lines with their names above, in rows so that they do not run into each other; anomalies on top."""
    low, high = axes.get_xlim()
    stages = sorted((mark for mark in marks if mark.kind == "stage" and is_finite(mark.x)), key=lambda mark: mark.x)
    ends: list[float] = []
    names = []
    for mark in stages:
        axes.axvline(mark.x, color=QUIET, lw=0.9, ls=(0, (3, 2)), zorder=1)
        half = (len(mark.label) + 1) / 2 * (high - low) / LEGEND_LETTERS
        row = next((row for row, end in enumerate(ends) if mark.x - half >= end), len(ends))
        ends[row : row + 1] = [mark.x + half]
        names.append(mark.label + "\n" * row if row < 3 else "")
    if stages:
        above = axes.secondary_xaxis("top")
        above.xaxis.set_major_locator(FixedLocator([mark.x for mark in stages]))
        above.xaxis.set_major_formatter(FixedFormatter(names))
        above.tick_params(labelsize=LETTERS - 0.5, length=0, colors=QUIET)
        above.spines["top"].set_visible(False)
    anomalies = [mark for mark in marks if mark.kind == "anomaly" and is_finite(mark.x)]
    if anomalies:
        axes.plot([mark.x for mark in anomalies], [0.985] * len(anomalies), "v", ms=6, color=BAD, mew=0,
                  transform=axes.get_xaxis_transform(), clip_on=False, zorder=5,
                  label=", ".join(dict.fromkeys(mark.label for mark in anomalies)))  # fmt: skip
    axes.set_xlim(min([low, *(mark.x for mark in stages + anomalies)]),
                  max([high, *(mark.x for mark in stages + anomalies)]))  # fmt: skip


def _even_columns(
    columns: Sequence[float], values: Sequence[Sequence[float | None]], first: float, last: float
) -> list[list[float]]:
    """The values at even distances: each that of the nearest column."""
    places, nearest = [], 0
    count = min(_COLUMNS, len(columns) * 8)
    for number in range(count):
        x = first + (last - first) * (number + 0.5) / count
        while nearest + 1 < len(columns) and abs(columns[nearest + 1] - x) <= abs(columns[nearest] - x):
            nearest += 1
        places.append(nearest)
    return [[math.nan if not is_finite(value := row[place]) else float(value or 0) for place in places]
            for row in values]  # fmt: skip
