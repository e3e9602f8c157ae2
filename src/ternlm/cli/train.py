"""`ternlm train`: a new run from a recipe, a settings file, or another run's checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ternlm.cli.options import RecipeAndSettings, RunsDir, prepare_with_bar, resolve_recipe, split_recipe
from ternlm.errors import SettingsError, TernlmError

if TYPE_CHECKING:
    from ternlm.data.preparation import Prepared
    from ternlm.run_directory import RunDirectory
    from ternlm.settings.resolve import Resolved
    from ternlm.training.settings import RunSettings


def train(
    recipe: RecipeAndSettings = None,
    data: Annotated[str | None, typer.Option(help="Corpus name, file, folder, glob, or hf:owner/name.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="byte, train, a path, or a hub name.")] = None,
    max_samples: Annotated[str | None, typer.Option(help="Read at most so many documents of each split.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per optimizer step.")] = None,
    learning_rate: Annotated[str | None, typer.Option("--learning-rate", "--lr", help="Peak learning rate.")] = None,
    steps: Annotated[str | None, typer.Option(help="Optimizer steps; replaces other limits.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Training tokens, e.g. 2B; replaces other limits.")] = None,
    epochs: Annotated[str | None, typer.Option(help="Passes over the data; replaces other limits.")] = None,
    seed: Annotated[int | None, typer.Option(help="Initial weights and data order.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = None,
    run_id: Annotated[str | None, typer.Option(help="Name of the run folder.", show_default="recipe and time")] = None,
    runs_dir: RunsDir = None,
    resume_from: Annotated[str | None, typer.Option(help="Start from this checkpoint of another run.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan (as ternlm plan).")] = False,
    preflight: Annotated[bool, typer.Option("--preflight", help="Ten steps with everything on, then check.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing while training.")] = False,
) -> None:  # fmt: skip
    """Train a model.

    Examples:  ternlm train bitnet-1m  |  ternlm train bitnet-12m --data my_texts --epochs 3
    |  ternlm train bitnet-1m --steps 2000 quantization.weights=none optimizer.learning_rate=1e-3
    """
    flags = {
        "data.source": data,
        "tokenizer.name": tokenizer,
        "data.max_documents": max_samples,
        "data.sequence_length": sequence_length,
        "training.batch_size": batch_size,
        "optimizer.learning_rate": learning_rate,
        "training.max_steps": steps,
        "training.max_tokens": tokens,
        "training.max_epochs": epochs,
        "training.seed": seed,
        "training.device": device,
    }
    name, assignments = split_recipe(recipe)
    if dry_run:
        from ternlm.cli.plan import show_plan

        show_plan(resolve_recipe(_required(name), flags, assignments), as_json=False)
        return
    from ternlm.checkpoint import resolve as resolve_checkpoint
    from ternlm.run_directory import RunDirectory, check_run_id, new_run_id, runs_root

    runs = runs_root(runs_dir)
    if resume_from is not None:
        source = resolve_checkpoint(resume_from, runs)
        resolved = _on_top_of_checkpoint(source, name, flags, assignments)
    else:
        source, resolved = None, resolve_recipe(_required(name), flags, assignments)
    if preflight:
        show_preflight(resolved, runs, quiet)
        return
    label = Path(name).stem if name else "continued"
    run = RunDirectory(runs / check_run_id(run_id or new_run_id(label)))
    start_training(resolved, run, source, quiet)


def start_training(resolved: "Resolved", run: "RunDirectory", source: Path | None, quiet: bool) -> None:
    """Train and say what to do next."""
    from ternlm.cli.report import reported
    from ternlm.run_directory import use_command
    from ternlm.training import launch

    with reported(run, quiet):
        launch.start(resolved, run, prepare_run, source, quiet)
    if not quiet:
        objective = resolved.values.get("objective", {}).get("name")
        typer.echo(f"next: {use_command(run, objective)}   |   ternlm evaluate {run.path}")


def prepare_run(settings: "RunSettings", folder: Path) -> "Prepared":
    """The data of a run, prepared with a progress line; streamed ones keep their blocks in the folder."""
    return prepare_with_bar(settings.data, settings.tokenizer, folder)


def show_preflight(resolved: "Resolved", runs: Path, quiet: bool) -> None:
    """Run the preflight in a folder beside the runs, print its table, and leave nothing behind unless it failed."""
    import shutil

    from rich.console import Console
    from rich.table import Table

    from ternlm.run_directory import RunDirectory, new_run_id
    from ternlm.training.preflight import STEPS, preflight

    run = RunDirectory(runs / f".{new_run_id('preflight')}")
    try:
        checks = preflight(resolved, run, prepare_run, quiet)
    except TernlmError:
        typer.echo(f"preflight failed; what it wrote is in {run.path}", err=True)
        raise
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        table.add_row("pass" if check.passed else "FAIL", check.name, check.detail)
    Console(highlight=False).print(table)
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise TernlmError(f"preflight: {', '.join(failed)} failed; everything it wrote is in {run.path}")
    shutil.rmtree(run.path, ignore_errors=True)
    typer.echo(f"preflight passed: {STEPS} steps, a resume, and {len(checks)} checks; its run folder is deleted.")


def _required(recipe: str | None) -> str:
    if recipe is None:
        raise SettingsError("no recipe given. Try 'ternlm train bitnet-1m', or 'ternlm recipes' for the list.")
    return recipe


def _on_top_of_checkpoint(
    source: Path, recipe: str | None, flags: Mapping[str, object], assignments: list[str]
) -> "Resolved":
    """The checkpoint's own settings, then recipe, flags and assignments; its tokenizer unless another is named."""
    from ternlm.settings.resolve import Layer, read_mapping

    saved = Layer(f"checkpoint {source}", read_mapping(source / "config.json"))
    tokenizer = Layer(saved.origin, {"tokenizer.name": str(source)})
    return resolve_recipe(recipe, flags, assignments, [saved, tokenizer])
