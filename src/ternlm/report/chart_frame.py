"""The frame of every figure of a report: its size, axes, letters, legend, and what stands where there is no value."""

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator

from ternlm.report.palette import PALETTE
from ternlm.report.plain_text import printable
from ternlm.report.short_numbers import ShortNumbers, significant

WIDTH, HEIGHT = 340, 230
"""Points of a figure: drawn 1:1 on a phone."""

LETTERS = 10.0
SERIES = [light for name, (light, _) in PALETTE.items() if name.startswith("series")]
INK, QUIET, LINE, BAD = (PALETTE[name][0] for name in ("ink", "quiet", "line", "bad"))
LEGEND_LETTERS = 48
"""Letters that fit side by side."""

_LONGEST_NAME = 26


def plain_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
    axes = figure.subplots()
    make_plain(axes)
    return figure, axes


def row_figure(names: Sequence[str]) -> tuple[Figure, Axes]:
    """A line of letters per name."""
    figure = Figure(figsize=(WIDTH / 72, (70 + 24 * max(len(names), 2)) / 72), layout="constrained")
    axes = figure.subplots()
    make_plain(axes)
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    return figure, axes


def make_plain(axes: Axes) -> None:
    """No frame where there is no axis, quiet axes, small letters."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(QUIET)
    axes.tick_params(labelsize=LETTERS, colors=QUIET, width=0.8, length=3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(fontsize=LETTERS, color=INK)
        axis.set_major_formatter(ShortNumbers())


def even_ticks(count: int, is_whole: bool = False) -> MaxNLocator:
    """At most so many steps between ticks, at round numbers, or at whole ones."""
    return MaxNLocator(count, steps=[1, 2, 5, 10] if is_whole else [1, 2, 2.5, 5, 10], integer=is_whole, min_n_ticks=1)


def draw_legend(figure: Figure, axes: Axes) -> None:
    """What colours mean, below; nothing where there is nothing to tell apart."""
    handles, labels = axes.get_legend_handles_labels()
    pairs = [(handle, short(label, 2 * _LONGEST_NAME)) for handle, label in zip(handles, labels, strict=True) if label]
    if len(pairs) < 2 and not any(isinstance(handle, Line2D) and handle.get_marker() == "v" for handle, _ in pairs):
        return
    widest = max(len(label) for _, label in pairs) + 5
    figure.legend(*zip(*pairs, strict=True), loc="outside lower center", ncols=max(1, LEGEND_LETTERS // widest),
                  frameon=False, fontsize=LETTERS, labelcolor=INK, handlelength=1.6, columnspacing=1.2)  # fmt: skip


def write_values(axes: Axes, names: Sequence[str], values: Sequence[float | None]) -> None:
    """The numbers themselves, flush at the right edge."""
    right = axes.secondary_yaxis("right")
    texts = ["no value" if value is None or not math.isfinite(value) else significant(value) for value in values]
    right.yaxis.set_major_locator(FixedLocator(range(len(names))))
    right.yaxis.set_major_formatter(FixedFormatter(texts))
    right.spines["right"].set_visible(False)
    right.tick_params(labelsize=LETTERS, length=0, colors=INK)


def nothing(figure: Figure, axes: Axes) -> Figure:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "no values yet", ha="center", va="center", color=QUIET, fontsize=LETTERS + 1,
              transform=axes.transAxes)  # fmt: skip
    return figure


def short(name: str, longest: int = _LONGEST_NAME) -> str:
    shown = " ".join(printable(name).split())
    return (shown if len(shown) <= longest else f"{shown[: longest - 1]}…").replace("$", r"\$")


def is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < 1e100
