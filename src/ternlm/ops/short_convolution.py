"""A short causal convolution along time, one filter per channel, that can stop and go on."""

from typing import Any

import torch
from torch import Tensor

from ternlm.ops.row_blocks import row_blocks

_ELEMENTS = 1 << 16
"""Numbers per piece: inputs, outputs and their gradients of one piece share the cache."""


def short_convolution(
    x: Tensor,
    weight: Tensor,
    previous: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = sum over k of w_k * x_{t-K+1+k}: the last tap reads the present, no position reads the future.

    Products and sums are float32 (float64 for float64 inputs), then cast once. There is no activation.

    Args:
        x: Inputs, (B, T, C), any float dtype.
        weight: Filters, (C, K).
        previous: The K-1 inputs before the first position, oldest first, (B, C, K-1); None is zero.
        starts: (B, T) bool, True at the first position of each sequence of a packed row. Inputs before a start do
            not reach the positions behind it.
        lengths: Valid positions of each row, (B,) int64; None: all are.

    Returns:
        y, (B, T, C), in the dtype of x, and the last K-1 valid inputs of each row, (B, C, K-1), in the dtype of
        `previous` (of x without one). A row with fewer inputs is filled up from `previous`; inputs of an earlier
        sequence of a packed row are zero.
    """
    kernel, positions = weight.shape[1], x.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    before = x.new_zeros(x.shape[0], kernel - 1, x.shape[2]) if previous is None else previous.transpose(1, 2)
    inputs = torch.cat([before.to(wide), x.to(wide)], dim=1)
    taps = weight.t().to(wide)
    ring = inputs[:, positions:] if lengths is None else _last(inputs, lengths, kernel - 1)
    if starts is not None:
        reach = _reach(starts, kernel)
        y = _convolve(inputs, taps, reach[:, :positions])
        allowed = reach[:, -1:] if lengths is None else reach.gather(1, lengths.unsqueeze(1))
        ages = torch.arange(kernel - 1, 0, -1, device=x.device)  # distance of each kept input from the next position
        ring = ring.masked_fill((allowed < ages).unsqueeze(-1), 0.0)
    elif inputs.device.type == "cpu" and positions > kernel and not torch.compiler.is_compiling():
        y = _Convolution.apply(inputs, taps)
    else:
        y = _convolve(inputs, taps)
    return y.to(x.dtype), ring.transpose(1, 2).to(x.dtype if previous is None else previous.dtype)


def _convolve(inputs: Tensor, taps: Tensor, reach: Tensor | None = None) -> Tensor:
    """The definition, (B, T, C), from the inputs with what came before, (B, K-1+T, C), and the taps, (K, C)."""
    kernel = taps.shape[0]
    positions = inputs.shape[1] - kernel + 1
    y = inputs[:, kernel - 1 :] * taps[-1]
    for back in range(1, kernel):
        first = kernel - 1 - back
        tap = inputs[:, first : first + positions]
        if reach is not None:
            tap = tap.masked_fill((reach < back).unsqueeze(-1), 0.0)
        y = y + tap * taps[first]
    return y


class _Convolution(torch.autograd.Function):
    """`_convolve` without `reach`, in pieces of a row that stay in the cache, keeping nothing but the inputs."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, taps: Tensor) -> Tensor:
        taps = taps.contiguous()
        kernel = taps.shape[0]
        y = inputs.new_empty(inputs.shape[0], inputs.shape[1] - kernel + 1, inputs.shape[2])
        for row, source in zip(y, inputs, strict=True):
            for block in row_blocks(row, elements=_ELEMENTS):
                out = row[block]
                torch.mul(source[block.start : block.start + out.shape[0]], taps[0], out=out)
                for k in range(1, kernel):
                    out.addcmul_(source[block.start + k : block.start + k + out.shape[0]], taps[k])
        ctx.save_for_backward(inputs, taps)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        inputs, taps = ctx.saved_tensors
        grad_inputs, grad_taps = torch.zeros_like(inputs), torch.zeros_like(taps)
        for grad, source, grad_source in zip(grads[0], inputs, grad_inputs, strict=True):
            for block in row_blocks(grad, elements=_ELEMENTS):
                piece = grad[block]
                for k in range(taps.shape[0]):
                    window = slice(block.start + k, block.start + k + piece.shape[0])
                    grad_source[window].addcmul_(piece, taps[k])
                    grad_taps[k] += (piece * source[window]).sum(dim=0)
        return grad_inputs, grad_taps


def _last(inputs: Tensor, lengths: Tensor, count: int) -> Tensor:
    """The last `count` valid inputs of each row, (B, count, C); row b begins with `count` earlier ones."""
    places = lengths.unsqueeze(1) + torch.arange(count, device=inputs.device)
    return inputs.gather(1, places.unsqueeze(-1).expand(-1, -1, inputs.shape[2]))


def _reach(starts: Tensor, kernel: int) -> Tensor:
    """How many positions each one may look back, at most kernel - 1, (B, T + 1): the last is the next position's."""
    following = torch.cat([starts, starts.new_zeros(starts.shape[0], 1)], dim=1)
    reach = torch.zeros(following.shape, dtype=torch.int64, device=starts.device)
    is_open = torch.ones_like(following)
    for back in range(kernel - 1):
        shifted = torch.ones_like(following)
        shifted[:, back:] = ~following[:, : following.shape[1] - back]
        is_open = is_open & shifted
        reach = reach + is_open
    return reach
