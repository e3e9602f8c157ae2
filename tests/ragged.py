"""Rows of different lengths: side by side, packed into one row, and arriving piece by piece."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def inside(lengths: Sequence[int]) -> Tensor:
    """Which positions of rows padded to the longest are real, (rows, longest) bool."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def packed(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """The real positions of all rows one behind the other, (1, sum of lengths, ...)."""
    return rows[inside(lengths)][None]


def starts_of(lengths: Sequence[int]) -> Tensor:
    """Where the rows begin that `packed` made one, (1, sum of lengths) bool; empty ones do not."""
    lasting = [length for length in lengths if length]
    starts = torch.zeros(1, sum(lasting), dtype=torch.bool)
    starts[0, torch.tensor([0, *lasting[:-1]]).cumsum(0)] = True
    return starts


def arriving(rows: Tensor, counts: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pieces of rows in which each row moves on at its own pace.

    Args:
        rows: (rows, positions, width).
        counts: How many positions of each row are in each piece.

    Yields:
        The piece, (rows, most positions, width), with later positions of the row as padding; the numbers of real
        positions, (rows,); and which of all positions those are, (rows, positions) bool.
    """
    places = torch.arange(rows.shape[1])
    begin = torch.zeros(len(rows), dtype=torch.int64)
    for each in counts:
        lengths = torch.tensor(each)
        index = (begin[:, None] + torch.arange(max(each))).clamp_max(rows.shape[1] - 1)
        piece = rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))
        yield piece, lengths, (places >= begin[:, None]) & (places < (begin + lengths)[:, None])
        begin = begin + lengths


def even_pieces(lengths: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Counts for `arriving` where all rows move on together until they end."""
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    return [[min(max(n - begin, 0), size) for n in lengths] for begin, size in zip(begins, sizes, strict=True)]
