"""What a run is doing, put together from what it left on disk, without disturbing it.

`status.json` comes first; where it is missing, old or lacks keys, the ends of the metric files fill in.
A run may be written, half deleted, or made by another version while it is read.
"""

import re
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from ternlm.report import tail
from ternlm.report.tail import mapping, number, string, whole
from ternlm.run_directory import RunDirectory, use_command
from ternlm.training.status import FINAL, RUNNING, SCHEMA, utc

SILENT_S, PATIENT_S = 120.0, 1800.0
GONE = ("lost", "damaged", "missing")
_PARTS = ("meta", "checkpoints", "metrics", "status.json")
_CHECKPOINT, _ANOMALY = re.compile(r"step_(\d{6,})"), re.compile(r"step_(\d+)_(.+)")
_NEWEST = 5
_YEAR_9999 = 253_000_000_000.0
_SAME_START_S = 2.0  # the system derives it from the boot time, which moves when the clock is set

_NUMBERS = {
    "loss": "train/loss", "learning_rate": "train/learning_rate", "weight_decay": "train/weight_decay",
    "grad_norm": "train/grad_norm", "tokens_per_sec": "perf/tokens_per_sec", "step_time_ms": "perf/step_time_ms",
    "eta_seconds": "eta_s", "elapsed_seconds": "wall_s", "bpb": "train/bpb", "data_time_ms": "perf/data_time_ms",
    "peak_memory_mb": "perf/peak_memory_mb", "loss_trend": "",
}  # fmt: skip
_COUNTS = {"step": "step", "tokens_seen": "tokens_seen", "stage": "train/stage"}
_TEXTS = ("stage_name", "started_at", "host", "device", "tracker", "error", "version")
"""Fields of `status.json`, and the column of a training row that says the same."""


@dataclass(frozen=True)
class Status:
    """A run at one moment; None where nothing is known.

    The keys of `status.json` keep their names and meaning (docs/metrics.md). Beside them:

    Attributes:
        state: A state of `status.json`; ``lost`` if the process of a running state is gone; ``unknown``
            without a status file; ``damaged`` for a folder without settings; ``missing`` for no folder.
        alive: Whether the process runs; None if it cannot be seen from here.
        path: The run's folder.
        age_seconds: Since the last sign of life.
        bpb: Training loss in bits per byte, at the last logged row.
        data_time_ms: Of a step, reading the batch.
        peak_memory_mb: As the last logged row has it.
        system: Last reading of CPU, memory and GPU.
        checkpoints: Their steps, ascending.
        checkpoint_bytes, run_bytes, free_bytes: Disk use, and what is left.
        anomalies: `count`, `last`, and the `newest` five, oldest first, each {event, step}.
        events: The newest warnings and errors, oldest first, each {step, event, severity, message, action}.
    """

    schema: int
    run_id: str
    path: str
    state: str
    alive: bool | None
    reason: str | None
    step: int | None
    max_steps: int | None
    tokens_seen: int | None
    progress: float | None
    stage: int | None
    stage_name: str | None
    loss: float | None
    loss_trend: float | None
    bpb: float | None
    learning_rate: float | None
    weight_decay: float | None
    grad_norm: float | None
    tokens_per_sec: float | None
    step_time_ms: float | None
    data_time_ms: float | None
    peak_memory_mb: float | None
    eta_seconds: float | None
    elapsed_seconds: float | None
    started_at: str | None
    updated_at: str | None
    age_seconds: float | None
    pid: int | None
    host: str | None
    device: str | None
    val: dict[str, Any] | None
    best: dict[str, Any] | None
    samples: list[dict[str, Any]]
    ternary: dict[str, Any] | None
    system: dict[str, float]
    anomalies: dict[str, Any]
    events: list[dict[str, Any]]
    checkpoints: list[int]
    last_checkpoint: int | None
    checkpoint_bytes: int
    run_bytes: int
    free_bytes: int | None
    tracker: str | None
    exit_code: int | None
    error: str | None
    next_command: str | None
    version: str | None

    @property
    def is_running(self) -> bool:
        """Whether more is to come, as far as one can tell."""
        is_fresh = self.age_seconds is not None and self.age_seconds < SILENT_S
        return self.state in RUNNING or (is_fresh and self.state not in (*FINAL, *GONE))

    def as_dict(self) -> dict[str, Any]:
        """All fields, JSON values only."""
        return asdict(self)


@dataclass(frozen=True)
class Disk:
    """Bytes used by a run and its checkpoints, and the bytes left; slow to count for large runs."""

    checkpoint_bytes: int
    run_bytes: int
    free_bytes: int | None


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, or what is left of one."""
    return not {*tail.names(folder)}.isdisjoint(_PARTS)


def read_disk(run: RunDirectory) -> Disk:
    """Count the run's bytes."""
    return Disk(tail.bytes_below(run.checkpoints), tail.bytes_below(run.path), tail.free_bytes(run.path))


