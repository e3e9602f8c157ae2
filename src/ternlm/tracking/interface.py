"""One small interface for everything that records a run, and a guard that keeps failures out of the loop."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from ternlm.settings import Count, Seconds, Settings

Kind = Literal["train", "eval", "sample", "ternary", "system", "event"]
Row = Mapping[str, Any]


class TrackingSettings(Settings):
    """What is recorded, besides the console and the rows in `metrics/`, `eval/` and `samples/`.

    Attributes:
        every_steps: Steps between logged rows.
        ternary_every_steps: Steps between rows with the codes and scales of every matrix.
        system_every_seconds: Time between rows with CPU, memory, disk and GPU, e.g. ``10s``.
        csv: Also write `logs/training_log.csv` and `logs/eval_log.csv`.
        tensorboard: Also write TensorBoard events to `logs/tensorboard`.
        report: Also write `report.html`, `report.md` and `report.json` when the run ends; see docs/report.md.
        wandb: ``online`` (falls back to ``offline``), ``offline`` or ``disabled``; None asks the environment:
            WANDB_MODE, else ``online`` where WANDB_PROJECT is set, else ``disabled``.
        wandb_project: None takes WANDB_PROJECT, else ``ternlm``.
        wandb_name: None takes WANDB_NAME, else the name of the run.
        wandb_tags: Besides family, size, data and version; empty takes WANDB_TAGS.
        wandb_notes: None takes WANDB_NOTES.
    """

    every_steps: Count = Field(default=10, ge=1)
    ternary_every_steps: Count = Field(default=100, ge=1)
    system_every_seconds: Seconds = Field(default=10.0, gt=0)
    csv: bool = True
    tensorboard: bool = True
    report: bool = True
    wandb: Literal["online", "offline", "disabled"] | None = None
    wandb_project: str | None = None
    wandb_name: str | None = None
    wandb_tags: tuple[str, ...] = ()
    wandb_notes: str | None = None


class Tracker(ABC):
    """Receives rows: ``train`` while training, ``eval`` per evaluation, ``sample`` per generated text,
    ``ternary`` with the codes and scales of every matrix, ``system`` with CPU, memory and GPU, and
    ``event`` for whatever was decided on the way.

    Every row has `step`; the names of quantities are those of docs/metrics.md.
    """

    @abstractmethod
    def log(self, kind: Kind, row: Row) -> None:
        """Record one row."""

    def flush(self) -> None:
        """Bring what was logged to where people look at it."""

    def begin_close(self) -> None:
        """Start to close without waiting; `close` waits. Several trackers close at the same time that way."""

    def close(self) -> None:
        """Flush and release files."""

    def describe(self) -> str | None:
        """A few words on mode and state for a status line; None where there is nothing to say."""
        return None


class Trackers(Tracker):
    """Several trackers as one; a tracker that raises is switched off with one warning.

    Args:
        trackers: The trackers, called in order.
        warn: Called with one sentence when one is switched off.
    """

    def __init__(self, trackers: Sequence[Tracker], warn: Callable[[str], None]) -> None:
        self._active, self._warn = list(trackers), warn
        self._off: list[str] = []

    def log(self, kind: Kind, row: Row) -> None:
        self._each(lambda tracker: tracker.log(kind, row))

    def flush(self) -> None:
        self._each(lambda tracker: tracker.flush())

    def begin_close(self) -> None:
        self._each(lambda tracker: tracker.begin_close())

    def close(self) -> None:
        self.begin_close()
        self._each(lambda tracker: tracker.close())

    def describe(self) -> str | None:
        return "; ".join([*filter(None, (tracker.describe() for tracker in self._active)), *self._off]) or None

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._active):
            try:
                call(tracker)
            except Exception as error:  # noqa: BLE001 - any failure of a tracker must leave training alone
                self._active.remove(tracker)
                self._off.append(f"{type(tracker).__name__} off: {error}")
                self._warn(f"{type(tracker).__name__} is switched off: {error}. Training goes on.")


def event_text(row: Row) -> str:
    """``warning: the loss is not finite; the update is skipped.``"""
    return f"{row.get('severity', 'info')}: {row.get('message', row.get('event'))}"
