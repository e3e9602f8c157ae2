"""The thread that reads ahead: it fills a folder with token blocks, within a budget, in the order of training.

Blocks are a pure function of the source, so nothing that happens here, such as failures, restarts, or blocks
that were deleted to make room, changes what is trained on; it changes only how long the trainer waits.
"""

import atexit
import threading
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from ternlm.data.blocks import Block, BlockStore
from ternlm.data.reader import Patience, Position
from ternlm.data.tape import Tape
from ternlm.errors import DataError

POLL = 0.2  # seconds between two calls of `while_waiting`
_LONGEST_CLOSE = 10.0  # seconds


class _Stopped(Exception):
    """`close` was called."""


class Producer:
    """Makes blocks in a thread of its own.

    The next block made is the first that is missing from the block being read on. Where the budget is used up,
    room is made by deleting, in this order: blocks that were released; blocks farther ahead than the one to be
    made; blocks behind the one being read, unless at least half of the budget lies ahead of it already. All of
    them can be made again.

    Args:
        store: Where blocks lie.
        tape: What they are made of.
        capacity: Most blocks on disk, the one being written included; at least 2.
        patience: The tape's; from now on the thread waits in it.

    Attributes:
        sentences: What people may want to know, oldest first; whoever shows one takes it out.
    """

    def __init__(self, store: BlockStore, tape: Tape, capacity: int, patience: Patience) -> None:
        self.store = store
        self.sentences: deque[str] = deque()
        self._tape = tape
        self._capacity = capacity
        self._patience = patience
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._wanted: int | None = None
        self._released = 0
        self._error: Exception | None = None
        self._blocks: Iterator[tuple[np.ndarray, Block]] = iter(())
        self._next = -1  # number of the block that `_blocks` yields next
        self._thread = threading.Thread(target=self._run, name="ternlm-stream", daemon=True)

    def start(self) -> None:
        """Begin to read ahead."""
        self._patience.say, self._patience.wait = self._ignore_complaint, self._wait
        atexit.register(self.close)  # a thread inside Arrow must not meet an interpreter that is gone
        self._thread.start()

    def block(self, number: int, while_waiting: Callable[[str | None], None]) -> np.ndarray:
        """The tokens of a block, (tokens,), as soon as it is there.

        Args:
            number: Which block; those after it are made next.
            while_waiting: Called about every 0.2 s with the complaint about the source, or with None where all
                is well and merely slow; what it raises ends the waiting.

        Raises:
            DataError: The block cannot be made.
        """
        while True:
            with self._changed:
                self._wanted = number
                self._released = min(self._released, number)  # who goes back needs again what was released
                self._changed.notify_all()
                is_present = number in self.store.present
            if is_present:
                tokens = self.store.read(number)
                if tokens is not None:
                    return tokens
                self._discard_damaged(number)
            while_waiting(self._patience.complaint)
            with self._changed:
                is_over = self._changed.wait_for(lambda: number in self.store.present or self._is_over(), POLL)
                if is_over and number not in self.store.present:
                    raise self._error or DataError("the stream is closed.")

    def release(self, number: int) -> None:
        """Allow blocks before `number` to be deleted."""
        with self._changed:
            self._released = max(self._released, number)
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread; a read that hangs in the network is left behind and writes nothing any more."""
        atexit.unregister(self.close)
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_LONGEST_CLOSE)
        self.store.close()

    def _run(self) -> None:
        try:
            while True:
                self._make(self._next_task())
        except _Stopped:
            pass
        except OSError as error:
            self._fail(
                DataError(
                    f"token blocks cannot be written to {self.store.folder}: {error.strerror or error}. Free space "
                    "or lower data.stream_buffer, then resume the run."
                )
            )
        except Exception as error:  # noqa: BLE001 (raised again in the thread that waits for a block)
            self._fail(error)
        finally:
            self._blocks = iter(())  # closes what is open while the libraries it needs are still there

    def _next_task(self) -> int:
        """Wait until a block is missing and there is room for it; its number."""
        with self._changed:
            while True:
                self._wait(0)
                for number in [number for number in self.store.present if number < self._released]:
                    self.store.remove(number)
                number = self._first_missing()
                if self._has_room(number):
                    return number
                self._changed.wait()

    def _first_missing(self) -> int:
        """The first missing block from the one being read on; before that is known, the first never made."""
        made = len(self.store.made)
        number = made if self._wanted is None else min(self._wanted, made)
        while number in self.store.present:
            number += 1
        return number

    def _has_room(self, number: int) -> bool:
        while len(self.store.present) >= self._capacity:
            victim = self._victim(number)
            if victim is None:
                return False
            self.store.remove(victim)
        return True

    def _victim(self, number: int) -> int | None:
        """A block to delete for the sake of another, or None if all are worth more."""
        present, wanted = self.store.present, self._wanted
        if wanted is None:
            return None
        if max(present) > number:
            return max(present)
        ahead = sum(other >= wanted for other in present)
        has_need = number <= wanted or ahead < self._capacity // 2
        return min(present) if min(present) < wanted and has_need else None

    def _make(self, number: int) -> None:
        made = self.store.made
        if number != self._next:
            start = Position() if number == 0 else made[number - 1].end
            self._blocks, self._next = self._tape.blocks(start, self.store.tokens, self.sentences.append), number
        tokens, block = next(self._blocks)
        self._next = number + 1
        self._wait(0)
        if number < len(made):
            self.store.restore(number, tokens)
        else:
            self.store.add(tokens, block)
        with self._changed:
            self._changed.notify_all()

    def _discard_damaged(self, number: int) -> None:
        with self._changed:
            self.store.remove(number)
            self._changed.notify_all()
        self.sentences.append(f"block {number} of {self.store.folder} is damaged or missing and is made again")

    def _is_over(self) -> bool:
        return self._error is not None or self._stop.is_set()

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _wait(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _Stopped

    def _ignore_complaint(self, sentence: str) -> None:
        """The complaint is shown by whoever has to wait."""
