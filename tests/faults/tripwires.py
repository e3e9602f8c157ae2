"""Tripwires around whatever reads a hostile file, and the account of what came of thousands of them."""

import os
import random
import resource
import signal
import sys
import sysconfig
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ternlm.errors import TernlmError

HANG_S, MEMORY = 2, 2**30


class Hang(BaseException):
    """A load took too much processor time."""


class Tripwires:
    """What reading a file must never do: run code, start a process, open a connection, write, or read elsewhere.

    An audit hook cannot be removed, so this belongs into a process of its own.

    Args:
        folder: The only place to read from, besides installed packages.

    Attributes:
        touched: What happened all the same.
    """

    NEVER = (
        *(
            "subprocess.",
            "os.system",
            "os.exec",
            "os.fork",
            "os.posix_spawn",
            "os.spawn",
            "socket.",
            "pickle.",
            "ctypes.",
        ),
        *(
            "os.remove",
            "os.rename",
            "os.mkdir",
            "os.rmdir",
            "os.symlink",
            "os.link",
            "os.chmod",
            "os.truncate",
            "shutil.",
        ),
        *("marshal.", "code.__new__", "webbrowser.", "urllib.", "http."),
    )

    def __init__(self, folder: Path) -> None:
        paths = {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
        source = str(Path(sys.modules["ternlm"].__file__ or "").parent)
        self._readable = (str(folder), *paths, source, "/proc/", "/sys/", "/usr/share/zoneinfo", "/dev/urandom")
        self._code = (*paths, source, "<frozen")
        self._armed = False
        self.touched: list[str] = []
        sys.addaudithook(self._hook)

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Watch while the block runs."""
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._armed:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            is_write = bool(flags & writes) if isinstance(flags, int) else any(c in str(mode) for c in "wax+")
            if is_write or (isinstance(path, str | bytes) and not os.fsdecode(path).startswith(self._readable)):
                self.touched.append(f"open {path!r} {mode} {flags}")
        elif event == "exec":
            if not arguments[0].co_filename.startswith(self._code):
                self.touched.append(f"exec {arguments[0].co_filename}")
        elif event == "compile":
            self.touched.append(f"compile {arguments[1]!r}")
        elif event.startswith(self.NEVER):
            self.touched.append(f"{event} {arguments!r:.100}")


class Findings:
    """What came of thousands of mutated files.

    Attributes:
        counts: How many loaded, and how many were refused with a typed error.
        wrong: Everything else, with how to get it again.
    """

    def __init__(self, tripwires: Tripwires, seed: int) -> None:
        self.tripwires, self.seed = tripwires, seed
        self.counts: Counter[str] = Counter()
        self.wrong: dict[str, str] = {}
        self._hung = False
        signal.signal(signal.SIGPROF, self._on_time)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def draw(self, target: str, trial: int) -> random.Random:
        """The randomness of one trial."""
        return random.Random(f"{self.seed}/{target}/{trial}")

    def judge(
        self, where: str, expected: tuple[type[TernlmError], ...], load: Callable[[], object], writes: bool = False
    ) -> None:
        """Load once, under watch.

        Args:
            where: How to get this trial again.
            expected: The errors that a damaged file may end with.
            load: Reads the file.
            writes: It goes on writing there, so the tripwires stay off.
        """
        self._hung, outcome = False, "loaded"
        signal.setitimer(signal.ITIMER_PROF, HANG_S)
        try:
            with nullcontext() if writes else self.tripwires.armed():
                load()
        except expected as error:
            outcome = "refused"
            text = str(error)
            if "\n" in text or len(text) > 1500:
                self._keep(f"a message that is not one sentence: {text[:80]!r}", where)
        except BaseException as error:  # noqa: BLE001 (a Rust panic is no Exception)
            outcome = "wrong"
            frames = traceback.extract_tb(error.__traceback__)
            inside = next((frame for frame in reversed(frames) if "/ternlm/" in frame.filename), frames[-1])
            place = f"{Path(inside.filename).name}:{inside.lineno}"
            self._keep(f"{type(error).__name__} from {place}: {str(error)[:80]}", where)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if self._hung:
            self._keep(f"more than {HANG_S} s", where)
        for event in self.tripwires.touched:
            self._keep(event, where)
        self.tripwires.touched.clear()
        self.counts[outcome] += 1

    def _on_time(self, number: int, frame: Any) -> None:
        self._hung = True
        raise Hang(f"after {HANG_S} s")

    def _keep(self, what: str, where: str) -> None:
        self.counts["findings"] += 1
        self.wrong.setdefault(what, where)
