"""One small interface for everything that records a run, and a guard that keeps failures out of the loop."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from ternlm.settings import Count, Settings

Kind = Literal["train", "eval", "sample"]
Row = Mapping[str, Any]


class TrackingSettings(Settings):
    """What is recorded, besides the console and `metrics/scalars.jsonl`.

    Attributes:
        every_steps: Steps between logged rows.
        csv: Also write `logs/training_log.csv` and `logs/eval_log.csv`.
        tensorboard: Also write TensorBoard events to `logs/tensorboard`.
    """

    every_steps: Count = Field(default=10, ge=1)
    csv: bool = True
    tensorboard: bool = True


class Tracker(ABC):
    """Receives rows: ``train`` while training, ``eval`` per evaluation, ``sample`` per generated text.

    Every row has `step`; the names of quantities are those of docs/metrics.md.
    """

    @abstractmethod
    def log(self, kind: Kind, row: Row) -> None:
        """Record one row."""

    def close(self) -> None:
        """Flush and release files."""


class Trackers(Tracker):
    """Several trackers as one; a tracker that raises is switched off with one warning.

    Args:
        trackers: The trackers, called in order.
        warn: Called with one sentence when one is switched off.
    """

    def __init__(self, trackers: Sequence[Tracker], warn: Callable[[str], None]) -> None:
        self._active, self._warn = list(trackers), warn

    def log(self, kind: Kind, row: Row) -> None:
        self._each(lambda tracker: tracker.log(kind, row))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._active):
            try:
                call(tracker)
            except Exception as error:  # noqa: BLE001 - any failure of a tracker must leave training alone
                self._active.remove(tracker)
                self._warn(f"{type(tracker).__name__} is switched off: {error}. Training goes on.")
