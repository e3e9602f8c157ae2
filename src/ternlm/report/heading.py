"""The first two lines of a report: what it is of, how that stands, and when and by what it was written."""

from collections.abc import Mapping
from typing import Any

_NAMED = 3


def heading(record: Mapping[str, Any], twin: str | None = None) -> tuple[str, str]:
    """Title and subtitle.

    Args:
        record: As `record.read_record` returns it.
        twin: Name of the comparison whose arms the runs are.
    """
    runs = record["runs"]
    names = [str(run["name"]) for run in runs]
    states = [str(run["status"].get("state") or "unknown") for run in runs]
    written = f"written {_shown_time(record['made_at'])} by ternlm {record['version']}"
    if len(runs) == 1 and twin is None:
        return names[0], f"{states[0]} · {written}"
    title = f"{len(runs)} runs: {', '.join(names[:_NAMED])}{' …' if len(names) > _NAMED else ''}"
    if twin is not None:
        title = f"{twin}: ternary against full precision"
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return title, f"{counts} · {written}"


def _shown_time(moment: Any) -> str:
    """``2026-11-21 05:55 UTC`` of a time as records spell it."""
    return f"{str(moment)[:16].replace('T', ' ')} UTC"
