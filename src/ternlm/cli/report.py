"""`ternlm report`: what a run was and did, as one page, Markdown and JSON; also written when a run ends."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ternlm.cli.options import Json, RunsDir, print_json
from ternlm.errors import EnvironmentFault, Interrupted, Preempted, SettingsError

if TYPE_CHECKING:
    from ternlm.run_directory import RunDirectory

SEVERAL = Path("report")


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(help="Runs, sweeps or twins: path, name, unique prefix.", show_default="latest"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the files.", show_default="the run's; ./report for several")
    ] = None,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Write report.html, report.md and report.json: one page that needs no network, for any browser or printer.

    Only reads the run, also while it is going on; several runs are shown side by side. With torch and a checkpoint
    the model itself is checked against the definition of BitNet b1.58. --json prints the numbers, and writes files
    only with --output.
    """
    found, twin = _find(runs or ["latest"], runs_dir)
    for run in found:
        note = check_model(run)
        if note is not None:
            typer.echo(f"note: {note}", err=True)
    if as_json:
        from ternlm.report.record import read_record

        print_json(read_record(found, twin))
    if output is not None or not as_json:
        page = write_report(found, output or twin or (found[0].path if len(found) == 1 else SEVERAL), twin)
        typer.echo(f"{page}, with .md and .json beside it", err=as_json)


def write_report(runs: Sequence["RunDirectory"], folder: Path, twin: Path | None = None) -> Path:
    """Read the runs and write the three files; the page.

    Args:
        runs: One or several, in the order in which they are shown.
        folder: Where report.html, report.md and report.json go.
        twin: The folder of the comparison that the runs are the arms of.

    Raises:
        EnvironmentFault: A file cannot be written.
    """
    from ternlm.cli.output import write_output
    from ternlm.files import to_json
    from ternlm.report.heading import heading
    from ternlm.report.markdown import markdown
    from ternlm.report.page import html_page
    from ternlm.report.record import read_record
    from ternlm.report.sections import sections

    record = read_record(runs, twin)
    (title, subtitle), parts = heading(record, twin.name if twin else None), sections(record)
    write_output(folder / "report.json", to_json(record))
    write_output(folder / "report.md", markdown(title, subtitle, parts).encode("utf-8", "backslashreplace"))
    write_output(folder / "report.html", html_page(title, subtitle, parts).encode("utf-8", "backslashreplace"))
    return folder / "report.html"


def check_model(run: "RunDirectory") -> str | None:
    """Check the newest checkpoint against the definition and keep the result in the run; why not, if it was not.

    Nothing is done where there is no checkpoint yet, or no torch.
    """
    if not any(run.checkpoints.glob("step_*/")):
        return None
    try:
        from ternlm.evaluation.alignment import update_alignment
    except (ImportError, OSError):  # no torch, or one that does not load here
        return None
    try:
        update_alignment(run)
    except Exception as error:  # noqa: BLE001 (a model that cannot be measured costs its rows, not the report)
        return f"the model of {run.path} was not checked: {error}"
    return None


@contextmanager
def reported(run: "RunDirectory", quiet: bool) -> Iterator[None]:
    """Write the run's report when the block ends, however it ends, unless the run says not to or never began.

    The outcome of the block is never changed by it: what goes wrong here, or a signal, is one sentence.
    """
    from ternlm.report.tail import modified

    before = modified(run.status)
    is_waited_for = False
    try:
        yield
    except (Interrupted, Preempted):
        is_waited_for = True
        raise
    finally:
        if modified(run.status) != before and _is_wanted(run):
            _write_at_end(run, is_waited_for, quiet)


class _Enough(BaseException):
    """A signal arrived while a report was written; no failure that anyone handles."""


def _write_at_end(run: "RunDirectory", is_waited_for: bool, quiet: bool) -> None:
    """Write the report; someone who asked the run to stop does not wait for the model to be checked too."""
    try:
        with _stopped_by_signals():
            if not is_waited_for:
                check_model(run)
            page = write_report([run], run.path)
    except _Enough:
        typer.echo(f"report not written. Later: ternlm report {run.path}", err=True)
    except Exception as error:  # noqa: BLE001 (the run is over and saved; nothing of its report may change how it ended)
        typer.echo(f"report not written: {error}. Later: ternlm report {run.path}", err=True)
    else:
        if not quiet:
            typer.echo(f"report: {page}")


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raise `_Enough` where a signal would end the process with a code that is not the run's."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Enough

    before: dict[int, Any] = {}
    with suppress(ValueError):  # signals belong to the main thread
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_wanted(run: "RunDirectory") -> bool:
    """``tracking.report`` of the run; runs from before the setting existed are reported."""
    from ternlm.files import from_json, read_regular

    try:
        config = from_json(read_regular(run.config, 2**24))
        return bool(config["tracking"].get("report", True))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _find(references: Sequence[str], runs_dir: str | None) -> tuple[list["RunDirectory"], Path | None]:
    """The runs, those of a sweep or twin one by one, and the twin's folder if one was given.

    Raises:
        SettingsError: A run is given twice.
        EnvironmentFault: One does not exist.
    """
    from ternlm.run_directory import TWIN, RunDirectory, runs_root

    found: list[RunDirectory] = []
    twin = None
    for reference in references:
        folder = _folder(reference, runs_root(runs_dir))
        if (folder / TWIN).is_file():
            if len(references) > 1:
                raise SettingsError(f"'{reference}' is a twin, which has a report of its own. Give it alone.")
            twin = folder
        for path in _members(folder):
            if path.resolve() in [run.path.resolve() for run in found]:
                raise SettingsError(f"run '{reference}' is given twice. Give each once.")
            found.append(RunDirectory(path))
    return found, twin


def _folder(reference: str, root: Path) -> Path:
    from ternlm.report.status import is_run
    from ternlm.run_directory import SWEEP, TWIN, find_run

    for folder in (Path(reference), root / reference):
        if is_run(folder) or (folder / SWEEP).is_file() or (folder / TWIN).is_file() or _is_empty(folder):
            return folder
    return find_run(reference, root).path


def _is_empty(folder: Path) -> bool:
    """Whether it is a folder in which a run has left nothing at all."""
    try:
        return folder.is_dir() and not any(folder.iterdir())
    except OSError:
        return False


def _members(folder: Path) -> list[Path]:
    """The runs of a folder: of a twin those that are compared, of a sweep all.

    Raises:
        EnvironmentFault: It is a sweep or twin that has none yet.
    """
    from ternlm.report.status import is_run
    from ternlm.run_directory import TWIN, runs_in
    from ternlm.twin.record import TwinDirectory
    from ternlm.twin.stages import compared_trials

    inside = runs_in(folder)
    if (folder / TWIN).is_file():
        with suppress(EnvironmentFault):  # of a damaged one whatever runs are there
            twin = TwinDirectory(folder)
            inside = [twin.run(trial).path for trial in compared_trials(twin.read())]
    members = inside if inside == [folder] else [path for path in inside if is_run(path)]
    if not members:
        raise EnvironmentFault(f"'{folder}' has no runs yet. Report it when the first one has started.")
    return members
