"""A run that is written as fast as possible and disturbed in every way, for readers to cope with.

The status file is replaced, rows are appended in two halves, and now and then a file or folder is deleted, emptied,
or replaced. Steps only grow, the status file comes first, and whatever rows are there end with the newest, so a
reader never has reason to see a smaller step than before. Run as a script: the folder is its argument; it goes on
until it is killed.
"""

import json
import os
import shutil
import sys
import time
from itertools import count
from pathlib import Path

from ternlm.run_directory import RunDirectory
from ternlm.training.status import StatusFile


def write(folder: Path) -> None:
    run, seconds = RunDirectory(folder), count(0, 100)
    for file in (run.config, run.scalars, run.evaluations, run.samples):
        file.parent.mkdir(parents=True, exist_ok=True)
    run.config.write_text('{"training": {"max_steps": 1000000}}')
    status = StatusFile(run, print, monotonic=lambda: next(seconds))  # every update is due
    for step in count(1):
        status.update("training", step=step, max_steps=1_000_000, loss=2.0)
        row = {"step": step, "time": time.time(), "train/loss": 2.0, "train/grad_norm": 1.0, "filler": "x" * 300}
        append_in_halves(run.scalars, row)
        if step % 10 == 0:
            append_in_halves(run.evaluations, {"step": step, "time": time.time(), "val/loss": 2.0})
        disturb(run, step)


def append_in_halves(file: Path, row: dict[str, object]) -> None:
    line = json.dumps(row).encode() + b"\n"
    with file.open("ab", buffering=0) as stream:
        stream.write(line[: len(line) // 2])
        os.sched_yield()
        stream.write(line[len(line) // 2 :])


def disturb(run: RunDirectory, step: int) -> None:
    match step % 60:
        case 5:
            run.scalars.unlink()
        case 15:
            os.truncate(run.scalars, 0)
            run.evaluations.unlink()
        case 25:
            run.status.unlink()
        case 35:
            run.status.write_bytes(run.status.read_bytes()[:100])
        case 45:
            other = run.scalars.with_suffix(".new")
            other.write_bytes(
                b"\x00\xff not json\n[1, 2]\n" + json.dumps({"step": step, "time": time.time()}).encode() + b"\n"
            )
            other.replace(run.scalars)
        case 50:
            (run.checkpoints / f"step_{step:06d}").mkdir(parents=True)
            (run.checkpoints / f"step_{step:06d}" / "model.safetensors").write_bytes(bytes(10))
            (run.anomalies / f"step_{step}_loss_spike").mkdir(parents=True)
        case 55:
            shutil.rmtree(run.checkpoints)
            shutil.rmtree(run.anomalies)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
