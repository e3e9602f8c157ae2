"""The pictures of an analysis: plain data in, matplotlib figures out."""

import math
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from ternlm.report.analysis_panels import (
    TEXT,
    Panel,
    Row,
    grouped,
    histograms,
    legend_below,
    make_plain,
    side_by_side,
)

_BLUE, _GREY, _ORANGE = "#3b6fb6", "#d9d9d9", "#e08214"
_FEW_CODES = 31


def draw_all(analysis: Row) -> dict[str, Figure]:
    """The pictures of an analysis by name; one that would show nothing is left out.

    Args:
        analysis: As `evaluation.analysis.analyze` returns it.
    """
    drawers: dict[str, Callable[[Row], Figure | None]] = {
        "occupancy": _occupancy,
        "scales": _scales,
        "weights": _weights,
        "activations": _activations,
        "norms": _norms,
        "sensitivity": _sensitivity,
        "time": _time,
    }
    figures = {name: draw(analysis) for name, draw in drawers.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _occupancy(analysis: Row) -> Figure | None:
    rows = [row for row in analysis["matrices"] if row["zero"] is not None]
    if not rows:
        return None
    figure, panels = side_by_side(rows, "Codes of the weights, in percent of each matrix")
    for panel in panels:
        left = [0.0] * len(panel.rows)
        for key, label, color in (("negative", "-1", _BLUE), ("zero", "0", _GREY), ("positive", "+1", _ORANGE)):
            shares = panel.values(key)
            panel.axes.barh(panel.places, shares, left=left, color=color, height=0.8, label=label)
            left = [start + share for start, share in zip(left, shares, strict=True)]
        panel.axes.set(xlim=(0, 1), xticks=(0, 0.5, 1))
        panel.axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    legend_below(figure, panels[0].axes)
    return figure


def _scales(analysis: Row) -> Figure | None:
    rows = [row for row in analysis["matrices"] if row["scale_median"] is not None]
    if not rows:
        return None
    figure, panels = side_by_side(rows, "Scales of the weights, and the size from which a weight is not 0")
    for panel in panels:
        panel.axes.hlines(panel.places, panel.values("scale_q05"), panel.values("scale_q95"),
                          color=_BLUE, alpha=0.4, lw=4, label="scale, 5% to 95% of all")  # fmt: skip
        panel.axes.plot(panel.values("scale_median"), panel.places, "o", color=_BLUE, ms=4, label="scale, median")
        edges = [
            (row["threshold_median"] * row["scale_median"], place)
            for row, place in zip(panel.rows, panel.places, strict=True)
            if row["threshold_median"] is not None
        ]
        if edges:
            panel.axes.plot(*zip(*edges, strict=True), "o", mfc="none", mec=_ORANGE, ms=5, label="threshold, median")
        panel.axes.set_xlim(0, 1.15 * max(panel.values("scale_q95")))
        panel.axes.xaxis.set_major_locator(MaxNLocator(2))
        panel.axes.grid(axis="x", alpha=0.3)
    legend_below(figure, panels[0].axes)
    return figure


def _weights(analysis: Row) -> Figure | None:
    def show(panel: Panel) -> None:
        part, unit = panel.rows[0]["part"], panel.rows[0]["unit"]
        panel.axes.set_title(_lines(part), fontsize=TEXT + 1)
        panel.axes.set_xlabel(f"weight / {unit}", fontsize=TEXT)
        panel.axes.set_ylim(bottom=0)
        edges = [edge for edge in panel.values("threshold_median") if edge is not None]
        for edge in {min(edges), max(edges)} if edges else ():
            for side in (-edge, edge):
                panel.axes.axvline(side, color="grey", ls="--", lw=0.7)

    rows = analysis["matrices"]
    title = "Latent weights; dashed lines: what lies between them is 0"
    if all(row["threshold_median"] is None for row in rows):
        title = "Latent weights"
    return histograms(rows, title, lambda row: (row["part"], row["unit"]), show) if rows else None


def _activations(analysis: Row) -> Figure | None:
    def show(panel: Panel) -> None:
        part, bits = panel.rows[0]["part"], panel.rows[0]["bits"]
        _show_decades(panel)
        panel.axes.set_title(f"{_lines(part)}, {'not rounded' if bits is None else f'{bits} bits'}", fontsize=TEXT + 1)
        panel.axes.set_xlabel(f"activation / {'root mean square' if bits is None else 'step'}", fontsize=TEXT)
        if bits is not None:
            _draw_codes(panel, 2 ** (bits - 1) - 1)

    rows = [row for row in analysis["sites"] if row["histogram"]]
    title = "Activations before they are rounded; grey lines: codes, of large codebooks 0 and the ends"
    if not any(row["bits"] for row in rows):
        title = "Inputs of the layers, none of them rounded"
    return histograms(rows, title, lambda row: (row["part"], row["bits"]), show) if rows else None


def _show_decades(panel: Panel) -> None:
    """A logarithmic scale from one power of ten to another, so that at least two are named."""
    curves: list[Any] = [line.get_ydata() for line in panel.axes.lines]
    densities = [density for curve in curves for density in curve if density > 0]
    if densities:
        low, high = math.floor(math.log10(min(densities))), math.ceil(math.log10(max(densities)))
        panel.axes.set_yscale("log")
        panel.axes.set_ylim(10.0**low, 10.0 ** max(high, low + 1))
        panel.axes.yaxis.set_minor_formatter(NullFormatter())


def _lines(part: str) -> str:
    """The path of a part on two lines."""
    return part.replace(".", "\n", 1)


def _draw_codes(panel: Panel, largest: int) -> None:
    """A line at each code of a small codebook, at the middle and the ends of a large one."""
    is_small = 2 * largest + 1 <= _FEW_CODES
    for code in range(-largest, largest + 1) if is_small else (-largest, 0, largest):
        panel.axes.axvline(code / largest, color="grey", lw=0.6, alpha=0.7, zorder=0)
    named = sorted({-largest, -(largest // 2), 0, largest // 2, largest})
    panel.axes.set_xticks([code / largest for code in named], [str(code) for code in named])


def _norms(analysis: Row) -> Figure | None:
    shown = {
        "clip_rate": "share clipped",
        "saturation": "share saturated",
        "alpha_eff": "slope at 0 (alpha)",
        "stream_std": "std of the input",
    }
    if not analysis["norms"]:
        return None
    figure = Figure(figsize=(2.5 * len(shown), 2.9), layout="constrained")
    figure.suptitle("Tanh norms by block", fontsize=TEXT + 3)
    rows = [row for row in analysis["norms"] if row["block"] is not None] or analysis["norms"]
    for axes, (key, label) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        for part, members in grouped(rows, lambda row: row["part"]).items():
            axes.plot(
                [row["block"] or 0 for row in members], [row[key] for row in members], "o-", ms=3, lw=1, label=part
            )
        axes.set_title(label, fontsize=TEXT + 1)
        axes.set_ylim(0, 1.1 * max(1e-3, *(row[key] for row in rows)))
        axes.set_xlabel("block", fontsize=TEXT)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(alpha=0.3)
        make_plain(axes)
    legend_below(figure, axes)
    return figure


def _sensitivity(analysis: Row) -> Figure | None:
    measured = analysis["sensitivity"]
    if measured is None or measured["full_precision"] is None or measured["loss"] is None:
        return None
    rows = [row for row in [*measured["blocks"], *measured["layers"]] if row["change"] is not None]
    title = "Change of the loss when one block, or one layer, is in full precision"
    figure, panels = side_by_side(rows, title)
    low = min(0.0, *(row["change"] - row["error"] for row in rows))
    high = max(0.0, *(row["change"] + row["error"] for row in rows))
    margin = 0.05 * (high - low) or 1.0
    for panel in panels:
        changes = panel.values("change")
        colors = [_ORANGE if change > 0 else _BLUE for change in changes]
        panel.axes.barh(panel.places, changes, color=colors, height=0.7, xerr=panel.values("error"),
                        error_kw={"lw": 0.7, "ecolor": "#444444"})  # fmt: skip
        panel.axes.axvline(0, color="black", lw=0.7)
        panel.axes.set_xlim(low - margin, high + margin)
        panel.axes.xaxis.set_major_locator(MaxNLocator(3))
        panel.axes.grid(axis="x", alpha=0.3)
    everything = measured["full_precision"]["loss"]
    figure.supxlabel(
        "nats per target, with one standard error; below 0 is what rounding costs.\n"
        f"The loss is {measured['loss']:.4f}, and {everything:.4f} with everything in full precision.",
        fontsize=TEXT,
    )
    return figure


def _time(analysis: Row) -> Figure | None:
    measured = analysis["time"]
    if measured is None:
        return None
    parts: list[dict[str, Any]] = measured["parts"]
    figure = Figure(figsize=(6.5, 1.3 + 0.22 * len(parts)), layout="constrained")
    axes = figure.subplots()
    forward = [part["forward_ms"] for part in parts]
    axes.barh(range(len(parts)), forward, color=_BLUE, height=0.75, label="forward")
    if parts[0]["backward_ms"] is not None:
        behind = [part["backward_ms"] for part in parts]
        axes.barh(range(len(parts)), behind, left=forward, color=_ORANGE, height=0.75, label="backward")
        legend_below(figure, axes)
    axes.set_yticks(range(len(parts)), [part["name"] for part in parts])
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.set_xlabel(f"milliseconds for {measured['tokens']:,} tokens, median of {measured['repeats']}", fontsize=TEXT)
    axes.set_title("Time of a pass by part of the model", fontsize=TEXT + 3)
    axes.grid(axis="x", alpha=0.3)
    make_plain(axes)
    return figure
