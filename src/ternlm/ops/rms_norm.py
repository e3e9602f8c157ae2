"""Root-mean-square normalization that keeps nothing for backward but its input and one number per row."""

from typing import Any

import torch
from torch import Tensor

from ternlm.ops.row_blocks import row_blocks


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """y = (x * r) * g with r = 1 / sqrt(mean(x^2) + eps), statistics in float32.

    The normalized value is cast to the dtype of x before the gain multiplies it. Backward, with
    h = x * r and u = g * dL/dy:

        dL/dx = r * (u - h * mean(u * h))          dL/dg = sum over rows of dL/dy * h

    Args:
        x: (..., features), any float dtype.
        gain: (features,), float32.
        eps: Added to the mean square, inside the root.

    Returns:
        (..., features), dtype of x.

    Source:
        Zhang and Sennrich 2019 (arXiv 1910.07467).
    """
    normed: Tensor = _RMSNorm.apply(x, gain, eps)
    return normed


def rms_norm_reference(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The definition of `rms_norm`, by automatic differentiation."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return normed.to(x.dtype) * gain.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        narrow_gain = gain.to(x.dtype)
        y = torch.empty_like(rows)
        inverse_rms = torch.empty(rows.shape[0], 1, device=x.device)
        for block in row_blocks(rows):
            wide = rows[block].float()
            r = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
            inverse_rms[block] = r
            y[block] = (wide * r).to(x.dtype) * narrow_gain
        ctx.save_for_backward(rows, gain, inverse_rms)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, gain, inverse_rms = ctx.saved_tensors
        grad_rows = grads[0].reshape(rows.shape)
        grad_x = torch.empty_like(rows)
        grad_gain = torch.zeros_like(gain)
        for block in row_blocks(rows):
            r = inverse_rms[block]
            grad_y = grad_rows[block].float()
            normed = rows[block].float() * r
            grad_gain = grad_gain + (grad_y * normed).sum(dim=0)
            grad_y = grad_y * gain
            projection = (grad_y * normed).mean(dim=-1, keepdim=True)
            grad_x[block] = (grad_y - normed * projection) * r
        return grad_x.view(grads[0].shape), grad_gain, None
