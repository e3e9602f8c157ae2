"""`ternlm experiment`: one file from a corpus to a trained, measured and heard model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ternlm.cli.options import Json, RunsDir, print_json, resolve_recipe, split_recipe
from ternlm.errors import SettingsError

if TYPE_CHECKING:
    from ternlm.data.preparation import Prepared
    from ternlm.experiment import Experiment


def experiment(
    file: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="EXPERIMENT [KEY=VALUE]...",
            help="A shipped experiment or a .yaml/.json file, then any settings.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of its folder among the runs.", show_default="experiment_name in the file")
    ] = None,
    model_config: Annotated[
        Path | None, typer.Option(help="A file with the model, instead of the one that the experiment names.")
    ] = None,
    max_samples: Annotated[
        str | None,
        typer.Option("--max-samples", "--max-documents", help="Read at most so many documents of each split."),
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Optimizer steps; replaces other limits.")] = None,
    seed: Annotated[int | None, typer.Option(help="Initial weights and data order.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = None,
    runs_dir: RunsDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what the file means and the plan.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: Json = False,
) -> None:
    """Run a whole experiment: prepare data, train, evaluate on the test split, generate, and write a summary.

    Stopped or killed anywhere, the same command goes on from there; what is done is not done again.

    Examples:  ternlm experiment stories-hnet  |  ternlm experiment my_experiment.yaml --max-samples 1000
    |  ternlm experiment my_experiment.json training.batch_size=32 generation.temperature=0.6
    """
    from ternlm.experiment import load_experiment
    from ternlm.experiment.stages import Hooks, run_experiment

    reference, assignments = split_recipe(file)
    if reference is None:
        raise SettingsError("no experiment given. Try 'ternlm experiment stories-hgrn', or give a .yaml or .json file.")
    own, rest = _divided(assignments)
    loaded = load_experiment(reference, model_config, own)
    if name is not None:
        loaded = loaded._replace(name=name)
    if (name is not None or runs_dir is not None) and not any(word.startswith("output.") for word in own):
        loaded = loaded._replace(directory=None)  # the command line says where it goes, and not the file
    flags = {
        "data.max_documents": max_samples,
        "training.max_steps": steps,
        "training.seed": seed,
        "training.device": device,
    }
    resolved = resolve_recipe(None, flags, rest, loaded.layers)
    silent = quiet or as_json
    if not silent:
        for note in loaded.notes:
            typer.echo(f"note: {note}")
    if dry_run:
        from ternlm.cli.plan import show_plan
        from ternlm.experiment.measuring import sampling_of

        sampling_of(loaded.generation)
        show_plan(resolved, as_json)
        return
    from ternlm.cli.train import prepare_run

    hooks = Hooks(prepare_run, quiet=silent) if silent else Hooks(prepare_run, _say_stage, _show_data)
    summary = run_experiment(loaded, resolved, _folder(loaded, runs_dir), hooks)
    if as_json:
        print_json(summary)
    elif not quiet:
        _show(summary, _folder(loaded, runs_dir).path)


def _divided(assignments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What is set on the command line of the experiment's own sections, and the settings of the run."""
    from ternlm.experiment.definition import is_own
    from ternlm.settings.resolve import parse_overrides

    own = [word for word in assignments if is_own(word.partition("=")[0])]
    return parse_overrides(own), [word for word in assignments if word not in own]


def _folder(experiment: "Experiment", runs_dir: str | None) -> Any:
    from ternlm.experiment import ExperimentDirectory
    from ternlm.run_directory import check_run_id, runs_root

    given = experiment.directory
    return ExperimentDirectory(given if given is not None else runs_root(runs_dir) / check_run_id(experiment.name))


def _say_stage(stage: str, text: str) -> None:
    from ternlm.experiment import STAGES

    typer.echo(f"[{STAGES.index(stage) + 1}/{len(STAGES)}] {stage:<9} {text}")


def _show_data(prepared: "Prepared", sequence_length: int) -> None:
    from ternlm.cli.data import show_statistics
    from ternlm.data.corpus import Corpus

    assert isinstance(prepared.corpus, Corpus)  # a streamed one is not prepared
    show_statistics(prepared.corpus, prepared.tokenizer, sequence_length)


def _show(summary: dict[str, Any], folder: Path) -> None:
    """The result in a few lines."""
    from rich.console import Console
    from rich.table import Table

    results = summary["results"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for split in ("train", "validation", "test"):
        for row in _split_rows(results.get(split)):
            table.add_row(f"{split} {row[0]}", *row[1:])
    generation = results.get("generation")
    if generation and generation["samples"]:
        table.add_row("valid UTF-8", f"{generation['utf8_validity']:.1%}", f"of {generation['samples']} continuations")
        table.add_row("speed", f"{generation['bytes_per_sec']:,.0f}", "bytes/s generated")
    Console(highlight=False).print(table)
    for split, result in results.items():
        if isinstance(result, dict) and result.get("baselines"):
            typer.echo(f"without a network, on {split}: {_baselines(result['baselines'])} bits per byte")
    typer.echo(f"summary: {folder / 'experiment_summary.json'}")
    verbs = f"ternlm chat {folder}   |   ternlm compare {folder} OTHER_RUN"
    typer.echo(f"next: {verbs if summary['config']['objective']['name'] == 'causal' else f'ternlm analyze {folder}'}")


def _split_rows(result: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    if not result:
        return []
    rows = [("loss", f"{result['loss']:.4f}", f"nats per {result['perplexity_unit']}")]
    if result["bpb"] is not None:
        sure = "" if result["bpb_ci95"] is None else "95 %: {:.4f} to {:.4f}".format(*result["bpb_ci95"])
        rows.insert(0, ("bits per byte", f"{result['bpb']:.4f}", sure))
    rows.append(("accuracy", f"{result['accuracy']:.2%}", f"top-5 {result['top5_accuracy']:.2%}"))
    return rows


def _baselines(found: dict[str, Any]) -> str:
    known = {name: value for name, value in found.items() if name != "ngram_training_bytes" and value is not None}
    return ", ".join(f"{name} {value:.3f}" for name, value in sorted(known.items(), key=lambda item: -item[1]))
