"""What a run does, part by part, against the published definition: measured on the model, and read off the log."""

from collections.abc import Mapping, Sequence
from typing import Any

from ternlm.report import tail
from ternlm.report.logged_schedule import schedule_rows
from ternlm.report.spread import Row
from ternlm.report.tail import mapping, string, whole
from ternlm.run_directory import RunDirectory

VERDICTS = ("same", "differs", "unknown")
_TEXTS = ("part", "definition", "run", "source")


def alignment_record(
    run: RunDirectory, config: Mapping[str, Any], rows: Sequence[Row], total: int | None
) -> dict[str, Any]:
    """`rows` of {part, definition, run, verdict, source}; `step` at which the model was measured, or None.

    Args:
        run: The run; ``eval/alignment.json`` holds what was measured on its model.
        config: Its settings.
        rows: Of the training log.
        total: Steps of the whole run.
    """
    measured = tail.document(run.alignment) or {}
    given = measured.get("rows")
    found = [_row(row) for row in given if isinstance(row, dict)] if isinstance(given, list) else []
    return {
        "step": whole(measured.get("step")),
        "checkpoint": string(measured.get("checkpoint")),
        "rows": [*found, *schedule_rows(config, rows, total)],
    }


def _row(given: Mapping[str, Any]) -> dict[str, str]:
    verdict = given.get("verdict")
    texts = {name: string(mapping(given).get(name)) or "" for name in _TEXTS}
    return {**texts, "verdict": verdict if verdict in VERDICTS else "unknown"}
