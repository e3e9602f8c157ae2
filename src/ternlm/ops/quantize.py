"""The only rounding in the package: ternary weights, absmax integer rows, and activations.

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
        codes[block] = round_to_levels_(weight[block].float() * inverse[block], 1)
    return codes


def twn_threshold(weight: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """0.7 mean|W| per tensor, (), or per row, (out_features, 1), in float32.

    Source:
        Li et al. 2016, ternary weight networks, section 2.3 (arXiv 1605.04711).
    """
    return 0.7 * absmean(weight, granularity)


def kept_mean(weight: Tensor, threshold: Tensor, eps: float = EPS) -> Tensor:
    """The mean of |W| beyond the threshold, the scale that fits its codes best in least squares.

    s = sum(|W| [|W| > threshold]) / count(|W| > threshold), at least eps; eps where no weight is kept.

    Args:
        weight: (out_features, in_features).
        threshold: () for one scale, (out_features, 1) for one per row.

    Returns:
        float32, shaped as `threshold`; summed in float64, as `absmean` is.
    """
    sums, counts = [], []
    limit = threshold.reshape(-1, 1).expand(weight.shape[0], 1)
    for block in row_blocks(weight):
        magnitude = weight[block].float().abs()
        kept = magnitude > limit[block]
        sums.append((magnitude * kept).sum(dim=1, dtype=torch.float64))
        counts.append(kept.sum(dim=1))
    total, count = torch.cat(sums), torch.cat(counts)
    if threshold.dim() == 0:
        total, count = total.sum(), count.sum()
    return (total / count.clamp_min(1)).float().clamp_min(eps).view(threshold.shape)


def write_threshold_codes(weight: Tensor, threshold: Tensor, codes: Tensor) -> Tensor:
    """Write sign(W) * [|W| > threshold] into `codes` and return it.

    Args:
        weight: (out_features, in_features).
        threshold: () or (out_features, 1), float32.
        codes: int8, (out_features, in_features), contiguous.
    """
    limit = threshold.reshape(-1, 1).expand(weight.shape[0], 1)
    for block in row_blocks(weight):
        wide = weight[block].float()
        codes[block] = (wide > limit[block]).to(torch.int8) - (wide < -limit[block]).to(torch.int8)
    return codes


def round_to_levels_(scaled: Tensor, levels: int | None, noise: Tensor | None = None) -> Tensor:
    """Replace z by round(clamp(z, -levels, levels) + noise / 2^16), in place, and return it.

    Without noise ties go to the even code. With noise that is uniform between -2^15 and 2^15, both excluded, rounding
    is stochastic: round(z + u - 1/2) is floor(z + u) with u uniform in (0, 1), whose mean is z.

    Args:
        scaled: Any shape, float32, in units of one step of the grid.
        levels: Largest code; None where z is known to be within the grid.
        noise: Broadcastable to `scaled`, float32.
    """
    if levels is not None:
        scaled.clamp_(-levels, levels)
    if noise is not None:
        scaled.add_(noise, alpha=2.0**-16)
    return scaled.round_()


def quantize_rows(weight: Tensor, bits: int = 8, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Round each row of a weight matrix to 2 L + 1 levels, L = 2^(bits - 1) - 1, with its own absmax scale.

    codes = round(W * (L / m)), scale = m / L with m = max(max_j|W_ij|, eps).

    Returns:
        int8 codes, (out_features, in_features), and float32 scales, (out_features, 1).
    """
    codes, inverse = quantize_activation(weight, bits, eps)
    return codes, inverse.reciprocal()


def quantize_activation(x: Tensor, bits: int = 8, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Round each token to `bits`-bit integers with its own absmax scale.

    codes = round(x * s) with s = L / max(max_j|x_tj|, eps) and L = 2^(bits - 1) - 1. The largest
    element becomes exactly L, so no clamp is needed: -128 never occurs. A token that holds a
    non-finite value keeps a non-finite scale, so the product stays visibly broken.

    Args:
        x: (..., features), any float dtype, read as float32.
        bits: 2 to 8.

    Returns:
        int8 codes, (..., features), and the float32 multiplier s, (..., 1); x is codes / s.

    Source:
        Ma et al. 2024 (arXiv 2402.17764), section 2; per-token absmax as in BitNet (arXiv 2310.11453).
    """
    levels = top_code(bits)
    rows = x.detach().reshape(-1, x.shape[-1])
    codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows.shape[0], 1, device=x.device)
    for block in row_blocks(rows):
        wide = rows[block].float()
        multiplier = levels / wide.abs().amax(dim=-1, keepdim=True).clamp_min(eps)
        scale[block] = multiplier
        codes[block] = round_to_levels_(wide * multiplier, None)
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)


def codes_on_grid(x: Tensor, grid: Tensor) -> Tensor:
    """The int8 codes of values that are multiples of a grid already: round(x * (1 / grid)).

    Args:
        x: (..., features), code * grid with |code| <= 127, in any float dtype: 8 significant bits tell codes apart.
        grid: float32, () or broadcastable to (..., 1).
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    inverse = grid.reciprocal().expand(*x.shape[:-1], 1).reshape(-1, 1)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    for block in row_blocks(rows):
        codes[block] = round_to_levels_(rows[block] * inverse[block], None)
    return codes.view(x.shape)


def top_code(bits: int) -> int:
    """L = 2^(bits - 1) - 1, the largest code of a symmetric grid of 2 L + 1 levels."""
    return int(2 ** (bits - 1)) - 1


def dequantize_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes * scale for any granularity, (out_features, in_features); exact when dtype is float32."""
    return codes.to(dtype) * _per_element(scale, codes.shape[1]).to(dtype)


def _per_element(scale: Tensor, in_features: int) -> Tensor:
    """Stretch scales so that they broadcast over a matrix: groups become columns."""
    if scale.dim() == 2 and scale.shape[1] > 1:
        return scale.repeat_interleave(in_features // scale.shape[1], dim=1)
    return scale.reshape(-1, 1)
