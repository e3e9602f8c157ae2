"""The `anomaly` section of a run's settings: which measurement is an anomaly, and what is done about it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ternlm.errors import SettingsError
from ternlm.settings import Count, Float, Seconds, Settings


class AnomalySettings(Settings):
    """Thresholds and decisions of `Detector`; docs/anomalies.md has the table of rules.

    Attributes:
        window: Accepted values that make up the median and spread of loss and gradient norm.
        min_values: Rules that compare with a median are silent below so many values.
        spike_scale: A value is a spike above median + `spike_scale` x spread.
        spike_ratio: A loss is also a spike above so many times its moving average.
        ema: Weight of the past in that average.
        grad_spike: Whether an update with a spike of the gradient norm is skipped or kept.
        divergence_nats: How far the loss must rise above the median before it rose, in nats ...
        divergence_steps: ... and for how many steps in a row, to count as divergence.
        non_finite_in_a_row, non_finite_in_1000: Steps without finite numbers that end the patience.
        action: What divergence and too many non-finite steps lead to. ``roll_back`` goes back to an
            earlier checkpoint and past the data; once `max_roll_backs` are used up the run stops.
        max_roll_backs: Roll-backs allowed per 10,000 steps.
        roll_back_steps: Fewest steps between the anomaly and the checkpoint that is gone back to.
        skip_batches: Batches passed over after a roll-back.
        grace_steps: Steps without alarm after the start of a stage, where the loss may jump.
        cooldown_steps: Steps until the same event is reported and dumped again; decisions are always reported.
        max_dumps: Folders of evidence per run.
        slow_for: How long throughput must stay below half of its median to be reported.
    """

    window: Count = Field(default=128, ge=8)
    min_values: Count = Field(default=64, ge=8)
    spike_scale: Float = Field(default=6.0, gt=0)
    spike_ratio: Float = Field(default=2.0, gt=1)
    ema: Float = Field(default=0.98, gt=0, lt=1)
    grad_spike: Literal["skip", "keep"] = "skip"
    divergence_nats: Float = Field(default=0.5, gt=0)
    divergence_steps: Count = Field(default=50, ge=1)
    non_finite_in_a_row: Count = Field(default=3, ge=1)
    non_finite_in_1000: Count = Field(default=10, ge=1)
    action: Literal["roll_back", "stop"] = "roll_back"
    max_roll_backs: Count = Field(default=3, ge=0)
    roll_back_steps: Count = Field(default=100, ge=1)
    skip_batches: Count = Field(default=200, ge=0)
    grace_steps: Count = Field(default=200, ge=0)
    cooldown_steps: Count = Field(default=100, ge=1)
    max_dumps: Count = Field(default=20, ge=0)
    slow_for: Seconds = Field(default=300.0, gt=0)

    @model_validator(mode="after")
    def _window_holds_what_it_waits_for(self) -> Self:
        if self.min_values > self.window:
            raise SettingsError(
                f"anomaly.min_values={self.min_values} exceeds anomaly.window={self.window}, so no rule would ever "
                "speak. Lower the first or raise the second."
            )
        return self
