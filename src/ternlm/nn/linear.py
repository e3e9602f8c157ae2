"""BitLinear: the linear layer whose weights are ternary, integer, or full precision by one dial.

The latent weights stay float32 parameters. Their codes are computed once per change (so once per
optimizer step, however many micro-batches read them) into fixed buffers. The full-precision twin
of a model is the same class with the mode `none`.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ternlm.errors import SettingsError
from ternlm.nn.learned_quantizer import LearnedQuantizer
from ternlm.nn.quantization import Perturbation, QuantizationMode
from ternlm.ops.learned_ternary import scaled_gradient
from ternlm.ops.noise import bypassed, happens, uniform
from ternlm.ops.quantize import (
    absmean,
    dequantize_weight,
    kept_mean,
    quantize_activation,
    quantize_rows,
    twn_threshold,
    write_ternary_codes,
    write_threshold_codes,
)
from ternlm.ops.quantized_linear import per_row, quantized_linear, straight_through

_TOKENS, _ROWS, _DITHER, _ZEROED = range(4)  # streams of noise under a layer's key


class BitLinear(nn.Module):
    """Linear layer without bias on quantized weights and activations; several matrices may share it.

    Matrices that read the same input (query, key, value; gate, up) are one parameter and one
    product, but keep a scale each, so they are the same model as separate layers; files hold them
    under their own names (`LanguageModel.tensors`).

    A layer made with a mode whose ternary scales are learned has a `quantizer` with their parameters, which stays
    when the mode is changed; any other layer has none, for good.

    Args:
        in_features: Width of the input.
        out_features: Rows of each merged matrix by name.
        mode: How weights and activations are rounded.
        rounds_input: Round the input per token here. False leaves that to whoever made the input
            (`ActivationQuantizer`).

    Attributes:
        noise: Key of the noise of a perturbed pass, (), int64; set before each micro-batch.

    Raises:
        SettingsError: The group size does not divide the width.
    """

    codes: Tensor
    scale: Tensor
    threshold: Tensor | None
    noise: Tensor
    _drop: Tensor
    _dither: Tensor
    _zeroed: Tensor
    _blend: Tensor
    _previous_codes: Tensor
    _previous_scale: Tensor

    def __init__(
        self, in_features: int, out_features: Mapping[str, int], mode: QuantizationMode, rounds_input: bool = True
    ) -> None:
        super().__init__()
        if mode.granularity == "group" and in_features % mode.group_size:
            raise SettingsError(
                f"quantization.group_size={mode.group_size} does not divide a width of {in_features}. "
                "Choose a divisor of all widths, or quantization.granularity=tensor."
            )
        self.in_features = in_features
        self.out_features = dict(out_features)
        self.sizes = list(out_features.values())
        self.rounds_input = rounds_input
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), in_features))
        self.quantizer = LearnedQuantizer(sum(self.sizes), mode) if mode.is_learned else None
        for name in ("codes", "scale", "threshold", "_previous_codes", "_previous_scale"):
            self.register_buffer(name, None, persistent=False)
        self.register_buffer("noise", torch.zeros((), dtype=torch.int64), persistent=False)
        for name in ("drop", "dither", "zeroed", "blend"):
            self.register_buffer(f"_{name}", torch.zeros(()), persistent=False)
        self.quantizations = 0
        self._packed_mode: QuantizationMode | None = None
        self._quantized_version: tuple[Any, ...] | None = None
        self._perturbation = Perturbation(blend=0.0)
        self.mode = mode
        self.perturb(Perturbation())

    @property
    def mode(self) -> QuantizationMode:
        """The rounding in force; setting it makes the codes stale, and integer weights make learned scales so."""
        return self._mode

    @mode.setter
    def mode(self, mode: QuantizationMode) -> None:
        kept = self._packed_mode
        if kept is not None and mode.weights != "none" and not _round_weights_alike(mode, kept):
            raise SettingsError(
                "packed ternary weights cannot be rounded in another way: their latent weights are not there. "
                "Use the run's own checkpoint."
            )
        if mode.is_learned and self.quantizer is None:
            raise ValueError(
                f"a layer made without learned scales cannot be set to quantizer={mode.quantizer}; "
                "make the model with that mode"
            )
        self._mode = mode
        self._activation_bits = mode.activation_bits if self.rounds_input else None
        self._is_quantized = mode.weights != "none"
        self._is_learned = mode.is_learned
        self._quantized_version = None
        if self.quantizer is not None and mode.weight_bits is not None:
            self.quantizer.forget()

    @property
    def is_packed(self) -> bool:
        """Whether codes and scales were given by `take_codes`, and there are no latent weights."""
        return self._packed_mode is not None

    @property
    def is_between(self) -> bool:
        """Whether weights are a mixture of two roundings, in evaluation as well."""
        return self._blends

    def perturb(self, perturbation: Perturbation) -> None:
        """What happens to the layer besides rounding, from now on; amounts may change freely in a compiled graph."""
        before, self._perturbation = self._perturbation, perturbation
        for name in ("drop", "dither", "zeroed", "blend"):
            if getattr(before, name) != getattr(perturbation, name):
                getattr(self, f"_{name}").fill_(getattr(perturbation, name))
        self._drop_by = perturbation.drop_by
        self._drops, self._dithers = perturbation.drop > 0, perturbation.dither > 0
        self._zeroes = perturbation.zeroed > 0
        self._blends = perturbation.blend < 1 and perturbation.previous is not None
        if perturbation.previous != before.previous or (before.blend < 1) != (perturbation.blend < 1):
            self._quantized_version = None

    def fit(self) -> None:
        """Take learned scales and thresholds from the latent weights; nothing to do where none are learned."""
        if self.quantizer is not None:
            self.quantizer.fit(self.weight.detach())
            if self._mode.weight_bits is not None:
                self.quantizer.forget()

    def forward(self, x: Tensor, grid: Tensor | None = None) -> tuple[Tensor, ...]:
        """(..., in_features) -> one (..., out_features) per merged matrix, in the dtype of x.

        Args:
            x: The input.
            grid: Only where the input is rounded elsewhere: x is codes * grid with |codes| <= 127, float32, () or
                broadcastable to (..., 1), and the product is computed on integers, exactly. Without it x is
                multiplied by the dequantized weights as it is.
        """
        if not self._is_quantized:
            return F.linear(x, self.weight.to(x.dtype)).split(self.sizes, dim=-1)
        if not torch.compiler.is_compiling():
            self.refresh()
        if self._blends or (self.training and (self._drops or self._dithers or self._zeroes)):
            return self._perturbed(x)
        target: Tensor = self.weight
        if self._is_learned and not self.is_packed:
            assert self.quantizer is not None
            target = self.quantizer.port(target, self.codes, self.scale, self.threshold)
        return quantized_linear(x, target, self.codes, self.scale, self.sizes, self._activation_bits, grid)

    @torch.inference_mode(False)  # or codes first made by an inference pass could never be trained on
    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the codes up to date with the latent weights; free when nothing has changed.

        Optimizer steps, loading a state dict and in-place edits all raise the version counter of
        the parameter (edits of `weight.data` do not: torch hides them). A compiled graph cannot read
        it, so a compiled model must be refreshed from outside, before the graph runs.
        """
        if not self._is_quantized or self.is_packed:
            return
        version: tuple[Any, ...] = (self.weight.data_ptr(), self.weight._version, self.weight.device)
        if self._is_learned:
            assert self.quantizer is not None
            self.quantizer.fit_once(self.weight)
            version += self.quantizer.versions()
        if version == self._quantized_version:
            return
        scale, threshold = self._write_codes(self._mode, "codes")
        self._keep("scale", scale)
        self._keep("threshold", threshold)
        previous = self._perturbation.previous
        if self._blends and previous is not None and previous.weights != "none":
            self._keep("_previous_scale", self._write_codes(previous, "_previous_codes")[0])
        self.quantizations += 1
        self._quantized_version = version

    @torch.no_grad()
    def take_codes(self, codes: Tensor, scale: Tensor) -> None:
        """Compute with these codes and scales from now on, as a model from packed weights does.

        There are no latent weights then. `weight` holds g Q, by which the mode ``none`` multiplies, and receives no
        gradient; it is never rounded again, for absmean of g Q is not g.

        Args:
            codes: int8 in {-1, 0, +1}, (sum of all out_features, in_features).
            scale: float32, as the attribute `scale`.
        """
        device = self.weight.device
        self.codes, self.scale, self.threshold = codes.to(device), scale.to(device), None
        self.weight.copy_(dequantize_weight(self.codes, per_row(self.scale, self.sizes)))
        self.weight.requires_grad_(False)
        self._packed_mode = self._mode

    def matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Up-to-date (codes, scale) of each merged matrix by name; the scale as `ternarize` returns it."""
        self.refresh()
        parts = zip(self.codes.split(self.sizes), self._parts(self.scale), strict=True)
        return dict(zip(self.out_features, parts, strict=True))

    def thresholds(self) -> dict[str, Tensor]:
        """Up-to-date magnitude beyond which a ternary code is not zero, of each merged matrix, shaped as its scale.

        Half of the scale where weights are rounded to the nearest code.
        """
        self.refresh()
        threshold = self.scale / 2 if self.threshold is None else self.threshold
        return dict(zip(self.out_features, self._parts(threshold), strict=True))

    def _parts(self, per_matrix: Tensor) -> tuple[Tensor, ...]:
        return per_matrix.unbind() if per_matrix.dim() == 1 else per_matrix.split(self.sizes)

    def _write_codes(self, mode: QuantizationMode, name: str) -> tuple[Tensor, Tensor | None]:
        """Write the codes of the latent weights into a buffer; returns the scale, and the threshold if there is one."""
        codes = getattr(self, name)
        if codes is None or codes.device != self.weight.device:
            codes = torch.empty(self.weight.shape, dtype=torch.int8, device=self.weight.device)
            setattr(self, name, codes)
        if mode.weight_bits is not None:
            rounded, scale = quantize_rows(self.weight, mode.weight_bits)
            codes.copy_(rounded)
            return scale, None
        if mode.is_learned:
            assert self.quantizer is not None
            scale, threshold = self.quantizer.scale(), self.quantizer.threshold()
            _write_ternary(self.weight, scale, threshold, codes)
            return scale, threshold
        return self._ternarize(mode, codes)

    def _ternarize(self, mode: QuantizationMode, codes: Tensor) -> tuple[Tensor, Tensor | None]:
        scales, thresholds = [], []
        for part, part_codes in zip(self.weight.split(self.sizes), codes.split(self.sizes), strict=True):
            if mode.quantizer == "twn":
                threshold = twn_threshold(part, mode.granularity)
                thresholds.append(threshold)
                scales.append(kept_mean(part, threshold))
                write_threshold_codes(part, threshold, part_codes)
            else:
                scales.append(absmean(part, mode.granularity, mode.group_size))
                write_ternary_codes(part, scales[-1], part_codes)
        join = torch.stack if mode.granularity == "tensor" else torch.cat
        return join(scales), join(thresholds) if thresholds else None

    def _keep(self, name: str, value: Tensor | None) -> None:
        """Store in the buffer of that name, in place where it fits, so that a compiled graph goes on reading it."""
        kept = getattr(self, name)
        if value is None or kept is None or kept.shape != value.shape or kept.device != value.device:
            setattr(self, name, value)
        else:
            kept.copy_(value)

    def _perturbed(self, x: Tensor) -> tuple[Tensor, ...]:
        """`forward` by floating-point simulation, with everything that `perturb` asked for."""
        weight = self._perturbed_weight()
        if self._activation_bits is not None:
            codes, s = quantize_activation(x, self._activation_bits)
            rounded = straight_through(x, codes / s)
            if self.training and self._drops:
                x = torch.where(bypassed(self.noise, self._drop, self._drop_by, x.shape, _TOKENS), x, rounded)
            else:
                x = rounded
        return F.linear(x, weight.to(x.dtype)).split(self.sizes, dim=-1)

    def _perturbed_weight(self) -> Tensor:
        """w^ = m (lam Q(w) + (1 - lam) Q_previous(w)) + (1 - m) w, with Q dithered and some of its codes zeroed.

        `share` and `around` are the factors of Q(w) and of everything else, which is what gradients need.
        """
        weight, shape = self.weight, self.weight.shape
        scale = per_row(self.scale, self.sizes)
        codes, rounded, share = self._perturbed_codes(scale)
        share, around = share.expand(shape), torch.zeros((), device=weight.device)
        if self._blends:
            rounded = torch.lerp(self._previous_weight(), rounded, self._blend)
            share, around = share * self._blend, around + 1 - self._blend
        if self.training and self._drops:
            past = bypassed(self.noise, self._drop, self._drop_by, shape, _ROWS)
            rounded = torch.where(past, weight.detach(), rounded)
            share, around = torch.where(past, 0.0, share), torch.where(past, 1.0, around)
        if self._is_learned:
            assert self.quantizer is not None
            target = self.quantizer.port(weight, codes, self.scale, self.threshold, share, around)
        else:
            target = scaled_gradient(weight, share + around)
        return straight_through(target, rounded)

    def _perturbed_codes(self, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, the rounded weights, and the factor (0, 1 or 1 / (1 - p)) of each from ternary dropout."""
        codes, one = self.codes, torch.ones((), device=scale.device)
        is_ternary = self.training and self._mode.weights == "ternary"
        if is_ternary and self._dithers:
            spread = scale.repeat_interleave(self.in_features // scale.shape[1], dim=1)
            noise = (uniform(self.noise, self.weight.shape, _DITHER) - 0.5) * spread * self._dither
            threshold = None if self.threshold is None else per_row(self.threshold, self.sizes)
            codes = _write_ternary(self.weight.detach() + noise, scale, threshold, torch.empty_like(codes))
        rounded = dequantize_weight(codes, scale)
        if not (is_ternary and self._zeroes):
            return codes, rounded, one
        kept = torch.where(happens(self.noise, self._zeroed, codes.shape, _ZEROED), 0.0, 1 / (1 - self._zeroed))
        share = torch.where(codes == 0, one, kept)
        return codes, torch.where(codes == 0, 0.0, rounded * share), share

    def _previous_weight(self) -> Tensor:
        previous = self._perturbation.previous
        if previous is None or previous.weights == "none":
            return self.weight.detach()
        return dequantize_weight(self._previous_codes, per_row(self._previous_scale, self.sizes))

    def extra_repr(self) -> str:
        names = ", ".join(f"{name}={size}" for name, size in self.out_features.items())
        return f"in_features={self.in_features}, {names}, weights={self._mode.weights}"


def _round_weights_alike(one: QuantizationMode, other: QuantizationMode) -> bool:
    names = ("weights", "quantizer", "granularity", "group_size")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _write_ternary(weight: Tensor, scale: Tensor, threshold: Tensor | None, codes: Tensor) -> Tensor:
    if threshold is None:
        return write_ternary_codes(weight, scale, codes)
    return write_threshold_codes(weight, threshold, codes)


def _raise_versions(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.autograd.graph.increment_version(parameters)


# Fused optimizers write parameters without raising their versions, by which layers know that codes are stale.
register_optimizer_step_post_hook(_raise_versions)
