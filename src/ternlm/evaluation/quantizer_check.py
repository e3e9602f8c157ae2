"""The quantizers of a model against their published formulas, written out once more, in plain arithmetic.

Nothing of `ops` is called for the expected values: a mistake there must show here.

    weights      g = max(mean|W|, 1e-5),  codes = clip(round(W / g), -1, 1)
    activations  s = 127 / max(max|x|, 1e-5) of each token,  codes = round(x s)
    product      y = (codes_x codes_W^T) (g / s)

Source:
    Ma et al. 2024 (arXiv 2402.17764), section 2; Wang et al. 2023 (arXiv 2310.11453).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ternlm.evaluation.ternary import layer_matrices
from ternlm.nn.linear import BitLinear

EPS = 1e-5
_SCALE, _PRODUCT, _TRACE = 1e-6, 2e-5, 1e-12
_BITS = (8, 6, 4, None)
_LARGEST_COPY = 64
"""Rows of the copy of a layer that its rounding is tried on."""


class WeightCheck(NamedTuple):
    """What was found of the ternary matrices of a model.

    Attributes:
        matrices: How many there are, rounded or not.
        rounding: Of how many the layer rounds to ternary codes.
        equal: Of how many all codes are those of the formula.
        scales_equal: Of how many there is one scale, mean|W|.
        wrong_codes: Share of all codes of ternary matrices that differ.
        worst_scale: Largest relative deviation of a single scale from mean|W|.
        scales: How many scales there are in all.
    """

    matrices: int
    rounding: int
    equal: int
    scales_equal: int
    wrong_codes: float
    worst_scale: float
    scales: int


class ProductCheck(NamedTuple):
    """What was found of the products of ternary layers on real activations.

    Attributes:
        layers: How many were tried.
        bits: Bits to which each layer rounds its input, with one scale per token, and how many do; None for a layer
            that does not round, "other" for one whose products no known rounding explains.
        exact: How many give, in their own type of number, the product of the codes, scaled after it.
    """

    layers: int
    bits: dict[int | str | None, int]
    exact: int


@torch.no_grad()
def check_weights(layers: Mapping[str, BitLinear]) -> WeightCheck:
    """Compare the codes and scales that layers compute with to those of the formula."""
    matrices = rounding = equal = scales_equal = wrong = total = scales = 0
    worst = 0.0
    for name, layer in layers.items():
        if layer.mode.weights != "ternary":
            matrices += len(layer.sizes)
            continue
        for matrix in layer_matrices(name, layer):
            matrices, rounding = matrices + 1, rounding + 1
            scales += matrix.scale.numel()
            mean = matrix.weight.abs().mean(dtype=torch.float64).float().clamp_min(EPS)
            deviation = float(((matrix.scale - mean).abs() / mean).max())
            has_mean = matrix.scale.numel() == 1 and deviation <= _SCALE
            worst = max(worst, deviation) if matrix.scale.numel() == 1 else worst
            g = matrix.scale.reshape(()) if has_mean else mean  # its last bit depends on the order of a sum
            wanted = (matrix.weight.float() * (1 / g)).round().clamp(-1, 1)
            differing = int((wanted != matrix.codes.float()).sum())
            scales_equal, equal = scales_equal + has_mean, equal + (differing == 0)
            wrong, total = wrong + differing, total + matrix.codes.numel()
    return WeightCheck(matrices, rounding, equal, scales_equal, wrong / max(total, 1), worst, scales)


@torch.no_grad()
def check_products(layers: Mapping[str, BitLinear], inputs: Mapping[str, Tensor]) -> ProductCheck:
    """Compare the outputs of layers for inputs they have really seen to products of codes.

    Args:
        layers: By name.
        inputs: (tokens, in_features), by name of the layer.
    """
    found: dict[int | str | None, int] = {}
    exact = 0
    for name, x in inputs.items():
        layer = layers[name]
        weight = _dequantized(name, layer)
        wide = torch.cat(layer(x.float()), dim=-1).double()
        fitting = [bits for bits in _BITS if _is_near(wide, _rounded(x, bits) @ weight.T, _PRODUCT)]
        kind = fitting[0] if fitting else "other"
        found[kind] = found.get(kind, 0) + 1
        bits = fitting[0] if fitting else None
        if bits is not None:
            exact += _is_equal(torch.cat(layer(x), dim=-1), _rounded(x, bits) @ weight.T)
    return ProductCheck(len(inputs), found, exact)


@torch.no_grad()
def ties_go_to_even(layer: BitLinear) -> tuple[bool, bool | None]:
    """Whether a copy of a layer rounds weights and activations that lie halfway between two codes to the even one.

    A matrix with magnitudes 1/2, 3/2, 1, 1, ... has mean magnitude 1: its first two codes are 0 and 1 with the right
    sign, whatever rounding away from zero, or always up, would make of them. A token L, 1/2, 3/2, 5/2, 1/2, 0, ...
    with the largest code L has codes L, 0, 2, 2, 0, whose sum a row of equal weights returns. The second is None for a
    layer that does not round its input.
    """
    trial = _small_copy(layer)
    width = trial.in_features
    row = torch.ones(width, device=trial.weight.device)
    row[:2] = torch.tensor([0.5, 1.5])
    signs = torch.ones(trial.weight.shape[0], 1, device=row.device)
    signs[1::2] = -1
    trial.weight.copy_(signs * row)
    trial.fit()
    codes = torch.cat([codes for codes, _ in trial.matrices().values()])
    even = torch.equal(codes.float(), signs * row.round().clamp(-1, 1))
    if layer.mode.activation_bits is None or not layer.rounds_input:
        return even, None
    trial.weight.fill_(1.0)
    trial.fit()
    top = 2.0 ** (layer.mode.activation_bits - 1) - 1
    token = torch.zeros(1, width, device=row.device)
    token[0, :5] = torch.tensor([top, 0.5, 1.5, 2.5, 0.5])
    return even, abs(float(torch.cat(trial(token), dim=-1)[0, 0]) - (top + 4)) < 1e-3


def _small_copy(layer: BitLinear) -> BitLinear:
    """A layer of the same class and mode with a few rows, whose weights may be overwritten."""
    sizes = {"first": min(_LARGEST_COPY, layer.sizes[0])}
    trial = type(layer)(layer.in_features, sizes, layer.mode, layer.rounds_input)
    return trial.to(layer.weight.device).eval()


def _dequantized(name: str, layer: BitLinear) -> Tensor:
    """W^ of all matrices of a layer as it computes with them, (all out_features, in_features), float64."""
    if layer.mode.weights == "none":
        return layer.weight.double()
    parts = []
    for matrix in layer_matrices(name, layer):
        scale = matrix.scale.reshape(-1, 1) if matrix.scale.dim() < 2 else matrix.scale
        parts.append(matrix.codes.double() * scale.double().repeat_interleave(layer.in_features // scale.shape[1], 1))
    return torch.cat(parts)


def _rounded(x: Tensor, bits: int | None) -> Tensor:
    """x^, float64."""
    wide = x.float()
    if bits is None:
        return wide.double()
    scale = (2 ** (bits - 1) - 1) / wide.abs().amax(dim=-1, keepdim=True).clamp_min(EPS)
    return (wide * scale).round().double() / scale.double()


def _is_near(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Whether the largest deviation is within a share of the largest value; never where something is not finite."""
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp_min(1e-30))


def _is_equal(found: Tensor, wanted: Tensor) -> bool:
    """Whether every element is the wanted one but for the rounding of its type, and of two factors in float32.

    The wanted ones are sums of rounded activations: where they should cancel, float64 leaves a trace.
    """
    tolerance = torch.finfo(found.dtype).eps + 4 * torch.finfo(torch.float32).eps
    return bool(((found.double() - wanted).abs() <= tolerance * wanted.abs() + _TRACE * wanted.abs().max()).all())
