"""`ternlm calibrate`: fixed activation scales measured once more, kept if held-out text is predicted no worse."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ternlm.cli.options import Checkpoint, Device, Json, RunsDir, print_json, token_stream
from ternlm.errors import SettingsError

if TYPE_CHECKING:
    from ternlm.checkpoint import Loaded
    from ternlm.data.batch import Batch
    from ternlm.data.corpus import TokenStream
    from ternlm.data.masking import MaskingSettings


def calibrate(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option(help="Folder of the calibrated checkpoint; it must not exist.")],
    batches: Annotated[int, typer.Option(min=1, help="Batches of training text to measure.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per batch.")] = 16,
    method: Annotated[
        str, typer.Option(help="exact, the percentile over all batches; ema, a moving average.")
    ] = "exact",
    data: Annotated[
        str | None,
        typer.Option(help="Measure on another corpus, file, folder, glob.", show_default="the run's training text"),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Score whole documents within so many tokens.", show_default="the run's")
    ] = None,
    device: Device = "auto",
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Measure the fixed activation scales of a checkpoint once more and freeze them, in a new checkpoint."""
    from ternlm import checkpoint as checkpoints
    from ternlm.device import choose_device, set_up
    from ternlm.evaluation import calibration
    from ternlm.evaluation.evaluate import EvaluationResult, evaluate
    from ternlm.evaluation.masked import masking_of
    from ternlm.run_directory import runs_root
    from ternlm.training.interruption import Interruption

    if method not in ("exact", "ema"):
        raise SettingsError(f"method '{method}' does not exist. Use exact or ema.")
    _require_free(output)
    target = choose_device(device)
    set_up(target)
    loaded = checkpoints.load(checkpoints.resolve(checkpoint, runs_root(runs_dir)), target)
    loaded.model.tensors()  # of packed weights no checkpoint is made
    calibration.static_sites(loaded.model)  # without any there is nothing to prepare data for
    masking = masking_of(loaded.model, loaded.config)
    held_out = token_stream(loaded, None, "validation")
    text = training_text(loaded, data, held_out)
    limit = max_tokens or loaded.config.get("evaluation", {}).get("max_tokens")
    length = loaded.config["data"]["sequence_length"]
    interruption = Interruption()

    def score() -> EvaluationResult:
        return evaluate(
            loaded.model, held_out, loaded.tokenizer, length, batch_size, limit, interruption.check, masking
        )  # fmt: skip

    with interruption.watched():
        first = 0 if data is not None else loaded.state.get("progress", {}).get("samples", 0)
        drawn = _drawn(loaded, text, masking, first, batches, batch_size)
        found = calibration.calibrate(loaded.model, drawn, score, method, interruption.check)  # type: ignore[arg-type]
        record = {
            "source": str(loaded.path), "step": loaded.state["step"],
            "data": data or loaded.config["data"]["source"], **found.as_dict(),
        }  # fmt: skip
        interruption.check()
        _save(output, loaded, record)
    if as_json:
        print_json({"checkpoint": str(output), **record})
    else:
        _print(output, record)


def _require_free(output: Path) -> None:
    from ternlm.checkpoint import steps

    if output.exists():
        raise SettingsError(
            f"'{output}' exists already; a checkpoint is never written over it. Choose another --output."
        )
    if steps(output.parent):
        raise SettingsError(
            f"'{output.parent}' holds the checkpoints of a run, which would go on from a calibrated one without its "
            "optimizer state. Choose an --output elsewhere."
        )


def training_text(loaded: "Loaded", data: str | None, held_out: "TokenStream") -> "TokenStream":
    """What is measured: never the text that decides whether the result is kept.

    Raises:
        SettingsError: The run streamed its training text, or what is given holds the held-out documents.
    """
    import numpy as np

    from ternlm.data.catalog import is_local

    if data is None:
        if loaded.config["data"].get("stream"):
            raise SettingsError(
                f"'{loaded.path}' was trained on a stream, whose text is not kept. Name some with --data FILE."
            )
        return token_stream(loaded, None, "train")
    text = token_stream(loaded, data, "all" if is_local(data) else "train")
    shared = float(np.isin(text.document_hashes, held_out.document_hashes).mean())
    if shared > 0.01:
        raise SettingsError(
            f"{shared:.0%} of the documents of '{data}' are in the run's validation text, which must not be measured. "
            "Give other text with --data, or none for the run's training text."
        )
    return text


def _drawn(
    loaded: "Loaded", text: "TokenStream", masking: "MaskingSettings | None", first: int, count: int, size: int
) -> "list[Batch]":
    """Batches as in training, from the sample on at which the training of this checkpoint would go on."""
    from ternlm.data.loader import Loader
    from ternlm.data.windows import build_windows

    seed = loaded.config["training"].get("seed", 0)
    windows = build_windows(masking, loaded.tokenizer, loaded.config["data"]["sequence_length"], seed)
    loader = Loader(text, size, windows, seed, next(loaded.model.parameters()).device)
    return [loader.batch(first + number * size) for number in range(count)]


def _save(output: Path, loaded: "Loaded", record: dict[str, Any]) -> None:
    """Write the model as it is now, whole or not at all; the numbers lie beside it and in its state."""
    from ternlm.checkpoint import Contents, save_as

    short = {name: value for name, value in record.items() if name != "scales"}
    state = {**loaded.state, "calibration": short}
    reports = {"calibration.json": record}
    contents = Contents(loaded.model.tensors(), {}, state, loaded.config, loaded.tokenizer, reports)
    save_as(output, loaded.state["step"], contents)


def _print(output: Path, record: dict[str, Any]) -> None:
    from rich.console import Console

    before, after = record["before"]["loss"], record["after"]["loss"]
    console = Console(highlight=False)
    kept = "new scales kept" if record["kept"] else "the old scales were better and stay"
    for line in (
        f"{record['source']} on '{record['data']}'",
        f"{len(record['scales'])} sites measured in {record['batches']} batches ({record['tokens']:,} tokens), "
        f"method {record['method']}",
        f"validation loss {before:.4f} -> {after:.4f}: {kept}, and frozen",
        f"calibrated checkpoint: {output}",
        f"next: ternlm evaluate {output}",
    ):
        console.print(line, markup=False, soft_wrap=True)
