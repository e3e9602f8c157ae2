"""Gated linear recurrence: the mixer over time whose memory is one vector, with ternary projections.

The scan itself and the short convolution are in `ops`; the residual stream and the bounds of a stack of
layers belong to the models.
"""

from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ternlm.nn.initialization import normal_
from ternlm.nn.linear import BitLinear
from ternlm.nn.norm import RMSNorm
from ternlm.nn.quantization import QuantizationMode
from ternlm.ops.recurrence import freeze, reset, scan
from ternlm.ops.short_convolution import short_convolution
from ternlm.settings import Count, Float, Settings

OutputGate = Literal["norm_h_silu_g", "norm_g_silu_h"]
LinearNorm = Literal["out_only", "rms", "none"]


class RecurrenceSettings(Settings):
    """Shape of the gated recurrence, named as in published configurations where they have a name.

    Attributes:
        expand_ratio: Width of the memory as a multiple of the width of the residual stream, rounded down.
        use_short_conv: Whether a short causal convolution stands in front of the gates.
        conv_size: Taps of that convolution.
        share_conv_kernel: One convolution with a SiLU on what all three projections read, instead of one
            behind the input and one behind the forget projection.
        output_gate: ``norm_h_silu_g``, norm(h) * SiLU(gate), or ``norm_g_silu_h``, norm(gate) * SiLU(h), the
            form of the first published checkpoints.
        bitlinear_norm: Which ternary layers have a root-mean-square norm over what they read: ``out_only``,
            the last ones of the mixer and of the feed-forward network; ``rms``, each; or ``none``.
        bitlinear_norm_eps: eps of those norms; None is `rms_norm_eps`.
        rms_norm_eps: Added to the mean square inside the root, in all other norms.
        scan_impl: ``auto``, the fastest that the device has; ``chunk``; ``kernel``, on a GPU; or ``reference``.
            It changes speed, not results.
        scan_chunk: Positions that ``chunk`` handles as one.
    """

    expand_ratio: Float = Field(default=1.0, gt=0)
    use_short_conv: bool = False
    conv_size: Count = Field(default=4, ge=2)
    share_conv_kernel: bool = False
    output_gate: OutputGate = "norm_h_silu_g"
    bitlinear_norm: LinearNorm = "out_only"
    bitlinear_norm_eps: Float | None = Field(default=None, gt=0)
    rms_norm_eps: Float = Field(default=1e-6, gt=0)
    scan_impl: Literal["auto", "chunk", "kernel", "reference"] = "auto"
    scan_chunk: Count = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _memory_exists(self) -> Self:
        if self.expand_ratio > 64:
            raise ValueError(f"model.expand_ratio={self.expand_ratio:g} must be at most 64; usual are 1 and 2")
        return self

    @property
    def inner_eps(self) -> float:
        """eps of the norms inside of ternary layers."""
        return self.rms_norm_eps if self.bitlinear_norm_eps is None else self.bitlinear_norm_eps

    def recurrence_width(self, width: int) -> int:
        """Channels of the memory beside a residual stream of `width` channels."""
        return int(width * self.expand_ratio)


class RecurrentState(NamedTuple):
    """What a gated recurrence remembers of each row.

    Attributes:
        h: (batch, recurrence width), float32.
        rings: Last inputs of the short convolutions, each (batch, channels, taps - 1), float32; () without them.
    """

    h: Tensor
    rings: tuple[Tensor, ...]


