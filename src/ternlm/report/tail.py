"""Reading files that another process writes, replaces, truncates or deletes at this moment.

Nothing here raises for what it finds, locks, or writes; what cannot be read is not there.
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from ternlm.files import regular_file

TAIL_BYTES = 64 * 1024
_DOCUMENT_BYTES = 4 * 1024 * 1024
_MOST_FILES = 50_000


def document(file: Path) -> dict[str, Any] | None:
    """The JSON object a file holds; None if there is none."""
    found = loads(read_end(file, _DOCUMENT_BYTES))
    return found if isinstance(found, dict) else None


def tail_rows(file: Path, size: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """The rows that lie wholly within the last `size` bytes of a JSONL file, oldest first."""
    return rows_in(read_end(file, size))


def read_end(file: Path, size: int) -> bytes:
    """The last `size` bytes of a regular file; nothing if it cannot be read."""
    try:
        with regular_file(file) as stream:
            stream.seek(max(os.fstat(stream.fileno()).st_size - size, 0))
            return stream.read(size)
    except OSError:
        return b""


def rows_in(content: bytes) -> list[dict[str, Any]]:
    """The lines that are JSON objects.

    What follows the last newline is still being written. A line that lacks its beginning is never an
    object, for its braces do not match.
    """
    return [row for row in map(loads, content.split(b"\n")[:-1]) if isinstance(row, dict)]


def loads(text: bytes) -> Any:
    """What a JSON text says; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def whole(value: Any) -> int | None:
    """A whole number, or None."""
    found = number(value)
    return None if found is None else int(found)


def string(value: Any) -> str | None:
    """A text, or None."""
    return value if isinstance(value, str) else None


def mapping(value: Any) -> dict[str, Any]:
    """A mapping; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def names(folder: Path) -> list[str]:
    """What a folder holds, in no order."""
    try:
        return os.listdir(folder)  # noqa: PTH208 (one system call, and no path objects for thousands of names)
    except OSError:
        return []


def bytes_below(folder: Path) -> int:
    """Bytes of the files below a folder; links are not followed."""
    total, left, folders = 0, _MOST_FILES, [os.fspath(folder)]
    while folders and left > 0:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    left -= 1
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        total += _size(entry)
        except OSError:
            continue
    return total


def free_bytes(folder: Path) -> int | None:
    """Free space of the disk a folder lies on."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def modified(file: Path) -> float | None:
    """When a file was last written, Unix time."""
    try:
        return file.stat().st_mtime
    except OSError:
        return None


def _size(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except OSError:
        return 0
