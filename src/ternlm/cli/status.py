"""`ternlm status`: what a run is doing, once or live, read from its folder without touching it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ternlm.cli.options import Json, RunsDir, print_json
from ternlm.errors import EnvironmentFault

if TYPE_CHECKING:
    from rich.console import Console

    from ternlm.report.status import Status
    from ternlm.run_directory import RunDirectory

RECOUNT_DISK_S = 30.0

Run = Annotated[str, typer.Argument(help="Path, name, unique prefix, or latest.")]
Interval = Annotated[float, typer.Option(min=0.1, help="Seconds between looks, with --watch.")]


def status(
    run: Run = "latest",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until the run ends; Ctrl-C leaves.")] = False,
    interval: Interval = 2.0,
    as_json: Json = False,
    runs_dir: RunsDir = None,
) -> None:
    """Show what a run is doing: progress, loss, rates, evaluation, samples, anomalies, disk.

    Only reads files, so it works from any terminal while the run trains, and after it ended.
    With --watch --json, or --watch into a file, there is one line per change.
    """
    from rich.console import Console

    found, console = _find(run, runs_dir), Console(highlight=False)
    if watch:
        try:
            _watch(found, interval, as_json, console)
        except KeyboardInterrupt:  # leaving is not a failure
            return
    elif as_json:
        from ternlm.report.status import read_status

        print_json(read_status(found).as_dict())
    else:
        _show(found, console)


def watch(run: Run = "latest", interval: Interval = 2.0, runs_dir: RunsDir = None) -> None:
    """The same as ternlm status --watch."""
    status(run, watch=True, interval=interval, runs_dir=runs_dir)


def _find(reference: str, runs_dir: str | None) -> "RunDirectory":
    """The run, also if it is damaged and only its folder is known."""
    from ternlm.report.status import is_run
    from ternlm.run_directory import RunDirectory, find_run, runs_root

    root = runs_root(runs_dir)
    for folder in (Path(reference), root / reference):
        if is_run(folder):
            return RunDirectory(folder)
    return find_run(reference, root)


def _show(run: "RunDirectory", console: "Console") -> None:
    from ternlm.report.history import History
    from ternlm.report.screen import Screen
    from ternlm.report.status import read_status

    history = History(run)
    history.poll()
    for line in Screen(console.width, console.options.ascii_only).draw(read_status(run), history.curves):
        console.print(line, soft_wrap=True)


def _watch(run: "RunDirectory", interval: float, as_json: bool, console: "Console") -> None:
    if as_json or not console.is_terminal:
        _print_changes(run, interval, as_json)
        return
    from rich.console import Group
    from rich.live import Live

    from ternlm.report.history import History
    from ternlm.report.screen import Screen

    history = History(run)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for now in _looks(run, interval):
            history.poll()
            screen = Screen(console.width, console.options.ascii_only)
            live.update(Group(*screen.draw(now, history.curves, console.height - 1)), refresh=True)


def _print_changes(run: "RunDirectory", interval: float, as_json: bool) -> None:
    """A line whenever state, step or evaluation changed."""
    import json

    before = None
    for now in _looks(run, interval):
        seen = (now.state, now.step, now.val)
        if seen != before:
            typer.echo(json.dumps(now.as_dict()) if as_json else _one_line(now))
        before = seen


def _looks(run: "RunDirectory", interval: float) -> Iterator["Status"]:
    """The status again and again, the last one when the run has ended.

    Raises:
        EnvironmentFault: The folder is gone.
    """
    from ternlm.report.status import read_disk, read_status

    disk, counted_s = read_disk(run), time.monotonic()
    while (now := read_status(run, disk)).is_running:
        yield now
        time.sleep(interval)
        if time.monotonic() - counted_s >= RECOUNT_DISK_S:
            disk, counted_s = read_disk(run), time.monotonic()
    if now.state == "missing":
        raise EnvironmentFault(f"run folder '{run.path}' is gone.")
    yield read_status(run)


def _one_line(status: "Status") -> str:
    from ternlm.report.screen import shown
    from ternlm.tracking.console import short_count, short_duration

    parts = [f"{status.updated_at}  {status.state}  step {shown(status.step, '')}/{shown(status.max_steps, '')}"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.val is not None:
        parts.append(f"val {status.val['loss']:.4f}")
    if status.tokens_per_sec is not None:
        parts.append(f"{short_count(status.tokens_per_sec)} tok/s")
    if status.eta_seconds is not None:
        parts.append(f"ETA {short_duration(status.eta_seconds)}")
    if status.anomalies["count"]:
        parts.append(f"anomalies {status.anomalies['count']}")
    return "  ".join(parts)
