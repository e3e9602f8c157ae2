"""What is in the weight matrices of a model: codes, dead rows, scales, thresholds, latent weights.

Nothing is run: all of it can be read off a checkpoint. What a run says about its matrices while it trains
is `ternary`.
"""

from typing import Any

import torch
from torch import Tensor

from ternlm.evaluation.histogram import Histogram, spread
from ternlm.evaluation.placement import Place, places
from ternlm.evaluation.ternary import Matrix, code_shares, inverse_scale, layer_matrices
from ternlm.models import LanguageModel
from ternlm.nn.linear import BitLinear
from ternlm.ops.quantize import dequantize_weight
from ternlm.ops.row_blocks import row_blocks

_RANGE, _BINS = 5.0, 100


@torch.no_grad()
def analyze_matrices(model: LanguageModel) -> list[dict[str, Any]]:
    """One row per matrix of every BitLinear, in order, the head included where it is one, whether it is rounded or not.

    Every row has its place (`name`, `block`, `part`), `rows`, `columns`, the rounding of its `weights`,
    `latent_std`, `latent_absmax` and `histogram`: latent weights in units of their scale where they are ternary,
    else of their root mean square (`unit`). A rounded matrix adds

        distinct_codes   different integers in use
        relative_error   sum (w - s q)^2 / sum w^2
        scale_*          mean and quantiles of the scales s, one per matrix, row or group
        dead_rows        rows whose codes are all 0

    and a ternary one `negative`, `zero`, `positive`, the shares of its codes, and `threshold_*`, the mean and
    quantiles of delta / s, where |w| > delta is what becomes -1 or +1. What does not apply is None.
    """
    where = places(model)
    rows = []
    for layer in where:
        if not isinstance(layer, BitLinear):
            continue
        weights = layer.weight.detach().split(layer.sizes)
        if layer.mode.weights == "none":
            found: list[Matrix | None] = [None] * len(weights)
        else:
            found = list(layer_matrices(where[layer].name, layer))
        for name, weight, matrix in zip(layer.out_features, weights, found, strict=True):
            rows.append(_row(where[layer].matrix(name), layer, weight, matrix))
    return rows


def analyze_skips(model: LanguageModel) -> list[dict[str, Any]]:
    """One row per parameter of a single number that a block has of its own: what its branches are multiplied by."""
    where = places(model)
    rows = []
    for block in model.blocks():
        for name, parameter in block.named_parameters(recurse=False):
            if parameter.numel() == 1:
                place = Place(f"{where[block].name}.{name}", where[block].block, name)
                rows.append(place.as_dict() | {"value": float(parameter.detach())})
    return rows


def _row(place: Place, layer: BitLinear, weight: Tensor, matrix: Matrix | None) -> dict[str, Any]:
    rms = weight.square().mean().sqrt()
    row = {
        **place.as_dict(), "rows": weight.shape[0], "columns": weight.shape[1], "weights": layer.mode.weights,
        "latent_std": float(weight.std(correction=0)), "latent_absmax": float(weight.abs().max()),
        "nonfinite": int((~weight.isfinite()).sum()), "negative": None, "zero": None, "positive": None,
        "dead_rows": None, "distinct_codes": None, "relative_error": None, "scale_median": None,
        "threshold_median": None,
    }  # fmt: skip
    in_rms = {
        "unit": "root mean square",
        "histogram": _histogram(weight, rms.clamp_min(1e-30).reciprocal().expand(weight.shape)),
    }
    if matrix is None:
        return row | in_rms
    row |= {
        "dead_rows": int((matrix.codes == 0).all(dim=1).sum()),
        "distinct_codes": int(matrix.codes.unique().numel()),
        "relative_error": _relative_error(matrix),
        **spread(matrix.scale, "scale"),
    }
    if layer.mode.weights != "ternary":
        return row | in_rms
    negative, zero, positive = (float(share) for share in code_shares(matrix.codes).values())
    thresholds = layer.thresholds()[matrix.name.rpartition(".")[2]] / matrix.scale
    return row | {
        "negative": negative, "zero": zero, "positive": positive, **spread(thresholds, "threshold"),
        "unit": "scale", "histogram": _histogram(weight, inverse_scale(matrix)),
    }  # fmt: skip


def _histogram(weight: Tensor, inverse: Tensor) -> dict[str, Any]:
    histogram = Histogram(-_RANGE, _RANGE, _BINS)
    for block in row_blocks(weight):
        histogram.add(weight[block] * inverse[block])
    return histogram.as_dict()


def _relative_error(matrix: Matrix) -> float | None:
    scale = matrix.scale if matrix.scale.dim() == 2 else matrix.scale.expand(matrix.codes.shape[0])[:, None]
    error = total = torch.zeros((), dtype=torch.float64, device=matrix.weight.device)
    for block in row_blocks(matrix.weight):
        weight = matrix.weight[block]
        lost = weight - dequantize_weight(matrix.codes[block], scale[block])
        error, total = error + lost.double().square().sum(), total + weight.double().square().sum()
    return float(error / total) if total > 0 else None
