"""Panels for quantities that every block of a model has: plain data in, matplotlib axes out.

What bears the same name in all blocks shares a panel, so that a model of 24 blocks is as legible as one of 2.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Row = Mapping[str, Any]

TEXT = 8
_FEW_BLOCKS = 4
_ACROSS = 4


class Panel(NamedTuple):
    """One set of axes and the rows it shows.

    Attributes:
        axes: Where to draw.
        rows: One per block.
        places: Of panels side by side, the height of each row.
    """

    axes: Axes
    rows: list[Row]
    places: list[int]

    def values(self, key: str) -> list[Any]:
        """A column of its rows."""
        return [row[key] for row in self.rows]


def side_by_side(rows: Sequence[Row], title: str) -> tuple[Figure, list[Panel]]:
    """A panel per part, with one line per block, the input side on top and what is outside the blocks last.

    Args:
        rows: With `block` and `part`.
        title: Of the whole.
    """
    blocks = sorted({row["block"] for row in rows}, key=lambda block: (block is None, block))
    groups = grouped(rows, lambda row: row["part"])
    figure = Figure(figsize=(0.9 + 1.45 * max(len(groups), 3), 1.7 + 0.22 * len(blocks)), layout="constrained")
    figure.suptitle(title, fontsize=TEXT + 3)
    panels = []
    for axes, (part, members) in zip(
        figure.subplots(1, len(groups), sharey=True, squeeze=False)[0], groups.items(), strict=True
    ):
        axes.set_title(part.replace(".", "\n"), fontsize=TEXT + 1)
        make_plain(axes)
        panels.append(Panel(axes, members, [blocks.index(row["block"]) for row in members]))
    first = panels[0].axes
    first.set_yticks(range(len(blocks)), ["none" if block is None else str(block) for block in blocks])
    first.set_ylim(len(blocks) - 0.4, -0.6)
    first.set_ylabel("block", fontsize=TEXT)
    return figure, panels


def histograms(
    rows: Sequence[Row], title: str, group: Callable[[Row], Hashable], show: Callable[[Panel], None]
) -> Figure:
    """A panel per group, with the histogram of each of its rows as a curve in the colour of its block.

    Args:
        rows: With `block` and `histogram`.
        title: Of the whole.
        group: What rows in one panel have in common.
        show: Completes a panel.
    """
    groups = grouped(rows, group)
    across = min(_ACROSS, len(groups))
    down = -(-len(groups) // across)
    figure = Figure(figsize=(0.9 + 2.5 * across, 0.9 + 2.2 * down), layout="constrained")
    figure.suptitle(title, fontsize=TEXT + 3)
    grid: list[Axes] = list(figure.subplots(down, across, squeeze=False).flat)
    blocks = sorted({row["block"] for row in rows if row["block"] is not None})
    for number, (axes, members) in enumerate(zip(grid, groups.values(), strict=False)):
        for row in members:
            _draw_density(axes, row["histogram"], _color(row["block"], blocks))
        make_plain(axes)
        if number % across == 0:
            axes.set_ylabel("density", fontsize=TEXT)
        show(Panel(axes, members, []))
    for axes in grid[len(groups) :]:
        axes.set_axis_off()
    _name_blocks(figure, grid, blocks)
    return figure


def legend_below(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """What the colours of one panel, and so of all, mean."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=TEXT)


def make_plain(axes: Axes) -> None:
    """No frame where there is no axis, and small numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=TEXT)


def grouped(rows: Sequence[Row], group: Callable[[Row], Hashable]) -> dict[Any, list[Row]]:
    """Rows by what they have in common, in the order of the first of each."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(group(row), []).append(row)
    return groups


def _draw_density(axes: Axes, histogram: Row, color: Any) -> None:
    counts, low, high = histogram["counts"], histogram["low"], histogram["high"]
    width, total = (high - low) / len(counts), max(sum(counts), 1)
    centres = [low + (number + 0.5) * width for number in range(len(counts))]
    axes.plot(centres, [count / total / width if count else float("nan") for count in counts], color=color, lw=0.9)


def _name_blocks(figure: Figure, grid: Sequence[Axes], blocks: Sequence[int]) -> None:
    """Which colour is which block: a legend for a few, a bar for many."""
    if len(blocks) <= _FEW_BLOCKS:
        for block in blocks:
            grid[0].plot([], [], color=_color(block, blocks), label=f"block {block}")
        if blocks:
            legend_below(figure, grid[0])
        return
    edges = [blocks[0] - 0.5, *(block + 0.5 for block in blocks)]
    colors = ListedColormap([_color(block, blocks) for block in blocks])
    bar = figure.colorbar(ScalarMappable(BoundaryNorm(edges, len(blocks)), colors), ax=list(grid), aspect=40)
    bar.set_label("block", fontsize=TEXT)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar.ax.tick_params(labelsize=TEXT)


def _color(block: int | None, blocks: Sequence[int]) -> Any:
    if block is None:
        return "black"
    return colormaps["viridis"](0.85 * blocks.index(block) / max(len(blocks) - 1, 1))
