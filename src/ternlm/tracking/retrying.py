"""Local files on a disk that may be full for a while: what cannot be written is counted, and the next row is tried."""

from collections.abc import Callable

from ternlm.tracking.interface import Kind, Row, Tracker


class RetryingTracker(Tracker):
    """Runs a tracker that appends to local files, and never gives it up.

    Args:
        name: What the files are called in a sentence.
        tracker: Raises when a row cannot be written, and can be called again.
        warn: Called with one sentence when writing begins to fail, and one when it works again.
    """

    def __init__(self, name: str, tracker: Tracker, warn: Callable[[str], None]) -> None:
        self._name, self._tracker, self._warn = name, tracker, warn
        self._lost = 0

    def log(self, kind: Kind, row: Row) -> None:
        try:
            self._tracker.log(kind, row)
        except Exception as error:  # noqa: BLE001 - a full disk, or a row that no file can hold; training goes on
            self._lost += 1
            if self._lost == 1:
                self._warn(
                    f"{self._name} cannot be written: {error}. Training goes on; every later row is tried again."
                )
            return
        if self._lost:
            self._warn(f"{self._name} can be written again; {_rows(self._lost)} lost.")
            self._lost = 0

    def close(self) -> None:
        if self._lost:
            self._warn(f"{self._name} could not be written to the end; {_rows(self._lost)} lost.")
        self._tracker.close()

    def describe(self) -> str | None:
        return f"{self._name} failing, {_rows(self._lost)} lost" if self._lost else None


def _rows(count: int) -> str:
    return "1 row was" if count == 1 else f"{count} rows were"
