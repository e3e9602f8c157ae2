"""Everything a report says about runs, as JSON values read from their folders: the content of `report.json`.

Nothing is raised for what a folder holds or lacks: a run may be empty, damaged, being written, or made by another
version. What is not known is None or empty, never made up. Words and pictures are left to `sections`.
"""

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ternlm
from ternlm.report import tail
from ternlm.report.alignment import alignment_record
from ternlm.report.papers import papers
from ternlm.report.size import parameter_counts
from ternlm.report.spread import Row, all_rows, curve, evenly, spread_rows
from ternlm.report.status import read_status
from ternlm.report.tail import mapping, number, string, whole
from ternlm.report.tasks import task_rows
from ternlm.report.ternary import ternary_record
from ternlm.run_directory import RunDirectory, runs_around
from ternlm.training.status import utc

SCHEMA = 1
TWIN_RESULT = "comparison.json"

_CURVES = ("train/loss", "train/bpb", "train/learning_rate", "train/weight_decay", "train/grad_norm", "train/epoch",
           "train/distillation_loss", "perf/tokens_per_sec", "perf/step_time_ms", "perf/data_time_ms", "perf/mfu",
           "perf/peak_memory_mb")  # fmt: skip
_MOST_EVALUATIONS, _MOST_EVENTS, _MOST_SAMPLINGS, _MOST_SYSTEM_CURVES = 400, 200, 6, 24
_LONGEST_TEXT = 1200
_POINTERS = ("best", "last", "final")
_CHECKPOINT = re.compile(r"step_(\d{6,})")
_LARGEST_JSON_DEPTH = 24


def read_record(runs: Sequence[RunDirectory], twin: Path | None = None, now: float | None = None) -> dict[str, Any]:
    """Read runs, to be reported on alone or side by side.

    Args:
        runs: In the order in which they are shown.
        twin: Folder of a comparison with full precision, whose result goes into the record.
        now: Unix time.

    Returns:
        `schema`, `made_at`, `version`; `runs`, one mapping each as `read_run` returns it; `differences`, the settings
        in which several runs differ; `twin`, what ``comparison.json`` holds, or None without one.
    """
    now = time.time() if now is None else now
    found = [read_run(run, now) for run in runs]
    _tell_apart(found)
    return {
        "schema": SCHEMA,
        "made_at": utc(now),
        "version": ternlm.__version__,
        "runs": found,
        "differences": differences(found) if len(found) > 1 else [],
        "twin": None if twin is None else _twin(twin),
    }


def read_run(run: RunDirectory, now: float) -> dict[str, Any]:
    """One run.

    Returns:
        `id`, `name` (told apart from other runs of the report), `path`, `status` (as ``ternlm status --json``),
        `is_running`; `config` (resolved settings), `changed` (each setting that is no default: value and origin),
        `sittings` (of provenance.json), `data` (of dataset_fingerprint.json, without its tokens); `parameters`;
        `curves` ({column: [[step, value]]}), `stages` ([{step, stage, name}]), `events`, `event_counts` (of warnings
        and errors); `evaluations` (rows); `tasks`; `ternary`; `samples`; `system` (curves); `checkpoints`; `alignment`;
        `papers`.
    """
    status = read_status(run, now=now)
    config = _json_safe(tail.document(run.config)) or {}
    rows = spread_rows(run.scalars)
    ternary = ternary_record(run)
    events = _events(run)
    return {
        "id": status.run_id,
        "name": status.run_id,
        "path": str(run.path),
        "status": status.as_dict(),
        "is_running": status.is_running,
        "config": config,
        "changed": _changed(config, tail.document(run.config_origin) or {}),
        "sittings": _sittings(run),
        "data": _data(run),
        "parameters": parameter_counts(run, config, status.checkpoints, ternary["matrices"]),
        "curves": {name: points for name in _curve_names(rows) if (points := curve(rows, name))},
        "stages": _stages(rows, status.stage, status.stage_name),
        "events": evenly(events, _MOST_EVENTS),
        "event_counts": dict(Counter(row["event"] for row in events)),
        "evaluations": [_json_safe(row) for row in evenly(_evaluations(run), _MOST_EVALUATIONS)],
        "tasks": task_rows(run),
        "ternary": ternary,
        "samples": _samples(run),
        "system": _system(run),
        "checkpoints": _checkpoints(run),
        "alignment": alignment_record(run, config, rows, status.max_steps),
        "papers": papers(config),
    }


