"""The linear map on integer codes, with straight-through gradients, and its plain reference.

`quantized_linear` is the fast path: exact integer product, scales afterwards, int8 activations
saved for backward, and several weight matrices that read the same input merged into one product.
`quantized_linear_reference` is the definition it is compared with, in value and in gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ternlm.ops.integer_matmul import integer_matmul
from ternlm.ops.quantize import codes_on_grid, dequantize_weight, quantize_activation
from ternlm.ops.row_blocks import row_blocks

_SUMS_AT_A_TIME, _SUMS_OF_WIDE_INPUTS = 1 << 16, 1 << 17
"""Size of a block of the product on a CPU: its integer sums and their float32 form, 512 kB, stay in the L2 cache. From
`_WIDE` columns of the input on, twice as much is up to a fifth faster: each block lays out the codes anew."""

_WIDE = 768

_COLUMNS_AT_A_TIME = 512
"""Width of such a block: the exact product of a narrow layer is up to twice as fast as with all columns at once."""


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    sizes: Sequence[int],
    activation_bits: int | None = 8,
    grid: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """y_i = x W_i^T for merged matrices W_i, computed on integer codes.

    With (Xq, s) = quantize_activation(x), and codes Q_i and scale g_i of each matrix:

        y_i = (Xq Q_i^T) * (g_i / s)               integers first, then one float32 product, then the cast
        dL/dx = sum_i dL/dy_i (g_i Q_i)            straight through both quantizers
        dL/dW_i = (dL/dy_i)^T (Xq / s)

    Args:
        x: (..., in_features), float32, bfloat16 or float16.
        weight: Latent weights of all matrices, stacked, (sum(sizes), in_features). It receives the
            gradient; its values are read through `codes` and `scale` only.
        codes: int8 codes of `weight`, same shape.
        scale: float32: (len(sizes),), one per matrix; or (sum(sizes), 1), one per row; or
            (sum(sizes), groups), one per group of columns of a row.
        sizes: out_features of each merged matrix.
        activation_bits: 2 to 8, or None for activations that are not rounded here. None multiplies by the
            dequantized weights, unless a grid is given.
        grid: With `activation_bits` None: x is codes * grid already, |codes| <= 127, float32, () or
            broadcastable to (..., 1). The integers are found again and counted exactly, s = 1 / grid.

    Returns:
        For each matrix (..., sizes[i]) in the dtype of x.

    Source:
        Ma et al. 2024 (arXiv 2402.17764); straight-through gradients, Bengio et al. 2013 (arXiv 1308.3432).
    """
    if activation_bits is None and grid is None:
        rounded = dequantize_weight(codes, per_row(scale, sizes))
        straight = straight_through(weight, rounded)
        return F.linear(x, straight.to(x.dtype)).split(list(sizes), dim=-1)
    return _IntegerLinear.apply(x, weight, codes, scale, tuple(sizes), activation_bits, grid)


def quantized_linear_reference(
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    sizes: Sequence[int],
    activation_bits: int | None = 8,
    grid: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The definition of `quantized_linear`, one matrix at a time, by automatic differentiation.

    Each quantizer is written z + (q(z) - z).detach(), whose value is q(z) and whose gradient is
    the identity; everything is computed in float32.
    """
    rounded = dequantize_weight(codes, per_row(scale, sizes))
    straight_weight = weight + (rounded - weight).detach()
    straight_x = x.float()
    if activation_bits is not None:
        x_codes, s = quantize_activation(x, activation_bits)
        straight_x = straight_x + (x_codes / s - straight_x).detach()
    elif grid is not None:
        straight_x = straight_x + (codes_on_grid(x, grid) * grid - straight_x).detach()
    return tuple((straight_x @ part.t()).to(x.dtype) for part in straight_weight.split(list(sizes)))


def straight_through(latent: Tensor, rounded: Tensor) -> Tensor:
    """The value of `rounded` in the dtype of `latent`, which receives the gradient unchanged."""
    straight: Tensor = _StraightThrough.apply(latent, rounded)
    return straight


def per_row(scale: Tensor, sizes: Sequence[int]) -> Tensor:
    """Scales as (rows, groups): one scale per merged matrix is repeated for each of its rows."""
    if scale.dim() == 2:
        return scale
    return torch.cat([part.expand(size) for part, size in zip(scale.unbind(), sizes, strict=True)])[:, None]


