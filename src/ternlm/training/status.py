"""`status.json`, the one small file that says what a run is doing now: written here, read by `ternlm.report.status`.

It is replaced whole, so a reader sees the old file or the new one. Nothing here can stop training: a
disk that refuses costs one warning. There is no thread: a long step leaves the file old, and readers
judge its age together with whether the process is alive.
"""

import json
import math
import os
import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

import psutil

import ternlm
from ternlm.files import synchronize_folder
from ternlm.run_directory import RunDirectory, read_jsonl

SCHEMA = 1

RunningState = Literal["starting", "compiling", "training", "evaluating", "saving", "waiting"]
FinalState = Literal["finished", "stopped", "preempted", "diverged", "out_of_memory", "failed"]
RUNNING: tuple[str, ...] = get_args(RunningState)
FINAL: tuple[str, ...] = get_args(FinalState)

WRITE_EVERY_S = 1.0
BEAT_EVERY_S = 5.0
_TREND_ROWS, _TREND_BLOCKS, _TREND_LEAST = 128, 16, 8


class StatusFile:
    """The current fields of a run, and the file they go to.

    Args:
        run: The run.
        warn: Called with one sentence the first time the file cannot be written.
        monotonic: Seconds that only grow, for the pace of writing.
        now: Unix time, for `started_at` and `updated_at`.
    """

    def __init__(
        self,
        run: RunDirectory,
        warn: Callable[[str], None],
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._path, self._warn, self._monotonic, self._now = run.status, warn, monotonic, now
        process = psutil.Process()
        self._fields: dict[str, Any] = {
            "schema": SCHEMA, "run_id": run.id, "state": "starting", "reason": None,
            "step": 0, "max_steps": None, "tokens_seen": 0, "progress": None, "stage": None, "stage_name": None,
            "loss": None, "loss_trend": None, "learning_rate": None, "weight_decay": None, "grad_norm": None,
            "tokens_per_sec": None, "step_time_ms": None, "eta_seconds": None, "elapsed_seconds": 0.0,
            "started_at": utc(now()), "updated_at": None,
            "pid": process.pid, "process_started": process.create_time(), "host": socket.gethostname(), "device": None,
            "val": None, "best": None, "samples": [], "last_checkpoint": None,
            "anomalies": {"count": 0, "last": None}, "ternary": None, "tracker": None,
            "exit_code": None, "error": None, "next_command": None, "version": ternlm.__version__,
        }  # fmt: skip
        self._losses = deque(_earlier(run.scalars, "train/loss"), _TREND_ROWS)
        self._evaluations = _earlier(run.evaluations, "val/loss")
        self._written_s = -math.inf
        self._is_dirty = self._has_warned = self._has_ended = False

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return int(self._fields["step"])

    @property
    def reason(self) -> str | None:
        """Why the run is in its state, if that was said."""
        reason: str | None = self._fields["reason"]
        return reason

    @property
    def loss_trend(self) -> float | None:
        """`loss_trend` of the latest logged losses, those of earlier sittings included; no clock has a say in it."""
        return loss_trend(self._losses)

    def update(self, state: RunningState | None = None, **fields: Any) -> None:
        """Take new values, and write the file if the state changed or the last write is a second old.

        `progress`, `loss_trend` and `best` follow from `step`, `loss` and `val`; a `best` that is given wins.
        """
        assert fields.keys() <= self._fields.keys(), f"not in schema {SCHEMA}: {fields.keys() - self._fields.keys()}"
        if self._has_ended:
            return
        changes_state = state is not None and state != self._fields["state"]
        self._take(fields if state is None else {**fields, "state": state})
        if changes_state or self._monotonic() - self._written_s >= WRITE_EVERY_S:
            self._write()

    def heartbeat(self) -> None:
        """Write what waits, or after some silence only the time; costs one clock reading when nothing is due."""
        pause = WRITE_EVERY_S if self._is_dirty else BEAT_EVERY_S
        if not self._has_ended and self._monotonic() - self._written_s >= pause:
            self._write()

    def final(
        self,
        state: FinalState,
        exit_code: int,
        reason: str | None = None,
        error: str | None = None,
        next_command: str | None = None,
    ) -> None:
        """Write the last word of this process and bring it to the disk; later updates are ignored."""
        self._take({
            "state": state, "exit_code": exit_code, "reason": reason, "next_command": next_command,
            "error": None if error is None else error[:2000], "eta_seconds": None,
        })  # fmt: skip
        self._write(durably=True)
        self._has_ended = True

    def _take(self, fields: Mapping[str, Any]) -> None:
        step, loss = fields.get("step"), fields.get("loss")
        while step is not None and self._losses and self._losses[-1][0] > step:
            self._losses.pop()  # resumed or rolled back: what came later did not happen
        if step is not None and loss is not None and math.isfinite(loss):
            self._losses.append((step, loss))
        self._fields.update(fields)
        val = fields.get("val")
        if val is not None and math.isfinite(val["loss"]):
            self._evaluations.append((val["step"], val["loss"]))
        if step is not None or val is not None:
            latest = max(self._fields["step"], 0 if val is None else val["step"])
            self._evaluations = [row for row in self._evaluations if row[0] <= latest]
            best = min(self._evaluations, key=lambda row: row[1], default=None)
            if "best" not in fields:
                self._fields["best"] = None if best is None else {"loss": best[1], "step": best[0]}
        self._is_dirty = True

    def _write(self, durably: bool = False) -> None:
        fields, steps = self._fields, self._fields["max_steps"]
        fields["progress"] = min(fields["step"] / steps, 1.0) if steps else None
        fields["loss_trend"] = self.loss_trend
        fields["updated_at"] = utc(self._now())
        self._written_s, self._is_dirty = self._monotonic(), False
        text = json.dumps(_strict(fields), indent=1, allow_nan=False, ensure_ascii=False, default=str) + "\n"
        try:
            # a lone surrogate in a sample becomes its JSON escape instead of an error
            _replace(self._path, text.encode(errors="backslashreplace"), durably)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                self._warn(f"'{self._path}' cannot be written: {error.strerror}. Training goes on without it.")


def loss_trend(rows: "deque[tuple[int, float]]") -> float | None:
    """How fast the loss falls: nats per 1000 steps, negative when it falls; None for fewer than 8 rows.

    Theil-Sen: the median slope over all pairs of the means of (at most 16) consecutive blocks, so that a
    few spikes change nothing.

    Args:
        rows: Step and loss, oldest first.
    """
    if len(rows) < _TREND_LEAST:
        return None
    given, size = list(rows), max(len(rows) // _TREND_BLOCKS, 1)
    blocks = [given[start : start + size] for start in range(len(given) % size, len(given), size)]
    means = [[statistics.fmean(column) for column in zip(*block, strict=True)] for block in blocks]
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(means, 2) if x2 > x1]
    return 1000 * statistics.median(slopes) if slopes else None


def utc(unix_time: float) -> str:
    """``2026-11-20T15:34:01.250Z``."""
    return datetime.fromtimestamp(unix_time, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _earlier(file: Path, column: str) -> list[tuple[int, float]]:
    """Step and loss of the rows of earlier sittings."""
    try:
        rows = read_jsonl(file)
    except OSError:
        return []
    pairs = [(row.get("step"), row.get(column)) for row in rows]
    return [(step, y) for step, y in pairs if isinstance(step, int) and isinstance(y, float) and math.isfinite(y)]


def _strict(value: Any) -> Any:
    """The value with null for numbers JSON has no name for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return value


def _replace(path: Path, content: bytes, durably: bool) -> None:
    """Replace a file through one temporary name, used again and again, so that crashes leave at most one behind."""
    temporary = path.with_name(f".{path.name}.new")
    flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(temporary, flags, 0o644)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            if durably:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
        if durably:
            synchronize_folder(path.parent)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
