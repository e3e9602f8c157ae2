"""SIGINT and SIGTERM as flags that every loop polls, so that a run ends by saving and not in the middle of a line."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ternlm.errors import Interrupted, Preempted, TernlmError


class Interruption:
    """Remembers the first signal; a second one ends the process at once.

    By design nothing on disk can be hurt by the second: files are replaced, never edited.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    @contextmanager
    def watched(self) -> Iterator["Interruption"]:
        """Watch SIGINT and SIGTERM inside the block; outside the main thread nothing is watched."""
        try:
            before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # signals belong to the main thread
            yield self
            return
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raise if a signal has arrived.

        Raises:
            Interrupted: SIGINT (Ctrl-C).
            Preempted: SIGTERM.
        """
        if self.received is not None:
            raise self.error("stopped.")

    def error(self, outcome: str) -> TernlmError:
        """The error for the signal received, saying what became of the run."""
        if self.received == signal.SIGTERM:
            return Preempted(outcome)
        return Interrupted(outcome)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise SystemExit(128 + number)
        self.received = number