class _IntegerLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        codes: Tensor,
        scale: Tensor,
        sizes: tuple[int, ...],
        bits: int | None,
        grid: Tensor | None,
    ) -> tuple[Tensor, ...]:
        x_codes, s = _activation_codes(x, bits, grid)
        ctx.save_for_backward(x_codes, s, codes, scale)
        ctx.sizes, ctx.x_shape, ctx.weight_dtype = sizes, x.shape, weight.dtype
        outputs = _product(x_codes, s, codes, scale, sizes, x.dtype)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_codes, s, codes, scale = ctx.saved_tensors
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_y = flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)
        dtype = grad_y.dtype
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y @ dequantize_weight(codes, per_row(scale, ctx.sizes), dtype)).view(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            rounded_x = x_codes.to(dtype).mul_(s.reciprocal().to(dtype))
            grad_weight = _weight_gradient(grad_y, rounded_x).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None, None, None, None


def _activation_codes(x: Tensor, bits: int | None, grid: Tensor | None) -> tuple[Tensor, Tensor]:
    """int8 codes, (tokens, in_features), and the multiplier s, (tokens, 1); x is about codes / s."""
    if bits is not None:
        return quantize_activation(x.reshape(-1, x.shape[-1]), bits)
    assert grid is not None
    s = grid.detach().reciprocal().expand(*x.shape[:-1], 1).reshape(-1, 1)
    return codes_on_grid(x, grid.detach()).view(-1, x.shape[-1]), s


class _StraightThrough(torch.autograd.Function):
    """Value of the second argument, gradient to the first."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, rounded: Tensor) -> Tensor:
        return rounded.to(latent.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _product(
    x_codes: Tensor, s: Tensor, codes: Tensor, scale: Tensor, sizes: tuple[int, ...], dtype: torch.dtype
) -> list[Tensor]:
    """sum over groups of columns of (Xq Q_i^T) * (g_i / s), for each merged matrix."""
    if scale.dim() == 2 and scale.shape[1] > 1:
        return list(_grouped_product(x_codes, s, codes, scale).to(dtype).split(sizes, dim=1))
    if torch.compiler.is_compiling() and codes.device.type == "cpu":
        outputs: list[Tensor] = _blocked_product(x_codes, s, codes, scale, sizes, dtype)
        return outputs
    return _scaled_product(x_codes, s, codes, scale, sizes, dtype)


def _scaled_product(
    x_codes: Tensor, s: Tensor, codes: Tensor, scale: Tensor, sizes: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """(Xq Q_i^T) * (g_i / s) for each merged matrix: a float32 product, then the cast."""
    outputs = _empty_outputs(x_codes, s, codes, scale, sizes, dtype)
    scales = scale.unbind() if scale.dim() == 1 else scale[:, 0].split(list(sizes))
    at_a_time = _SUMS_AT_A_TIME if x_codes.shape[1] < _WIDE else _SUMS_OF_WIDE_INPUTS
    for y, matrix, g in zip(outputs, codes.split(list(sizes)), scales, strict=True):
        for columns in _column_blocks(x_codes, matrix):
            part, own = matrix[columns], g if g.dim() == 0 else g[columns]
            for rows in row_blocks(x_codes, part.shape[0], at_a_time):
                y[rows, columns] = integer_matmul(x_codes[rows], part).float().mul_(own / s[rows])
    return outputs


def _column_blocks(x_codes: Tensor, matrix: Tensor) -> list[slice]:
    """Slices that cover the outputs of a matrix, in order, wider where there are few tokens."""
    width = max(_COLUMNS_AT_A_TIME, _SUMS_AT_A_TIME // max(x_codes.shape[0], 1))
    if torch.compiler.is_compiling() or matrix.device.type != "cpu":
        width = matrix.shape[0]
    return [slice(start, start + width) for start in range(0, matrix.shape[0], width)]


def _empty_outputs(
    x_codes: Tensor, s: Tensor, codes: Tensor, scale: Tensor, sizes: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """Where `_scaled_product` writes, given its arguments."""
    return [torch.empty(x_codes.shape[0], size, dtype=dtype, device=codes.device) for size in sizes]


# A compiler takes the operator as it is. It would compute all sums at once and write them to memory.
_blocked_product = torch.library.custom_op("ternlm::scaled_product", _scaled_product, mutates_args=())
_blocked_product.register_fake(_empty_outputs)


def _grouped_product(x_codes: Tensor, s: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The sum over groups of columns of their exact products, each with its own scale, float32."""
    width = codes.shape[1] // scale.shape[1]
    total = torch.zeros(x_codes.shape[0], codes.shape[0], device=codes.device)
    groups = zip(x_codes.split(width, dim=1), codes.split(width, dim=1), scale.unbind(1), strict=True)
    for x_group, code_group, g in groups:
        total += integer_matmul(x_group.contiguous(), code_group.contiguous()) * (g / s)
    return total


def _weight_gradient(grad_y: Tensor, x: Tensor) -> Tensor:
    """grad_y^T x. CPU kernels for 16-bit types are twice as fast when the left operand is laid out in rows.

    Laying it out costs in proportion to its size, so it pays where each element meets many columns of x.
    """
    left = grad_y.t()
    if grad_y.device.type == "cpu" and grad_y.dtype != torch.float32 and x.shape[1] >= 768:
        left = left.contiguous()
    return left @ x
