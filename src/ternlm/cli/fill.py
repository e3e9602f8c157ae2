"""`ternlm fill`: what a masked language model puts in the gaps of a text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ternlm.cli.options import Checkpoint, Device, Json, RunsDir, read_lines
from ternlm.errors import SettingsError

if TYPE_CHECKING:
    from ternlm.generation import Filled


def fill(
    checkpoint: Checkpoint,
    text: Annotated[list[str] | None, typer.Argument(help="Text with a [MASK] or several.", show_default=False)] = None,
    file: Annotated[Path | None, typer.Option(help="One text per line.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Candidates per mask.")] = 5,
    mask_text: Annotated[
        str | None, typer.Option(help="How the mask is written.", show_default="[MASK], <mask> or <|mask|>")
    ] = None,
    device: Device = "auto",
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Show the likeliest words for every mask of a text.

    Example:  ternlm fill latest "The capital of France is [MASK]."
    """
    from ternlm import checkpoint as checkpoints
    from ternlm.device import choose_device, set_up
    from ternlm.generation import fill as fill_texts
    from ternlm.run_directory import runs_root

    texts = list(text or []) + (_read_texts(file) if file is not None else [])
    if not texts:
        raise SettingsError("there is no text to fill. Give one with a [MASK] in it, or --file.")
    target = choose_device(device)
    set_up(target)
    loaded = checkpoints.load(checkpoints.resolve(checkpoint, runs_root(runs_dir)), target)
    results = fill_texts(loaded.model, loaded.tokenizer, texts, top, mask_text)
    if as_json:
        _print_json(results)
    else:
        _print(results)


def _read_texts(file: Path) -> list[str]:
    texts = [line for line in read_lines(file, "file") if line.strip()]
    if not texts:
        raise SettingsError(f"file '{file}' holds no text. Write one with a [MASK] in it per line.")
    return texts


def _print_json(results: list["Filled"]) -> None:
    """One JSON object per text, one per line."""
    import json

    for result in results:
        masks = [[candidate._asdict() for candidate in candidates] for candidates in result.masks]
        typer.echo(json.dumps(result._asdict() | {"masks": masks}, ensure_ascii=False))


def _print(results: list["Filled"]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for result in results:
        console.print(result.filled, markup=False, soft_wrap=True)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for number in range(1, len(result.masks) + 1):
            table.add_column(f"mask {number}" if len(result.masks) > 1 else "mask")
            table.add_column(justify="right", style="dim")
        for row in zip(*result.masks, strict=True):
            cells = [(("##" if c.continues else "") + c.text, f"{c.probability:.2%}") for c in row]
            table.add_row(*(_plain(cell) for pair in cells for cell in pair))
        console.print(table)


def _plain(cell: str) -> str:
    from rich.markup import escape

    return escape("".join(character if character.isprintable() else repr(character)[1:-1] for character in cell))
