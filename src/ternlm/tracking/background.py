"""A tracker in a thread of its own, so that one that is slow, hangs or fails costs training nothing but its rows."""

import threading
import time
from collections import deque
from collections.abc import Callable

from ternlm.tracking.interface import Kind, Row, Tracker

Say = Callable[[str], None]


class BackgroundTracker(Tracker):
    """Hands rows to another tracker through a bounded queue; no call here waits for it, except `close` for a while.

    The other tracker is also built in the thread, because that may hang as well. An exception switches it off.
    Sentences are said by the next call of `log`, `flush` or `close`, so always in the caller's thread.

    Args:
        name: What the tracker is called in sentences.
        build: Makes the tracker; it gets a function that says a sentence.
        warn: Called with each sentence.
        capacity: Rows that wait at most; what comes while the queue is full is dropped and counted.

    Attributes:
        dropped: Rows that found the queue full.
    """

    def __init__(self, name: str, build: Callable[[Say], Tracker], warn: Say, capacity: int = 1000) -> None:
        self._name, self._warn, self._capacity = name, warn, capacity
        self.dropped = 0
        self._calls: deque[Callable[[Tracker], None]] = deque()
        self._changed = threading.Condition()
        self._sentences: deque[str] = deque()
        self._tracker: Tracker | None = None
        self._reason: str | None = None
        self._closing_since: float | None = None
        self._thread = threading.Thread(target=self._work, args=(build,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, kind: Kind, row: Row) -> None:
        copy = dict(row)
        if not self._hand_over(lambda tracker: tracker.log(kind, copy)):
            self.dropped += 1
        self._say_all()

    def flush(self) -> None:
        self._hand_over(lambda tracker: tracker.flush())
        self._say_all()

    def begin_close(self) -> None:
        with self._changed:
            if self._closing_since is None:
                self._closing_since = time.monotonic()
                self._changed.notify()

    def close(self, timeout_s: float = 5.0) -> None:
        """Let the tracker finish for at most this long, counted from `begin_close`, then leave it behind."""
        self.begin_close()
        assert self._closing_since is not None
        if self._reason is None:
            self._thread.join(max(0.0, self._closing_since + timeout_s - time.monotonic()))
        if self._reason is None and self._thread.is_alive():
            self._reason = f"not finished within {timeout_s:g} s, {len(self._calls)} rows waiting"
            self._sentences.append(f"{self._name} is left behind: {self._reason}. The files of the run hold every row.")
        self._say_all()

    def describe(self) -> str:
        if self._reason is not None:
            text = f"{self._name} off: {self._reason}"
        elif self._tracker is None:
            text = f"{self._name} starting"
        else:
            text = self._tracker.describe() or self._name
        return f"{text}, {self.dropped} rows dropped" if self.dropped else text

    def _hand_over(self, call: Callable[[Tracker], None]) -> bool:
        """Whether there was room for the call; a tracker that is off or closing takes none and needs none."""
        with self._changed:
            if self._reason is not None or self._closing_since is not None:
                return True
            if len(self._calls) >= self._capacity:
                return False
            self._calls.append(call)
            self._changed.notify()
            return True

    def _work(self, build: Callable[[Say], Tracker]) -> None:
        try:
            tracker = self._tracker = build(self._sentences.append)
            while call := self._next():
                call(tracker)
            tracker.close()
            if self.dropped:
                self._sentences.append(f"{self._name} was slower than training; {self.dropped} rows were dropped.")
        except BaseException as error:  # noqa: BLE001 - in this thread even SystemExit is only the tracker's failure
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            self._reason = reason
            self._sentences.append(f"{self._name} is switched off: {reason}. Training goes on.")

    def _next(self) -> Callable[[Tracker], None] | None:
        """The next call, waited for; None when the queue is empty and is being closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._calls or self._closing_since is not None)
            return self._calls.popleft() if self._calls else None

    def _say_all(self) -> None:
        while self._sentences:
            self._warn(self._sentences.popleft())
