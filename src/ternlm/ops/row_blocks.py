"""Cutting a matrix into blocks of rows that stay in the processor's cache.

An eager chain of elementwise operations writes every intermediate to memory. Run block by block, the
intermediates stay in the L2 cache, which is up to twice as fast on a CPU. A compiler fuses the chain
by itself and a GPU wants it whole: there the only block is everything.
"""

import torch
from torch import Tensor

ELEMENTS = 1 << 17
"""Elements per block: 512 kB per float32 intermediate, so that several fit in an L2 cache."""


def row_blocks(matrix: Tensor, columns: int | None = None, elements: int | None = None) -> list[slice]:
    """Slices that cover the rows of a matrix, in order.

    Args:
        matrix: (rows, columns).
        columns: Width of what is computed from a row, where it differs from that of the matrix.
        elements: About how many elements a block may have; None is `ELEMENTS`.
    """
    rows = matrix.shape[0]
    if torch.compiler.is_compiling() or matrix.device.type != "cpu":
        return [slice(0, rows)]
    step = max(1, (elements or ELEMENTS) // max(columns or matrix.shape[1], 1))
    return [slice(start, start + step) for start in range(0, rows, step)]
