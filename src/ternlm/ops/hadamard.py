"""Block Hadamard transforms and signed permutations: the two parts of an orthogonal mixer.

The transform is a product with a small matrix: on processors with matrix units that is ten to eighty times
as fast as log2(b) passes of additions over memory (`hadamard_reference`), of which each reads and writes
everything. Both are linear and orthogonal, so each is the other's backward with nothing to save.
"""

from typing import Any

import torch
from torch import Tensor

from ternlm.ops.row_blocks import row_blocks


def hadamard(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply each run of b consecutive channels by the normalized Hadamard matrix H_b.

    H_b is symmetric and orthogonal, so it is its own inverse, and dL/dx is the same transform of dL/dy.

    Args:
        x: (..., features), any float dtype; features is a multiple of b.
        matrix: `hadamard_matrix(b)` on the device of x.

    Returns:
        (..., features), dtype of x.
    """
    return (x.reshape(-1, matrix.shape[0]) @ matrix.to(x.dtype)).view(x.shape)


def hadamard_reference(x: Tensor, block: int) -> Tensor:
    """The definition of `hadamard`: log2(b) passes, each replacing pairs (p, q) by (p + q, p - q)."""
    y, width = x.reshape(-1, block), 1
    while width < block:
        first, second = y.unflatten(1, (-1, 2, width)).unbind(2)
        y = torch.stack((first + second, first - second), dim=2).flatten(1)
        width *= 2
    return (y * block**-0.5).view(x.shape)


def hadamard_matrix(block: int) -> Tensor:
    """Sylvester's matrix of order b divided by sqrt(b): H_1 = (1), H_2b = [[H_b, H_b], [H_b, -H_b]] / sqrt(2).

    Args:
        block: b, a power of two.

    Returns:
        (b, b), float32.
    """
    if not is_power_of_two(block):
        raise ValueError(f"a Hadamard block of {block} is not a power of two")
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < block:
        matrix = torch.cat((torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1)))
    return matrix * block**-0.5


def largest_block(width: int, most: int) -> int:
    """The largest power of two that divides a width and is at most `most`."""
    return min(width & -width, most)


def is_power_of_two(value: int) -> bool:
    """Whether a value is 1, 2, 4, 8, ..."""
    return value > 0 and value & (value - 1) == 0


def signed_permutation(x: Tensor, source: Tensor, signs: Tensor, target: Tensor) -> Tensor:
    """y_j = signs_j * x_source(j): channels are moved and some change sign.

    Args:
        x: (..., features), any float dtype.
        source: Where each output channel comes from, (features,), int64.
        signs: -1 or +1 for each output channel, (features,), float32.
        target: The inverse of `source`, for the backward pass: dL/dx_i = signs_target(i) * dL/dy_target(i).

    Returns:
        (..., features), dtype of x.
    """
    moved: Tensor = _SignedPermutation.apply(x, source, signs, target)
    return moved


class _SignedPermutation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, signs: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(signs, target)
        return _moved(x, source, signs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        signs, target = ctx.saved_tensors
        return _moved(grads[0], target, signs.index_select(0, target)), None, None, None


def _moved(x: Tensor, source: Tensor, signs: Tensor) -> Tensor:
    """Channels are gathered four times as fast from 32-bit numbers on a CPU, so 16-bit ones are widened on the way."""
    rows = x.reshape(-1, x.shape[-1])
    moved = torch.empty_like(rows)
    dtype = torch.float32 if x.device.type == "cpu" and x.itemsize < 4 else x.dtype
    signs = signs.to(dtype)
    for block in row_blocks(rows):
        moved[block] = rows[block].to(dtype).index_select(1, source) * signs
    return moved.view(x.shape)
