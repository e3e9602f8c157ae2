"""Every single file-system call of a save, of recording metrics and of preparing data fails once: nothing is lost.

The n-th call gets an error, or the process SIGKILL, for n = 1, 2, 3 ... until an act ends without meeting it, so the
search is exhaustive. After each the old state or the new one is there, and work goes on from it.
"""

import errno
import itertools
import os
import resource
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness import Fault, Row, apart, forked, intercepted
from scenes import SCENES, Scene, place

from ternlm import checkpoint, files, run_directory
from ternlm.checkpoint import store
from ternlm.errors import TernlmError

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="kills and limits are used as Linux has them"),
]

ERRORS = {
    "ENOSPC once": errno.ENOSPC, "ENOSPC for good": -errno.ENOSPC, "EIO once": errno.EIO,
    "half a write": "half", "half a write, then ENOSPC": "full",
}  # fmt: skip
KILLS = {"SIGKILL": "kill", "SIGKILL after half a write": "torn"}
SIZES = sorted({round(1.29**power) for power in range(1, 45)})  # bytes that a file may have: 1 to 73,000


@pytest.mark.parametrize("name", SCENES)
def test_an_error_at_every_call(name: str, folder: Path, row: Row) -> None:
    """ENOSPC, EIO and short writes: a typed sentence, and the last good state loads."""
    place(folder)
    found = {kind: fail_everywhere(SCENES[name], folder, number) for kind, number in ERRORS.items()}
    summarize(row, found, least=10)


@pytest.mark.parametrize("name", SCENES)
def test_a_kill_at_every_call(name: str, folder: Path, row: Row) -> None:
    """SIGKILL before the call or in the middle of a write."""
    summarize(row, apart(kill_everywhere, name, str(folder)), least=10)


@pytest.mark.parametrize("name", SCENES)
def test_a_full_disk(name: str, folder: Path, row: Row) -> None:
    """Files that may not grow beyond 40 sizes: writes come out short, then fail."""
    found = apart(fill_the_disk, name, str(folder))
    row.trials, row.injected = len(SIZES), f"{found['refused']} refused"
    assert 5 < found["refused"] < len(SIZES)
    row.result = "old or new state, work goes on"


@pytest.mark.parametrize("name", SCENES)
def test_nothing_is_written_past_these_calls(name: str, folder: Path, row: Row) -> None:
    """What Python opens for writing otherwise, and what the system sees change, is none of it ours but the lock."""
    found = apart(write_under_watch, name, str(folder))
    row.trials, row.injected, row.result = 1, "none", "the faults above reach every write"
    assert found["past"] == (["corpus/.lock"] if name == "prepare" else [])
    assert found["control"] == ["noticed"]
    row.controls = "1 of 1"


def test_the_checks_notice_careless_writers(folder: Path, row: Row) -> None:
    """Negative controls: the same search finds writers that ignore what the system says."""
    place(folder)
    caught = {}
    for bug, (name, number, careless) in CARELESS.items():
        with pytest.MonkeyPatch.context() as patch:
            careless(patch)
            try:
                fail_everywhere(SCENES[name], folder / bug, number)
                caught[bug] = False
            except AssertionError:
                caught[bug] = True
    row.trials = len(caught)
    assert all(caught.values()), caught
    row.controls, row.injected, row.result = f"{sum(caught.values())} of {len(caught)}", "seeded bugs", "all noticed"


def summarize(row: Row, found: dict[str, int], least: int) -> None:
    row.trials, row.injected = sum(found.values()), ", ".join(f"{n} x {kind}" for kind, n in found.items())
    assert min(found.values()) >= least, f"too few calls were met: {found}"
    row.result = "old or new state, work goes on"


def fail_everywhere(scene: Scene, folder: Path, kind: str | int) -> int:
    """Let the first call fail, then the second ...; how many there were."""
    for n in itertools.count(1):
        work = folder / f"{scene.name}-{n}"
        scene.set_up(work)
        fault, completed = Fault(n, kind), True
        try:
            with intercepted(fault):
                scene.act(work)
        except (TernlmError, *scene.may_fail_with) as error:
            completed = False
            require_one_sentence(error)
        context = f"{scene.name}, call {n}, {kind}"
        check(scene, work, completed, context)
        shutil.rmtree(work)
        if not fault.met:
            assert completed, f"{context}: failed without a fault"
            return n - 1
    raise AssertionError("unreachable")


def check(scene: Scene, work: Path, completed: bool, context: str) -> None:
    try:
        scene.check(work, completed)
    except (AssertionError, TernlmError, OSError) as error:
        raise AssertionError(f"{context}: {type(error).__name__}: {error}") from error


