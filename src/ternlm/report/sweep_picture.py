"""The summary of a sweep as a picture: on the left how the arms ended, on the right how they got there.

The left side has one line per arm, the best at the top, every seed a point; where a single number was swept, it is
the metric over that number. Colours on both sides are the same, so that the left one is the legend of the right.
"""

import itertools
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from ternlm.report.history import Curve
from ternlm.report.sweep import HIGHER_IS_BETTER, ArmResult, Summary
from ternlm.settings.numbers import parse_float
from ternlm.training.sweep_record import SweepDirectory

_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7b4bb7",
    "#8c564b",
    "#5f7a00",
    "#d6336c",
)
_STYLES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)))
_BASE_COLOUR, _GREY, _ALARM = "#222222", "#888888", "#c92a2a"
_TITLES = {"val/loss": "validation loss (nats per token)", "val/bpb": "validation loss (bits per byte)",
           "val/accuracy": "validation accuracy"}  # fmt: skip
_LONGEST_LABEL, _MOST_TICKS, _FAR_APART = 44, 8, 8.0

Colours = dict[str, Any]


class Swept(NamedTuple):
    """A setting that alone tells the arms apart, and its value in each of them."""

    key: str
    values: dict[str, float]


def draw_summary(sweep: SweepDirectory, summary: Summary) -> bool:
    """Replace summary.png and summary.svg; False if there is nothing to show yet.

    Raises:
        OSError: The disk is full.
    """
    from matplotlib.figure import Figure

    with_curves = [arm for arm in summary.arms if any(trial.curve for trial in arm.trials)]
    if not with_curves:
        return False
    swept = swept_number(summary)
    height = 4.2 if swept else max(4.2, 1.6 + 0.32 * len(summary.arms))
    figure = Figure(figsize=(12, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
    colours = _colours(summary, swept)
    if swept:
        _draw_over_number(left, summary, swept, colours)
    else:
        _draw_dots(left, summary, colours)
    _draw_curves(right, summary, colours)
    if swept and len(swept.values) <= _MOST_TICKS:
        _draw_legend(right, swept, colours)
    figure.suptitle(summary.id, fontsize=11)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    for ending in ("png", "svg"):
        unfinished = sweep.path / f".summary.{ending}"
        figure.savefig(unfinished, dpi=150, format=ending)
        unfinished.replace(sweep.summary(ending))
    return True


def swept_number(summary: Summary) -> Swept | None:
    """The setting that alone tells the arms apart, if it is a number with at least two values."""
    keys = {key for arm in summary.arms for key in arm.settings}
    if len(keys) != 1:
        return None
    (key,) = keys
    found = {arm.name: _number_of(arm, key) for arm in summary.arms}
    values = {name: value for name, value in found.items() if value is not None}
    return Swept(key, values) if len(values) == len(found) and len(set(values.values())) > 1 else None


def is_logarithmic(values: Sequence[float]) -> bool:
    """Whether numbers are spread by factors: all positive, and far apart or in a geometric series."""
    known = sorted(set(values))
    if len(known) < 2 or known[0] <= 0:
        return False
    ratios = [above / below for below, above in itertools.pairwise(known)]
    is_series = len(ratios) > 1 and max(ratios) < 1.05 * min(ratios)
    return is_series or known[-1] >= _FAR_APART * known[0]


def _draw_dots(axes: Any, summary: Summary, colours: Colours) -> None:
    """One line per arm, the best at the top; those without a result say why."""
    ranked = summary.ranked
    reference = next((arm.compared for arm in ranked if arm.name == summary.base and arm.compared), None)
    if reference is not None:
        axes.axvline(reference.mean, color=_GREY, linewidth=1, linestyle="--", zorder=0)
        if reference.spread is not None:
            low, high = reference.mean - reference.spread, reference.mean + reference.spread
            axes.axvspan(low, high, color=_GREY, alpha=0.15, linewidth=0, zorder=0)
    for place, arm in enumerate(ranked):
        if arm.compared is None:
            axes.text(
                0.02, place, arm.state, transform=axes.get_yaxis_transform(), va="center", color=_GREY,
                backgroundcolor="white",
            )  # fmt: skip
            continue
        colour, _ = colours[arm.name]
        values = [trial.value for trial in arm.trials if trial.value is not None]
        if arm.compared.spread is not None:
            axes.errorbar(
                arm.compared.mean, place, xerr=arm.compared.spread, color=colour, elinewidth=1.4, capsize=3, zorder=2
            )
            axes.plot(values, [place] * len(values), "o", color=colour, markersize=4, alpha=0.55, linewidth=0, zorder=3)
            axes.plot(arm.compared.mean, place, "|", color=colour, markersize=15, markeredgewidth=2, zorder=4)
        else:
            axes.plot(arm.compared.mean, place, "o", color=colour, markersize=7, zorder=3)
        axes.annotate(
            f"{arm.compared.mean:#.4g}", (max(values), place), xytext=(9, 0), textcoords="offset points", va="center",
            fontsize=8, color=_GREY, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    axes.set_yticks(range(len(ranked)), [_shortened(arm.name) for arm in ranked])
    for label, arm in zip(axes.get_yticklabels(), ranked, strict=True):
        label.set_fontweight("bold" if arm.name == summary.base else "normal")
        label.set_color(colours[arm.name][0])
    axes.set_ylim(len(ranked) - 0.5, -0.5)
    axes.margins(x=0.18)
    spread = "; bars: standard deviation over seeds" if summary.has_seeds else ""
    axes.set_xlabel(_TITLES[summary.metric] + spread)
    axes.grid(axis="x", alpha=0.3)


def _draw_over_number(axes: Any, summary: Summary, swept: Swept, colours: Colours) -> None:
    """The metric over the swept number, through the means of the seeds."""
    ended = [(swept.values[arm.name], arm, arm.compared) for arm in summary.arms if arm.compared is not None]
    ended.sort(key=lambda row: row[0])
    axes.plot([x for x, _, _ in ended], [found.mean for _, _, found in ended], color=_GREY, linewidth=1, zorder=1)
    for x, arm, found in ended:
        colour, _ = colours[arm.name]
        values = [trial.value for trial in arm.trials if trial.value is not None]
        marker = "D" if arm.name == summary.base else "o"
        axes.plot([x] * len(values), values, marker, color=colour, markersize=7 if len(values) == 1 else 5, zorder=3)
        if found.spread is not None:
            axes.errorbar(x, found.mean, yerr=found.spread, color=colour, capsize=3, zorder=2)
        if arm.name == summary.base:
            axes.annotate("base", (x, max(values)), xytext=(0, 14), textcoords="offset points", ha="center", fontsize=8,
                          color=_GREY)  # fmt: skip
    for arm in summary.arms:
        if arm.compared is None and arm.state == "diverged":
            place = (swept.values[arm.name], 0.98)
            axes.axvline(place[0], color=_ALARM, linewidth=1, linestyle=":")
            axes.annotate(
                "diverged", place, xycoords=axes.get_xaxis_transform(), rotation=90, va="top", ha="right", fontsize=8,
                color=_ALARM,
            )  # fmt: skip
    numbers = sorted(set(swept.values.values()))
    if is_logarithmic(numbers):
        axes.set_xscale("log")
        axes.minorticks_off()
    if len(numbers) <= _MOST_TICKS:
        axes.set_xticks(numbers, [f"{x:.4g}" for x in numbers])
    axes.margins(x=0.1, y=0.15)
    spread = "; bars: standard deviation over seeds" if summary.has_seeds else ""
    axes.set(xlabel=swept.key + spread, ylabel=_TITLES[summary.metric])
    axes.grid(alpha=0.3)


def _draw_curves(axes: Any, summary: Summary, colours: Colours) -> None:
    """The metric over steps: the mean of the seeds, and each of them faintly."""
    for arm in reversed(summary.ranked):
        colour, style = colours[arm.name]
        is_base = arm.name == summary.base
        curves = [trial.curve for trial in arm.trials if trial.curve]
        for curve in curves if len(curves) > 1 else []:
            axes.plot(*zip(*curve, strict=True), color=colour, linewidth=0.6, alpha=0.35, zorder=2)
        mean = _mean_curve(curves)
        axes.plot(
            [step for step, _ in mean], [value for _, value in mean], color=colour, linestyle=style,
            linewidth=1.8 if is_base else 1.3, marker="o" if len(mean) < 3 else "", markersize=3,
            zorder=4 if is_base else 3,
        )  # fmt: skip
    limits = _settled_range(summary)
    if limits is not None:
        axes.set_ylim(*limits)
    axes.set(xlabel="optimizer step", ylabel=_TITLES[summary.metric])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean at the steps that every curve has."""
    if not curves:
        return []
    values = [dict(curve) for curve in curves]
    shared = [step for step, _ in curves[0] if all(step in found for found in values)]
    return [(step, fmean(found[step] for found in values)) for step in shared]


def _draw_legend(axes: Any, swept: Swept, colours: Colours) -> None:
    """Which curve belongs to which number, in the order of the numbers."""
    from matplotlib.lines import Line2D

    order = sorted(swept.values, key=lambda name: swept.values[name])
    lines = [Line2D([], [], color=colours[name][0]) for name in order]
    labels = [f"{swept.values[name]:.4g}" for name in order]
    axes.legend(lines, labels, title=swept.key.rpartition(".")[2], frameon=False, fontsize=8, title_fontsize=8)


def _settled_range(summary: Summary) -> tuple[float, float] | None:
    """From the best value ever to the worst of the later half of each curve that ended well: the fall at the start,
    and what blew up, would flatten all the rest."""
    curves = [t.curve for t in summary.trials if t.value is not None] or [t.curve for t in summary.trials if t.curve]
    late = [value for curve in curves for _, value in curve[len(curve) // 2 :]]
    every = [value for curve in curves for _, value in curve]
    if not late:
        return None
    low, high = (min(late), max(every)) if summary.metric in HIGHER_IS_BETTER else (min(every), max(late))
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    return low - pad, high + pad


def _colours(summary: Summary, swept: Swept | None) -> Colours:
    """Colour and line style by arm: along a scale for a swept number, else the base dark and the others apart."""
    if swept:
        from matplotlib import colormaps

        order = sorted(summary.arms, key=lambda arm: swept.values[arm.name])
        scale, last = colormaps["viridis"], max(len(order) - 1, 1)
        return {arm.name: (scale(0.9 * place / last), "-") for place, arm in enumerate(order)}
    others = [arm.name for arm in summary.arms if arm.name != summary.base]
    count = len(_COLOURS)
    found = {
        name: (_COLOURS[place % count], _STYLES[place // count % len(_STYLES)]) for place, name in enumerate(others)
    }
    return {summary.base: (_BASE_COLOUR, "-"), **found}


def _number_of(arm: ArmResult, key: str) -> float | None:
    value = arm.settings.get(key)
    try:
        value = parse_float(value)
    except ValueError:
        return None
    return (
        float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        else None
    )


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 3]}..."
