"""What the fault tests share: calls of `os` that fail or kill, processes that are killed, and rows of the summary.

A process that has threads must not be forked, and test runners keep threads. `apart` therefore runs a function of a
test module in a fresh process of one thread, which imports everything once; `forked` gives each trial a child of that
process, which costs milliseconds instead of seconds.
"""

import errno
import faulthandler
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "ftruncate", "close")
"""The calls of `os` through which everything durable is written."""


@dataclass
class Row:
    """One line of the summary.

    Attributes:
        test: What was done.
        trials: How often.
        injected: Faults that really happened, in words.
        result: What came of it; a test that fails never gets to say.
        controls: Seeded bugs that the same checks caught, as ``3 of 3``.
        seconds: Wall time.
    """

    test: str
    trials: int = 0
    injected: str = ""
    result: str = "FAILED"
    controls: str = "-"
    seconds: float = 0.0

    def line(self) -> str:
        """The row as one line of text."""
        return (
            f"[faults] {self.test}: {self.trials:,} trials ({self.injected}), {self.result}, "
            f"controls caught {self.controls}, {self.seconds:.1f} s"
        )


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| test | trials | injected | result | negative controls caught | seconds |", "|---|---|---|---|---|---|"]
    for row in rows:
        values = asdict(row) | {"trials": f"{row.trials:,}", "seconds": f"{row.seconds:.1f}"}
        lines.append("| " + " | ".join(str(value) for value in values.values()) + " |")
    return "\n".join(lines)


# Calls of os that fail


@contextmanager
def intercepted(before: Callable[[str, tuple[Any, ...]], int | None]) -> Iterator[None]:
    """Announce every file-system call of this process ahead of carrying it out.

    Args:
        before: Called with the name and arguments; a number that it returns is the result of the call, which is
            not carried out, and what it raises is raised. A close that fails has closed the file all the same.
    """
    real = {name: getattr(os, name) for name in CALLS}

    def announced(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            try:
                result = before(name, arguments)
            except BaseException:
                if name == "close":
                    real["close"](*arguments)
                raise
            return real[name](*arguments, **options) if result is None else result

        return call

    for name in CALLS:
        setattr(os, name, announced(name))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


class Fault:
    """Something that goes wrong at the n-th file-system call.

    Args:
        n: Which call, from 1.
        kind: ``kill``: the process gets SIGKILL. An error number: the call fails once. A negative error number: it
            and all later ones fail. ``torn``: the n-th write takes half of its bytes, then the process gets SIGKILL.
            ``full``: the n-th write takes half of its bytes and all later calls fail, as when a disk runs full.
            ``half``: the n-th write takes half of its bytes and says so; nothing else happens.

    Attributes:
        met: Whether there was an n-th call.
    """

    def __init__(self, n: int, kind: str | int) -> None:
        self.n, self.kind, self.count, self.met = n, kind, 0, False
        self._write = os.write

    def __call__(self, name: str, arguments: tuple[Any, ...]) -> int | None:
        of_writes = self.kind in ("torn", "full", "half")
        sticks = self.kind == "full" or (isinstance(self.kind, int) and self.kind < 0)
        self.count += name == "write" or not of_writes
        if self.count < self.n or (self.met and not sticks):
            return None
        taken, is_first, self.met = None, not self.met, True
        if of_writes and is_first:
            content = bytes(arguments[1])
            taken = self._write(arguments[0], content[: -(-len(content) // 2)])
        if self.kind in ("kill", "torn"):
            os.kill(os.getpid(), signal.SIGKILL)
        if taken is not None:
            return taken
        number = abs(self.kind) if isinstance(self.kind, int) else errno.ENOSPC
        raise OSError(number, os.strerror(number))


# Processes that are killed


def apart(function: Callable[..., Any], *arguments: Any, seconds: float = 300) -> Any:
    """Run a function of a test module in a fresh process of one thread.

    Args:
        function: Takes and returns JSON values.
        seconds: Guard against a hang; not a measure of speed.
    """
    tests = str(Path(__file__).parents[1])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([tests, str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.NamedTemporaryFile() as result:
        command = [sys.executable, __file__, result.name, function.__module__, function.__name__, json.dumps(arguments)]
        done = subprocess.run(command, env=environment, timeout=seconds, capture_output=True, check=False)
        said = done.stderr.decode(errors="replace")[-6000:]
        assert done.returncode == 0, f"{function.__name__} ended with {done.returncode}:\n{said}"
        return json.loads(result.read())


class Ended(NamedTuple):
    """How a child ended.

    Attributes:
        code: 0, the `exit_code` of a `TernlmError`, 1 for any other error, or the negative number of a signal.
        said: The error, if there was one.
    """

    code: int
    said: str


def forked(function: Callable[[], object], kill_after: float | None = None, seconds: float = 60) -> Ended:
    """Run a function in a child of this process, which has warmed up and has one thread.

    Args:
        function: What the child does.
        kill_after: SIGKILL after so many seconds, unless the child has ended by then.
        seconds: The child dumps its stacks and ends with 1 if it takes longer.
    """
    from ternlm.errors import TernlmError

    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not be forked"
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        code, said = 1, ""
        try:
            faulthandler.dump_traceback_later(seconds, exit=True)
            function()
            code = 0
        except TernlmError as error:
            code, said = error.exit_code, f"{type(error).__name__}: {error}"
        except BaseException:  # noqa: BLE001 (whatever it is, the child ends here)
            said = traceback.format_exc()
        finally:
            os.write(theirs, said.encode(errors="replace")[-60_000:])
            os._exit(code)
    os.close(theirs)
    if kill_after is not None:
        handle = os.pidfd_open(child)
        select.select([handle], [], [], kill_after)
        os.close(handle)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(ours, "rb") as pipe:
        return Ended(code, pipe.read().decode())


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._started


if __name__ == "__main__":
    faulthandler.enable()
    result_file, module, name, arguments = sys.argv[1:]
    import torch

    torch.set_num_threads(1)
    found = getattr(importlib.import_module(module), name)(*json.loads(arguments))
    Path(result_file).write_text(json.dumps(found))
