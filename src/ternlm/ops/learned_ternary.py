"""Ternary quantizers whose scale, and threshold, are parameters of each row: `ttq` and `lsq`.

Both round a row w to s q with q in {-1, 0, +1}:

    ttq    q_j = sign(w_j) [|w_j| > delta]            s = softplus(s~), delta = softplus(d~)
    lsq    q_j = clamp(round(w_j / s), -1, 1)         s = softplus(s~)

The codes themselves come from `ops/quantize.py`; here are the starting values and the gradients. The linear
product knows only dL/dw^ for the rounded weights w^, which it hands to its latent weights; `gradient_port` stands
in front of them and turns it into what the latent weights and the row parameters receive.

Source:
    Zhu et al. 2016, TTQ (arXiv 1612.01064); Esser et al. 2019, LSQ (arXiv 1902.08153).
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ternlm.ops.quantize import EPS, absmean, kept_mean
from ternlm.ops.row_blocks import row_blocks

SMALLEST = 1e-8
"""Least scale and threshold: softplus of a very negative number is zero in float32."""


def fit_ttq(weight: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Starting scale and threshold of each row for `ttq`.

    delta_i lies midway between the order statistics of rank ceil(percentile / 100 * columns) of |w_i| and the next,
    so that many weights become zero and none lies on it; s_i is the mean of |w_i| over the others, the best scale in
    least squares. Neither is below 1e-5.

    Returns:
        Two float32 tensors, (rows,).
    """
    columns = weight.shape[1]
    rank = min(max(math.ceil(percentile / 100 * columns), 1), columns)
    magnitude = weight.float().abs()
    below, above = (magnitude.kthvalue(min(r, columns), dim=1, keepdim=True).values for r in (rank, rank + 1))
    threshold = ((below + above) / 2).clamp_min(EPS)
    return kept_mean(weight, threshold)[:, 0], threshold[:, 0]


def fit_lsq(weight: Tensor) -> Tensor:
    """Starting scale of each row for `lsq`: 1.55 mean|w_i|, near the least squared error on Gaussian rows; (rows,)."""
    return 1.55 * absmean(weight, "row")[:, 0]


def positive(raw: Tensor) -> Tensor:
    """softplus, and never below 1e-8."""
    return F.softplus(raw).clamp_min(SMALLEST)


def inverse_positive(value: Tensor) -> Tensor:
    """raw with softplus(raw) = value: value + log(-expm1(-value))."""
    return value + torch.log(-torch.expm1(-value))


class RowQuantizer(NamedTuple):
    """What the gradients of a learned quantizer are made of.

    Attributes:
        codes: int8 codes of the forward pass, (rows, columns).
        scale: s, (rows, 1), float32.
        threshold: delta, (rows, 1), for ``ttq``; None for ``lsq``.
        clips: dL/dw is zero where |w| > s (``ste: clip``).
    """

    codes: Tensor
    scale: Tensor
    threshold: Tensor | None
    clips: bool = False


def gradient_port(
    weight: Tensor,
    raw_scale: Tensor,
    raw_threshold: Tensor | None,
    quantizer: RowQuantizer,
    share: Tensor | None = None,
    around: Tensor | None = None,
) -> Tensor:
    """The latent weights, unchanged; a gradient dL/dw^ that arrives here is spread over weights and row parameters.

    With g = share * dL/dw^, K columns and c = 1 / sqrt(K), for each row:

        dL/dw      = g + around * dL/dw^; with `clips` g [|w| <= s] + around * dL/dw^
        dL/ds      = c sum_j g q                                                              (ttq)
                   = c sum_j g (q - w / s where |w| <= s, else q)                             (lsq)
        dL/ddelta  = c sum_j g (-s sign(w)) [| |w| - delta | < delta / 2] / delta             (ttq)

    The two row gradients are multiplied by the slope of softplus. The box of width delta around the threshold stands
    in for the derivative of the step there.

    Args:
        weight: (rows, columns), float32.
        raw_scale, raw_threshold: s~ and d~, (rows,); d~ is None for ``lsq``.
        quantizer: The row quantizer of this forward pass.
        share: By how much w^ grows with its rounded value, broadcastable to `weight`; None is 1.
        around: By how much it grows with the latent weight past the quantizer; None is 0. Both or neither are given.

    Returns:
        A tensor equal to `weight`.
    """
    port: Tensor = _GradientPort.apply(
        weight,
        raw_scale,
        raw_threshold,
        quantizer.codes,
        quantizer.scale,
        quantizer.threshold,
        share,
        around,
        quantizer.clips,
    )
    return port


class _GradientPort(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        raw_scale: Tensor,
        raw_threshold: Tensor | None,
        codes: Tensor,
        scale: Tensor,
        threshold: Tensor | None,
        share: Tensor | None,
        around: Tensor | None,
        clips: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight, raw_scale, raw_threshold, codes, scale, threshold, share, around)
        ctx.clips = clips
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, raw_scale, raw_threshold, codes, scale, threshold, share, around = ctx.saved_tensors
        grad = grads[0]
        changes_weight = ctx.clips or share is not None
        grad_weight = torch.empty_like(grad) if changes_weight else grad
        share, around = (None if part is None else part.expand(weight.shape) for part in (share, around))
        grad_scale, grad_threshold = [], []
        for block in row_blocks(weight):
            w, s, q = weight[block], scale[block], codes[block].to(grad.dtype)
            g = grad[block] if share is None else grad[block] * share[block]
            within = (w.abs() <= s).to(g.dtype) if ctx.clips or threshold is None else None
            if threshold is None:
                assert within is not None
                grad_scale.append((g * (q - w / s * within)).sum(dim=1))
            else:
                grad_scale.append((g * q).sum(dim=1))
                delta = threshold[block]
                # g where |w / delta| lies within 1/2 of 1, for positive and negative w: comparisons to bool, signs
                # and their products would take three times as long.
                beyond = (w * delta.reciprocal()).sub_(1)
                signed = torch.ops.aten.hardtanh_backward(g, beyond, -0.5, 0.5).sum(dim=1)
                signed = signed - torch.ops.aten.hardtanh_backward(g, beyond.add_(2), -0.5, 0.5).sum(dim=1)
                grad_threshold.append(signed * -(s / delta)[:, 0])
            if changes_weight:
                through = g if within is None or not ctx.clips else g * within
                grad_weight[block] = through if around is None else through + grad[block] * around[block]

        def parameter(parts: list[Tensor], raw: Tensor) -> Tensor:
            return torch.cat(parts) / math.sqrt(weight.shape[1]) * raw.sigmoid()

        grad_raw_threshold = None if threshold is None else parameter(grad_threshold, raw_threshold)
        return grad_weight, parameter(grad_scale, raw_scale), grad_raw_threshold, *(None,) * 6


def scaled_gradient(weight: Tensor, factor: Tensor) -> Tensor:
    """The value of `weight`, whose gradient is multiplied by `factor`."""
    scaled: Tensor = _ScaledGradient.apply(weight, factor)
    return scaled


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grads[0] * factor, None
