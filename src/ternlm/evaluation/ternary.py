"""What the quantizers of a model do: codes, scales, flips, distance to the threshold, activations.

Only matrices inside BitLinear layers count; embeddings, heads and norms are never rounded. Everything
is summed on the device and read once per measurement.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ternlm.models import LanguageModel
from ternlm.nn.linear import BitLinear
from ternlm.ops.packing import pack_2bit
from ternlm.ops.quantize import quantize_activation
from ternlm.ops.row_blocks import row_blocks

KEYS = (
    "frac_neg", "frac_zero", "frac_pos", "scale", "flip_rate", "threshold_distance", "near_threshold", "latent_rms",
    "activation_scale", "activation_clipped",
)  # fmt: skip

_NEAR = 0.05
_WATCHED_TOKENS = 1024


class Matrix(NamedTuple):
    """One quantized matrix, up to date.

    Attributes:
        name: As in checkpoints, without ``.weight``.
        layer: The layer that computes with it.
        weight, codes: Latent weights and their int8 codes, (out_features, in_features).
        scale: As `ternarize` returns it.
    """

    name: str
    layer: BitLinear
    weight: Tensor
    codes: Tensor
    scale: Tensor


def quantized_matrices(model: LanguageModel) -> Iterator[Matrix]:
    """The matrices of BitLinear layers that are rounded, in order."""
    for name, layer in model.bit_linears().items():
        if layer.mode.weights != "none":
            yield from layer_matrices(name, layer)


def layer_matrices(name: str, layer: BitLinear) -> Iterator[Matrix]:
    """The matrices of one layer that rounds its weights, in order.

    Args:
        name: Path of the layer in its model.
        layer: The layer.
    """
    weights = layer.weight.detach().split(layer.sizes)
    for weight, (matrix, (codes, scale)) in zip(weights, layer.matrices().items(), strict=True):
        yield Matrix(f"{name.rpartition('.')[0]}.{matrix}".lstrip("."), layer, weight, codes, scale)


def code_shares(codes: Tensor) -> dict[str, Tensor]:
    """Shares of the codes -1, 0 and +1, each ()."""
    names = {"frac_neg": -1, "frac_zero": 0, "frac_pos": 1}
    return {name: (codes == value).count_nonzero() / codes.numel() for name, value in names.items()}


def inverse_scale(matrix: Matrix) -> Tensor:
    """1 / g for every weight of a matrix, (out_features, in_features)."""
    scale = matrix.scale.reshape(-1, 1) if matrix.scale.dim() < 2 else matrix.scale
    inverse = scale.reciprocal().repeat_interleave(matrix.weight.shape[1] // scale.shape[1], dim=1)
    return inverse.expand(matrix.weight.shape)


class TernaryStatistics:
    """Measures the quantized matrices of a model, again and again.

    The codes of the latest measurement are kept at 2 bits each, to count those that changed since.
    They are not part of a checkpoint: `remember` restores them where a run goes on from a step at
    which it measured.

    Args:
        model: Neither its weights, its mode nor its compiled blocks are changed by a measurement.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._packed: dict[str, Tensor] = {}

    def remember(self) -> None:
        """Let the next measurement count flips since now."""
        self._packed = {
            matrix.name: pack_2bit(matrix.codes)
            for matrix in quantized_matrices(self._model)
            if matrix.layer.mode.weights == "ternary"
        }

    @torch.no_grad()
    def measure(self, tokens: Tensor | None = None) -> dict[str, float | None]:
        """One row: ``ternary/<matrix>/<key>`` and ``ternary/all/<key>`` for each of `KEYS`.

        frac_neg, frac_zero, frac_pos: shares of the codes.
        scale: mean of the scales g.
        flip_rate: share of codes that differ from those of the previous measurement.
        threshold_distance: mean of | |w| / g - 1/2 |; near_threshold: share where it is below 0.05.
        latent_rms: root of the mean of w^2.
        activation_scale: mean over tokens of max|x| / L, the step of the activation's grid of 2L + 1 levels.
        activation_clipped: share of activation codes at -L and L; never below 1 / in_features.

        ``all`` is the mean weighted by the number of weights. What does not apply is None: fractions,
        flips and thresholds of int8 weights, flips before there is something to compare with,
        activations without `tokens` or where they are not rounded. A model that rounds nothing has
        an empty row.

        Args:
            tokens: (batch, time). A first part of about a thousand tokens goes through the model once, in
                evaluation mode and not compiled, to watch the activations; the training pass is left alone.
        """
        matrices = list(quantized_matrices(self._model))
        activations = {} if tokens is None or not matrices else _watch(self._model, tokens)
        packed: dict[str, Tensor] = {}
        measured = []
        for matrix in matrices:
            values = {"scale": matrix.scale.mean(), "latent_rms": matrix.weight.square().mean().sqrt()}
            if matrix.layer.mode.weights == "ternary":
                packed[matrix.name] = pack_2bit(matrix.codes)
                values |= code_shares(matrix.codes) | _thresholds(matrix)
                if matrix.name in self._packed:
                    changed = _differing(packed[matrix.name], self._packed[matrix.name])
                    values["flip_rate"] = changed / matrix.codes.numel()
            measured.append(values | activations.get(matrix.layer, {}))
        self._packed = packed
        read = _read(measured)
        row = {
            f"ternary/{matrix.name.removeprefix('model.')}/{key}": values.get(key)
            for matrix, values in zip(matrices, read, strict=True)
            for key in KEYS
        }
        sizes = [matrix.codes.numel() for matrix in matrices]
        return row | {f"ternary/all/{key}": _overall(key, read, sizes) for key in KEYS if matrices}


