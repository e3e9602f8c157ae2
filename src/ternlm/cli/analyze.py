"""`ternlm analyze`: what the quantizers of a checkpoint do, what each costs, and where the time goes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ternlm.cli.options import Checkpoint, Device, EncodingErrors, Json, RunsDir, print_json, token_stream
from ternlm.cli.output import write_output, write_pictures
from ternlm.errors import SettingsError

if TYPE_CHECKING:
    from ternlm.checkpoint import Loaded
    from ternlm.data.corpus import TokenStream


def analyze(
    checkpoint: Checkpoint,
    data: Annotated[
        str | None, typer.Option(help="Corpus name, file, folder, glob, hf:owner/name.", show_default="the run's own")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="train, validation, test, or all.", show_default="all of a local --data, else validation"),
    ] = None,
    encoding_errors: EncodingErrors = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens to read.")] = 8192,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 4,
    sensitivity: Annotated[bool, typer.Option(help="The loss with each block and layer in full precision.")] = True,
    repeats: Annotated[int, typer.Option(min=0, help="Timed passes; 0 measures no time.")] = 5,
    backward: Annotated[bool, typer.Option("--backward", help="Time backward passes as well.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every matrix, site and block, and every alarm.")] = False,
    chunks: Annotated[
        str | None, typer.Option(help="Show instead where a hierarchical model cuts this text.", metavar="TEXT")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for analysis.json, tables (CSV) and pictures.")] = None,
    picture_format: Annotated[Literal["png", "svg", "both"], typer.Option("--format", help="Of the pictures.")] = "png",
    device: Device = "auto",
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Look into a checkpoint: codes, scales, activations, norms, sensitivity and time of every layer.

    Of each quantity the lowest, median and highest value are shown and where they are; what deserves a look is
    said in a sentence. Sites and the loss are measured on held-out text.

    Example:  ternlm analyze latest --chunks "Once upon a time" --output chunks
    """
    from ternlm import checkpoint as checkpoints
    from ternlm.cli.chunks import show_chunks
    from ternlm.device import choose_device, set_up
    from ternlm.run_directory import runs_root

    target = choose_device(device)
    set_up(target)
    loaded = checkpoints.load(checkpoints.resolve(checkpoint, runs_root(runs_dir)), target)
    formats = ("png", "svg") if picture_format == "both" else (picture_format,)
    if chunks is not None:
        show_chunks(loaded, chunks, output, formats, as_json)
        return
    if loaded.model.is_packed:
        raise SettingsError(
            f"'{loaded.path}' holds packed weights, and there is nothing to say of latent ones. Analyze the run's own "
            "checkpoint; 'ternlm inspect' shows codes and scales."
        )
    stream = token_stream(loaded, data, split, encoding_errors)
    measured = _measure(loaded, stream, (max_tokens, batch_size), (sensitivity, repeats, backward))
    record = _identity(loaded, stream, data) | measured
    if output is not None:
        _write_folder(output, record, formats)
    if as_json:
        print_json(record)
        return
    _print(record, full)
    if output is not None:
        typer.echo(f"tables and pictures in {output}")


def _measure(
    loaded: "Loaded", stream: "TokenStream", size: tuple[int, int], wanted: tuple[bool, int, bool]
) -> dict[str, Any]:
    from rich.console import Console

    from ternlm.evaluation.analysis import Wanted, held_out_batches
    from ternlm.evaluation.analysis import analyze as look_into
    from ternlm.evaluation.chunks import has_chunks, measure_chunks
    from ternlm.training.interruption import Interruption
    from ternlm.training.objective import ObjectiveSettings

    objective = ObjectiveSettings.from_mapping(loaded.config.get("objective", {}), "objective")
    max_tokens, batch_size = size
    batches = held_out_batches(
        loaded.model, stream, loaded.tokenizer, loaded.config["data"]["sequence_length"], batch_size, max_tokens,
        objective.masking,
    )  # fmt: skip
    console, interruption = Console(stderr=True, highlight=False), Interruption()
    with interruption.watched(), console.status("measuring") as line:
        report = lambda text: line.update(f"measuring {text}")  # noqa: E731
        measured = look_into(loaded.model, batches, Wanted(*wanted), interruption.check, report)
        if has_chunks(loaded.model):
            measured["chunks"] = measure_chunks(loaded.model, batches, loaded.tokenizer)
    tokens = sum(batch.tokens.numel() for batch in batches)
    return {"tokens": tokens, **measured}


def _identity(loaded: "Loaded", stream: "TokenStream", data: str | None) -> dict[str, Any]:
    """What was measured, and on what."""
    modes = [layer.mode for layer in loaded.model.bit_linears().values()]
    return {
        "checkpoint": str(loaded.path),
        "step": loaded.state["step"],
        "family": loaded.model.settings.family,
        "parameters": loaded.model.parameter_counts().total,
        "weights": sorted({mode.weights for mode in modes}),
        "data": data or loaded.config["data"]["source"],
        "split": stream.name,
        "dtype": str(loaded.model.compute_dtype).removeprefix("torch."),
        "device": str(next(loaded.model.parameters()).device),
    }


def _write_folder(folder: Path, record: dict[str, Any], formats: tuple[str, ...]) -> None:
    import csv
    import io

    from ternlm.files import to_json
    from ternlm.report.analysis_pictures import draw_all
    from ternlm.report.analysis_tables import csv_rows
    from ternlm.report.chunk_picture import draw_statistics

    write_output(folder / "analysis.json", to_json(record))
    for kind, rows in csv_rows(record).items():
        if rows:
            text = io.StringIO()
            columns = list(dict.fromkeys(name for row in rows for name in row))
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_output(folder / f"{kind}.csv", text.getvalue().encode())
    pictures = draw_all(record)
    if "chunks" in record:
        pictures["chunks"] = draw_statistics(record["chunks"])
    for name, figure in pictures.items():
        write_pictures(folder, name, figure, formats)


def _print(record: dict[str, Any], full: bool) -> None:
    from rich.console import Console

    from ternlm.report.analysis_tables import FULL_WIDTH, full_tables, sentences, summary_table
    from ternlm.report.chunk_text import statistics_table

    console = Console(highlight=False)
    if full:
        console.width = max(console.width, FULL_WIDTH)
    weights = " and ".join("full-precision" if name == "none" else name for name in record["weights"])
    console.print(
        f"{record['checkpoint']}: {record['family']}, step {record['step']:,}, {record['parameters']:,} parameters, "
        f"{weights} weights\n{record['tokens']:,} tokens of '{record['data']}' ({record['split']}), "
        f"{record['dtype']} on {record['device']}\n",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    for table in full_tables(record) if full else [summary_table(record)]:
        console.print(table)
        console.print()
    if "chunks" in record:
        console.print(statistics_table(record["chunks"]))
        console.print()
    for sentence in sentences(record, full):
        console.print(sentence, markup=False, soft_wrap=True)
