"""Writing to disk so that nobody ever reads half of it, and holding a folder for one process."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_durably(path: Path, content: bytes) -> None:
    """Create a new file and bring it to the disk before returning.

    Raises:
        OSError: The file exists, the disk is full, or a write failed. A failed fsync is final: the
            kernel may have dropped the data, so the caller must write a new file elsewhere.
    """
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags, 0o644)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(path: Path, content: bytes) -> None:
    """Replace a file so that a reader, and a power cut, see the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    write_durably(temporary, content)
    temporary.replace(path)
    synchronize_folder(path.parent)


def synchronize_folder(folder: Path) -> None:
    """Bring creations and renames inside a folder to the disk, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def held(lock: Path, in_use: Exception) -> Iterator[None]:
    """Hold a lock file while the block runs; the system frees it however the process ends.

    Args:
        lock: Made if missing.
        in_use: Raised if another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no flock
        yield
        return
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise in_use from None
        yield


def to_json(value: Mapping[str, Any]) -> bytes:
    """Readable, sorted, strict JSON (no NaN), ending with a newline."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()
