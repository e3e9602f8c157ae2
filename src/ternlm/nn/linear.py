"""BitLinear: the linear layer whose weights are ternary, 8-bit, or full precision by one dial.

The latent weights stay float32 parameters. Their codes are computed once per change (so once per
optimizer step, however many micro-batches read them) into fixed buffers. The full-precision twin
of a model is the same class with the mode `none`.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ternlm.errors import SettingsError
from ternlm.ops.quantize import Granularity, absmean, quantize_rows, write_ternary_codes
from ternlm.ops.quantized_linear import quantized_linear
from ternlm.settings import Count, Settings


class QuantizationMode(Settings):
    """How one layer rounds: the dial that schedules turn, and the `quantization` section of a run.

    Attributes:
        weights: ``ternary`` (absmean), ``int8`` (absmax per row) or ``none``.
        activations: ``int8``, ``int4`` (absmax per token) or ``none``; ignored when weights are ``none``.
        granularity: What shares a ternary scale: the whole matrix, a row, or a group of columns.
        group_size: Columns per group.
    """

    weights: Literal["ternary", "int8", "none"] = "ternary"
    activations: Literal["int8", "int4", "none"] = "int8"
    granularity: Granularity = "tensor"
    group_size: Count = Field(default=128, ge=1)

    @property
    def activation_bits(self) -> int | None:
        return {"int8": 8, "int4": 4, "none": None}[self.activations]


FULL_PRECISION = QuantizationMode(weights="none", activations="none")


class BitLinear(nn.Module):
    """Linear layer without bias on quantized weights and activations; several matrices may share it.

    Matrices that read the same input (query, key, value; gate, up) are one parameter and one
    product, but keep a scale each, so they are the same model as separate layers; files hold them
    under their own names (`LanguageModel.tensors`).

    Args:
        in_features: Width of the input.
        out_features: Rows of each merged matrix by name.
        mode: How weights and activations are rounded.

    Raises:
        SettingsError: The group size does not divide the width.
    """

    def __init__(self, in_features: int, out_features: Mapping[str, int], mode: QuantizationMode) -> None:
        super().__init__()
        if mode.granularity == "group" and in_features % mode.group_size:
            raise SettingsError(
                f"quantization.group_size={mode.group_size} does not divide a width of {in_features}. "
                "Choose a divisor of all widths, or quantization.granularity=tensor."
            )
        self.in_features = in_features
        self.out_features = dict(out_features)
        self.sizes = list(out_features.values())
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), in_features))
        self.codes: Tensor
        self.scale: Tensor
        self.register_buffer("codes", None, persistent=False)
        self.register_buffer("scale", None, persistent=False)
        self.quantizations = 0
        self._quantized_version: tuple[Any, ...] | None = None
        self.mode = mode

    @property
    def mode(self) -> QuantizationMode:
        """The rounding in force; setting it makes the codes stale."""
        return self._mode

    @mode.setter
    def mode(self, mode: QuantizationMode) -> None:
        self._mode = mode
        self._activation_bits = mode.activation_bits
        self._is_quantized = mode.weights != "none"
        self._quantized_version = None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(..., in_features) -> one (..., out_features) per merged matrix, in the dtype of x."""
        if not self._is_quantized:
            return F.linear(x, self.weight.to(x.dtype)).split(self.sizes, dim=-1)
        if not torch.compiler.is_compiling():
            self.refresh()
        return quantized_linear(x, self.weight, self.codes, self.scale, self.sizes, self._activation_bits)

    @torch.inference_mode(False)  # or codes first made by an inference pass could never be trained on
    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the codes up to date with the latent weights; free when nothing has changed.

        Optimizer steps, loading a state dict and in-place edits all raise the version counter of
        the parameter (edits of `weight.data` do not: torch hides them). A compiled graph cannot read
        it, so a compiled model must be refreshed from outside, before the graph runs.
        """
        if not self._is_quantized:
            return
        version = (self.weight.data_ptr(), self.weight._version, self.weight.device)
        if version == self._quantized_version:
            return
        if self.codes is None or self.codes.device != self.weight.device:
            self.codes = torch.empty(self.weight.shape, dtype=torch.int8, device=self.weight.device)
        if self._mode.weights == "int8":
            codes, scale = quantize_rows(self.weight)
            self.codes.copy_(codes)
        else:
            scale = self._ternarize()
        if self.scale is None or self.scale.shape != scale.shape or self.scale.device != scale.device:
            self.scale = scale
        else:
            self.scale.copy_(scale)
        self.quantizations += 1
        self._quantized_version = version

    def matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Up-to-date (codes, scale) of each merged matrix by name; the scale as `ternarize` returns it."""
        self.refresh()
        codes = self.codes.split(self.sizes)
        scales = self.scale.unbind() if self.scale.dim() == 1 else self.scale.split(self.sizes)
        return dict(zip(self.out_features, zip(codes, scales, strict=True), strict=True))

    def _ternarize(self) -> Tensor:
        granularity, group_size = self._mode.granularity, self._mode.group_size
        scales = []
        for part, codes in zip(self.weight.split(self.sizes), self.codes.split(self.sizes), strict=True):
            scale = absmean(part, granularity, group_size)
            write_ternary_codes(part, scale, codes)
            scales.append(scale)
        return torch.stack(scales) if granularity == "tensor" else torch.cat(scales)

    def extra_repr(self) -> str:
        names = ", ".join(f"{name}={size}" for name, size in self.out_features.items())
        return f"in_features={self.in_features}, {names}, weights={self._mode.weights}"


def _raise_versions(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.autograd.graph.increment_version(parameters)


# Fused optimizers write parameters without raising their versions, by which layers know that codes are stale.
register_optimizer_step_post_hook(_raise_versions)