def differences(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`setting` and its `values`, one for each run, of the settings that are not the same in all of them."""
    flat = [_flat(run["config"]) for run in runs]
    names = sorted(set().union(*flat))
    found = []
    for name in names:
        values = [settings.get(name) for settings in flat]
        if any(value != values[0] for value in values):
            found.append({"setting": name, "values": values})
    return found


def _twin(folder: Path) -> dict[str, Any] | None:
    """The result of a comparison; empty if the file holds something else, None if there is no file yet."""
    found = mapping(_json_safe(tail.document(folder / TWIN_RESULT)))
    if isinstance(found.get("texts"), list) and isinstance(found.get("arms"), dict):
        return found
    return {} if (folder / TWIN_RESULT).exists() else None


def _tell_apart(runs: list[dict[str, Any]]) -> None:
    """Give runs of the same name, such as trials of several sweeps, as much of their path as tells them apart."""
    counts = Counter(run["id"] for run in runs)
    for run in runs:
        if counts[run["id"]] > 1:
            path = Path(run["path"]).absolute()
            around = runs_around(RunDirectory(path))
            name = path.relative_to(around).as_posix()
            run["name"] = name if "/" in name else f"{path.parent.name}/{path.name}"
    seen: Counter[str] = Counter()
    for run in runs:
        seen[run["name"]] += 1
        if seen[run["name"]] > 1:
            run["name"] += f" ({seen[run['name']]})"


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, values in config.items()
        for key, value in (values.items() if isinstance(values, dict) else ())
    }


def _changed(config: Mapping[str, Any], origin: Mapping[str, Any]) -> list[dict[str, Any]]:
    flat = _flat(config)
    return [
        {"setting": name, "value": flat[name], "origin": source}
        for name, source in sorted(origin.items())
        if name in flat and isinstance(source, str)
    ]


def _sittings(run: RunDirectory) -> list[dict[str, Any]]:
    found = (tail.document(run.provenance) or {}).get("sittings")
    return [_json_safe(sitting) for sitting in found if isinstance(sitting, dict)] if isinstance(found, list) else []


def _data(run: RunDirectory) -> dict[str, Any]:
    """What the run was trained on, but for the list of its first tokens and the shards."""
    given = tail.document(run.data_fingerprint) or {}
    splits = {
        name: {key: value for key in ("documents", "tokens", "bytes") if (value := whole(split.get(key))) is not None}
        for name, split in mapping(given.get("splits")).items()
        if isinstance(split, dict)
    }
    kept = {key: value for key, value in given.items() if key not in ("first_token_ids", "splits")}
    return {**mapping(_json_safe(kept)), "splits": splits} if given else {}


def _curve_names(rows: Sequence[Row]) -> list[str]:
    """Columns that are drawn, those of a hierarchical model among them."""
    chunks = {
        name for row in rows[-1:] for name in row if name.startswith("hnet/") and name.endswith("bytes_per_chunk")
    }
    return [*_CURVES, *sorted(chunks)]


def _stages(rows: Sequence[Row], stage: int | None, name: str | None) -> list[dict[str, Any]]:
    """Where a stage begins; the name is known of the present one only."""
    found: list[dict[str, Any]] = []
    for row in rows:
        value = whole(row.get("train/stage"))
        if value is not None and (not found or found[-1]["stage"] != value):
            found.append({"step": row["step"], "stage": value, "name": name if value == stage else None})
    return found


def _events(run: RunDirectory) -> list[Row]:
    """Warnings and errors, in the order in which they came."""
    texts = ("event", "severity", "message", "action")
    return [
        {"step": whole(row.get("step")), **{name: string(row.get(name)) or "" for name in texts}}
        for row in all_rows(run.events)
        if row.get("severity") in ("warning", "error")
    ]


def _evaluations(run: RunDirectory) -> list[Row]:
    return [row for row in spread_rows(run.evaluations) if number(row.get("val/loss")) is not None]


def _samples(run: RunDirectory) -> list[Row]:
    """What was written at a few times, evenly spaced over the run."""
    by_step: dict[int, list[Row]] = {}
    for row in all_rows(run.samples):
        text, step = string(row.get("generated_text")), whole(row.get("step"))
        if text is None or step is None:
            continue
        for later in [known for known in by_step if known > step]:
            del by_step[later]  # resumed from an earlier step
        texts = {"prompt": string(row.get("prompt")) or "", "mode": string(row.get("mode")) or ""}
        numbers = {name: number(row.get(name)) for name in ("mean_entropy", "repetition_frac", "seq_rep_4")}
        by_step.setdefault(step, []).append({"step": step, **texts, "text": text[:_LONGEST_TEXT], **numbers})
    chosen = evenly([{"step": step} for step in sorted(by_step)], _MOST_SAMPLINGS)
    return [row for one in chosen for row in by_step[one["step"]]]


def _system(run: RunDirectory) -> dict[str, Any]:
    rows = spread_rows(run.system)
    names = sorted({name for row in rows for name in row if name.startswith("system/")})
    return {name: points for name in names[:_MOST_SYSTEM_CURVES] if (points := curve(rows, name))}


def _checkpoints(run: RunDirectory) -> list[dict[str, Any]]:
    """Saved steps with their size, what points at them, and whether they look whole."""
    pointers = {name: _pointed(run.checkpoints / name) for name in _POINTERS}
    found = []
    for name in tail.names(run.checkpoints):
        match = _CHECKPOINT.fullmatch(name)
        if match is not None:
            folder = run.checkpoints / name
            found.append({
                "name": name,
                "step": int(match[1]),
                "bytes": tail.bytes_below(folder),
                "pointers": [pointer for pointer, target in pointers.items() if target == name],
                "has_manifest": bool(files := mapping((tail.document(folder / "manifest.json") or {}).get("files"))),
                "is_complete": all(_has_size(folder / name, entry) for name, entry in files.items()),
            })  # fmt: skip
    return sorted(found, key=lambda one: one["step"])


def _has_size(file: Path, entry: Any) -> bool:
    """Whether a file of a checkpoint is as long as its manifest says; what it holds is not read."""
    try:
        return file.stat().st_size == whole(mapping(entry).get("bytes"))
    except (OSError, ValueError):
        return False


def _pointed(file: Path) -> str:
    return tail.read_end(file, 256).decode(errors="replace").strip()


def _json_safe(value: Any, depth: int = 0) -> Any:
    """A value as strict JSON can hold it: numbers that are not finite are None, and nothing lies too deep."""
    if isinstance(value, dict):
        return {str(name): _json_safe(inner, depth + 1) for name, inner in value.items()} if _is_flat(depth) else None
    if isinstance(value, list):
        return [_json_safe(inner, depth + 1) for inner in value] if _is_flat(depth) else None
    return value if isinstance(value, str | bool | int) else number(value)


def _is_flat(depth: int) -> bool:
    return depth < _LARGEST_JSON_DEPTH