def read_status(run: RunDirectory, disk: Disk | None = None, now: float | None = None) -> Status:
    """Read a run; whatever is missing or broken is None in the result, and nothing is raised for it.

    Args:
        run: The run.
        disk: Counted earlier, so that a screen refreshed every second need not count again.
        now: Unix time.
    """
    now = time.time() if now is None else now
    file = tail.document(run.status)
    alive = _is_alive(file or {})
    if alive is False:  # it may have written its last word and ended since the file was read
        file = tail.document(run.status)
    given = file or {}
    rows = _Rows(run, given)
    last_sign = max(filter(None, [rows.status_time, rows.time]), default=tail.modified(run.config))
    age = None if last_sign is None else max(now - last_sign, 0.0)
    state, reason = _state(run, file, alive, age)
    values: dict[str, Any] = {name: rows.number(name, column) for name, column in _NUMBERS.items()}
    values |= {name: whole(rows.number(name, column)) for name, column in _COUNTS.items()}
    values |= {name: string(given.get(name)) for name in _TEXTS}
    values |= {name: whole(given.get(name)) for name in ("pid", "exit_code")}
    if state in (*FINAL, *GONE):
        values["eta_seconds"] = None
    max_steps = whole(given.get("max_steps")) or _planned_steps(run)
    checkpoints = sorted(int(match[1]) for match in map(_CHECKPOINT.fullmatch, tail.names(run.checkpoints)) if match)
    return Status(
        **values,
        schema=whole(given.get("schema")) or SCHEMA,
        run_id=run.id or string(given.get("run_id")) or ".",
        path=str(run.path),
        state=state,
        alive=alive,
        reason=reason,
        max_steps=max_steps,
        progress=min(values["step"] / max_steps, 1.0) if values["step"] is not None and max_steps else None,
        updated_at=None if last_sign is None else utc(last_sign),
        age_seconds=age,
        val=rows.validation(),
        best=rows.best(),
        samples=_samples(run, given),
        ternary=_numbers_in(mapping(given.get("ternary"))) or None,
        system=_last_system(run),
        anomalies=_anomalies(run, given),
        events=_events(run),
        checkpoints=checkpoints,
        last_checkpoint=checkpoints[-1] if checkpoints else whole(given.get("last_checkpoint")),
        next_command=string(given.get("next_command")) or _next_command(run, state),
        **asdict(disk or read_disk(run)),
    )


def unix_time(text: Any) -> float | None:
    """Seconds since 1970 of an ISO-8601 time; None for anything else."""
    try:
        return _plausible(datetime.fromisoformat(text).timestamp()) if isinstance(text, str) else None
    except (ValueError, OverflowError):
        return None


def _plausible(time: float | None) -> float | None:
    """A Unix time that a date can be made of."""
    return time if time is not None and 0 <= time < _YEAR_9999 else None


class _Rows:
    """The status file and the last rows of the metric files, whichever is newer."""

    def __init__(self, run: RunDirectory, given: Mapping[str, Any]) -> None:
        self.given, self.status_time = given, unix_time(given.get("updated_at"))
        trained = [row for row in tail.tail_rows(run.scalars) if number(row.get("step")) is not None]
        self.train: dict[str, Any] = trained[-1] if trained else {}
        scored = tail.tail_rows(run.evaluations)
        self.scored = [row for row in scored if None not in (number(row.get("val/loss")), number(row.get("step")))]
        self.time = _plausible(number(self.train.get("time")))

    def number(self, name: str, column: str) -> float | None:
        """A field of the status file, or the same of the last training row."""
        from_status, from_row = number(self.given.get(name)), number(self.train.get(column))
        if from_status is None or (from_row is not None and self._is_newer(self.train)):
            return from_row
        return from_status

    def validation(self) -> dict[str, Any] | None:
        """The last evaluation."""
        row = self.scored[-1] if self.scored else {}
        given = mapping(self.given.get("val"))
        loss, step = number(given.get("loss")), whole(given.get("step"))
        if row and (loss is None or self._is_newer(row)):
            loss, step, bpb = number(row["val/loss"]), whole(row["step"]), row.get("val/bpb")
        elif loss is None:
            return None
        else:
            bpb = given.get("bpb")
        accuracy = row.get("val/accuracy") if whole(row.get("step")) == step else None
        return {"loss": loss, "bpb": number(bpb), "step": step, "accuracy": number(accuracy)}

    def best(self) -> dict[str, Any] | None:
        """Loss and step of the best evaluation."""
        given = mapping(self.given.get("best"))
        pairs = [(number(row["val/loss"]), whole(row["step"])) for row in self.scored if self._is_newer(row)]
        pairs.append((number(given.get("loss")), whole(given.get("step"))))
        known = [(loss, step) for loss, step in pairs if loss is not None]
        loss, step = min(known, key=lambda pair: pair[0], default=(None, None))
        return None if loss is None else {"loss": loss, "step": step}

    def _is_newer(self, row: Mapping[str, Any]) -> bool:
        """Whether a row was made after the status file; both in whole milliseconds, as the file has them."""
        made = number(row.get("time"))
        return self.status_time is None or (made is not None and int(1e3 * made) > round(1e3 * self.status_time))


