"""A comparison as a picture: bits per byte of each model with its interval, and over the number of parameters."""

from collections.abc import Mapping
from typing import Any

from ternlm.report.comparison import baseline_rows
from ternlm.tracking.console import short_count

Row = Mapping[str, Any]

_COLOURS = {"hgrn": "#0072b2", "hnet": "#d55e00", "bitnet": "#009e73"}
_OTHER, _GREY = "#cc79a7", "#888888"
_FULL_PRECISION = "full"
_LONGEST_LABEL = 40


def draw_comparison(record: Row) -> Any:
    """The figure; on the right also parameters, if models differ in them. None if no model has bits per byte.

    Filled marks are quantized models, hollow ones full precision; a colour is a family; grey lines are baselines.
    """
    from matplotlib.figure import Figure

    models = [row for row in record["models"] if row["rank"] is not None]
    if not models:
        return None
    has_sizes = len({row["parameters"] for row in models}) > 1
    height = max(3.2, 1.8 + 0.34 * len(models))
    figure = Figure(figsize=(12 if has_sizes else 7.5, height), layout="constrained")
    axes = figure.subplots(1, 2 if has_sizes else 1, squeeze=False)[0]
    _draw_ranking(axes[0], record, models)
    if has_sizes:
        _draw_sizes(axes[1], record, models)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{record['bytes']:,} bytes, {record['documents']:,} documents, {record['protocol']}", fontsize=10)
    return figure


def _draw_ranking(axes: Any, record: Row, models: list[Row]) -> None:
    """One line per model, the best at the top."""
    for place, row in enumerate(models):
        low, high = row["bpb_ci95"] or (row["bpb"], row["bpb"])
        spread = [[max(row["bpb"] - low, 0.0)], [max(high - row["bpb"], 0.0)]]
        axes.errorbar(row["bpb"], place, xerr=spread, capsize=3, markersize=7, zorder=3, **_mark(row))
        axes.annotate(f"{row['bpb']:.3f}", (high, place), xytext=(8, 0), textcoords="offset points", va="center",
                      fontsize=8, color=_GREY)  # fmt: skip
    for name, bits in _near(record, models):
        axes.axvline(bits, color=_GREY, linewidth=1, linestyle="--", zorder=0)
        axes.text(bits, 1.0, name, transform=axes.get_xaxis_transform(), rotation=90, va="top", ha="right", fontsize=8,
                  color=_GREY)  # fmt: skip
    axes.set_yticks(range(len(models)), [f"{_shortened(row['name'])}  {row['rank']}" for row in models])
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.margins(x=0.18)
    bars = "; bars: 95 % over documents" if any(row["bpb_ci95"] for row in models) else ""
    axes.set_xlabel(f"bits per byte{bars}")
    axes.grid(axis="x", alpha=0.3)
    _draw_legend(axes, models)


def _draw_sizes(axes: Any, record: Row, models: list[Row]) -> None:
    """Bits per byte over parameters; the numbers are ranks."""
    from matplotlib.ticker import LogLocator

    for row in models:
        axes.plot(row["parameters"], row["bpb"], markersize=7, zorder=3, **_mark(row))
        is_odd = row["rank"] % 2  # neighbours in rank are often neighbours here
        axes.annotate(str(row["rank"]), (row["parameters"], row["bpb"]), xytext=(8 if is_odd else -8, 0), fontsize=8,
                      textcoords="offset points", ha="left" if is_odd else "right", va="center")  # fmt: skip
    for name, bits in _near(record, models):
        axes.axhline(bits, color=_GREY, linewidth=1, linestyle="--", zorder=0)
        axes.text(1.0, bits, name, transform=axes.get_yaxis_transform(), va="bottom", ha="right", fontsize=8,
                  color=_GREY)  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda count, _: short_count(count))
    axes.minorticks_off()
    axes.margins(x=0.2, y=0.18)
    axes.set(xlabel="parameters", ylabel="bits per byte")
    axes.grid(alpha=0.3)


def _draw_legend(axes: Any, models: list[Row]) -> None:
    """Families by colour; quantized and full precision by filling, if there are both."""
    from matplotlib.lines import Line2D

    kinds = {(row["family"], row["weights"]): row for row in models}
    if len(kinds) < 2:
        return
    several = len({weights for _, weights in kinds}) > 1
    marks = [Line2D([], [], **_mark(row)) for row in kinds.values()]
    labels = [f"{family}, {weights}" if several else family for family, weights in kinds]
    axes.legend(marks, labels, fontsize=8, loc="best", edgecolor="none", framealpha=0.9)


def _mark(row: Row) -> dict[str, Any]:
    colour = _COLOURS.get(row["family"], _OTHER)
    face = "white" if row["weights"] == _FULL_PRECISION else colour
    return {"color": colour, "marker": "o", "markerfacecolor": face, "linestyle": "none"}


def _near(record: Row, models: list[Row]) -> list[tuple[str, float]]:
    """Baselines in the range of the models and a little beyond; others would flatten the rest."""
    reached = [row["bpb"] for row in models]
    return [(name, bits) for name, bits in baseline_rows(record) if min(reached) / 1.5 <= bits <= 1.25 * max(reached)]


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else f"...{name[-_LONGEST_LABEL + 3 :]}"
