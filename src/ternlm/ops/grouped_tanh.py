"""The activation of the QDyT norm: centering by groups, a learned clip and a tanh, and nothing saved but its input."""

from typing import Any

import torch
from torch import Tensor

from ternlm.ops.row_blocks import row_blocks


def grouped_tanh(
    x: Tensor, gain: Tensor, bias: Tensor, slope: Tensor, clip: Tensor | None, groups: int, eps: float | None = None
) -> Tensor:
    """y = gain * tanh(slope * v) + bias with v = clamp(u, -clip, clip) and u = x - mean of its group.

    The channels of a token form `groups` runs of equal length, each with its own mean. With `eps`, u is divided
    by its root mean square over all channels, sqrt(mean(u^2) + eps), before it is clipped. With t = tanh(slope v)
    and h = dL/dy * gain * (1 - t^2), where inside means |u| <= clip:

        dL/du = slope * h inside, 0 outside            dL/dclip = slope * sum over elements outside of h * sign(u)
        dL/dslope = sum of h * v                       dL/dgain = sum over tokens of dL/dy * t, dL/dbias = of dL/dy
        dL/dx = dL/du - mean of its group              (behind the derivative of the division, if there is one)

    Args:
        x: (..., features), any float dtype; computed in the dtype of `gain`, float32.
        gain, bias: (features,), float32.
        slope: (), float32.
        clip: (), float32, above 0; None clips nothing.
        groups: Divides features; 1 centers each token by its mean, 0 does not center.
        eps: None divides by nothing.

    Returns:
        (..., features), dtype of x.

    Source:
        Zhu et al. 2025, DyT (arXiv 2503.10622); the learned clip, Choi et al. 2018, PACT (arXiv 1805.06085).
    """
    y: Tensor = _GroupedTanh.apply(x, gain, bias, slope, clip, groups, eps)
    return y


def grouped_tanh_reference(
    x: Tensor, gain: Tensor, bias: Tensor, slope: Tensor, clip: Tensor | None, groups: int, eps: float | None = None
) -> Tensor:
    """The definition of `grouped_tanh`, by automatic differentiation."""
    u = x.to(gain.dtype)
    if groups:
        grouped = u.unflatten(-1, (groups, -1))
        u = (grouped - grouped.mean(dim=-1, keepdim=True)).flatten(-2)
    if eps is not None:
        u = u * torch.rsqrt(u.square().mean(dim=-1, keepdim=True) + eps)
    if clip is not None:
        u = torch.where(u.abs() <= clip, u, u.sign() * clip)
    return (gain * torch.tanh(slope * u) + bias).to(x.dtype)


def centered(x: Tensor, groups: int, eps: float | None = None) -> tuple[Tensor, Tensor | None]:
    """u, and what it was multiplied by, (tokens, 1), if it was divided by its root mean square.

    Args:
        x: (tokens, features), float32.
        groups, eps: As `grouped_tanh` takes them.
    """
    u = _without_group_means(x, groups)
    if eps is None:
        return u, None
    inverse_rms = torch.rsqrt(u.square().mean(dim=-1, keepdim=True) + eps)
    return u * inverse_rms, inverse_rms


def _without_group_means(x: Tensor, groups: int) -> Tensor:
    if not groups:
        return x
    grouped = x.reshape(x.shape[0], groups, -1)
    return (grouped - grouped.mean(dim=-1, keepdim=True)).view(x.shape)


class _GroupedTanh(torch.autograd.Function):
    """Counts u in clips, w = u / clip, so that bounds are constants: clamping by a tensor is ten times as slow."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        bias: Tensor,
        slope: Tensor,
        clip: Tensor | None,
        groups: int,
        eps: float | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = torch.empty_like(rows)
        steepness = slope if clip is None else slope * clip
        for block in row_blocks(rows):
            w, _ = centered(rows[block].to(gain.dtype), groups, eps)
            if clip is not None:
                w = (w / clip).clamp_(-1, 1)
            y[block] = torch.addcmul(bias, gain, (w * steepness).tanh_())
        ctx.save_for_backward(rows, gain, slope, clip)
        ctx.groups, ctx.eps = groups, eps
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, gain, slope, clip = ctx.saved_tensors
        grad_rows = grads[0].reshape(rows.shape)
        grad_x = torch.empty_like(rows)
        grad_gain, grad_bias = torch.zeros_like(gain), torch.zeros_like(gain)
        total, within = torch.zeros_like(slope), torch.zeros_like(slope)
        unit = torch.ones_like(slope) if clip is None else clip
        for block in row_blocks(rows):
            u, inverse_rms = centered(rows[block].to(gain.dtype), ctx.groups, ctx.eps)
            w = u / unit
            v = w if clip is None else w.clamp(-1, 1)
            t = (v * (slope * unit)).tanh_()
            h = grad_rows[block].to(gain.dtype)
            grad_bias = grad_bias + h.sum(dim=0)
            grad_gain = grad_gain + (h * t).sum(dim=0)
            h = torch.ops.aten.tanh_backward(h * gain, t)
            total = total + torch.dot(h.view(-1), v.view(-1))
            if clip is not None:
                h = torch.ops.aten.hardtanh_backward(h, w, -1, 1)
                within = within + torch.dot(h.view(-1), v.view(-1))
            grad_x[block] = _through_centering(h.mul_(slope), u, inverse_rms, ctx.groups)
        grad_clip = None if clip is None else slope * (total - within)  # outside, v is the sign of u
        return grad_x.view(grads[0].shape), grad_gain, grad_bias, unit * total, grad_clip, None, None


def _through_centering(grad_u: Tensor, u: Tensor, inverse_rms: Tensor | None, groups: int) -> Tensor:
    if inverse_rms is not None:
        grad_u = (grad_u - u * (grad_u * u).mean(dim=-1, keepdim=True)) * inverse_rms
    return _without_group_means(grad_u, groups)
