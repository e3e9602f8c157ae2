"""What a run says about itself: rows for the trackers, the status file, the console, each when due."""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch

from ternlm.device import peak_memory_mb
from ternlm.evaluation.evaluate import EvaluationResult
from ternlm.run_directory import RunDirectory, read_jsonl
from ternlm.tracking import Trackers, build_trackers
from ternlm.tracking.console import ConsoleTracker
from ternlm.tracking.system import SystemMonitor
from ternlm.training.anomaly import Event
from ternlm.training.clock import Clock
from ternlm.training.progress import Progress
from ternlm.training.schedule import Schedule
from ternlm.training.settings import RunSettings
from ternlm.training.status import StatusFile
from ternlm.training.step import StepResult
from ternlm.training.utilization import Peak, mfu, peak_flops


class Recorder:
    """Turns what happens into rows, and sends them to everyone who wants to know.

    Args:
        run: The run.
        settings: Its settings.
        schedule: Rates and stages.
        progress: The trainer's own position, read whenever a row is made.
        status: The run's status file.
        quiet: Show nothing on the console.
    """

    def __init__(
        self, run: RunDirectory, settings: RunSettings, schedule: Schedule, progress: Progress, status: StatusFile,
        quiet: bool,
    ) -> None:  # fmt: skip
        self.settings, self.schedule, self.progress, self.status = settings, schedule, progress, status
        self.console = ConsoleTracker(schedule.total_steps, progress.step, run.log, quiet=quiet)
        self.say = self.console.say
        self.system = SystemMonitor(run.path)
        self._run = run
        self._system_due_s = 0.0
        self._peak: Peak | None = None
        self._trackers: Trackers | None = None
        self._anomalies = len(read_jsonl(run.events)) if run.events.exists() else 0

    def start(self, device: torch.device, facts: Mapping[str, Any]) -> None:
        """Open the trackers; `facts` are what they record beside the settings."""
        built = build_trackers(self._run, self.settings.tracking, self.progress.step, self.say, facts)
        self.status.update(device=str(device), max_steps=self.schedule.total_steps, step=self.progress.step)
        self._trackers = Trackers([self.console, *built], self.say)
        self._peak, self._device = peak_flops(device), device
        self.clock = Clock(self.progress.elapsed_s)

    def step(self, k: int, result: StepResult, epoch: float | None, bytes_per_token: float | None) -> dict[str, Any]:
        """Log update `k`; returns the row."""
        rates = self.clock.read()
        remaining = self.schedule.total_steps - self.progress.step
        flops = self.settings.model.flops_per_token(self.settings.data.sequence_length)
        row = {
            **self._row(),
            "train/loss": result.loss,
            "train/perplexity": math.exp(min(result.loss, 700.0)),
            "train/bpb": None if bytes_per_token is None else result.loss / (math.log(2) * bytes_per_token),
            "train/learning_rate": self.schedule.learning_rate(k),
            "train/weight_decay": self.schedule.weight_decay(k),
            "train/grad_norm": result.grad_norm,
            **self._distillation(k, result),
            **result.telemetry,
            "train/epoch": epoch,
            "train/stage": self.schedule.stage(k),
            **(self.schedule.quantization.row(k) if self.schedule.quantization is not None else {}),
            **rates,
            "perf/mfu": mfu(rates["perf/tokens_per_sec"], flops, self._peak),
            "perf/peak_memory_mb": peak_memory_mb(self._device),
            "eta_s": remaining * rates["perf/step_time_ms"] / 1e3,
        }
        self.log("train", row)
        self.status.update(
            step=self.progress.step, tokens_seen=self.progress.tokens, elapsed_seconds=row["wall_s"],
            stage=row["train/stage"], stage_name=self.schedule.stage_name(k), loss=result.loss,
            learning_rate=row["train/learning_rate"],
            weight_decay=row["train/weight_decay"], grad_norm=result.grad_norm,
            tokens_per_sec=row["perf/tokens_per_sec"], step_time_ms=row["perf/step_time_ms"],
            eta_seconds=row["eta_s"], tracker=self.tracker_states(),
        )  # fmt: skip
        return row

    def _distillation(self, k: int, result: StepResult) -> dict[str, float]:
        """The weighted term of a teacher, which the loss does not hold, and its weight; nothing without one."""
        if result.distillation is None:
            return {}
        weight = self.settings.distillation.weight_at(k, self.schedule.total_steps)
        return {"train/distillation_loss": result.distillation, "train/distillation_weight": weight}

    def evaluation(self, result: EvaluationResult, chunks: Mapping[str, float | None]) -> None:
        """Log an evaluation, and what was found about a hierarchical model's chunks."""
        mean = self.progress.mean_loss
        gap = None if mean is None else result.loss - mean
        self.log("eval", {
            **self._row(),
            "val/loss": result.loss,
            "val/perplexity": result.perplexity,
            "val/bpb": result.bpb,
            "val/accuracy": result.accuracy,
            "val/top5_accuracy": result.top5_accuracy,
            "val/train_gap": gap,
            "train_eval_gap": None if gap is None else -gap,
            **{name: value for name, value in result.as_dict().items() if name not in ("loss", "perplexity", "wall_s")},
            **{f"val/{name}": value for name, value in chunks.items()},
        })  # fmt: skip
        self.status.update(val={"loss": result.loss, "bpb": result.bpb, "step": self.progress.step})

    def samples(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.log("sample", {**self._row(), **row})
        first = {row["mode"]: row for row in reversed(rows)}  # of each mode, its first prompt
        shown = [{"mode": r["mode"], "prompt": r["prompt"], "text": r["generated_text"][:200]} for r in first.values()]
        self.status.update(samples=shown[::-1])

    def ternary(self, row: Mapping[str, Any]) -> None:
        if row:
            self.log("ternary", {**self._row(), **row})
            shown = {name: row.get(f"ternary/all/{name}") for name in ("frac_zero", "flip_rate")}
            self.status.update(ternary=shown)

    def system_when_due(self) -> None:
        """Log CPU, memory and GPU at most every `tracking.system_every_seconds`."""
        now = time.monotonic()
        if now >= self._system_due_s:
            self._system_due_s = now + self.settings.tracking.system_every_seconds
            self.log("system", {**self._row(), **self.system.read()})

    def event(self, event: Event) -> None:
        """Log something that was noticed and decided."""
        self._anomalies += 1
        self.log("event", {**self._row(), **event.row()})
        self.status.update(anomalies={"count": self._anomalies, "last": {"event": event.name, "step": event.step}})

    def log(self, kind: Any, row: Mapping[str, Any]) -> None:
        if self._trackers is not None:
            self._trackers.log(kind, row)

    def flush(self) -> None:
        if self._trackers is not None:
            self._trackers.flush()

    def close(self) -> None:
        if self._trackers is not None:
            self._trackers.close()

    def tracker_states(self) -> str | None:
        return self._trackers.describe() if self._trackers is not None else None

    def _row(self) -> dict[str, Any]:
        return {
            "step": self.progress.step,
            "tokens_seen": self.progress.tokens,
            "wall_s": round(self.progress.elapsed_s, 3),
            "time": time.time(),
        }
