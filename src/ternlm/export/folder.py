"""A folder that appears whole, at the end, or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ternlm.checkpoint import steps
from ternlm.errors import SettingsError, StorageFault, TokenizerError
from ternlm.files import synchronize_folder


def require_new(folder: Path) -> None:
    """Refuse a place for an export that is taken, or that a resumed run would read.

    Raises:
        SettingsError: It is one of these.
    """
    if folder.exists() or folder.is_symlink():
        raise SettingsError(f"'{folder}' exists already; an export is never written over it. Choose another --output.")
    if steps(folder.parent):
        raise SettingsError(
            f"'{folder.parent}' holds the checkpoints of a run, which are not to be mixed with exports. "
            "Choose an --output elsewhere."
        )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder under another name to write into; when the block ends well it is brought to the disk and renamed.

    Whatever the block raises, nothing of it stays.

    Args:
        folder: Its place, which must be free.

    Raises:
        SettingsError: It is not.
        StorageFault: The disk is full or failing, or the place cannot be written.
    """
    require_new(folder)
    temporary, renamed = folder.with_name(f".tmp-{folder.name}"), False
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        synchronize_folder(temporary)
        temporary.rename(folder)
        renamed = True
        synchronize_folder(folder.parent)
    except BaseException as error:
        for path in (temporary, *([folder] if renamed else [])):
            shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError | TokenizerError):
            reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
            raise StorageFault(
                f"'{folder}' cannot be written: {reason}. Nothing was changed; free disk space or choose another "
                "--output."
            ) from error
        raise
