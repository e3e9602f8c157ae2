"""Where a run is recorded, in one table written by hand; nothing here may raise into the loop or hold it up."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ternlm.run_directory import RunDirectory
from ternlm.tracking.interface import Kind, Row, Tracker, Trackers, TrackingSettings

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Recorded:
    """What a tracker is built from.

    Attributes:
        run: Where files go.
        settings: What the user asked for.
        first_step: The step a resumed run goes on from, else 0.
        warn: Called with one sentence, always in the thread that trains.
        facts: Settings, parameter counts, data and hardware, to show beside the curves.
    """

    run: RunDirectory
    settings: TrackingSettings
    first_step: int
    warn: Warn
    facts: Mapping[str, Any]


def _jsonl(recorded: Recorded) -> Tracker:
    from ternlm.tracking.jsonl import JsonlTracker
    from ternlm.tracking.retrying import RetryingTracker

    return RetryingTracker("metrics/*.jsonl", JsonlTracker(recorded.run), recorded.warn)


def _csv(recorded: Recorded) -> Tracker | None:
    from ternlm.tracking.csv import CsvTracker
    from ternlm.tracking.retrying import RetryingTracker

    if not recorded.settings.csv:
        return None
    return RetryingTracker("logs/*.csv", CsvTracker(recorded.run), recorded.warn)


def _tensorboard(recorded: Recorded) -> Tracker | None:
    from ternlm.tracking.background import BackgroundTracker

    if not recorded.settings.tensorboard:
        return None

    def build(say: Warn) -> Tracker:
        from ternlm.tracking.tensorboard import TensorBoardTracker

        return TensorBoardTracker(recorded.run, recorded.first_step + 1 if recorded.first_step else None)

    return BackgroundTracker("tensorboard", build, recorded.warn)


def _wandb(recorded: Recorded) -> Tracker | None:
    from ternlm.tracking.background import BackgroundTracker
    from ternlm.tracking.wandb import WandbTracker, chosen_mode

    mode = chosen_mode(recorded.settings)
    if mode == "disabled":
        return None
    return BackgroundTracker(
        "wandb",
        lambda say: WandbTracker(recorded.run, recorded.settings, recorded.facts, mode, say),
        recorded.warn,
    )


TRACKERS: dict[str, Callable[[Recorded], Tracker | None]] = {
    "jsonl": _jsonl,
    "csv": _csv,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}


def build_trackers(
    run: RunDirectory,
    settings: TrackingSettings,
    first_step: int,
    warn: Warn,
    facts: Mapping[str, Any] | None = None,
) -> list[Tracker]:
    """The trackers the settings ask for; one that cannot start is left out with one warning.

    Args:
        run, settings, first_step, warn, facts: As `Recorded`.
    """
    recorded = Recorded(run, settings, first_step, warn, facts or {})
    trackers = []
    for name, build in TRACKERS.items():
        try:
            tracker = build(recorded)
        except Exception as error:  # noqa: BLE001 - a tracker that cannot start must not stop training
            warn(f"tracker '{name}' is off: {error}. Training goes on.")
            continue
        if tracker is not None:
            trackers.append(tracker)
    return trackers


__all__ = ["TRACKERS", "Kind", "Recorded", "Row", "Tracker", "Trackers", "TrackingSettings", "build_trackers"]