class GatedRecurrence(nn.Module):
    """h_t = f_t h_{t-1} + (1 - f_t) SiLU(i_t), then y = W_o(norm(h) * SiLU(g)), channel by channel.

    i, f~ and g are ternary projections of x, and f = bound + (1 - bound) sigmoid(f~). Each h is an average of
    values of SiLU(i), so memory cannot grow without limit. Gates, scan and memory are float32 (float64 where x
    is); i, f~ and g are one product with a scale each, unless each has a norm of its own (`bitlinear_norm`).

    Args:
        settings: Shape.
        width: Width of the residual stream.
        mode: Rounding of the projections.

    Source:
        Qin et al. 2023, HGRN (arXiv 2311.04823); Zhu et al. 2024, its ternary form (arXiv 2406.02528).
    """

    ifg: BitLinear | None
    conv: nn.Parameter | None
    i_conv: nn.Parameter | None
    f_conv: nn.Parameter | None

    def __init__(self, settings: RecurrenceSettings, width: int, mode: QuantizationMode) -> None:
        super().__init__()
        inner, eps = settings.recurrence_width(width), settings.inner_eps
        self.recurrence_width, self.output_gate = inner, settings.output_gate
        self.scan_impl, self.scan_chunk = settings.scan_impl, settings.scan_chunk
        if settings.bitlinear_norm == "rms":
            self.ifg = None
            self.i_inner_norm, self.i = RMSNorm(width, eps), BitLinear(width, {"i_proj": inner}, mode)
            self.f_inner_norm, self.f = RMSNorm(width, eps), BitLinear(width, {"f_proj": inner}, mode)
            self.g_inner_norm, self.g = RMSNorm(width, eps), BitLinear(width, {"g_proj": inner}, mode)
        else:
            self.ifg = BitLinear(width, {"i_proj": inner, "f_proj": inner, "g_proj": inner}, mode)
        self._add_convolutions(settings, width)
        self.g_norm = RMSNorm(inner, settings.rms_norm_eps)
        self.o_inner_norm = nn.Identity() if settings.bitlinear_norm == "none" else RMSNorm(inner, eps)
        self.o = BitLinear(inner, {"o_proj": width}, mode)

    def forward(
        self,
        x: Tensor,
        bound: Tensor | None,
        starts: Tensor | None = None,
        state: RecurrentState | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, RecurrentState | None]:
        """Mix over time.

        Args:
            x: (batch, time, width).
            bound: (recurrence width,), float32, the least f of each channel; None is 0.
            starts: (batch, time), bool, True where memory is to be forgotten first, as at each sequence of a
                packed row; None where nowhere.
            state: Memory of earlier positions; None begins with an empty one.
            lengths: (batch,), how many positions of each row are real when rows are padded on the right; the
                others leave no trace in the state.

        Returns:
            (batch, time, width), and the memory after these positions if one was given.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        i, f, gate, rings = self._inputs(x, starts, state, lengths)
        shut = torch.sigmoid(-f.to(wide))
        if bound is not None:
            shut = shut * (1 - bound.to(wide))
        a, u = 1 - shut, F.silu(i.to(wide)) * shut
        if starts is not None:
            a = reset(a, starts)
        if state is not None and lengths is not None:
            a, u = freeze(a, u, lengths)
        h0 = None if state is None else state.h.to(wide)
        h, last = scan(a, u, h0, self.scan_impl, self.scan_chunk)
        h = h.to(x.dtype)
        mixed = self.g_norm(h) * F.silu(gate) if self.output_gate == "norm_h_silu_g" else self.g_norm(gate) * F.silu(h)
        (y,) = self.o(self.o_inner_norm(mixed))
        return y, None if state is None else RecurrentState(last, tuple(rings))

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> RecurrentState:
        """Empty memory for `batch_size` rows."""
        taps = [kernel for kernel in (self.conv, self.i_conv, self.f_conv) if kernel is not None]
        rings = tuple(torch.zeros(batch_size, tap.shape[0], tap.shape[1] - 1, device=device) for tap in taps)
        return RecurrentState(torch.zeros(batch_size, self.recurrence_width, device=device), rings)

    def initialize_convolutions(self, seed: int, name: str) -> None:
        """Draw the kernels afresh, so that they pass on the variance of what they read, keyed by (seed, name)."""
        for kind in ("conv", "i_conv", "f_conv"):
            kernel = getattr(self, kind)
            if kernel is not None:
                normal_(kernel, kernel.shape[1] ** -0.5, seed, f"{name}.{kind}")

    def _inputs(
        self, x: Tensor, starts: Tensor | None, state: RecurrentState | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """i, f~ and the gate, behind the convolutions, and the last inputs of those."""
        before = iter(()) if state is None else iter(state.rings)
        rings: list[Tensor] = []

        def convolved(z: Tensor, kernel: Tensor | None) -> Tensor:
            if kernel is None:
                return z
            previous = next(before, None)
            if previous is not None:
                previous = previous.to(torch.promote_types(z.dtype, torch.float32))
            z, ring = short_convolution(z, kernel, previous, starts, lengths)
            rings.append(ring)
            return z

        if self.conv is not None:
            x = F.silu(convolved(x, self.conv))
        i, f, gate = self._projected(x)
        return convolved(i, self.i_conv), convolved(f, self.f_conv), gate, rings

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.ifg is not None:
            return self.ifg(x)
        (i,) = self.i(self.i_inner_norm(x))
        (f,) = self.f(self.f_inner_norm(x))
        (g,) = self.g(self.g_inner_norm(x))
        return i, f, g

    def _add_convolutions(self, settings: RecurrenceSettings, width: int) -> None:
        """Kernels, (channels, taps); those that are not in use are None."""
        shared = settings.use_short_conv and settings.share_conv_kernel
        apart = settings.use_short_conv and not settings.share_conv_kernel
        for name, used, channels in (("conv", shared, width), ("i_conv", apart, self.recurrence_width),
                                     ("f_conv", apart, self.recurrence_width)):  # fmt: skip
            kernel = nn.Parameter(torch.empty(channels, settings.conv_size)) if used else None
            self.register_parameter(name, kernel)
