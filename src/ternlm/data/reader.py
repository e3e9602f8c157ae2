"""Reading a source row by row from any position on, and again from the exact row after a failure.

What a source is made of is left to `hub` (files of a dataset) and `catalog` (documents in one sequence).
"""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from itertools import islice
from typing import TypeVar

from ternlm.errors import DataError, Interrupted

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between two attempts
_POLL = 0.2  # seconds between two questions whether to stop

Result = TypeVar("Result")


class Unreadable(Exception):
    """A source cannot be read just now; trying again may help."""


@dataclass(frozen=True, order=True)
class Position:
    """A token of a source that is read pass after pass; positions sort in the order of reading.

    Attributes:
        epoch: Completed passes.
        file: File of the source.
        row: Row of the file, every row counted that it stores.
        token: Token of the row's document, markers counted.
    """

    epoch: int = 0
    file: int = 0
    row: int = 0
    token: int = 0

    def as_list(self) -> list[int]:
        """[epoch, file, row, token]."""
        return list(astuple(self))


class Source(ABC):
    """Rows of text in files that can be read from any row on.

    Attributes:
        name: What sentences call it.
    """

    name: str

    @abstractmethod
    def files(self) -> int:
        """Number of files.

        Raises:
            Unreadable: It cannot be known just now.
        """

    @abstractmethod
    def rows(self, file: int, row: int) -> Iterator[tuple[str, str]]:
        """Split and text of the rows of a file from `row` on; a text may be empty.

        Raises:
            Unreadable: Reading broke off.
            DataError: Trying again would not help.
        """

    def reset(self) -> None:
        """Forget what is open, so that the next call opens it anew."""


class DocumentSource(Source):
    """A source that can only be read from its start; a position costs reading everything before it.

    Args:
        name: What sentences call it.
        documents: Opens the sequence of splits and texts.
    """

    def __init__(self, name: str, documents: Callable[[], Iterator[tuple[str, str]]]) -> None:
        self.name = name
        self._documents = documents

    def files(self) -> int:
        return 1

    def rows(self, file: int, row: int) -> Iterator[tuple[str, str]]:
        return islice(self._documents(), row, None)


class Patience:
    """What a reader does when its source fails: say so, wait 1, 2, 4 ... 60 s, and try again.

    Args:
        retry_for: Seconds after which an outage becomes an error; None waits for ever.
        say: Called with a sentence when an attempt failed and when reading works again.
        wait: Waits for so many seconds; what it raises ends the waiting. Readers that have much to do ask it
            for 0 seconds now and then.
        clock: Seconds that only grow.

    Attributes:
        say, wait: As given; whoever goes on reading elsewhere puts its own.
        complaint: The sentence that holds now, or None while all is well.
    """

    def __init__(
        self,
        retry_for: float | None = None,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
        wait: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.say = say
        self.wait = wait
        self.complaint: str | None = None
        self._retry_for = retry_for
        self._clock = clock
        self._since = 0.0
        self._delay = FIRST_WAIT

    def failed(self, name: str, error: Unreadable) -> None:
        """Wait before the next attempt.

        Raises:
            DataError: The source has been unreadable for `retry_for`.
        """
        now = self._clock()
        if self.complaint is None:
            self._since, self._delay = now, FIRST_WAIT
        delay = self._delay
        if self._retry_for is not None:
            left = self._retry_for - (now - self._since)
            if left <= 0:
                raise unreadable(name, str(error))
            delay = min(delay, left)
        self.complaint = f"waiting for data: {name} cannot be read: {error}; trying again in {delay:.0f}s"
        self.say(self.complaint)
        self.wait(delay)
        self._delay = min(2 * self._delay, LONGEST_WAIT)

    def succeeded(self, name: str) -> None:
        """The source was read."""
        if self.complaint is not None:
            self.complaint = None
            self.say(f"{name} can be read again")

    def attempt(self, name: str, action: Callable[[], Result]) -> Result:
        """The result of an action, repeated while it raises `Unreadable`.

        Raises:
            DataError: As `failed`.
        """
        while True:
            try:
                result = action()
            except Unreadable as error:
                self.failed(name, error)
            else:
                self.succeeded(name)
                return result


def read_pass(source: Source, start: Position, patience: Patience) -> Iterator[tuple[Position, str, str]]:
    """Position, split and text of every row from `start` to the end of its pass, each exactly once.

    Raises:
        DataError: Trying again does not help, or helped not soon enough.
    """
    epoch, file, row = start.epoch, start.file, start.row
    while True:
        try:
            while file < source.files():
                for split, text in source.rows(file, row):
                    patience.succeeded(source.name)
                    yield Position(epoch, file, row), split, text
                    row += 1
                file, row = file + 1, 0
            patience.succeeded(source.name)
            return
        except Unreadable as error:
            patience.failed(source.name, error)
            source.reset()


def wait_unless(should_stop: Callable[[], bool]) -> Callable[[float], None]:
    """A `Patience.wait` that raises Interrupted soon after `should_stop` says so."""

    def wait(seconds: float) -> None:
        end = time.monotonic() + seconds
        while True:
            if should_stop():
                raise Interrupted("stopped while reading data. Give the same command again to continue.")
            left = end - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, _POLL))

    return wait


def unreadable(name: str, reason: str) -> DataError:
    """The error for a source that cannot be read and will not be tried again."""
    return DataError(
        f"{name} cannot be read: {reason}. Check the name and the connection (HF_TOKEN for private ones), or "
        "download it and give the local folder as data.source."
    )
