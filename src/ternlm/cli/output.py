"""Files that verbs write where the user asked for them: whole or not at all, and a sentence where that fails."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ternlm.errors import EnvironmentFault


def write_output(file: Path, content: bytes) -> None:
    """Replace a file, with its folder if that is missing.

    Raises:
        EnvironmentFault: It cannot be written.
    """
    from ternlm.files import replace_durably

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(file, content)
    except OSError as error:
        raise unwritable(file, error) from None


def write_pictures(folder: Path, name: str, figure: Any, formats: Iterable[str]) -> None:
    """A figure of matplotlib as NAME.png, NAME.svg or both.

    Raises:
        EnvironmentFault: One cannot be written.
    """
    for kind in formats:
        picture = io.BytesIO()
        figure.savefig(picture, format=kind, dpi=150)
        write_output(folder / f"{name}.{kind}", picture.getvalue())


def unwritable(file: Path, error: OSError) -> EnvironmentFault:
    """What is raised where an output cannot be written."""
    return EnvironmentFault(f"'{file}' cannot be written: {error.strerror}. Choose another --output.")