def require_one_sentence(error: Exception) -> None:
    """A typed error is one sentence with its exit code; others are left to their scene."""
    if isinstance(error, TernlmError):
        assert error.exit_code == 3, repr(error)
        assert "\n" not in str(error), repr(error)
        assert 20 < len(str(error)) < 600, repr(error)


# In a process of its own


def kill_everywhere(name: str, folder: str) -> dict[str, int]:
    """As `fail_everywhere`, with a child of this process for each call."""
    place(Path(folder))
    scene, found = SCENES[name], {}
    scene.set_up(Path(folder) / "warm")
    scene.act(Path(folder) / "warm")
    scene.check(Path(folder) / "warm", True)
    for kind, how in KILLS.items():
        for n in itertools.count(1):
            work = Path(folder) / f"{name}-{n}"
            scene.set_up(work)
            code, said = forked(lambda n=n, how=how, work=work: act_with(Fault(n, how), scene, work))
            assert code in (0, -9), f"{name}, call {n}, {kind}: the child ended with {code}: {said}"
            check(scene, work, code == 0, f"{name}, call {n}, {kind}")
            shutil.rmtree(work)
            if code == 0:
                found[kind] = n - 1
                break
    return found


def fill_the_disk(name: str, folder: str) -> dict[str, int]:
    """Act with files that may not grow beyond each of the sizes."""
    place(Path(folder))
    scene, refused = SCENES[name], 0
    scene.set_up(Path(folder) / "warm")
    scene.act(Path(folder) / "warm")
    scene.check(Path(folder) / "warm", True)
    for size in SIZES:
        work = Path(folder) / f"{name}-{size}"
        scene.set_up(work)
        code, said = forked(lambda size=size, work=work: act_within(size, scene, work))
        assert code in (0, 3), f"{name}, {size} bytes: the child ended with {code}: {said}"
        check(scene, work, code == 0, f"{name}, {size} bytes")
        refused += code == 3
    return {"refused": refused}


def write_under_watch(name: str, folder: str) -> dict[str, list[str]]:
    """Which files below a folder are opened for writing by anything but `os.open`."""
    place(Path(folder))
    scene, work, past = SCENES[name], Path(folder) / "work", []
    scene.set_up(work)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            file = Path(os.fsdecode(arguments[0])) if isinstance(arguments[0], str | bytes) else Path()
            if file.is_relative_to(work):
                past.append(str(file.relative_to(work)))

    sys.addaudithook(hook)
    scene.act(work)
    found = sorted(set(past))
    past.clear()
    (work / "noticed").write_text("x")
    return {"past": found, "control": past}


def act_with(fault: Fault, scene: Scene, work: Path) -> None:
    with intercepted(fault):
        scene.act(work)


def act_within(size: int, scene: Scene, work: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        scene.act(work)
    except scene.may_fail_with as error:
        assert error.args[0] in (errno.EFBIG, errno.ENOSPC)
        os._exit(3)


# Negative controls: a scene, an error that shows the bug, and the bug


def _ignore_short_writes(patch: pytest.MonkeyPatch) -> None:
    def write_all(descriptor: int, content: Any) -> None:
        os.write(descriptor, content)  # looked up now, as the fault takes its place later

    patch.setattr(files, "_write_all", write_all)


def _swallow_errors(patch: pytest.MonkeyPatch) -> None:
    real = files._write_all

    def write_all(descriptor: int, content: Any) -> None:
        with suppress(OSError):
            real(descriptor, content)

    patch.setattr(files, "_write_all", write_all)


def _commit_before_the_files(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files.AppendFile, "synchronize", lambda self: None)


def _prune_before_writing(patch: pytest.MonkeyPatch) -> None:
    def make_room(self: checkpoint.Writer, *_: object) -> list[int]:
        for step in store.steps(self.root):
            with suppress(OSError):
                store.remove(store.folder(self.root, step))
        return []

    patch.setattr(checkpoint.Writer, "_make_room", make_room)


def _append_behind_torn_lines(patch: pytest.MonkeyPatch) -> None:
    def append(file: Path, line: str) -> None:
        descriptor = os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        os.write(descriptor, line.encode() + b"\n")
        os.close(descriptor)

    patch.setattr(run_directory, "append_line", append)


CARELESS: dict[str, tuple[str, str | int, Callable[[pytest.MonkeyPatch], None]]] = {
    "old checkpoints deleted first": ("save", errno.ENOSPC, _prune_before_writing),
    "short writes ignored while saving": ("save", "half", _ignore_short_writes),
    "rows appended behind torn ones": ("record", "half", _append_behind_torn_lines),
    "short writes ignored while preparing": ("prepare", "half", _ignore_short_writes),
    "write errors swallowed while preparing": ("prepare", errno.ENOSPC, _swallow_errors),
    "progress recorded before the shards": ("prepare", errno.ENOSPC, _commit_before_the_files),
}
