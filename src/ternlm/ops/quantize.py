"""The only rounding in the package: absmean ternary weights, absmax integer rows and activations.

Training, evaluation, packing and export all call these functions, so the codes that are trained
are the codes that are shipped. Scales are float32, rounding is half to even, and a scale is
applied after the integer product (`ops/quantized_linear.py`), never before.
"""

from typing import Literal

import torch
from torch import Tensor

from ternlm.ops.row_blocks import row_blocks

Granularity = Literal["tensor", "row", "group"]

EPS = 1e-5
"""Smallest weight scale and smallest activation maximum, so that zeros stay finite."""


def ternarize(
    weight: Tensor, granularity: Granularity = "tensor", group_size: int = 128, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """Round a weight matrix to {-1, 0, +1} with absmean scales.

    codes = clamp(round(W * (1 / s)), -1, 1) with s = max(mean|W|, eps).

    Args:
        weight: Latent weights, (out_features, in_features), any float dtype, read as float32.
        granularity: One scale for the matrix, for each row, or for each group of columns of a row.
        group_size: Columns per group; must divide in_features.
        eps: Smallest scale, so that an all-zero matrix stays finite.

    Returns:
        int8 codes, (out_features, in_features), and float32 scales: () for ``tensor``,
        (out_features, 1) for ``row``, (out_features, in_features / group_size) for ``group``.

    Source:
        Ma et al. 2024, "The Era of 1-bit LLMs", eqs. 1-3 (arXiv 2402.17764).
    """
    scale = absmean(weight, granularity, group_size, eps)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    return write_ternary_codes(weight, scale, codes), scale


def absmean(weight: Tensor, granularity: Granularity = "tensor", group_size: int = 128, eps: float = EPS) -> Tensor:
    """max(mean|W|, eps) per tensor, row or group, in float32.

    The sum is accumulated in float64: its order depends on threads and device, and a last-bit
    difference in the scale would move every code that sits on a threshold.
    """
    if granularity == "tensor":
        sums = [weight[block].double().abs_().sum() for block in row_blocks(weight)]
        mean = torch.stack(sums).sum() / weight.numel()
    else:
        width = weight.shape[1] if granularity == "row" else group_size
        if weight.shape[1] % width:
            raise ValueError(f"group_size {group_size} does not divide in_features {weight.shape[1]}")
        groups = weight.unflatten(1, (-1, width))
        mean = torch.linalg.vector_norm(groups, 1, dim=2, dtype=torch.float64) / width
    return mean.float().clamp_min(eps)


def write_ternary_codes(weight: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    """Write clamp(round(W * (1 / s)), -1, 1) into `codes` and return it.

    Written in place so that a layer keeps one buffer for its whole life: no allocation, and
    nothing for a compiled graph to notice.

    Args:
        weight: (out_features, in_features).
        scale: (), (out_features, 1) or (out_features, groups), float32.
        codes: int8, (out_features, in_features), contiguous.
    """
    inverse = _per_element(scale.reciprocal(), weight.shape[1]).expand(weight.shape[0], -1)
    for block in row_blocks(weight):
        codes[block] = (weight[block].float() * inverse[block]).round_().clamp_(-1, 1)
    return codes


def quantize_rows(weight: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Round each row of a weight matrix to 255 levels with its own absmax scale.

    codes = round(W * (127 / m)), scale = m / 127 with m = max(max_j|W_ij|, eps).

    Returns:
        int8 codes, (out_features, in_features), and float32 scales, (out_features, 1).
    """
    codes, inverse = quantize_activation(weight, eps=eps)
    return codes, inverse.reciprocal()


def quantize_activation(x: Tensor, bits: int = 8, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Round each token to `bits`-bit integers with its own absmax scale.

    codes = round(x * s) with s = L / max(max_j|x_tj|, eps) and L = 2^(bits - 1) - 1. The largest
    element becomes exactly L, so no clamp is needed: -128 never occurs. A token that holds a
    non-finite value keeps a non-finite scale, so the product stays visibly broken.

    Args:
        x: (..., features), any float dtype, read as float32.
        bits: 8 or 4.

    Returns:
        int8 codes, (..., features), and the float32 multiplier s, (..., 1); x is codes / s.

    Source:
        Ma et al. 2024 (arXiv 2402.17764), section 2; per-token absmax as in BitNet (arXiv 2310.11453).
    """
    levels = 2 ** (bits - 1) - 1
    rows = x.detach().reshape(-1, x.shape[-1])
    scale = levels / rows.abs().amax(dim=-1, keepdim=True).float().clamp_min(eps)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    for block in row_blocks(rows):
        codes[block] = (rows[block] * scale[block]).round_()
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)


def dequantize_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes * scale for any granularity, (out_features, in_features); exact when dtype is float32."""
    return codes.to(dtype) * _per_element(scale, codes.shape[1]).to(dtype)


def _per_element(scale: Tensor, in_features: int) -> Tensor:
    """Stretch scales so that they broadcast over a matrix: groups become columns."""
    if scale.dim() == 2 and scale.shape[1] > 1:
        return scale.repeat_interleave(in_features // scale.shape[1], dim=1)
    return scale.reshape(-1, 1)
