"""`ternlm evaluate --tasks`: a checkpoint on tasks of lm-evaluation-harness, kept in its run's folder."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ternlm.cli.options import ProgressLine, print_json
from ternlm.cli.output import write_output
from ternlm.errors import SettingsError

if TYPE_CHECKING:
    from ternlm.checkpoint import Loaded

_QUIET_S = 10.0


def require_tasks_alone(tasks: str | None, limit: int | None, texts: Mapping[str, Any]) -> None:
    """Refuse options about a text beside tasks, which have texts of their own, and a limit without tasks.

    Args:
        tasks: What `--tasks` says.
        limit: What `--limit` says.
        texts: Options about a text, None where not given.

    Raises:
        SettingsError: There are some.
    """
    if tasks is None:
        if limit is not None:
            raise SettingsError(f"--limit {limit} counts documents of --tasks; of a text, use --max-tokens.")
        return
    if not all(task.strip() for task in tasks.split(",")):
        raise SettingsError(f"--tasks '{tasks}' leaves a name empty. Write names with commas between them.")
    given = next((name for name, value in texts.items() if value is not None), None)
    if given is not None:
        raise SettingsError(f"{given} is about a text, and --tasks bring their own. Leave it out, or evaluate twice.")


def evaluate_on_tasks(
    loaded: "Loaded",
    tasks: Sequence[str],
    sequence_length: int | None,
    batch_size: int,
    limit: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Run the tasks, print a table or JSON, and keep the record in the run's folder if the checkpoint is in one."""
    from ternlm.evaluation.evaluate import weights_of
    from ternlm.evaluation.harness import evaluate_tasks
    from ternlm.evaluation.likelihood import Scorer
    from ternlm.files import to_json
    from ternlm.training.interruption import Interruption

    names = [task.strip() for task in tasks]
    interruption, length = Interruption(), sequence_length or loaded.config["data"]["sequence_length"]
    scorer = Scorer(loaded.model, loaded.tokenizer, length, batch_size, interruption.check, _Progress().say)
    with interruption.watched():
        found = evaluate_tasks(scorer, names, limit)
    measured = {
        "sequence_length": length,
        "weights": weights_of(loaded.model),
        "dtype": str(loaded.model.compute_dtype).removeprefix("torch."),
    }
    results = {name: row | measured for name, row in found["tasks"].items()}
    step = loaded.state["step"]
    record = {"checkpoint": str(loaded.path), "step": step, "harness": found["harness"], "tasks": results}
    kept = _keep(loaded.path, record)
    if as_json:
        print_json(record)
    else:
        _print(record, kept)
    if output is not None:  # behind what is printed, so that a full disk does not cost the result
        write_output(output, to_json(record))


class _Progress:
    """A line every ten seconds."""

    def __init__(self) -> None:
        self._line, self._said = ProgressLine(), time.monotonic()

    def say(self, done: int, total: int) -> None:
        if time.monotonic() - self._said >= _QUIET_S:
            self._said = time.monotonic()
            self._line.say(f"{done:,} of {total:,} answers")


def _keep(checkpoint: Path, record: dict[str, Any]) -> Path | None:
    """Write the record into the run's folder, with what earlier calls found on other tasks; None outside of a run."""
    from ternlm.files import from_json, to_json
    from ternlm.run_directory import RunDirectory

    run = RunDirectory(checkpoint.parent.parent)
    if checkpoint.parent != run.checkpoints or not run.config.is_file():
        return None
    file = run.task_results(record["step"])
    try:
        earlier = from_json(file.read_bytes())["tasks"]
    except (OSError, ValueError, LookupError, TypeError):
        earlier = {}
    tasks = (earlier if isinstance(earlier, dict) else {}) | record["tasks"]
    write_output(file, to_json(record | {"tasks": tasks}))
    return file


def _print(record: dict[str, Any], kept: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("task", "metric", "value", "+-", "documents"):
        table.add_column(title, justify="right" if title in ("value", "+-", "documents") else "left")
    for name, row in record["tasks"].items():
        known = {key: value for key, value in row.items() if isinstance(value, float) and key != "version"}
        for metric, value in known.items():
            error = known.get(metric + "_stderr")
            if not metric.endswith("_stderr"):
                shown = "" if error is None else f"{error:.4f}"
                documents = "" if row["n_samples"] is None else f"{row['n_samples']:,}"
                table.add_row(name, metric, f"{value:.4f}", shown, documents)
    console = Console(highlight=False)
    console.print(f"{record['checkpoint']} on tasks of lm-eval {record['harness']}", markup=False, soft_wrap=True)
    console.print(table)
    if any(row["limit"] is not None for row in record["tasks"].values()):
        console.print("--limit: the first documents of each task only; not to be compared with published numbers")
    if kept is not None:
        typer.echo(f"kept in {kept}")
