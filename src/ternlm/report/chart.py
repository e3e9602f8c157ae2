"""Curves as text: one line of blocks, or a small picture of braille dots; ASCII where the terminal is not UTF-8."""

import math
from collections.abc import Sequence

_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille character, by row from the top and column."""


class Picture:
    """A curve cut into columns, and the range of values that is drawn.

    The range goes from 0 if asked, else from the lowest column; its upper end leaves out the first tenth of
    the columns unless it begins at 0: the fall at the start of a run would flatten all the rest.

    Args:
        curve: (x, y) with ascending x, at least one point.
        columns: How many; each shows the mean of its share of the x-range.
        from_zero: Whether the range begins at 0.
    """

    def __init__(self, curve: Sequence[tuple[float, float]], columns: int, from_zero: bool = False) -> None:
        self.columns = _columns(curve, columns)
        means = [mean for mean in self.columns if mean is not None]
        settled = means if from_zero else means[len(means) // 10 :]
        self.low, self.high = 0.0 if from_zero else min(means), max(settled)

    def shares(self) -> list[float | None]:
        """Where each column lies in the range, 0 to 1; None where there is no point."""
        return [None if mean is None else self._share(mean) for mean in self.columns]

    def _share(self, value: float) -> float:
        span = self.high - self.low
        if not 0 < span < math.inf:
            return 0.5
        return min(max((value - self.low) / span, 0.0), 1.0)


def sparkline(
    curve: Sequence[tuple[float, float]], width: int, from_zero: bool = False, ascii_only: bool = False
) -> str:
    """A curve as a line of at most `width` blocks: ``█▅▃▂▁``."""
    marks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    shares = Picture(curve, width, from_zero).shares()
    return "".join(marks[round(share * (len(marks) - 1))] for share in shares if share is not None)


def plot(picture: Picture, height: int, ascii_only: bool = False) -> list[str]:
    """A curve as `height` lines of text.

    A braille character is 2 x 4 dots, so a picture of 80 columns and height 4 takes 40 x 4 characters and
    shows 80 x 16 points; in ASCII a character is one point.
    """
    across, down = dots(ascii_only)
    rows = height * down - 1
    levels = _joined([None if share is None else round((1 - share) * rows) for share in picture.shares()])
    width = -(-len(levels) // across)
    cells = [[0] * width for _ in range(height)]
    previous = levels[0]
    for x, level in enumerate(levels):
        start = previous + (level > previous) - (level < previous)
        for y in range(min(start, level), max(start, level) + 1):  # down or up to its neighbour
            cells[y // down][x // across] |= 1 if ascii_only else _DOTS[y % down][x % across]
        previous = level
    if ascii_only:
        return ["".join(" *"[cell] for cell in line) for line in cells]
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in line) for line in cells]


def dots(ascii_only: bool) -> tuple[int, int]:
    """Points across and down in one character."""
    return (1, 1) if ascii_only else (2, 4)


def _columns(curve: Sequence[tuple[float, float]], count: int) -> list[float | None]:
    """Means of y over `count` equal parts of the x-range; None between points that lie further apart."""
    first, last = curve[0][0], curve[-1][0]
    count = 1 if last == first else max(count, 1)
    sums, sizes = [0.0] * count, [0] * count
    for x, y in curve:
        share = 0.0 if last == first else (x - first) / (last - first)
        column = min(int(share * count), count - 1)
        sums[column] += y
        sizes[column] += 1
    return [total / size if size else None for total, size in zip(sums, sizes, strict=True)]


def _joined(levels: Sequence[int | None]) -> list[int]:
    """Levels with straight lines across the gaps; there is none at either end."""
    joined: list[int] = []
    gap = 1
    for level in levels:
        if level is None:
            gap += 1
            continue
        before = joined[-1] if joined else level
        joined += [round(before + (level - before) * i / gap) for i in range(1, gap + 1)]
        gap = 1
    return joined
