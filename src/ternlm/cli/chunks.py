"""`ternlm analyze --chunks TEXT`: where a hierarchical model cuts a text."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ternlm.cli.options import print_json
from ternlm.cli.output import write_output, write_pictures

if TYPE_CHECKING:
    from ternlm.checkpoint import Loaded


def show_chunks(loaded: "Loaded", text: str, output: Path | None, formats: tuple[str, ...], as_json: bool) -> None:
    """Print the chunks of a text, and write them to a folder.

    Args:
        loaded: The checkpoint.
        text: What is cut.
        output: Folder for chunks.json, chunks.html and pictures, or None.
        formats: Of the pictures.
        as_json: Print everything as JSON instead.

    Raises:
        SettingsError: The model has no chunks, or the text is empty.
        EnvironmentFault: The folder cannot be written.
    """
    from ternlm.evaluation.chunks import find_chunks
    from ternlm.tokenizers.interface import readable

    record = {
        "checkpoint": str(loaded.path), "step": loaded.state["step"], "family": loaded.model.settings.family,
        **find_chunks(loaded.model, loaded.tokenizer, readable(text)),
    }  # fmt: skip
    if output is not None:
        _write_folder(output, record, formats)
    if as_json:
        print_json(record)
        return
    _print(record)
    if output is not None:
        typer.echo(f"page and pictures in {output}")


def _write_folder(folder: Path, record: dict[str, Any], formats: tuple[str, ...]) -> None:
    from ternlm.files import to_json
    from ternlm.report.chunk_page import chunk_page
    from ternlm.report.chunk_picture import draw_chunks

    write_output(folder / "chunks.json", to_json(record))
    write_output(folder / "chunks.html", chunk_page(record, _title(record)).encode())
    write_pictures(folder, "chunks", draw_chunks(record), formats)


def _print(record: dict[str, Any]) -> None:
    from rich.console import Console

    from ternlm.report.chunk_text import marked_texts, statistics_table

    console = Console(highlight=False)
    console.print(f"{_title(record)}, {record['bytes']:,} bytes\n", markup=False, soft_wrap=True)
    console.print(statistics_table(record["stages"]))
    ascii_only = not console.encoding.lower().startswith("utf")
    for number, text in enumerate(marked_texts(record, ascii_only)):
        console.print(f"\nstage {number}")
        console.print(text, soft_wrap=True)


def _title(record: dict[str, Any]) -> str:
    return f"{record['checkpoint']}: {record['family']}, step {record['step']:,}"
