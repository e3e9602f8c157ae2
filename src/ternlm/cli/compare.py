"""`ternlm compare`: several checkpoints on the same text, ranked by bits per byte."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ternlm.cli.options import (
    Device,
    EncodingErrors,
    Json,
    ProgressLine,
    RunsDir,
    Stride,
    WikiText,
    print_json,
    token_stream,
)
from ternlm.cli.output import write_output, write_pictures
from ternlm.cli.scoring import baselines_of, require_readable
from ternlm.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ternlm.checkpoint import Loaded
    from ternlm.data.corpus import TokenStream
    from ternlm.evaluation.comparison import Contender
    from ternlm.evaluation.protocols import Protocol


def compare(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="Checkpoint folders, or runs: path, name, latest, RUN@best, RUN@500.", show_default=False),
    ],
    data: Annotated[
        str | None, typer.Option(help="Corpus name, file, folder, glob, hf:owner/name.", show_default="the runs' own")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="train, validation, test, or all.", show_default="all of a local --data, else validation"),
    ] = None,
    protocol: Annotated[
        Literal["block", "stream"],
        typer.Option(help="block: windows side by side; stream: memory carried through each document."),
    ] = "block",
    stride: Stride = None,
    wikitext: WikiText = None,
    encoding_errors: EncodingErrors = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens per window, of all models.", show_default="each run's")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass; no effect on the result.")] = 16,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Score whole documents within so many bytes.")] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also uniform, unigram, n-grams of bytes, gzip and xz.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for comparison.json, .csv and the picture.")] = None,
    picture_format: Annotated[Literal["png", "svg", "both"], typer.Option("--format", help="Of the picture.")] = "png",
    device: Device = "auto",
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Score checkpoints of any families and tokenizers on the same text, and rank them by bits per byte.

    Beside each: how sure the number is, its distance from the best on the same documents, parameters, speed, and the
    memory of one text. The tokenizers may differ; the text must not.
    """
    from ternlm.device import choose_device, set_up
    from ternlm.evaluation.comparison import compare as rank
    from ternlm.training.interruption import Interruption

    target = choose_device(device)
    set_up(target)
    line, interruption = ProgressLine(), Interruption()
    found: list[Contender] = []
    bits: dict[str, Any] = {}
    for reference, name in zip(checkpoints, _names(checkpoints, runs_dir), strict=True):
        loaded = _load(reference, runs_dir, target)
        require_readable(loaded, sequence_length)
        stream = token_stream(loaded, data, split, encoding_errors, wikitext)
        line.say(f"scoring {name}")
        with interruption.watched():
            how = (sequence_length or loaded.config["data"]["sequence_length"], batch_size, max_bytes, stride)
            found.append(_contender(loaded, stream, name, protocol, how, interruption.check))
            if baselines and not bits:
                bits = _baselines(loaded, stream, name, max_bytes, interruption.check)
    record = {"data": data or "the runs' own", **rank(found), **bits}
    if as_json:
        print_json(record)
    else:
        _print(record)
    if output is not None:  # behind what is printed, so that a full disk does not cost the result
        _write_folder(output, record, ("png", "svg") if picture_format == "both" else (picture_format,))
        typer.echo(f"table and picture in {output}", err=as_json)


def _contender(
    loaded: "Loaded",
    stream: "TokenStream",
    name: str,
    protocol: "Protocol",
    how: tuple[int, int, int | None, int | None],
    check: "Callable[[], None]",
) -> "Contender":
    """Score one model; `how` is the length of a window, rows per pass, the limit in bytes, and the stride."""
    import numpy as np
    import torch

    from ternlm.evaluation.comparison import Contender, end_within_bytes, require_comparable
    from ternlm.evaluation.evaluate import evaluate
    from ternlm.evaluation.memory import state_bytes

    model, (sequence_length, batch_size, max_bytes, stride) = loaded.model, how
    require_comparable(model, name)
    last = end_within_bytes(stream, max_bytes)
    result = evaluate(model, stream, loaded.tokenizer, sequence_length, batch_size, last, check, None, protocol, stride)
    first = torch.from_numpy(stream.read(0, min(sequence_length, last)).astype(np.int64))
    counts = model.parameter_counts()
    return Contender(
        name=name,
        checkpoint=str(loaded.path),
        family=model.settings.family,
        step=loaded.state["step"],
        tokens_seen=loaded.state.get("progress", {}).get("tokens"),
        parameters=counts.total,
        ternary_parameters=counts.ternary,
        state_bytes=state_bytes(model, first),
        result=result,
    )


def _baselines(
    loaded: "Loaded", stream: "TokenStream", name: str, max_bytes: int | None, check: "Callable[[], None]"
) -> dict[str, Any]:
    from ternlm.evaluation.comparison import end_within_bytes

    return {"baselines": baselines_of(loaded, stream, end_within_bytes(stream, max_bytes), check), "baselines_of": name}


def _load(reference: str, runs_dir: str | None, device: Any) -> "Loaded":
    from ternlm import checkpoint
    from ternlm.run_directory import runs_root

    return checkpoint.load(checkpoint.resolve(reference, runs_root(runs_dir)), device)


def _names(references: list[str], runs_dir: str | None) -> list[str]:
    """``RUN@STEP`` of each checkpoint, with as much of the path as tells them apart.

    Raises:
        SettingsError: A checkpoint is given twice.
        CheckpointError: One does not exist.
    """
    from ternlm import checkpoint
    from ternlm.run_directory import runs_root

    paths = [checkpoint.resolve(reference, runs_root(runs_dir)).resolve() for reference in references]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            earlier = references[paths.index(path)]
            raise SettingsError(f"'{references[number]}' and '{earlier}' are the same checkpoint. Give each once.")
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = [_name(path, depth) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _name(path: Path, depth: int) -> str:
    """A checkpoint by the last `depth` folders of its run, and its step."""
    is_in_run = path.parent.name == "checkpoints"
    folder = path.parent.parent if is_in_run else path
    name, step = "/".join(folder.parts[-depth:]), path.name.removeprefix("step_")
    return f"{name}@{step.lstrip('0') or step}" if is_in_run else name


def _write_folder(folder: Path, record: dict[str, Any], formats: tuple[str, ...]) -> None:
    from ternlm.files import to_json
    from ternlm.report.comparison import as_csv
    from ternlm.report.comparison_picture import draw_comparison

    write_output(folder / "comparison.json", to_json(record))
    write_output(folder / "comparison.csv", as_csv(record).encode("utf-8", "backslashreplace"))
    figure = draw_comparison(record)
    if figure is not None:
        write_pictures(folder, "comparison", figure, formats)


def _print(record: dict[str, Any]) -> None:
    from rich.console import Console

    from ternlm.report.comparison import WIDTH, as_table, sentences

    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    ascii_only = not (console.encoding or "").lower().startswith("utf")
    console.print(as_table(record, ascii_only))
    console.print()
    for sentence in sentences(record):
        console.print(sentence.replace("±", "+-") if ascii_only else sentence, markup=False, soft_wrap=True)
