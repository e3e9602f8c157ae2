"""One place of a model where an activation is rounded to a few bits, with a scale that is observed or computed."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ternlm.nn.quantization import Perturbation, QuantizationMode
from ternlm.ops.activation_rounding import round_activation
from ternlm.ops.noise import bypassed
from ternlm.ops.percentile import magnitude_percentile
from ternlm.ops.quantize import EPS, top_code
from ternlm.settings import Float, Settings

_ROUNDING, _PAST = range(2)  # streams of noise under a site's key
_LEAST_STEP = 1e-8


class ActivationSettings(Settings):
    """How the activation quantizers of a model find their scales and round.

    Attributes:
        act_scale: ``ema_percentile``, a moving average of a percentile of |x|; ``absmax_token``, the largest |x| of
            each token; ``bound``, the largest value that the layer before can produce, where it knows one.
        act_percentile: Percentile of |x| that becomes the top of the grid.
        act_ema: Weight of the past in the moving average.
        stochastic_rounding: Round up or down at random in training, so that the mean is right.
        act_granularity: One scale per site (or per head, where a site has heads), or one per ``channel``, which is a
            simulation: no integer product has it.
    """

    act_scale: Literal["ema_percentile", "absmax_token", "bound"] = "ema_percentile"
    act_percentile: Float = Field(default=99.7, gt=0, le=100)
    act_ema: Float = Field(default=0.95, ge=0, lt=1)
    stochastic_rounding: bool = True
    act_granularity: Literal["tensor", "channel"] = "tensor"


class ActivationQuantizer(nn.Module):
    """Rounds one activation to a symmetric grid: x^ = Delta * code, |code| <= L = 2^(bits - 1) - 1.

        Delta = max(rho / L, 1e-8)           rho from `act_scale`
        rho <- ema rho + (1 - ema) P_p(|x|)  in training, with ``ema_percentile``; the first observation is copied
        train: code = clamp(floor(x / Delta + U(0, 1)), -L, L)          eval: code = round(clamp(x / Delta, -L, L))
        dL/dx = dL/dx^ [|x| <= L Delta]

    A training pass rounds with the new rho but keeps it aside, so that a pass that is repeated (activation
    checkpointing) sees the same rho and finds the same new one; `commit` puts it in force.

    Args:
        bits: 2 to 15; from 16 on the site is off.
        settings: Scale and rounding.
        features: Channels, the last dimension of the input.
        heads: For inputs (batch, heads, time, features), with a scale per head.

    Attributes:
        rho: Top of the grid, float32: (), (heads, 1, 1), (features,) or (heads, 1, features).
        observed: How many observations made it, (), int64; 0 is none yet.
        frozen: A calibrated scale, which no observation changes any more, (), bool.
        observing: Whether training passes observe.
        noise: Key of the noise of a training pass, (), int64; set before each micro-batch.

    Source:
        Choi et al. 2018, clipped activations (arXiv 1805.06085); Wei et al. 2022, QDrop (arXiv 2203.05740).
    """

    rho: Tensor
    observed: Tensor
    frozen: Tensor
    noise: Tensor
    _next: Tensor
    _drop: Tensor

    def __init__(self, bits: int, settings: ActivationSettings, features: int, heads: int | None = None) -> None:
        super().__init__()
        self.own_bits, self.settings = bits, settings
        self.features, self.heads = features, heads
        self.observing = True
        if settings.act_scale != "absmax_token":
            shape = (() if heads is None else (heads, 1, 1)) if settings.act_granularity == "tensor" else (
                (features,) if heads is None else (heads, 1, features)
            )  # fmt: skip
            self.register_buffer("rho", torch.zeros(shape))
            self.register_buffer("observed", torch.zeros((), dtype=torch.int64))
            self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
            self.register_buffer("_next", torch.full(shape, torch.nan), persistent=False)
        self.register_buffer("noise", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("_drop", torch.zeros(()), persistent=False)
        self._drops, self._drop_by = False, "token_row"
        self.mode = QuantizationMode()

    @property
    def mode(self) -> QuantizationMode:
        """The rounding of the block; a site keeps its own bits, but for `least_bits` and ``none``."""
        return self._mode

    @mode.setter
    def mode(self, mode: QuantizationMode) -> None:
        self._mode = mode
        is_on = self.own_bits < 16 and mode.weights != "none" and mode.activations != "none"
        self._bits = max(self.own_bits, mode.least_bits) if is_on else None

    @property
    def bits(self) -> int | None:
        """Bits in force; None when the site is off."""
        return self._bits

    def perturb(self, perturbation: Perturbation) -> None:
        """Bypass the quantizer at random in training; the other perturbations are those of weights."""
        if perturbation.drop or self._drops:
            self._drop.fill_(perturbation.drop)
        self._drops, self._drop_by = perturbation.drop > 0, perturbation.drop_by

    def forward(
        self, x: Tensor, valid: Tensor | None = None, bound: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Round an activation.

        Args:
            x: (batch, time, features), or (batch, heads, time, features) where the site has heads.
            valid: (batch, time), bool, the tokens that are observed; None is all. All of them are rounded.
            bound: Largest possible |x|, float32, (), for ``act_scale: bound``; a site without one observes instead.

        Returns:
            The rounded x in its dtype, and the step Delta, float32, () or broadcastable to (..., 1), of which it is
            an exact multiple (a code of at most 127 times Delta, rounded to the dtype). None instead of the step
            where there is no such number: the site is off or bypassed here and there, has a scale per channel, or
            more than 8 bits.
        """
        if self._bits is None:
            return x, None
        top = top_code(self._bits)
        is_dynamic = self.settings.act_scale == "absmax_token"
        if is_dynamic:
            limit = x.detach().abs().amax(dim=-1, keepdim=True).float().clamp_min(EPS)
        elif self.settings.act_scale == "bound" and bound is not None:
            limit = bound.detach().float()
        else:
            limit = self._observed_limit(x, valid)
        step = (limit / top).clamp_min(_LEAST_STEP)
        key = self.noise if self.training and self.settings.stochastic_rounding else None
        rounded = round_activation(x, step, self._bits, key, clips=not is_dynamic)
        if self.training and self._drops:
            shape = x.shape if self.heads is None or self._drop_by == "element" else (x.shape[0], 1, *x.shape[2:])
            return torch.where(bypassed(self.noise, self._drop, self._drop_by, shape, _PAST), x, rounded), None
        has_grid = self._bits <= 8 and (step.dim() == 0 or step.shape[-1] == 1)
        return rounded, step if has_grid else None

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything that was observed."""
        if self.settings.act_scale != "absmax_token":
            for buffer in (self.rho, self.observed, self.frozen):
                buffer.zero_()
            self._next.fill_(torch.nan)  # or `commit` would take it for an observation of a site that is off

    @torch.no_grad()
    def commit(self) -> None:
        """Put the rho of the last training pass in force: once per micro-batch, after its backward pass."""
        if self.settings.act_scale == "absmax_token":
            return
        is_new = self._next.isfinite()
        self.rho.copy_(torch.where(is_new, self._next, self.rho))
        self.observed.add_(is_new.any())
        self._next.fill_(torch.nan)

    @torch.no_grad()
    def _observed_limit(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """rho for this pass; a site that has seen nothing yet goes by what is in front of it."""
        by_channel = self.settings.act_granularity == "channel"
        wide = x if x.dim() > 2 else x[None]
        now = magnitude_percentile(wide, self.settings.act_percentile, valid, self.heads is not None, by_channel)
        if not (self.training and self.observing):
            return torch.where(self.observed > 0, self.rho, now)
        ema = self.settings.act_ema
        updated = torch.where(self.observed > 0, ema * self.rho + (1 - ema) * now, now)
        # What is not finite (a broken batch, nothing but padding) must not stay in a moving average for ever.
        is_kept = self.frozen | ~now.isfinite()
        self._next.copy_(torch.where(is_kept, torch.nan, updated))
        return torch.where(is_kept, self.rho, updated)

    def extra_repr(self) -> str:
        return f"bits={self.own_bits}, features={self.features}, heads={self.heads}, {self.settings.act_scale}"
