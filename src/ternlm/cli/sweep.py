"""`ternlm sweep`: many runs from one definition, and the table and picture that compare them."""

from typing import TYPE_CHECKING, Annotated

import typer

from ternlm.cli.options import Json, RunsDir, flag_values, prepare_with_bar, print_json
from ternlm.cli.output import show_costs, wide_console
from ternlm.errors import SettingsError, TernlmError

if TYPE_CHECKING:
    from ternlm.training.plan import Plan
    from ternlm.training.settings import RunSettings
    from ternlm.training.sweep import Trial
    from ternlm.training.sweep_record import End, SweepDirectory, SweepRecord


def sweep(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SWEEP | RECIPE [KEY=VALUE]...",
            help="A sweep (name or file) and, if it names none, a recipe; or a recipe and values in brackets.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Corpus name, file, folder, glob, or hf:owner/name.")] = None,
    steps: Annotated[str | None, typer.Option(help="Optimizer steps of every trial.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Training tokens of every trial.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Train every arm with each of these seeds: 0,1,2.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="How many random draws.")] = None,
    draw_seed: Annotated[int | None, typer.Option(min=0, help="Decides the random draws.")] = None,
    metric: Annotated[str | None, typer.Option(help="val/loss, val/bpb or val/accuracy, at the end.")] = None,
    sweep_id: Annotated[
        str | None, typer.Option(help="Name of the sweep folder.", show_default="from the trials")
    ] = None,
    runs_dir: RunsDir = None,
    resume: Annotated[str | None, typer.Option(metavar="SWEEP", help="Go on with a sweep: path, name, latest.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed trials again.")] = False,
    parallel: Annotated[int, typer.Option(min=1, help="Trials at the same time.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the trials and what they cost.")] = False,
    summary: Annotated[str | None, typer.Option(metavar="SWEEP", help="Only read a sweep and show it.")] = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing while trials run.")] = False,
) -> None:  # fmt: skip
    """Train many variants, each an ordinary run, and compare how they end.

    Examples:  ternlm sweep learning-rate bitnet-1m --steps 200
    |  ternlm sweep bitnet-1m 'optimizer.learning_rate=[1e-3,2e-3,4e-3]' --seeds 0,1,2
    |  ternlm sweep bitnet-1m 'optimizer.learning_rate=log(1e-4,1e-2)' --samples 8
    The same command again goes on where the sweep was stopped.
    """
    from ternlm.cli import sweep_words
    from ternlm.run_directory import check_run_id, runs_root
    from ternlm.training.sweep_record import SweepDirectory, find_sweep

    flags = {"data.source": data, "training.max_steps": steps, "training.max_tokens": tokens, "training.device": device}
    options = {"seeds": _seeds(seeds), "samples": samples, "draw_seed": draw_seed, "metric": metric}
    root = runs_root(runs_dir)
    known = summary or resume
    if known is not None:
        if words or any(value is not None for value in (*flags.values(), *options.values(), sweep_id)):
            raise SettingsError("a sweep goes on as it was defined: --resume and --summary take no settings.")
        folder = find_sweep(known, root)
        record = folder.read()
    else:
        given = sweep_words.read_words(words or [], flag_values(flags), options)
        record = sweep_words.make_record(given, lambda text: typer.echo(text, err=True))
        folder = SweepDirectory(root / check_run_id(sweep_id or sweep_words.sweep_id(record)))
        if folder.file.exists():
            record = _as_before(folder, record)
    if summary is not None:
        _show(folder, record, as_json)
        return
    settings = sweep_words.validated(record)
    if dry_run:
        _show_plan(record, settings, as_json)
        return
    with folder.locked():
        has_run = _run(folder, record, settings, retry_failed, parallel, quiet or as_json)
    if as_json or not has_run:
        _show(folder, record, as_json, is_quiet=quiet)
    _refuse_unfinished(folder, record)


def _seeds(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",")]


def _as_before(folder: "SweepDirectory", record: "SweepRecord") -> "SweepRecord":
    """The record that is there, if it holds the same trials; another metric is taken over.

    Raises:
        SettingsError: It is of another sweep.
    """
    before = folder.read()
    if before.fingerprints != record.fingerprints:
        raise SettingsError(
            f"sweep '{folder.path}' holds other trials. Go on with it by --resume {folder.path}, "
            "or choose another --sweep-id."
        )
    return before._replace(metric=record.metric)


