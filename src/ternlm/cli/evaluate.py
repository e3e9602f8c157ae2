"""`ternlm evaluate`: loss, perplexity, bits per byte and accuracies on any text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ternlm.cli.options import Checkpoint, Device, Json, RunsDir, prepare_with_bar, print_json
from ternlm.errors import SettingsError

if TYPE_CHECKING:
    from ternlm.checkpoint import Loaded
    from ternlm.data.corpus import TokenStream


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        str | None,
        typer.Option(help="Corpus name, file, folder, glob, hf:owner/name. [default: the run's own]"),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="train, validation, test, or all. [default: all of a local --data, else validation]"),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Must be the checkpoint's own; default.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Targets per window. [default: the run's]")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass; no effect on the result.")] = 16,
    max_tokens: Annotated[int | None, typer.Option(help="Score whole documents within so many tokens.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    device: Device = "auto",
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Evaluate a checkpoint on held-out text, with its quantized weights."""
    from ternlm import checkpoint as checkpoints
    from ternlm.device import choose_device, set_up
    from ternlm.errors import TokenizerError
    from ternlm.evaluation.evaluate import evaluate as score
    from ternlm.run_directory import runs_root
    from ternlm.tokenizers import load_tokenizer
    from ternlm.training.interruption import Interruption

    target = choose_device(device)
    set_up(target)
    loaded = checkpoints.load(checkpoints.resolve(checkpoint, runs_root(runs_dir)), target)
    if tokenizer is not None and load_tokenizer(tokenizer).fingerprint != loaded.tokenizer.fingerprint:
        raise TokenizerError(
            f"tokenizer '{tokenizer}' is not the one '{loaded.path}' was trained with "
            f"('{loaded.tokenizer.name}'). Leave --tokenizer out."
        )
    stream = _stream(loaded, data, split)
    interruption = Interruption()
    with interruption.watched():
        result = score(
            loaded.model, stream, loaded.tokenizer, sequence_length or loaded.config["data"]["sequence_length"],
            batch_size, max_tokens, interruption.check,
        )  # fmt: skip
    record = {
        "checkpoint": str(loaded.path), "step": loaded.state["step"],
        "data": data or loaded.config["data"]["source"], **result.as_dict(),
    }  # fmt: skip
    if output is not None:
        _write(output, record)
    if as_json:
        print_json(record)
    else:
        _print(record)


def _stream(loaded: "Loaded", data: str | None, split: str | None) -> "TokenStream":
    """The tokens to score, prepared with the checkpoint's own tokenizer."""
    from ternlm.data.catalog import is_local
    from ternlm.data.corpus import load_corpus
    from ternlm.data.settings import DataSettings
    from ternlm.tokenizers import TokenizerSettings

    if split not in (None, "train", "validation", "test", "all"):
        raise SettingsError(f"split '{split}' does not exist. Use train, validation, test or all.")
    values = dict(loaded.config["data"])
    if data is not None:
        values |= {
            "source": data,
            "validation_path": None,
            "test_path": None,
            "max_documents": None,
            "max_tokens": None,
        }
        split = split or ("all" if is_local(data) else "validation")
    held_out = loaded.path.parent.parent / "stream" / "validation"
    if data is None and values.get("stream") and split in (None, "validation") and held_out.is_dir():
        return load_corpus(held_out).split("validation")
    values["stream"] = False
    if split == "all":
        values |= {"validation_fraction": 0.0, "test_fraction": 0.0}
    settings = DataSettings.from_mapping(values, "data")
    prepared = prepare_with_bar(settings, TokenizerSettings(name=str(loaded.path)))
    return prepared.corpus.split("train" if split == "all" else split or "validation")


def _write(output: Path, record: dict[str, Any]) -> None:
    from ternlm.errors import EnvironmentFault
    from ternlm.files import replace_durably, to_json

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(output, to_json(record))
    except OSError as error:
        raise EnvironmentFault(f"'{output}' cannot be written: {error.strerror}. Choose another --output.") from None


def _print(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    unit = record["perplexity_unit"]
    rows = [
        ("loss", f"{record['loss']:.4f}", "nats per target"),
        ("perplexity", f"{record['perplexity']:.3f}", f"per {unit}"),
        ("bits per byte", "-" if record["bpb"] is None else f"{record['bpb']:.4f}", "of the raw text"),
        ("accuracy", f"{record['accuracy']:.2%}", f"top-5 {record['top5_accuracy']:.2%}, top-10 "
         f"{record['top10_accuracy']:.2%}"),
        ("targets", f"{record['n_targets']:,}", f"{record['n_bytes'] or 0:,} bytes, split {record['split']}"),
        ("speed", f"{record['tokens_per_sec']:,.0f}", f"tokens/s ({record['dtype']}, {record['weights']} weights)"),
    ]  # fmt: skip
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(f"{record['checkpoint']} on '{record['data']}'", markup=False, soft_wrap=True)
    console.print(table)
