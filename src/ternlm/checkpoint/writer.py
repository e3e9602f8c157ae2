"""Writing checkpoints: durable and verified before anything older goes, beside the training loop where wanted.

A checkpoint is written under another name, brought to the disk, renamed, and read back. Only then do the
pointers move, and only then is anything deleted, all in one thread and in this order.
"""

import hashlib
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from time import perf_counter
from types import TracebackType
from typing import NamedTuple, Self

from ternlm.checkpoint.manifest import MANIFEST, read_manifest, seal, verify
from ternlm.checkpoint.snapshot import Buffers, Contents, Snapshot, take
from ternlm.checkpoint.store import folder, point, prune, remove, remove_unfinished, steps
from ternlm.errors import CheckpointError, SettingsError, StorageFault, TokenizerError
from ternlm.files import synchronize_folder, to_json, write_durably, write_parts_durably

MIN_FREE = 200_000_000

_WAY_OUT = "Earlier checkpoints are untouched; free disk space or choose another --runs-dir, then resume."


class Saved(NamedTuple):
    """A checkpoint that is complete, verified and pointed at.

    Attributes:
        step: Completed optimizer steps.
        path: Its folder.
        bytes: Size of weights, optimizer state and settings.
        seconds: From the snapshot to the end.
        removed: Steps of the checkpoints that were pruned for it.
    """

    step: int
    path: Path
    bytes: int
    seconds: float
    removed: list[int]


