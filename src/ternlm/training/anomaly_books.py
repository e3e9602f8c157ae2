"""What the rules say, and what they remember: events and verdicts, the normal level of a measurement, and the books."""

import copy
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, Self

from ternlm.training.anomaly_settings import AnomalySettings

Action = Literal["update", "warn", "skip", "roll_back", "stop"]
Severity = Literal["warning", "error"]

MOST_OUTLIERS = 10
"""Outliers per window that stay out of the statistics; more of them are the new level, not outliers."""

_NORMAL_SPREAD = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation."""

_LEAST_SPREAD = 0.005
"""Smallest spread as a share of the median, so that a flat curve does not alarm."""


class Event(NamedTuple):
    """One anomaly.

    Attributes:
        name: Its rule, e.g. ``loss_spike``.
        step: Where it was seen.
        severity: ``error`` if the run goes back or stops, else ``warning``.
        message: One sentence.
        action: What was decided: ``update`` (the step counts all the same), ``warn``, ``skip``,
            ``roll_back`` or ``stop``.
        values: The numbers behind it; loss and gradient norm may be non-finite.
        dump: Whether evidence is to be written.
    """

    name: str
    step: int
    severity: Severity
    message: str
    action: Action
    values: dict[str, float]
    dump: bool = False

    def row(self) -> dict[str, str]:
        """The columns of an event row, without step and time."""
        return {"event": self.name, "severity": self.severity, "message": self.message, "action": self.action}


class Verdict(NamedTuple):
    """What to do with a step, and why."""

    action: Action
    events: list[Event]


@dataclass
class Level:
    """Median, spread and moving average of a quantity's accepted values.

    Outliers do not enter, or the first one would hide the next. But a level that rises for good must
    not be an outlier for ever: from the eleventh in a window on they do enter, and after half a window
    the median has moved.

    Attributes:
        values: The last accepted ones, oldest first.
        average: Exponential moving average of all accepted values.
        outliers: Steps of the latest outliers.
    """

    values: list[float] = field(default_factory=list)
    average: float = 0.0
    outliers: list[int] = field(default_factory=list)

    def median(self) -> float:
        return statistics.median(self.values)

    def median_and_spread(self) -> tuple[float, float]:
        """The median, and max(1.4826 x median absolute deviation from it, 0.5 % of it)."""
        ordered = sorted(self.values)  # once: sorting what is in order costs next to nothing
        median = statistics.median(ordered)
        deviation = statistics.median([abs(value - median) for value in ordered])
        return median, max(_NORMAL_SPREAD * deviation, _LEAST_SPREAD * abs(median))

    def take(self, value: float, step: int, is_outlier: bool, settings: AnomalySettings) -> bool:
        """Let a value into the statistics, unless it is one of the few outliers; returns whether it entered."""
        if is_outlier:
            self.outliers = [*(old for old in self.outliers if old > step - settings.window), step]
            if len(self.outliers) <= MOST_OUTLIERS:
                return False
        self.average = value if not self.values else settings.ema * self.average + (1 - settings.ema) * value
        self.values.append(value)
        del self.values[: -settings.window]
        return True


@dataclass
class Bookkeeping:
    """What the rules remember up to one step. A roll-back returns to the bookkeeping of the step it goes to.

    Attributes:
        step: The last judged step.
        quiet_until: First step after the grace of the latest stage.
        loss, grad_norm: Their levels.
        in_a_row: Non-finite steps up to this one.
        non_finite: The non-finite ones of the last 1000 steps.
        above: Steps in a row with the loss far above `reference`.
        reference: Median of the loss before it rose.
        flip_rates: Recent flip rates by matrix.
        frozen_since: Matrices without a flip, and since when.
        reported: Matrices, or stages, for which an event has been raised already, by event.
        boundary_rates: Recent shares of positions where a hierarchical model cuts, by stage.
    """

    step: int = -1
    quiet_until: int = 0
    loss: Level = field(default_factory=Level)
    grad_norm: Level = field(default_factory=Level)
    in_a_row: int = 0
    non_finite: list[int] = field(default_factory=list)
    above: int = 0
    reference: float = 0.0
    flip_rates: dict[str, list[float]] = field(default_factory=dict)
    frozen_since: dict[str, int] = field(default_factory=dict)
    reported: dict[str, list[str]] = field(default_factory=dict)
    boundary_rates: dict[str, list[float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON values only, all finite."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`; shares nothing with it.

        Raises:
            KeyError, TypeError: The values are not such a dictionary.
        """
        values = copy.deepcopy(dict(values))
        return cls(**{**values, "loss": Level(**values["loss"]), "grad_norm": Level(**values["grad_norm"])})
