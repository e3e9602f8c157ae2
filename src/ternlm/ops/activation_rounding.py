"""Rounding activations to a given grid, with a straight-through gradient that stops at the ends of the grid.

`round_activation` is the fast path: one pass over memory in blocks that stay in the cache, stochastic or to the
nearest code, keeping one byte per element for backward. `round_activation_reference` is its definition.
"""

from typing import Any

import torch
from torch import Tensor

from ternlm.ops.noise import NoiseRows
from ternlm.ops.quantize import round_to_levels_, top_code
from ternlm.ops.row_blocks import row_blocks


def round_activation(x: Tensor, step: Tensor, bits: int, key: Tensor | None = None, clips: bool = True) -> Tensor:
    """y = step * code with code = round(clamp(x / step, -L, L) + u), L = 2^(bits - 1) - 1.

        dL/dx = dL/dy [|x| <= L step]

    Without a key u is zero and ties go to the even code. With one, u is noise between -1/2 and 1/2, so that the mean
    of y is x inside the grid: round(z + u) is floor(z + u + 1/2). Computed in float32.

    Args:
        x: (..., features), any float dtype.
        step: float32, (), or broadcastable to x; no gradient flows to it.
        bits: 2 or more.
        key: Key of the noise (`ops/noise.py`), (), int64.
        clips: False where no element lies beyond the grid: the gradient is the identity and nothing is kept for it.

    Returns:
        (..., features), dtype of x.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        rounded: Tensor = _Rounding.apply(x, step.detach(), key, bits, clips)
        return rounded
    return _round(x, step.detach(), key, bits)[0]


def round_activation_reference(x: Tensor, step: Tensor, bits: int, noise: Tensor | None = None) -> Tensor:
    """The definition of `round_activation`, by automatic differentiation; `noise` is u * 2^16, shaped as x."""
    top = top_code(bits)
    scaled = (x.float() * step.reciprocal()).clamp(-top, top)
    codes = torch.round(scaled if noise is None else scaled + noise * 2.0**-16)
    return (step * (scaled + (codes - scaled).detach())).to(x.dtype)


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, key: Tensor | None, bits: int, clips: bool) -> Tensor:
        inside = torch.empty(x.shape, dtype=torch.int8, device=x.device) if clips else None
        y, inside = _round(x, step, key, bits, inside)
        ctx.save_for_backward(inside)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        if inside is None:
            return grads[0], None, None, None, None
        grad_rows = grads[0].reshape(-1, grads[0].shape[-1])
        inside = inside.view(grad_rows.shape)
        grad_x = torch.empty_like(grad_rows)
        for block in row_blocks(grad_rows):
            # Products with a tensor of one byte, or of truth values, would be several times as slow.
            grad_x[block] = grad_rows[block] * inside[block].to(grad_rows.dtype)
        return grad_x.view(grads[0].shape), None, None, None, None


def _round(
    x: Tensor, step: Tensor, key: Tensor | None, bits: int, inside: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """y, and `inside` filled with 1 where an element lies on the grid and 0 beyond."""
    top, columns = top_code(bits), x.shape[-1]
    rows = x.detach().reshape(-1, columns)
    inside_rows = None if inside is None else inside.view(rows.shape)
    steps = _of_rows(step, x)
    multipliers = steps.reciprocal()
    noise = None if key is None else NoiseRows(key, rows.shape[0], columns)
    y = torch.empty_like(rows)
    for block in row_blocks(rows):
        scaled = rows[block].float() * _part(multipliers, block)
        bounded = scaled.clamp(-top, top)
        if inside_rows is not None:
            inside_rows[block] = scaled.eq_(bounded)  # in place and so in float32: comparisons to bool are slow
        codes = round_to_levels_(bounded, None, None if noise is None else noise.odd(block))
        y[block] = codes.mul_(_part(steps, block))
    return y.view(x.shape), inside


def _of_rows(step: Tensor, x: Tensor) -> Tensor:
    """A step as (), (rows, 1), (1, features) or (rows, features)."""
    if step.numel() == 1:
        return step.reshape(())
    if step.shape[-1] == 1:
        return step.expand(*x.shape[:-1], 1).reshape(-1, 1)
    if step.numel() == x.shape[-1]:
        return step.reshape(1, -1)
    return step.expand(x.shape).reshape(-1, x.shape[-1])


def _part(per_row: Tensor, block: slice) -> Tensor:
    return per_row[block] if per_row.dim() == 2 and per_row.shape[0] > 1 else per_row
