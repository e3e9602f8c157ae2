"""`ternlm export`: a trained model in the small file of this package or in a folder for transformers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ternlm.cli.options import Checkpoint, Json, RunsDir, print_json
from ternlm.errors import SettingsError

if TYPE_CHECKING:
    from ternlm.checkpoint import Loaded


def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the export; it must not exist.")],
    to: Annotated[
        Literal["packed", "hf", "hf-packed"],
        typer.Option(
            help="packed: any family, for ternlm. hf-packed: codes, for transformers. hf: trainable weights for it."
        ),
    ] = "packed",
    encoding: Annotated[
        Literal["2bit64", "trit5"], typer.Option(help="Of packed: 2 bits per weight, or 1.6, slower to read.")
    ] = "2bit64",
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(
            help="Of embeddings and head, for transformers norms as well; bfloat16 halves and rounds them.",
            show_default="float32; for transformers bfloat16 from 200M parameters",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Title of the card.", show_default="the folder's name")] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="Licence of the weights, for the card, such as apache-2.0.")
    ] = None,
    language: Annotated[str | None, typer.Option(help="Language of the text, for the card, such as en.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read the export back and compare it with the model.")
    ] = True,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Write a trained model into a new folder, with its tokenizer and a card that says what it is.

    The folder appears only when what was written has been loaded again and compared with the model.

    Example:  ternlm export latest@best --output my-model
    """
    from ternlm import checkpoint as checkpoints
    from ternlm import export as exports
    from ternlm.report.card import card, is_plain
    from ternlm.run_directory import runs_root

    for option, value in (("--license", license_), ("--language", language)):
        if value is not None and not is_plain(value):
            raise SettingsError(
                f"{option} '{value}' is no plain word. Write it as model hubs do, such as apache-2.0, en."
            )
    exports.require_new(output)
    loaded = checkpoints.load(checkpoints.resolve(checkpoint, runs_root(runs_dir)))
    record = _record(loaded)
    words = {"name": name or output.resolve().name, "license": license_, "language": language}
    choices = exports.Choices(to, encoding, dtype, verify)
    facts = exports.export(loaded, output, choices, lambda found: card({**record, "export": {**found, **words}}))
    if as_json:
        print_json({"folder": str(output), "checkpoint": str(loaded.path), **facts})
    else:
        _print(output, loaded, facts)


def _record(loaded: "Loaded") -> dict[str, Any]:
    """What is known of the run that a checkpoint lies in; outside of one, the settings in the checkpoint itself."""
    from ternlm.report.papers import papers
    from ternlm.report.record import read_record
    from ternlm.run_directory import RunDirectory

    folder = loaded.path.resolve().parent
    run = RunDirectory(folder.parent)
    if folder.name == run.checkpoints.name and run.config.is_file():
        return read_record([run])
    return {"runs": [{"config": loaded.config, "papers": papers(loaded.config)}]}


def _print(output: Path, loaded: "Loaded", facts: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    size, counts = facts["bytes"], facts["parameters"]
    lines = [
        f"{loaded.path} as {facts['format']}: {counts['total']:,} parameters, {counts['ternary']:,} of them in ternary "
        f"layers" if facts["ternary_layers"] else f"{loaded.path} as {facts['format']}: {counts['total']:,} parameters",
        f"weights {size / 1e6:,.2f} MB; the same parameters take {facts['bytes_bfloat16'] / 1e6:,.2f} MB in bfloat16",
        *_verdict(facts["verification"]),
        f"folder with tokenizer and card: {output}",
    ]  # fmt: skip
    if facts["format"] == "packed":
        use = f"generate {output} --prompt '...'" if facts["is_causal"] else f"fill {output} 'A [MASK] text.'"
        lines.append(f"next: ternlm {use}")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _verdict(found: dict[str, Any]) -> list[str]:
    if found["status"] != "passed":
        return [f"not verified: {found['reason']}"]
    lines = [
        f"loaded again with {found['by']}: largest difference of a logit {found['largest_logit_difference']:.3g} "
        f"(logits up to {found['largest_logit']:.3g}, {found['tokens']} tokens)"
    ]
    if "relative_l2_unrounded" in found:
        lines.append(
            f"with activations not rounded: {found['relative_l2_unrounded']:.2g} apart (relative L2), at most "
            f"{found['limit']:g} is right"
        )
    if found.get("codes_found_otherwise"):
        lines.append(f"transformers rounds {found['codes_found_otherwise']:,} weights to another code")
    return lines
