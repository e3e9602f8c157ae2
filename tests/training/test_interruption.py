"""Signals as flags: the first is remembered, the second ends the process, and handlers are put back."""

import os
import signal
import threading

import pytest

from ternlm.errors import Interrupted, Preempted
from ternlm.training.interruption import Interruption


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, Interrupted), (signal.SIGTERM, Preempted)])
def test_a_signal_becomes_its_error_at_the_next_check(number: int, error: type[Exception]) -> None:
    interruption = Interruption()
    with interruption.watched():
        interruption.check()
        os.kill(os.getpid(), number)
        assert interruption.received == number
        with pytest.raises(error):
            interruption.check()
        with pytest.raises(error):
            interruption.check()


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_with_its_own_code(first: int, second: int) -> None:
    with Interruption().watched():
        os.kill(os.getpid(), first)
        with pytest.raises(SystemExit) as caught:
            os.kill(os.getpid(), second)
    assert caught.value.code == 128 + second


def test_handlers_are_put_back_however_the_block_ends() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), Interruption().watched():
        raise ZeroDivisionError
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_outside_the_main_thread_nothing_is_watched_and_nothing_fails() -> None:
    seen: list[object] = []

    def work() -> None:
        with Interruption().watched() as interruption:
            interruption.check()
            seen.append(interruption.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
