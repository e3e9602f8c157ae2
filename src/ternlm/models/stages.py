"""Progressive quantization: which layer rounds how at which update, as a pure function of (layer, step).

Nothing here has state, so training, resuming, evaluating a checkpoint and planning cannot disagree. The
settings are the `quantization` section of a run; how a layer rounds once it is told is left to `nn`.
"""

import math
from typing import Any, Self

from pydantic import Field, model_validator

from ternlm.models.language_model import LanguageModel
from ternlm.nn.quantization import DropBy, Perturbation, QuantizationMode
from ternlm.settings import Count, Float

STAGE_NAMES = {0: "full precision", 1: "int8 warm-up", 2: "partly ternary", 3: "fully ternary"}


class QuantizationSettings(QuantizationMode):
    """The `quantization` section of a run: how layers round, and on what way they get there.

    Attributes:
        full_precision_until: Share of the run in which nothing is rounded at all, before everything else; optimizer
            state is kept when rounding begins.
        progressive: Begin with 8-bit integer weights, then let the half of the layers nearest the output turn
            ternary, then all; otherwise all weights are ternary from the first update. Without effect where
            `weights` is ``none``, so that one setting makes the full-precision twin.
        int8_until: Share of the run after which the first layers turn ternary.
        partial_until: Share of the run after which all layers are ternary.
        lr_factor: The learning rate is multiplied by it once all layers are ternary.
        lr_ramp_steps: Updates over which that factor is reached.
        blend_steps: Updates over which a layer goes from its old rounding to the new one; 0 switches at once.
        qdrop: Probability at the start with which a quantizer is bypassed, per token or row; it falls
            linearly to 0.
        qdrop_until: Share of the run after which nothing is bypassed.
        qdrop_steps: The same as a number of updates; wins over `qdrop_until`.
        qdrop_by: What is bypassed together: ``token_row``, ``batch`` or ``element``.
        dither: Amplitude, in scales, of the noise on latent weights before they are rounded; it falls
            linearly to 0 over `dither_steps` after a layer turns ternary.
        dither_steps: Updates with dither.
        ternary_dropout: Probability with which a non-zero ternary weight is zeroed.
        ternary_dropout_steps: Updates from the start with ternary dropout.

    Source:
        Wei et al. 2022, QDrop (arXiv 2203.05740); Fan et al. 2020, quantization noise (arXiv 2004.07320); Nielsen et
        al. 2025, full precision first (arXiv 2502.11895).
    """

    full_precision_until: Float = 0.0
    progressive: bool = False
    int8_until: Float = 0.1
    partial_until: Float = 0.3
    lr_factor: Float = 0.7
    lr_ramp_steps: Count = Field(default=100, ge=0)
    blend_steps: Count = Field(default=0, ge=0)
    qdrop: Float = 0.0
    qdrop_until: Float = 0.25
    qdrop_steps: Count | None = Field(default=None, ge=1)
    qdrop_by: DropBy = "token_row"
    dither: Float = Field(default=0.0, ge=0)
    dither_steps: Count = Field(default=1000, ge=1)
    ternary_dropout: Float = 0.0
    ternary_dropout_steps: Count = Field(default=10_000, ge=1)

    @model_validator(mode="after")
    def _shares(self) -> Self:
        for name in ("full_precision_until", "int8_until", "partial_until", "qdrop", "qdrop_until"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"quantization.{name}={getattr(self, name)} must lie between 0 and 1")
        if not 0 <= self.ternary_dropout < 1:
            raise ValueError(
                f"quantization.ternary_dropout={self.ternary_dropout} must be at least 0 and below 1: "
                "what survives is divided by 1 minus it"
            )
        if self.int8_until > self.partial_until:
            raise ValueError(
                f"quantization.int8_until={self.int8_until} lies after quantization.partial_until={self.partial_until}"
            )
        if self.progressive and self.full_precision_until > self.int8_until:
            raise ValueError(
                f"quantization.full_precision_until={self.full_precision_until} lies after "
                f"quantization.int8_until={self.int8_until}"
            )
        if not 0 < self.lr_factor <= 1:
            raise ValueError(f"quantization.lr_factor={self.lr_factor} must lie above 0 and not above 1")
        if self.progressive and self.weights not in ("ternary", "none"):
            raise ValueError(
                f"quantization.progressive leads to ternary weights, and quantization.weights={self.weights}; "
                "drop one of them"
            )
        return self

    @property
    def perturbs(self) -> bool:
        """Whether training does anything to quantizers besides rounding."""
        return self.weights != "none" and bool(self.qdrop or self.dither or self.ternary_dropout or self.blend_steps)

    def base(self) -> QuantizationMode:
        """How every layer rounds in the end."""
        values: dict[str, Any] = {name: getattr(self, name) for name in QuantizationMode.model_fields}
        return QuantizationMode.model_construct(**values)