class Writer:
    """Saves the checkpoints of one run, one at a time.

    `submit` copies the state and returns; the rest happens in a thread, and what comes of it is told once, by
    the next `poll`, `wait` or `submit`: a `Saved`, or the error of the thread, with its traceback. The copy
    takes as much memory as the checkpoint is large (12 bytes per parameter with Adam) and is used again.

    The thread is a daemon: a process that must end at once is not held up by a slow disk, and a save that
    dies half-way is what a checkpoint is made to survive. `close` waits for it.

    Args:
        root: The run's checkpoints folder.
        keep_last: Newest checkpoints to keep.
        keep_every: Also keep multiples of this.
        min_free: Bytes of the disk that a checkpoint must leave free.
        asynchronous: Whether to use a thread; without it `submit` returns when everything is done, and
            raises what goes wrong. The files are the same.
    """

    def __init__(
        self,
        root: Path,
        keep_last: int = 2,
        keep_every: int | None = None,
        min_free: int = MIN_FREE,
        asynchronous: bool = True,
    ) -> None:
        self.root, self.keep_last, self.keep_every = root, keep_last, keep_every
        self.min_free, self.asynchronous = min_free, asynchronous
        self._buffers = Buffers()
        self._thread: Thread | None = None
        self._outcome: Saved | BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"The last checkpoint was not saved either: {failure}")

    def submit(
        self,
        step: int,
        contents: Contents,
        pinned: str | None = None,
        pointers: Sequence[str] = ("last",),
        protect: Collection[int] = (),
    ) -> Saved | None:
        """Begin to save; a save that is under way is awaited first.

        Args:
            step: Completed optimizer steps.
            contents: What to save, as it is now.
            pinned: Why this checkpoint must never be pruned, or None.
            pointers: Those of best, last and final that are to name it.
            protect: Steps that must not be pruned now.

        Returns:
            What the save before this one came to, if that has not been told.

        Raises:
            Diverged: A value is not finite; nothing is written.
            TernlmError: The save before this one failed; this one was not begun.
        """
        before = self.wait()
        started = perf_counter()
        snapshot = take(step, contents, pinned, self._buffers if self.asynchronous else None)
        task = (snapshot, tuple(pointers), frozenset(protect), started)
        if self.asynchronous:
            self._thread = Thread(target=self._save_and_keep_outcome, args=task, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._outcome = self._save(*task)
        return before

    def poll(self) -> Saved | None:
        """What the last save came to, once it has ended, without waiting.

        Raises:
            TernlmError: It failed.
        """
        return None if self._thread is not None and self._thread.is_alive() else self.wait()

    def wait(self) -> Saved | None:
        """Wait for the save that is under way, if any, and say what it came to.

        Raises:
            StorageFault: The disk is full or failing; earlier checkpoints are untouched.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def close(self) -> Saved | None:
        """`wait`, and give the memory of the copies back."""
        try:
            return self.wait()
        finally:
            self._buffers.clear()

    def _save_and_keep_outcome(
        self, snapshot: Snapshot, pointers: Sequence[str], protect: frozenset[int], started: float
    ) -> None:
        try:
            self._outcome = self._save(snapshot, pointers, protect, started)
        except BaseException as error:  # noqa: BLE001 (raised by `wait`, in the thread that trains)
            self._outcome = error

    def _save(self, snapshot: Snapshot, pointers: Sequence[str], protect: frozenset[int], started: float) -> Saved:
        run_id = str(snapshot.manifest["run_id"])
        removed = self._make_room(snapshot, run_id, protect)
        path = _commit(folder(self.root, snapshot.step), snapshot)
        for name in pointers:
            point(self.root, name, path)
        protect |= {snapshot.step}
        removed += prune(self.root, self.keep_last, self.keep_every, run_id, snapshot.step + 1, protect)
        return Saved(snapshot.step, path, snapshot.size, perf_counter() - started, removed)

    def _make_room(self, snapshot: Snapshot, run_id: str, protect: frozenset[int]) -> list[int]:
        """Prune before writing, as one checkpoint later would be done anyway, if the disk is too full otherwise."""
        removed = []
        if _free(self.root) < _needed(snapshot.size, self.min_free):
            remove_unfinished(self.root)
            last_good = _last_good(self.root, run_id)
            if last_good is not None:
                protect |= {last_good}
                removed = prune(self.root, self.keep_last - 1, self.keep_every, run_id, snapshot.step, protect)
        require_room(self.root, snapshot.size, self.min_free)
        return removed


def save(root: Path, step: int, contents: Contents, pinned: str | None = None) -> Path:
    """Write `step_NNNNNN` under `root` and return its path; no pointer moves and nothing else is deleted.

    Args:
        root: The run's checkpoints folder.
        step: Completed optimizer steps.
        contents: What to write.
        pinned: Why this checkpoint must never be pruned, or None.

    Raises:
        Diverged: A value is not finite.
        StorageFault: The disk is full or failing, or the folder cannot be written.
    """
    return _commit(folder(root, step), take(step, contents, pinned))


def save_as(path: Path, step: int, contents: Contents) -> Path:
    """Write a checkpoint that belongs to no run's folder, under any name, and return its path.

    Args:
        path: The folder, which must not exist.
        step: Completed optimizer steps of the model.
        contents: What to write.

    Raises:
        SettingsError: There is something already.
        Diverged: A value is not finite.
        StorageFault: The disk is full or failing, or the folder cannot be written.
    """
    if path.exists():
        raise SettingsError(f"'{path}' exists already; a checkpoint is never written over it. Choose another folder.")
    return _commit(path, take(step, contents), "Nothing else was changed; free disk space or choose another folder.")


def require_room(root: Path, size: int, min_free: int = MIN_FREE) -> None:
    """Refuse to write a checkpoint that the disk may not hold.

    Args:
        root: The run's checkpoints folder.
        size: Expected bytes of the checkpoint; a fifth more is asked for.
        min_free: Bytes to leave free.

    Raises:
        StorageFault: Too little is free.
    """
    free, needed = _free(root), _needed(size, min_free)
    if free < needed:
        raise StorageFault(
            f"the disk of '{root}' has {free / 1e6:,.0f} MB free, a checkpoint needs {needed / 1e6:,.0f} MB "
            f"({min_free / 1e6:,.0f} MB of them stay free). Earlier checkpoints are untouched; free disk space, lower "
            "training.keep_last or keep_every, or choose another --runs-dir, then resume."
        )


def _commit(target: Path, snapshot: Snapshot, way_out: str = _WAY_OUT) -> Path:
    """Write a checkpoint beside its place, bring it to the disk, rename it, and read it back."""
    temporary = target.with_name(f".tmp-{target.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_snapshot(temporary, snapshot)
        synchronize_folder(temporary)
        if target.exists():  # a damaged one, passed over on resume; it gives way only now
            remove(target)
        temporary.rename(target)
        synchronize_folder(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | TokenizerError):
            raise _fault(target, error, way_out) from error
        raise
    try:
        verify(target)
    except CheckpointError as error:
        with suppress(OSError):
            remove(target)
        raise StorageFault(
            f"checkpoint '{target}' does not read back as it was written ({error}) The disk may be failing. {way_out}"
        ) from error
    return target


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Write all files of a checkpoint into an empty folder, the manifest last.

    Raises:
        OSError: The disk is full or failing.
        TokenizerError: The tokenizer's files cannot be written.
    """
    files = {}
    for name, parts in snapshot.files.items():
        size, sha256 = write_parts_durably(folder / name, parts)
        files[name] = {"bytes": size, "sha256": sha256}
    snapshot.tokenizer.save(folder)
    for path in sorted(folder.iterdir()):
        if path.name not in files:
            content = path.read_bytes()
            files[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {**snapshot.manifest, "files": files}
    write_durably(folder / MANIFEST, to_json({**manifest, "sha256": seal(manifest)}))


def _needed(size: int, min_free: int) -> int:
    return size + size // 5 + min_free


def _free(root: Path) -> int:
    """Free bytes on the disk of a folder, which is made."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(root).free
    except OSError as error:
        raise _fault(root, error) from error


def _last_good(root: Path, run_id: str) -> int | None:
    """The newest step of a run whose checkpoint verifies now."""
    for step in reversed(steps(root)):
        with suppress(CheckpointError):
            if read_manifest(folder(root, step)).get("run_id") == run_id:
                verify(folder(root, step))
                return step
    return None


def _fault(path: Path, error: OSError | TokenizerError, way_out: str = _WAY_OUT) -> StorageFault:
    reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
    return StorageFault(f"checkpoint '{path}' cannot be written: {reason}. {way_out}")