def _thresholds(matrix: Matrix) -> dict[str, Tensor]:
    inverse = inverse_scale(matrix)
    sums = []
    for block in row_blocks(matrix.weight):
        distance = (matrix.weight[block] * inverse[block]).abs_().sub_(0.5).abs_()
        sums.append(torch.stack([distance.sum(), (distance < _NEAR).count_nonzero().float()]))
    total, near = (torch.stack(sums).sum(dim=0) / matrix.weight.numel()).unbind()
    return {"threshold_distance": total, "near_threshold": near}


def _differing(packed: Tensor, other: Tensor) -> Tensor:
    """Number of 2-bit fields that differ."""
    changed = packed ^ other
    return torch.stack([(changed & (3 << shift)).count_nonzero() for shift in (0, 2, 4, 6)]).sum()


def _watch(model: LanguageModel, tokens: Tensor) -> dict[nn.Module, dict[str, Tensor]]:
    """activation_scale and activation_clipped of each layer, from one pass over the first of the tokens."""
    seen: dict[nn.Module, list[tuple[Tensor, int]]] = {}  # means over the tokens of a call, and their number

    def watch(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(layer, BitLinear)
        bits = layer.mode.activation_bits
        if bits is None or layer.mode.weights == "none":
            return
        codes, multiplier = quantize_activation(inputs[0], bits)
        clipped = (codes.abs() == 2 ** (bits - 1) - 1).count_nonzero() / codes.numel()
        means = torch.stack([multiplier.reciprocal().mean(), clipped])
        seen.setdefault(layer, []).append((means, multiplier.numel()))

    rows = max(1, _WATCHED_TOKENS // tokens.shape[1])
    hooks = [layer.register_forward_pre_hook(watch) for layer in model.bit_linears().values()]
    was_training = model.training
    try:
        with not_compiled(model):
            model.eval()(tokens[:rows])
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    watched = {}
    for layer, calls in seen.items():
        total = torch.stack([means * count for means, count in calls]).sum(dim=0)
        scale, clipped = (total / sum(count for _, count in calls)).unbind()
        watched[layer] = {"activation_scale": scale, "activation_clipped": clipped}
    return watched


@contextmanager
def not_compiled(model: LanguageModel) -> Iterator[None]:
    """Run blocks as written: a compiled graph does not know of hooks added later."""
    compiled = [(block, block._compiled_call_impl) for block in model.blocks()]
    for block, _ in compiled:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, call in compiled:
            block._compiled_call_impl = call


def _read(measured: list[dict[str, Tensor]]) -> list[dict[str, float]]:
    """All numbers, in one transfer from the device."""
    flat = [value.float() for values in measured for value in values.values()]
    numbers = iter(torch.stack(flat).tolist() if flat else [])
    return [{key: next(numbers) for key in values} for values in measured]


def _overall(key: str, read: list[dict[str, float]], sizes: list[int]) -> float | None:
    known = [(values[key], size) for values, size in zip(read, sizes, strict=True) if key in values]
    weights = sum(size for _, size in known)
    if not known:
        return None
    if key == "latent_rms":
        return math.sqrt(sum(value**2 * size for value, size in known) / weights)
    return sum(value * size for value, size in known) / weights