def _run(
    folder: "SweepDirectory",
    record: "SweepRecord",
    settings: "dict[str, RunSettings]",
    retry_failed: bool,
    parallel: int,
    quiet: bool,
) -> bool:
    """Run what is left to run; the table is shown after every trial. False if nothing was left."""
    from rich.console import Console

    from ternlm.training.sweep_trials import TrialRunner, pending

    left = pending(folder, record, retry_failed)
    if not left:
        return False
    _prepare(record, settings, left)
    folder.write(record)
    place = {trial.id: number for number, trial in enumerate(record.trials, start=1)}

    def began(trial: "Trial") -> None:
        if not quiet:
            seed = "" if trial.seed is None else f", seed {trial.seed}"
            typer.echo(f"\ntrial {place[trial.id]}/{len(place)}: {trial.arm}{seed}  ({folder.run(trial).path})")

    def ended(trial: "Trial", end: "End") -> None:
        if not quiet and end.code:
            typer.echo(f"trial '{trial.id}' ended with code {end.code}: {end.error or 'it said nothing'}", err=True)
        _show(folder, record, as_json=False, is_quiet=quiet)

    show = not quiet and Console().is_terminal
    TrialRunner(folder, record, parallel, show, began, ended).run(left)
    return True


def _prepare(record: "SweepRecord", settings: "dict[str, RunSettings]", left: "list[Trial]") -> None:
    """Prepare the data of all trials once, and find what would stop one of them before the first begins."""
    from ternlm.cli.plan import plan_of
    from ternlm.cli.sweep_words import naming
    from ternlm.training.launch import with_vocab_size

    prepared = {}
    for trial in left:
        own = settings[trial.id]
        if own.data.stream:  # read by each run on its own, into its own folder
            continue
        key = (repr(own.data), repr(own.tokenizer))
        if key not in prepared:
            with naming(trial):
                prepared[key] = prepare_with_bar(own.data, own.tokenizer)
            prepared[key].corpus.close()
        with naming(trial):
            with_vocab_size(own, prepared[key])
    for trial in left:
        with naming(trial):
            plan_of(settings[trial.id])


def _show(folder: "SweepDirectory", record: "SweepRecord", as_json: bool, is_quiet: bool = False) -> None:
    """Read the runs, replace the summary's files, and print the table."""

    from ternlm.report.sweep import read_summary
    from ternlm.report.sweep_picture import draw_summary
    from ternlm.report.sweep_text import as_table, notes, write_files

    found = read_summary(folder, record)
    try:
        write_files(folder, found)
        has_picture = draw_summary(folder, found)
    except OSError as error:
        typer.echo(f"the summary in '{folder.path}' cannot be written: {error.strerror}.", err=True)
        has_picture = False
    if as_json:
        print_json(found.as_dict())
    elif not is_quiet:
        console = wide_console(120)
        console.print()
        console.print(as_table(found, console.options.ascii_only))
        for line in [*notes(found), *([f"picture: {folder.summary('png')}"] if has_picture else [])]:
            console.print(line, markup=False, soft_wrap=True)


def _show_plan(record: "SweepRecord", settings: "dict[str, RunSettings]", as_json: bool) -> None:
    """Every trial with what it changes and what it costs, and the sum."""
    from rich.table import Table

    from ternlm.cli.plan import plan_of
    from ternlm.cli.sweep_words import naming
    from ternlm.tracking.console import short_count
    from ternlm.training.sweep import shown_value

    plans: dict[str, Plan] = {}
    for trial in record.trials:
        with naming(trial):
            plans[trial.id] = plan_of(settings[trial.id])
    total = {name: sum(getattr(made, name) for made in plans.values()) for name in ("tokens", "flops", "disk_bytes")}
    if as_json:
        costs = {
            name: {key: getattr(made, key) for key in ("parameters", "steps", *total)} for name, made in plans.items()
        }
        print_json({"trials": [{**trial._asdict(), **costs[trial.id]} for trial in record.trials], "total": total})
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("trial", "changes", "parameters", "steps", "tokens", "operations"):
        table.add_column(title, justify="left" if title in ("trial", "changes") else "right", overflow="fold")
    for trial in record.trials:
        made = plans[trial.id]
        changes = ", ".join(f"{key}={shown_value(value)}" for key, value in trial.overrides().items())
        figures = (f"{made.parameters:,}", f"{made.steps:,}", short_count(made.tokens), f"{made.flops:.2e}")
        table.add_row(trial.id, changes, *figures)
    show_costs(table, f"{len(plans)} trials", record.recipe, total)


def _refuse_unfinished(folder: "SweepDirectory", record: "SweepRecord") -> None:
    """Say what failed or was stopped.

    Raises:
        TernlmError: Something did.
    """
    from ternlm.training.sweep_trials import end_of, is_settled

    ends = {trial.id: end_of(folder, record, trial) for trial in record.trials}
    failed = [name for name, end in ends.items() if end is not None and not is_settled(end)]
    stopped = [name for name, end in ends.items() if end is None]
    if stopped:
        raise TernlmError(f"unfinished: {', '.join(stopped)}. Continue with: {folder.resume_command}")
    if failed:
        raise TernlmError(
            f"failed: {', '.join(failed)}. Their last words are in '{folder.path}'/*.log; try them again with: "
            f"{folder.resume_command} --retry-failed"
        )
