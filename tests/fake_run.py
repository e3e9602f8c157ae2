"""A run folder as training leaves it, made by hand: curves, evaluations, samples, anomalies, checkpoints, status."""

import json
import math
import random
from pathlib import Path
from typing import Any

from ternlm.run_directory import RunDirectory

TIME = 1_800_000_000.0
"""When the last row was written."""


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """A JSONL file with these rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def training_row(step: int, total: int, noise: random.Random, end: float = TIME, last: int = 0) -> dict[str, Any]:
    """One row of scalars.jsonl, on a curve that falls from 5.5 to 1.2 nats with a spike at step 2000."""
    loss = 1.2 + 4.3 * math.exp(-step / 400) + noise.gauss(0, 0.03) + (0.9 if 2000 <= step < 2030 else 0)
    return {
        "step": step, "tokens_seen": step * 4096, "wall_s": step * 0.21, "time": end - 0.21 * (last - step),
        "train/loss": loss, "train/bpb": loss / math.log(2), "train/perplexity": math.exp(loss),
        "train/learning_rate": 1.2e-3 * min(step / 200, 1 - step / total + 0.02),
        "train/weight_decay": 0.1 if step < total / 2 else 0.0, "train/stage": 1 + (step >= total / 2),
        "train/grad_norm": 0.8 + 2 * math.exp(-step / 200) + abs(noise.gauss(0, 0.08)), "train/epoch": step / 1700,
        "perf/tokens_per_sec": 19500 + noise.gauss(0, 350), "perf/step_time_ms": 210.0 + noise.gauss(0, 3),
        "perf/data_time_ms": 1.3, "perf/mfu": None, "perf/peak_memory_mb": 1812.0, "eta_s": (total - step) * 0.21,
    }  # fmt: skip


def fake_run(path: Path, step: int = 3120, total: int = 5000, every: int = 1, **status: Any) -> RunDirectory:
    """A run that has reached `step`; `status` goes on top of its status file, which names a process long gone."""
    run, noise = RunDirectory(path), random.Random(7)
    run.config.parent.mkdir(parents=True, exist_ok=True)
    run.config.write_text(json.dumps({"model": {"family": "bitnet"}, "training": {"max_steps": total}}))
    rows = [training_row(k, total, noise, last=step) for k in range(every, step + 1, every)]
    write_rows(run.scalars, rows)
    evaluations = [
        {"step": row["step"], "time": row["time"], "val/loss": row["train/loss"] + 0.08, "val/bpb": 1.1,
         "val/accuracy": 0.58}
        for row in rows if row["step"] % 250 == 0
    ]  # fmt: skip
    write_rows(run.evaluations, evaluations)
    texts = {
        "greedy": "the fox went to the pond.\nHe saw a duck.",
        "typical": "a bird sang 🙂 in the rain, and 小鳥 came too; then they all went home and slept until noon.",
        "stress": "\x1b[31mzq [bold] the the the",
    }
    samples = [
        {"step": 3000, "time": TIME - 25, "prompt": "One day, ", "mode": mode, "generated_text": text, "seed": 1}
        for mode, text in texts.items()
    ]
    write_rows(run.samples, samples)
    write_rows(run.system, [{"step": step, "system/ram_percent": 41.0, "system/process_ram_mb": 1400.0}])
    write_rows(run.events, [
        {"step": 1, "event": "start", "severity": "info", "message": "started", "action": "none"},
        {"step": 2003, "event": "loss_spike", "severity": "warning", "action": "skip",
         "message": "loss 2.14 is 9.1 deviations above the last 128; the batch is skipped"},
    ])  # fmt: skip
    for name in ("step_2003_loss_spike", "step_000811_nan_inf_grad", "step_012_entropy_collapse"):
        (run.anomalies / name).mkdir(parents=True)
    for saved in range(250, step + 1, 250):
        (run.checkpoints / f"step_{saved:06d}").mkdir(parents=True)
        (run.checkpoints / f"step_{saved:06d}" / "model.safetensors").write_bytes(bytes(1000))
    run.status.write_text(json.dumps(status_fields(run, rows[-1], evaluations, total, samples) | status))
    return run


def status_fields(
    run: RunDirectory, row: dict[str, Any], evaluations: list[dict[str, Any]], total: int, samples: list[dict[str, Any]]
) -> dict[str, Any]:
    """The fields of status.json at a training row."""
    val = evaluations[-1] if evaluations else None
    best = min(evaluations, key=lambda row: row["val/loss"], default=None)
    return {
        "schema": 1, "run_id": run.id, "state": "training", "reason": None, "step": row["step"], "max_steps": total,
        "tokens_seen": row["tokens_seen"], "progress": row["step"] / total, "stage": 2, "stage_name": "full ternary",
        "loss": row["train/loss"], "loss_trend": -0.0213, "learning_rate": row["train/learning_rate"],
        "weight_decay": 0.0, "grad_norm": row["train/grad_norm"], "tokens_per_sec": row["perf/tokens_per_sec"],
        "step_time_ms": row["perf/step_time_ms"], "eta_seconds": row["eta_s"], "elapsed_seconds": row["wall_s"],
        "started_at": "2027-01-15T07:48:00.000Z", "updated_at": "2027-01-15T08:00:00.000Z", "pid": 2**22 + 1,
        "process_started": 1.0, "host": "box", "device": "cpu",
        "val": val and {"loss": val["val/loss"], "bpb": val["val/bpb"], "step": val["step"]},
        "best": best and {"loss": best["val/loss"], "step": best["step"]},
        "samples": [{"mode": s["mode"], "prompt": s["prompt"], "text": s["generated_text"]} for s in samples],
        "last_checkpoint": row["step"], "anomalies": {"count": 3, "last": {"event": "loss_spike", "step": 2003}},
        "ternary": {"frac_zero": 0.381, "flip_rate": 0.0042}, "tracker": "jsonl, csv, tensorboard",
        "exit_code": None, "error": None, "next_command": None, "version": "0.2.0",
    }  # fmt: skip
