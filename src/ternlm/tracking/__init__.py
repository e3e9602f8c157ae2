"""Where a run is recorded, in one table written by hand; nothing here may raise into the loop."""

from collections.abc import Callable

from ternlm.run_directory import RunDirectory
from ternlm.tracking.interface import Kind, Row, Tracker, Trackers, TrackingSettings


def _jsonl(run: RunDirectory, settings: TrackingSettings, first_step: int) -> Tracker:
    from ternlm.tracking.jsonl import JsonlTracker

    return JsonlTracker(run)


def _csv(run: RunDirectory, settings: TrackingSettings, first_step: int) -> Tracker | None:
    from ternlm.tracking.csv import CsvTracker

    return CsvTracker(run) if settings.csv else None


def _tensorboard(run: RunDirectory, settings: TrackingSettings, first_step: int) -> Tracker | None:
    from ternlm.tracking.tensorboard import TensorBoardTracker

    return TensorBoardTracker(run, first_step + 1 if first_step else None) if settings.tensorboard else None


TRACKERS: dict[str, Callable[[RunDirectory, TrackingSettings, int], Tracker | None]] = {
    "jsonl": _jsonl,
    "csv": _csv,
    "tensorboard": _tensorboard,
}


def build_trackers(
    run: RunDirectory, settings: TrackingSettings, first_step: int, warn: Callable[[str], None]
) -> list[Tracker]:
    """The trackers the settings ask for; one that cannot start is left out with one warning."""
    trackers = []
    for name, build in TRACKERS.items():
        try:
            tracker = build(run, settings, first_step)
        except Exception as error:  # noqa: BLE001 - a tracker that cannot start must not stop training
            warn(f"tracker '{name}' is off: {error}. Training goes on.")
            continue
        if tracker is not None:
            trackers.append(tracker)
    return trackers


__all__ = ["TRACKERS", "Kind", "Row", "Tracker", "Trackers", "TrackingSettings", "build_trackers"]