class Stages:
    """Stage, rounding and perturbation of each block at each update of one run.

    With N updates, e0 = floor(full_precision_until N), e1 = floor(int8_until N) and e2 = floor(partial_until N):

        stage(k)    0 while k < e0, 1 while k < e1, 2 while k < e2, then 3; without progressive e1 = e2 = e0
        weights     not rounded in stage 0, nor activations; int8 in stage 1; in stage 2 int8 below block floor(L / 2),
                    ternary from it on; ternary in 3
        bits        activations and integer weights have at least 8 bits in stage 1
        rate        if progressive, times 1 - (1 - lr_factor) clip((k - e2) / lr_ramp_steps, 0, 1)

    A model whose weights are not rounded in the end, the full-precision twin, has no stages, and one whose weights are
    integers only those in full precision and after.

    Args:
        settings: The section.
        num_blocks: Blocks of the model, L.
        total_steps: Updates of the run, N.
    """

    def __init__(self, settings: QuantizationSettings, num_blocks: int, total_steps: int) -> None:
        self.settings, self.num_blocks, self.total_steps = settings, num_blocks, total_steps
        self._base = settings.base()
        self._warm = self._base.model_copy(update={"weights": "int8", "least_bits": 8})
        self._waiting = self._base.model_copy(update={"weights": "int8"})
        self._full = self._base.model_copy(update={"weights": "none", "activations": "none"})
        self.is_progressive = settings.progressive and settings.weights == "ternary"
        first = settings.full_precision_until if settings.weights != "none" else 0.0
        share = (first, settings.int8_until, settings.partial_until) if self.is_progressive else (first,) * 3
        self._ends = tuple(math.floor(s * total_steps) for s in share)
        self._upper = num_blocks // 2
        qdrop_end = settings.qdrop_steps or math.floor(settings.qdrop_until * total_steps)
        self._qdrop_end = max(qdrop_end, 1)

    def stage(self, k: int) -> int:
        """0 to 3; always 3 where nothing changes on the way."""
        return sum(k >= end for end in self._ends)

    def stage_name(self, k: int) -> str:
        """What the stage is called; after full precision, the weights that follow may be integers for good."""
        stage = self.stage(k)
        return STAGE_NAMES[stage] if stage < 3 or self.settings.weights == "ternary" else self.settings.weights

    @property
    def is_staged(self) -> bool:
        """Whether layers round differently at some time of the run."""
        return self._ends[-1] > 0

    def mode(self, block: int, k: int) -> QuantizationMode:
        """How a block rounds in update k."""
        stage = self.stage(k)
        if stage < 2:
            return self._warm if stage else self._full
        return self._waiting if stage == 2 and block < self._upper else self._base

    def modes(self, k: int) -> list[QuantizationMode]:
        """How each block rounds in update k, input side first."""
        return [self.mode(block, k) for block in range(self.num_blocks)]

    def perturbation(self, block: int, k: int) -> Perturbation:
        """What update k does to the quantizers of a block besides rounding."""
        settings, turned = self.settings, self.turns_ternary(block)
        since = k - turned
        blend = min(1.0, (since + 1) / (settings.blend_steps + 1)) if since >= 0 and turned > 0 else 1.0
        amplitude = settings.dither * max(0.0, 1 - since / settings.dither_steps) if since >= 0 else 0.0
        zeroed = settings.ternary_dropout if since >= 0 and k < settings.ternary_dropout_steps else 0.0
        return Perturbation(
            drop=settings.qdrop * max(0.0, 1 - k / self._qdrop_end),
            drop_by=settings.qdrop_by,
            dither=amplitude,
            zeroed=zeroed,
            blend=blend,
            previous=self.mode(block, turned - 1) if blend < 1 else None,
        )

    def turns_ternary(self, block: int) -> int:
        """The first update in which a block's weights are ternary, 0 from the start."""
        return self._ends[1] if block >= self._upper else self._ends[2]

    def rate_factor(self, k: int) -> float:
        """What the learning rate of update k is multiplied by."""
        settings, end = self.settings, self._ends[2]
        if not self.is_progressive or k < end:
            return 1.0
        ramp = settings.lr_ramp_steps
        share = min(1.0, (k - end) / ramp) if ramp else 1.0
        return 1 - (1 - settings.lr_factor) * share

    def boundaries(self) -> list[int]:
        """Updates that begin a new stage."""
        return sorted({end for end in self._ends if 0 < end < self.total_steps})

    def apply(self, model: LanguageModel, k: int) -> None:
        """Let a model round as in update k."""
        k = max(k, 0)
        model.set_modes(self.modes(k))
        model.perturb([self.perturbation(block, k) for block in range(self.num_blocks)])
        model.set_step(k)

    def row(self, k: int) -> dict[str, Any]:
        """What is logged of update k, beside its stage: of each block whether it is ternary (1) or integer (0)."""
        ternary = [self.mode(block, k).weights == "ternary" for block in range(self.num_blocks)]
        row: dict[str, Any] = {
            "quantization/ternary_layers": sum(ternary),
            "quantization/qdrop": self.perturbation(0, k).drop,
            "quantization/rate_factor": self.rate_factor(k),
        }
        return row | {f"quantization/layer_{block:02d}/ternary": int(is_) for block, is_ in enumerate(ternary)}
