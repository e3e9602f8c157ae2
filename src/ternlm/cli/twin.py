"""`ternlm twin`: a ternary model and its full-precision twin, trained and measured alike, and the gap between them."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ternlm.cli.options import (
    Json,
    RecipeAndSettings,
    RunsDir,
    flag_values,
    prepare_with_bar,
    print_json,
    split_recipe,
)
from ternlm.cli.output import show_costs, wide_console
from ternlm.errors import SettingsError

if TYPE_CHECKING:
    from ternlm.training.sweep import Trial
    from ternlm.training.sweep_record import End
    from ternlm.twin import TwinDirectory, TwinRecord
    from ternlm.twin.definition import ArmName
    from ternlm.twin.stages import Hooks


def twin(
    recipe: RecipeAndSettings = None,
    data: Annotated[str | None, typer.Option(help="Corpus name, file, folder, glob, or hf:owner/name.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data, of each arm.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Training tokens of each arm.")] = None,
    steps: Annotated[str | None, typer.Option(help="Optimizer steps of each arm.")] = None,
    learning_rates: Annotated[
        str | None, typer.Option(help="Ternary arm: 2-4 to choose among, 4e-3,8e-3.", show_default="the recipe's")
    ] = None,
    twin_learning_rates: Annotated[
        str | None, typer.Option(help="Full-precision arm: the same.", show_default="the recipe's twin:")
    ] = None,
    sweep_share: Annotated[float, typer.Option(help="Share of the budget for each of those.")] = 0.25,
    ternary: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A setting of the ternary arm alone; repeatable.")
    ] = None,
    twin_settings: Annotated[
        list[str] | None, typer.Option("--twin", metavar="KEY=VALUE", help="Of the full-precision arm alone.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Train both arms with each: 0,1,2.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="A held-out text to measure on; repeatable.")
    ] = None,
    ptq: Annotated[bool, typer.Option("--ptq", help="Also measure the twin rounded after training.")] = False,
    resume: Annotated[str | None, typer.Option(metavar="TWIN", help="Go on with a twin: path, name, latest.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed runs again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the runs and what they cost.")] = False,
    no_timing: Annotated[bool, typer.Option("--no-timing", help="Do not time the models in turns.")] = False,
    as_json: Json = False,
    runs_dir: RunsDir = None,
    run_id: Annotated[str | None, typer.Option(help="Name of the folder.", show_default="from the settings")] = None,
) -> None:  # fmt: skip
    """Train a ternary model and the same network in full precision, and measure what ternary weights cost.

    Both read the same tokens in the same order; each has its own learning rate.

    Examples:  ternlm twin bitnet-10m --data novels/ --epochs 3 --text novel=held_out.txt
    |  ternlm twin bitnet-1m --steps 400 --learning-rates 2e-3,4e-3,8e-3 --twin-learning-rates 1e-3,2e-3,4e-3
    The same command again goes on where it was stopped.
    """
    from ternlm.run_directory import check_run_id, runs_root
    from ternlm.twin import TwinDirectory, find_twin
    from ternlm.twin.arms import make_record, twin_id

    flags = {"data.source": data, "training.max_epochs": epochs, "training.max_tokens": tokens,
             "training.max_steps": steps}  # fmt: skip
    root = runs_root(runs_dir)
    if resume is not None:
        given = (recipe, *flags.values(), learning_rates, twin_learning_rates, ternary, twin_settings, seeds, text)
        if any(value for value in (*given, run_id)):
            raise SettingsError("a twin goes on as it was defined: --resume takes no settings.")
        folder = find_twin(resume, root)
        record = folder.read()
    else:
        name, words = split_recipe(recipe)
        if name is None:
            raise SettingsError("no recipe given. Try 'ternlm twin bitnet-1m --steps 200', or 'ternlm recipes'.")
        own: dict[ArmName, dict[str, Any]] = {"ternary": _settings(ternary), "full": _settings(twin_settings)}
        options = {
            "learning_rates": {"ternary": _numbers(learning_rates), "full": _numbers(twin_learning_rates)},
            "sweep_share": sweep_share,
            "seeds": _words(seeds),
            "texts": _texts(text),
            "ptq": ptq,
            "timing": not no_timing,
        }
        record = make_record(name, {**flag_values(flags), **_settings(words)}, own, options)
        _say_kept(record)
        folder = TwinDirectory(root / check_run_id(run_id or twin_id(record)))
        if folder.file.exists():
            record = _as_before(folder, record)
    if dry_run:
        _show_plan(record, as_json)
        return
    _run(folder, record, retry_failed, as_json)


def _run(folder: "TwinDirectory", record: "TwinRecord", retry_failed: bool, as_json: bool) -> None:
    """Do what is left, show the result, and say what failed."""
    from ternlm.twin.stages import refuse_unfinished, run_twin

    with folder.locked():
        found = run_twin(folder, record, _hooks(folder, as_json), retry_failed)
        if as_json:
            print_json(found)
        else:
            _show(found)
        _write_report(folder, as_json)  # behind what is printed, so that a full disk does not cost the result
    refuse_unfinished(folder, folder.read())


def _write_report(folder: "TwinDirectory", is_quiet: bool) -> None:
    """The page with the comparison and both arms, whatever they left on disk."""
    from ternlm.cli.report import check_model, write_report
    from ternlm.twin.stages import compared_trials

    runs = [run for trial in compared_trials(folder.read()) if (run := folder.run(trial)).config.exists()]
    for run in runs:
        check_model(run)
    typer.echo(f"report: {write_report(runs, folder.path, folder.path)}", err=is_quiet)


def _hooks(folder: "TwinDirectory", is_quiet: bool) -> "Hooks":
    from rich.console import Console

    from ternlm.twin.stages import Hooks

    def say(text: str) -> None:
        typer.echo(text, err=is_quiet)

    def began(trial: "Trial") -> None:
        if not is_quiet:
            seed = "" if trial.seed is None else f", seed {trial.seed}"
            typer.echo(f"\ntraining {trial.id}{seed}  ({folder.run(trial).path})")

    def ended(trial: "Trial", end: "End") -> None:
        if end.code:
            typer.echo(f"'{trial.id}' ended with code {end.code}: {end.error or 'it said nothing'}", err=True)

    return Hooks(prepare_with_bar, say, began, ended, show=not is_quiet and Console().is_terminal)


def _as_before(folder: "TwinDirectory", record: "TwinRecord") -> "TwinRecord":
    """The record that is there, if it trains the same; texts and what else is measured are taken over.

    Raises:
        SettingsError: It is of another twin.
    """
    from ternlm.twin.arms import identity

    before = folder.read()
    if identity(before) != identity(record):
        raise SettingsError(
            f"twin '{folder.path}' was begun with other settings. Go on with it by {folder.resume_command}, or choose "
            "another --run-id."
        )
    return before._replace(definition=record.definition)


def _say_kept(record: "TwinRecord") -> None:
    """Say which of the settings of both arms the twin has otherwise."""
    from ternlm.training.sweep import shown_value
    from ternlm.twin.arms import arm_settings, definition_of

    own = definition_of(record).own.get("full", {})
    ternary, full = (arm_settings(record, arm).model_dump() for arm in ("ternary", "full"))
    for setting in (name for name in own if name in record.shared):
        section, _, field = setting.partition(".")
        given, value = ternary[section][field], full[section][field]
        if given != value:
            typer.echo(
                f"note: {setting}={shown_value(given)} is the ternary arm's; the twin has {shown_value(value)}. Change "
                f"it with --twin {setting}=VALUE.",
                err=True,
            )


def _settings(words: list[str] | None) -> dict[str, Any]:
    from ternlm.settings.resolve import parse_overrides

    return parse_overrides(words or [])


def _words(text: str | None) -> list[str]:
    return [] if text is None else [word.strip() for word in text.split(",")]


def _numbers(text: str | None) -> list[str]:
    return _words(text)


def _texts(words: list[str] | None) -> list[Any]:
    from ternlm.twin.definition import read_text

    return [read_text(word) for word in words or []]


def _show(found: dict[str, Any]) -> None:

    from ternlm.report.twin import comparison_table, cost_table, headline

    console = wide_console(170)
    ascii_only = console.options.ascii_only
    console.print()
    console.print(comparison_table(found, ascii_only))
    console.print()
    console.print(cost_table(found))
    console.print()
    for sentence in [*headline(found), *(note["text"] for note in found["notes"])]:
        console.print(sentence, markup=False, soft_wrap=True)


def _show_plan(record: "TwinRecord", as_json: bool) -> None:
    """Every run with what it changes and what it costs, and the sum."""
    from rich.table import Table

    from ternlm.cli.plan import plan_of
    from ternlm.tracking.console import short_count
    from ternlm.training.launch import settings_from
    from ternlm.twin.arms import naming, resolve_trial
    from ternlm.twin.stages import plan_trials

    table, listed = Table(box=None, pad_edge=False, header_style="dim"), []
    for title in ("run", "learning rate", "changes"):
        table.add_column(title, overflow="fold")
    for title in ("steps", "tokens", "operations"):
        table.add_column(title, justify="right", no_wrap=True)
    total = dict.fromkeys(("tokens", "flops", "disk_bytes"), 0.0)
    for trial in plan_trials(record):
        with naming(trial):
            settings = settings_from(resolve_trial(record, trial))
            made = plan_of(settings)
        total = {name: value + getattr(made, name) for name, value in total.items()}
        rate = None if _waits(record, trial) else settings.optimizer.learning_rate
        costs = {name: getattr(made, name) for name in ("parameters", "steps", *total)}
        listed.append({**trial._asdict(), "learning_rate": rate, **costs})
        figures = (f"{made.steps:,}", short_count(made.tokens), f"{made.flops:.2e}")
        table.add_row(trial.id, "the best above" if rate is None else f"{rate:g}", _changes(trial), *figures)
    if as_json:
        print_json({"runs": listed, "total": total})
        return
    show_costs(table, f"{len(listed)} runs", record.recipe, total)


def _waits(record: "TwinRecord", trial: "Trial") -> bool:
    """Whether a trial has its learning rate only when those of its arm's sweep are known."""
    from ternlm.twin.arms import definition_of
    from ternlm.twin.definition import arm_of, of_sweep

    arm = arm_of(trial)
    return of_sweep(trial) is None and definition_of(record).is_swept(arm) and record.chosen.get(arm) is None


def _changes(trial: "Trial") -> str:
    """What a trial changes besides its learning rate and its length."""
    from ternlm.training.sweep import shown_value
    from ternlm.twin.definition import LIMITS, RATE

    left = {name: value for name, value in trial.overrides().items() if name not in (RATE, *LIMITS)}
    return ", ".join(f"{name}={shown_value(value)}" for name, value in left.items())