def _state(
    run: RunDirectory, file: dict[str, Any] | None, alive: bool | None, age: float | None
) -> tuple[str, str | None]:
    """The state and why it is so."""
    if tail.modified(run.path) is None:
        return "missing", "the folder is gone"
    if file is None and tail.modified(run.config) is None:
        return "damaged", "meta/config.json is missing"
    if file is None and tail.modified(run.status) is not None:
        return "unknown", "status.json cannot be read"
    if file is None:  # made by an older version
        return ("finished" if "final" in tail.names(run.checkpoints) else "unknown"), "there is no status.json"
    state, reason = string(file.get("state")) or "unknown", string(file.get("reason"))
    if state not in RUNNING:
        return state, reason
    patience = PATIENT_S if state != "training" else SILENT_S + (number(file.get("step_time_ms")) or 0.0) / 100
    if alive is False:
        return "lost", f"process {file.get('pid')} is gone and said nothing; it was {state}"
    if alive is None and age is not None and age > patience:
        return "lost", f"no sign of life from {file.get('host')} for {age:.0f} s; it was {state}"
    return state, reason


def _is_alive(given: Mapping[str, Any]) -> bool | None:
    """Whether the process that wrote the file runs, and is not another one with its number."""
    pid, started = whole(given.get("pid")), number(given.get("process_started"))
    if pid is None or given.get("host") != socket.gethostname():
        return None
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return started is None or abs(process.create_time() - started) < _SAME_START_S
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False
    except (psutil.Error, OSError):
        return None


def _planned_steps(run: RunDirectory) -> int | None:
    training = mapping((tail.document(run.config) or {}).get("training"))
    return whole(training.get("max_steps"))


def _samples(run: RunDirectory, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The texts of the last sampling, from the status file or else from the rows."""
    shown = given.get("samples")
    rows = [mapping(row) for row in shown] if isinstance(shown, list) else []
    if not rows:
        rows = tail.tail_rows(run.samples)
        rows = [row for row in rows if row.get("step") == rows[-1].get("step")]
    found = []
    for row in rows:
        text = string(row.get("text", row.get("generated_text")))
        if text is not None:
            prompt = string(row.get("prompt")) or ""
            found.append({"mode": string(row.get("mode")), "prompt": prompt, "text": text[:200]})
    return found


def _anomalies(run: RunDirectory, given: Mapping[str, Any]) -> dict[str, Any]:
    """Count, last and newest, in the order of steps."""
    known = mapping(given.get("anomalies"))
    matches = filter(None, map(_ANOMALY.fullmatch, tail.names(run.anomalies)))
    found = [{"event": event, "step": step} for step, event in sorted((int(match[1]), match[2]) for match in matches)]
    last = mapping(known.get("last"))
    named = {"event": string(last.get("event")), "step": whole(last.get("step"))} if last else None
    count = max(whole(known.get("count")) or 0, len(found))
    return {"count": count, "last": named or (found[-1] if found else None), "newest": found[-_NEWEST:]}


def _events(run: RunDirectory) -> list[dict[str, Any]]:
    rows = [row for row in tail.tail_rows(run.events) if row.get("severity") in ("warning", "error")]
    texts = ("event", "severity", "message", "action")
    return [
        {"step": whole(row.get("step")), **{name: string(row.get(name)) for name in texts}} for row in rows[-_NEWEST:]
    ]


def _last_system(run: RunDirectory) -> dict[str, float]:
    rows = tail.tail_rows(run.system)
    named = {name: value for name, value in (rows[-1] if rows else {}).items() if name.startswith("system/")}
    return _numbers_in(named)


def _numbers_in(values: Mapping[str, Any]) -> dict[str, float]:
    found = {name: number(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}


def _next_command(run: RunDirectory, state: str) -> str | None:
    if state in GONE[1:]:
        return None
    if state == "finished":
        return use_command(run, mapping((tail.document(run.config) or {}).get("objective")).get("name"))
    return f"ternlm resume {run.path}" if state in (*FINAL, "lost") else f"ternlm status {run.path} --watch"
