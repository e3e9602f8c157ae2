"""`ternlm runs`: the runs of a folder in one table, damaged ones included."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ternlm.cli.options import Json, RunsDir, print_json
from ternlm.errors import EnvironmentFault

if TYPE_CHECKING:
    from ternlm.report.status import Status

COLUMNS = ("run", "state", "step", "loss", "val loss (bpb)", "tokens/s", "updated", "size")
_FIRST_TO_GO = ("size", "tokens/s", "updated", "val loss (bpb)")


def runs(runs_dir: RunsDir = None, as_json: Json = False) -> None:
    """List runs, the newest last: it is the one that 'latest' means."""
    from ternlm.report.status import read_status
    from ternlm.run_directory import RunDirectory, runs_root

    root = runs_root(runs_dir)
    found = [read_status(RunDirectory(folder)) for folder in _folders(root)]
    if as_json:
        print_json({"runs_dir": str(root), "runs": [status.as_dict() for status in found]})
    elif found:
        _print(found, root)
        typer.echo(f"\nnext: ternlm status {found[-1].path}")
    else:
        typer.echo(f"there are no runs in '{root}'. Start one with 'ternlm train bitnet-1m' or 'ternlm demo'.")


def _folders(root: Path) -> list[Path]:
    """Folders that are or may have been runs, by the time their settings were last written."""
    from ternlm.report.tail import modified
    from ternlm.run_directory import runs_in

    if not root.exists():
        return []
    try:
        visible = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
        folders = [run for path in visible for run in runs_in(path)]
    except OSError as error:
        raise EnvironmentFault(f"runs folder '{root}' cannot be read: {error.strerror}.") from None
    return sorted(folders, key=lambda folder: (modified(folder / "meta") or 0.0, folder.name))


def _print(found: list["Status"], root: Path) -> None:
    """A table that fits the terminal: columns give way, then the names are cut."""
    from rich.cells import cell_len, set_cell_size
    from rich.console import Console

    from ternlm.report.screen import STATE_STYLES, Screen

    console = Console(highlight=False)
    screen = Screen(console.width if console.is_terminal else max(console.width, 120), console.options.ascii_only)
    rows = [dict(zip(COLUMNS, COLUMNS, strict=True)), *(_row(status, root) for status in found)]
    widths = {column: max(cell_len(row[column]) for row in rows) for column in COLUMNS}
    for name in _FIRST_TO_GO:
        if sum(widths.values()) + 2 * len(widths) > screen.width:
            del widths[name]
    spare = screen.width - sum(widths.values()) - 2 * len(widths)
    widths["run"] = max(widths["run"] + min(spare, 0), 8)
    for row, state in zip(rows, ["", *(status.state for status in found)], strict=True):
        parts = []
        for column, width in widths.items():
            text = set_cell_size(row[column], width) if column in COLUMNS[:2] else row[column].rjust(width)
            style = "dim" if not state else STATE_STYLES.get(state, "") if column == "state" else ""
            parts.append((f"{text}  ", style))
        console.print(screen.line(*parts), soft_wrap=True)


def _row(status: "Status", root: Path) -> dict[str, str]:
    from ternlm.report.screen import shown, size_text
    from ternlm.tracking.console import short_count, short_duration

    val, speed, age = status.val or {}, status.tokens_per_sec, status.age_seconds
    bpb = "" if val.get("bpb") is None else f" ({val['bpb']:.3f})"
    name = Path(status.path).relative_to(root).as_posix()
    step = "-" if status.step is None else f"{status.step}/{shown(status.max_steps, '')}"
    cells = (
        name, status.state, step, shown(status.loss, ".4f"), shown(val.get("loss"), ".4f") + bpb,
        "-" if speed is None else short_count(speed), "-" if age is None else f"{short_duration(age)} ago",
        size_text(status.run_bytes),
    )  # fmt: skip
    return dict(zip(COLUMNS, cells, strict=True))
