"""Writing to disk so that nobody ever reads half of it, and holding a folder for one process.

Every change goes through one call of `os` (open, write, fsync, rename ...), so that tests can let each of them fail.
"""

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

_PLAIN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_CHUNK = 2**24


def write_durably(path: Path, content: bytes) -> None:
    """Create a new file and bring it to the disk before returning.

    Raises:
        OSError: The file exists, the disk is full, or a write failed. A failed fsync is final: the
            kernel may have dropped the data, so the caller must write a new file elsewhere.
    """
    write_parts_durably(path, (content,))


def write_parts_durably(path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """`write_durably` for a file too large to be put together in memory first.

    Returns:
        Bytes written and their sha256 (hex), computed from memory and not from what the disk took.
    """
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _PLAIN, 0o644)
    try:
        for part in parts:
            for start in range(0, len(part), _CHUNK):
                chunk = memoryview(part)[start : start + _CHUNK]
                digest.update(chunk)
                _write_all(descriptor, chunk)
            size += len(part)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size, digest.hexdigest()


class AppendFile:
    """A file that grows at its end and can be cut back: what is appended is collected and written in large pieces.

    Args:
        path: Made if missing.
        length: Bytes to keep of what is there; the rest is cut off.

    Attributes:
        digest: Running sha256 of everything kept and appended.

    Raises:
        OSError: Also by `append`, `write_out` and `synchronize`; after a failure the file is to be closed.
    """

    PIECE = 2**20

    def __init__(self, path: Path, length: int = 0) -> None:
        self.path = path
        self.digest = hashlib.sha256()
        self._waiting = bytearray()
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | _PLAIN, 0o644)
        os.ftruncate(self._descriptor, length)
        while content := os.read(self._descriptor, self.PIECE):
            self.digest.update(content)

    def append(self, content: bytes) -> None:
        """Add to the end."""
        self.digest.update(content)
        self._waiting += content
        if len(self._waiting) >= self.PIECE:
            self.write_out()

    def write_out(self) -> None:
        """Give everything appended to the system, so that other readers of the file see it."""
        _write_all(self._descriptor, self._waiting)
        self._waiting = bytearray()

    def synchronize(self) -> None:
        """Bring everything appended to the disk."""
        self.write_out()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the file; what was appended since the last `write_out` is dropped."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def __del__(self) -> None:
        with suppress(OSError):
            self.close()


def replace_durably(path: Path, content: bytes) -> None:
    """Replace a file so that a reader, and a power cut, see the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        write_durably(temporary, content)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
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
def regular_file(path: Path) -> Iterator[BufferedReader]:
    """A file open for reading, if it is an ordinary one: no link, pipe, device or folder; nothing is waited for.

    Raises:
        OSError: It is missing, unreadable, or not an ordinary file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _PLAIN)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is not an ordinary file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_regular(path: Path, limit: int) -> bytes:
    """The content of an ordinary file.

    Args:
        path: The file.
        limit: Largest size accepted, in bytes; nothing is read of a larger one.

    Raises:
        OSError: As `regular_file`, or it is too large.
    """
    with regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"is larger than {limit:,} bytes")
        return file.read(size)


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


def from_json(content: bytes) -> Any:
    """The value of strict JSON: UTF-8, every key once per object, no NaN and nothing infinite.

    Raises:
        ValueError: It is not that, is nested too deeply, or holds an integer of thousands of digits.
    """
    try:
        return json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object_of_unique_keys,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _write_all(descriptor: int, content: bytes | bytearray | memoryview) -> None:
    view = memoryview(content)
    while view:  # a disk that is nearly full takes a part
        view = view[os.write(descriptor, view) :]
