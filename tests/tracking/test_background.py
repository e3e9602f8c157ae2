"""A tracker in its own thread: whatever it does, calls return, rows wait up to a limit, and closing ends in time.

The stubs block on events that the test sets, so nothing here depends on how fast the machine is; `GUARD_S` only ends
a test that would hang.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ternlm.tracking import Tracker, Trackers
from ternlm.tracking.background import BackgroundTracker

GUARD_S = 60.0


class Recording(Tracker):
    """Keeps its rows; `before_row` runs first and may block or raise."""

    def __init__(self, before_row: Callable[[], None] = lambda: None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.done: list[str] = []
        self.threads: set[int] = set()
        self.before_row = before_row

    def log(self, kind: str, row: Any) -> None:
        self.before_row()
        self.threads.add(threading.get_ident())
        self.rows.append(dict(row))

    def flush(self) -> None:
        self.done.append(f"flush after {len(self.rows)}")

    def close(self) -> None:
        self.done.append(f"close after {len(self.rows)}")


class Gate:
    """Somewhere a tracker gets stuck until the test lets it go."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def pass_through(self) -> None:
        self.reached.set()
        assert self.opened.wait(GUARD_S)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


def returns(call: Callable[[], Any]) -> bool:
    """Whether a call comes back at all."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(GUARD_S)
    return not thread.is_alive()


def in_background(tracker: Tracker, said: list[str], capacity: int = 1000) -> BackgroundTracker:
    return BackgroundTracker("stub", lambda say: tracker, said.append, capacity)


def test_rows_arrive_in_order_in_another_thread_and_all_before_close_returns() -> None:
    said: list[str] = []
    inner = Recording()
    tracker = in_background(inner, said)
    for step in range(100):
        tracker.log("train", {"step": step})
    tracker.flush()
    tracker.log("train", {"step": 100})
    tracker.close(GUARD_S)
    assert [row["step"] for row in inner.rows] == list(range(101))
    assert threading.get_ident() not in inner.threads
    assert inner.done == ["flush after 100", "close after 101"]
    assert (said, tracker.dropped, tracker.describe()) == ([], 0, "stub")


def test_l10_a_tracker_that_blocks_for_ever_holds_up_neither_logging_nor_closing(gate: Gate) -> None:
    said: list[str] = []
    inner = Recording(gate.pass_through)
    tracker = in_background(inner, said)
    tracker.log("train", {"step": 0})
    assert gate.reached.wait(GUARD_S)
    for step in range(1, 6):
        assert returns(lambda step=step: tracker.log("train", {"step": step}))
    assert returns(tracker.flush)
    assert returns(lambda: tracker.close(0.05))
    assert inner.rows == [], "it was stuck all the time"
    assert said == [
        "stub is left behind: not finished within 0.05 s, 6 rows waiting. The files of the run hold every row."
    ]
    assert tracker.describe() == "stub off: not finished within 0.05 s, 6 rows waiting"
    tracker.close(0.05)
    assert len(said) == 1


def test_l10_a_tracker_that_never_starts_holds_up_nothing(gate: Gate) -> None:
    said: list[str] = []

    def build(say: Callable[[str], None]) -> Tracker:
        gate.pass_through()
        return Recording()

    tracker = BackgroundTracker("stub", build, said.append)
    assert gate.reached.wait(GUARD_S)
    assert returns(lambda: tracker.log("train", {"step": 1}))
    assert tracker.describe() == "stub starting"
    assert returns(lambda: tracker.close(0.05))
    assert len(said) == 1
    assert "left behind" in said[0]


def test_l10_rows_that_find_the_queue_full_are_dropped_and_counted(gate: Gate) -> None:
    said: list[str] = []
    inner = Recording(gate.pass_through)
    tracker = in_background(inner, said, capacity=3)
    tracker.log("train", {"step": 0})
    assert gate.reached.wait(GUARD_S), "the first row has left the queue"
    for step in range(1, 10):
        tracker.log("train", {"step": step})
    tracker.flush()
    assert (tracker.dropped, tracker.describe()) == (6, "stub, 6 rows dropped")
    gate.opened.set()
    tracker.close(GUARD_S)
    assert [row["step"] for row in inner.rows] == [0, 1, 2, 3]
    assert said == ["stub was slower than training; 6 rows were dropped."]


@pytest.mark.parametrize("error", [ConnectionError("no\nroute."), SystemExit(1), KeyError()])
def test_l10_a_tracker_that_fails_to_start_is_switched_off_with_one_sentence(error: BaseException) -> None:
    said: list[str] = []

    def build(say: Callable[[str], None]) -> Tracker:
        raise error

    tracker = BackgroundTracker("stub", build, said.append)
    tracker._thread.join(GUARD_S)
    for step in range(3):
        tracker.log("train", {"step": step})
    tracker.close(GUARD_S)
    reason = {ConnectionError: "no route", SystemExit: "1", KeyError: "KeyError"}[type(error)]
    assert said == [f"stub is switched off: {reason}. Training goes on."]
    assert tracker.describe() == f"stub off: {reason}"


def test_l10_a_tracker_that_fails_at_a_row_is_switched_off_and_gets_no_further_one() -> None:
    said: list[str] = []
    inner = Recording()

    def fail_at_the_third() -> None:
        if len(inner.rows) == 2:
            raise OSError("disk gone")

    inner.before_row = fail_at_the_third
    tracker = in_background(inner, said)
    for step in range(5):
        tracker.log("train", {"step": step})
    tracker.close(GUARD_S)
    assert [row["step"] for row in inner.rows] == [0, 1]
    assert inner.done == []
    assert said == ["stub is switched off: disk gone. Training goes on."]


def test_rows_are_those_of_the_moment_of_the_call(gate: Gate) -> None:
    inner = Recording(gate.pass_through)
    tracker = in_background(inner, [])
    row = {"step": 1}
    tracker.log("train", row)
    row["step"] = 2
    gate.opened.set()
    tracker.close(GUARD_S)
    assert inner.rows == [{"step": 1}]


def test_sentences_are_said_in_the_thread_that_trains() -> None:
    speakers: list[int] = []

    def build(say: Callable[[str], None]) -> Tracker:
        say("hello")
        return Recording()

    tracker = BackgroundTracker("stub", build, lambda sentence: speakers.append(threading.get_ident()))
    tracker._thread.join(0.05)
    tracker.log("train", {"step": 1})
    tracker.close(GUARD_S)
    assert speakers == [threading.get_ident()]


def test_a_tracker_that_describes_itself_is_described_by_its_own_words() -> None:
    inner = Recording()
    inner.describe = lambda: "stub offline (buffering)"  # type: ignore[method-assign]
    tracker = in_background(inner, [])
    tracker.close(GUARD_S)
    together = Trackers([tracker, Recording()], print)
    assert together.describe() == "stub offline (buffering)"


def test_all_trackers_begin_to_close_before_the_first_is_waited_for() -> None:
    order: list[str] = []

    class Ordered(Tracker):
        def __init__(self, name: str) -> None:
            self.name = name

        def log(self, kind: str, row: Any) -> None: ...

        def begin_close(self) -> None:
            order.append(f"begin {self.name}")

        def close(self) -> None:
            order.append(f"close {self.name}")

    Trackers([Ordered("a"), Ordered("b")], print).close()
    assert order == ["begin a", "begin b", "close a", "close b"]
