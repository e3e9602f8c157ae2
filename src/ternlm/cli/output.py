"""Files that verbs write where the user asked for them: whole or not at all, and a sentence where that fails."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

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


def wide_console(columns: int) -> Any:
    """A console of rich that is as wide as a table needs where nobody looks at it as it comes: in files and pipes."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(console.width, columns))


def show_costs(table: Any, what: str, recipe: str, total: Mapping[str, float]) -> None:
    """A table of planned runs, and the sum of what they cost.

    Args:
        table: Of rich, one line per run.
        what: How many runs of what kind.
        recipe: What they stand on.
        total: `tokens`, `flops` and `disk_bytes` of all.
    """
    from ternlm.report.screen import size_text
    from ternlm.tracking.console import short_count

    wide_console(120).print(table)
    typer.echo(
        f"\n{what} from {recipe}: {short_count(total['tokens'])} tokens, "
        f"{total['flops']:.2e} floating-point operations, {size_text(int(total['disk_bytes']))} of checkpoints"
    )


def unwritable(file: Path, error: OSError) -> EnvironmentFault:
    """What is raised where an output cannot be written."""
    return EnvironmentFault(f"'{file}' cannot be written: {error.strerror}. Choose another --output.")
