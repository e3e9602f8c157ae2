"""Learning rate and weight decay as pure functions of the optimizer step.

`k` is the index of the update about to run, 0 .. N - 1; micro-batches never count. Nothing here has
state, so resuming, plotting and planning cannot disagree with training.
"""

import math
from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from ternlm.settings import Count, Float, Settings

if TYPE_CHECKING:
    from ternlm.models.stages import Stages

ScheduleName = Literal["constant", "linear", "cosine", "wsd", "two_stage", "two_stage_continuous"]


class ScheduleSettings(Settings):
    """The shape of the learning-rate and weight-decay curves.

    Attributes:
        name: ``constant``, ``linear``, ``cosine``, ``wsd`` (warm-up, stable, decay), ``two_stage``
            (two lines over the whole horizon with a drop at the boundary, as published for BitNet
            b1.58) or ``two_stage_continuous`` (one broken line).
        warmup_steps: Steps of linear warm-up; None takes `warmup_fraction` of the run.
        warmup_fraction: Share of the run spent warming up.
        min_lr_ratio: Final learning rate as a share of the peak.
        second_peak_ratio: Second-stage peak as a share of the peak, for the two-stage schedules.
        decay_fraction: Share of the run spent decaying, for ``wsd``.
        stage_boundary: Where the second stage begins, as a share of the run.
        weight_decay_until: Share of the run after which weight decay is 0; None follows the
            published practice: the stage boundary for two-stage schedules, 2/3 otherwise.
    """

    name: ScheduleName = "linear"
    warmup_steps: Count | None = None
    warmup_fraction: Float = 0.02
    min_lr_ratio: Float = 0.02
    second_peak_ratio: Float = 2 / 3
    decay_fraction: Float = 0.2
    stage_boundary: Float = 0.5
    weight_decay_until: Float | None = None

    @model_validator(mode="after")
    def _shares(self) -> Self:
        for name in (
            "warmup_fraction",
            "min_lr_ratio",
            "second_peak_ratio",
            "decay_fraction",
            "stage_boundary",
            "weight_decay_until",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"schedule.{name}={value} must be a share between 0 and 1")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps={self.warmup_steps} must not be negative")
        return self


class Schedule:
    """Learning rate, weight decay and stage of every update of one run.

    With peak P, second peak P2, final F, warm-up w, boundary b and N updates:

        warm-up (k < w)         P (k + 1) / w
        constant                P
        linear                  F + (P - F) (N - k) / (N - w)
        cosine                  F + (P - F) (1 + cos(pi (k - w) / (N - w))) / 2
        wsd                     P, then over the last D updates F + (P - F) (N - k) / D
        two_stage               F + (P_s - F) (N - k) / (N - w), P_s = P before b, then P2
        two_stage_continuous    P + (P2 - P) (k - w) / (b - w), then P2 + (F - P2) (k - b) / (N - b)

    Progressive quantization multiplies the curve by its own factor once all layers are ternary.

    Args:
        settings: The curve.
        peak: Peak learning rate P.
        weight_decay: Weight decay before it is switched off.
        total_steps: Number of updates N.
        quantization: The stages in which layers round, if they change.

    Source:
        Ma et al., "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (two stages, weight decay
        off in the second); Kaushal et al. 2024, Spectra (arXiv 2407.12327).
    """

    def __init__(
        self,
        settings: ScheduleSettings,
        peak: float,
        weight_decay: float,
        total_steps: int,
        quantization: "Stages | None" = None,
    ) -> None:
        self.quantization = quantization if quantization is not None and quantization.is_staged else None
        self.settings, self.peak, self.total_steps = settings, peak, total_steps
        self.final = peak * settings.min_lr_ratio
        self.second_peak = peak * settings.second_peak_ratio
        self._weight_decay = weight_decay
        warmup = settings.warmup_steps
        if warmup is None:
            warmup = round(settings.warmup_fraction * total_steps)
        self.warmup_steps = min(warmup, total_steps)
        self.has_stages = settings.name.startswith("two_stage")
        self.boundary = math.floor(settings.stage_boundary * total_steps)
        until = settings.weight_decay_until
        if until is None:
            until = settings.stage_boundary if self.has_stages else 2 / 3
        self.weight_decay_end = math.floor(until * total_steps)

    def learning_rate(self, k: int) -> float:
        """Learning rate of update k."""
        factor = 1.0 if self.quantization is None else self.quantization.rate_factor(k)
        if k < self.warmup_steps:
            return factor * self.peak * (k + 1) / self.warmup_steps
        return factor * float(getattr(self, f"_{self.settings.name}")(k))

    def weight_decay(self, k: int) -> float:
        """Weight decay of update k."""
        return self._weight_decay if k < self.weight_decay_end else 0.0

    def stage(self, k: int) -> int:
        """The stage of quantization, 0 to 3, or else of the schedule, 1 or 2; 1 where there is one only."""
        if self.quantization is not None:
            return self.quantization.stage(k)
        return 2 if self.has_stages and k >= self.boundary else 1

    def stage_name(self, k: int) -> str | None:
        """What the stage of quantization is called; None where there is none."""
        return None if self.quantization is None else self.quantization.stage_name(k)

    def boundaries(self) -> list[int]:
        """Updates that begin a new stage: a checkpoint is kept on both sides of each."""
        own = {self.boundary} if self.has_stages and 0 < self.boundary < self.total_steps else set()
        return sorted(own.union(self.quantization.boundaries() if self.quantization is not None else ()))

    def _constant(self, k: int) -> float:
        return self.peak

    def _line(self, peak: float, k: int) -> float:
        span = max(self.total_steps - self.warmup_steps, 1)
        return self.final + (peak - self.final) * (self.total_steps - k) / span

    def _linear(self, k: int) -> float:
        return self._line(self.peak, k)

    def _cosine(self, k: int) -> float:
        progress = (k - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        return self.final + (self.peak - self.final) * (1 + math.cos(math.pi * progress)) / 2

    def _wsd(self, k: int) -> float:
        decay_steps = max(round(self.settings.decay_fraction * self.total_steps), 1)
        if k < self.total_steps - decay_steps:
            return self.peak
        return self.final + (self.peak - self.final) * (self.total_steps - k) / decay_steps

    def _two_stage(self, k: int) -> float:
        return self._line(self.peak if k < self.boundary else self.second_peak, k)

    def _two_stage_continuous(self, k: int) -> float:
        if k < self.boundary:
            share = (k - self.warmup_steps) / max(self.boundary - self.warmup_steps, 1)
            return self.peak + (self.second_peak - self.peak) * share
        share = (k - self.boundary) / max(self.total_steps - self.boundary, 1)
        return self.second_peak + (self.final - self.second_peak) * share
