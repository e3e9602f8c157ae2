"""A corpus that is on every machine: the source of the running Python's standard library."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ternlm.errors import DataError

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def stdlib() -> Iterator[str]:
    """One document per module, sorted by path; tests, IDLE and installed packages are left out.

    Modules that are not UTF-8 (a few test-like fixtures) are skipped.

    Raises:
        DataError: The interpreter ships without sources.
    """
    found = False
    for path in stdlib_files():
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            found = True
            yield text
    if not found:
        raise DataError(
            "the running Python has no .py sources of its standard library. Set data.source to another corpus."
        )


def stdlib_files() -> list[Path]:
    """The modules' files, in order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts))
