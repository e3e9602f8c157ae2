"""The summary of a sweep as text: a table for the terminal, and JSON, CSV and Markdown files."""

import csv
import io
from collections.abc import Callable, Mapping

from rich.table import Table
from rich.text import Text

from ternlm.files import replace_durably, to_json
from ternlm.report.screen import STATE_STYLES, shown
from ternlm.report.sweep import TIE_DEVIATIONS, ArmResult, Summary
from ternlm.tracking.console import short_count, short_duration
from ternlm.training.sweep import shown_value
from ternlm.training.sweep_record import SweepDirectory

_LEFT = ("arm", "settings", "status")


def write_files(sweep: SweepDirectory, summary: Summary) -> None:
    """Replace summary.json, summary.csv and summary.md.

    Raises:
        OSError: The disk is full.
    """
    replace_durably(sweep.summary("json"), to_json(summary.as_dict()))
    replace_durably(sweep.summary("csv"), as_csv(summary).encode("utf-8", "backslashreplace"))
    replace_durably(sweep.summary("md"), as_markdown(summary).encode("utf-8", "backslashreplace"))


def as_table(summary: Summary, ascii_only: bool = False) -> Table:
    """For the terminal: the best arm first."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    head, *rows = _rows(summary)
    for title in head:
        is_text = title in _LEFT
        table.add_column(title, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for arm, row in zip(summary.ranked, rows, strict=True):
        style = "bold" if arm.name == summary.base else STATE_STYLES.get(arm.state.replace(" ", "_"), "")
        cells = [_ascii(cell) if ascii_only else cell for cell in row]
        styled = "" if arm.state == "finished" and style != "bold" else "dim" if arm.state == "waiting" else style
        table.add_row(*(Text(cell, style=styled) for cell in cells))
    return table


def notes(summary: Summary) -> list[str]:
    """What the table's marks mean, and where the sweep stands."""
    states = [trial.state for trial in summary.trials]
    seconds = sum(trial.seconds or 0.0 for trial in summary.trials)
    tokens = sum(trial.tokens or 0 for trial in summary.trials)
    counted = ", ".join(f"{states.count(state)} {state.replace('_', ' ')}" for state in dict.fromkeys(states))
    lines = [
        f"{len(states)} trials: {counted}; {short_count(tokens)} tokens, {short_duration(seconds)}; "
        f"base '{summary.base}'"
    ]
    if any(arm.compared is not None and arm.compared.spread is not None for arm in summary.arms):
        lines.append(
            "± standard deviation over seeds; = not told apart from the best, ~ not from the base "
            f"(under {TIE_DEVIATIONS:g} standard deviations)"
        )
    return lines


def as_markdown(summary: Summary) -> str:
    """Both tables, arms and runs, with the picture."""
    title = f"# {summary.id}"
    told = [summary.description] if summary.description else []
    facts = f"Recipe `{summary.recipe}`, compared by `{summary.metric}` at the end, base `{summary.base}`."
    runs = [["run", "arm", "seed", summary.metric, "step", "state", "error"]]
    runs += [
        [
            f"`{trial.path}`", trial.arm, shown(trial.seed, "d"), shown(trial.value, ".6g"), shown(trial.step, "d"),
            trial.state, trial.error or "",
        ]
        for trial in summary.trials
    ]  # fmt: skip
    parts = [title, *told, facts, _markdown_table(_rows(summary)), *notes(summary)]
    parts += ["![the sweep](summary.svg)", "## Runs", _markdown_table(runs)]
    return "\n\n".join(parts) + "\n"


def as_csv(summary: Summary) -> str:
    """One line per run, with a column for every setting that is varied."""
    keys = list(dict.fromkeys(key for arm in summary.arms for key in arm.settings))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["trial", "arm", "seed", *keys, summary.metric, "step", "tokens", "seconds", "state", "run"])
    for arm in summary.arms:
        values = [shown_value(arm.settings[key]) if key in arm.settings else "" for key in keys]
        for trial in arm.trials:
            figures = (trial.value, trial.step, trial.tokens, trial.seconds, trial.state, trial.path)
            table.writerow([trial.id, arm.name, trial.seed, *values, *figures])
    return text.getvalue()


def _rows(summary: Summary) -> list[list[str]]:
    """The head, and one row per arm, ranked; what the arms change is left out where their names say it."""
    labels = summary.labels()
    head = ["#", "arm", "settings", summary.metric, "vs base", "tokens", "time", "status"]
    rows = [head, *(_cells(arm, labels) for arm in summary.ranked)]
    place = head.index("settings")
    if not any(row[place] for row in rows[1:]):
        for row in rows:
            del row[place]
    return rows


def _cells(arm: ArmResult, labels: Mapping[str, str]) -> list[str]:
    found, label = arm.compared, "" if labels[arm.name] == arm.name else labels[arm.name]
    ended = [_or_dash(short_count)(arm.tokens), _or_dash(short_duration)(arm.seconds), arm.state]
    if found is None:
        return ["-", arm.name, label, "-", "-", *ended]
    spread = "" if found.spread is None else f" ± {found.spread:.4f}"
    difference = shown(found.difference, "+.4f") + (" ~" if found.ties_base else "")
    rank = f"{found.rank}{'=' if found.ties_best else ''}"
    return [rank, arm.name, label, f"{found.mean:.4f}{spread}", difference, *ended]


def _or_dash(form: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: "-" if value is None else form(value)


def _markdown_table(rows: list[list[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ascii(text: str) -> str:
    return text.replace("±", "+-").encode("ascii", "replace").decode()
