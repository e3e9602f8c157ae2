"""Arms that take turns: what the benchmarks of a training step share.

All arms live in one process and take turns (`ternlm.benchmark.turns`), so that a machine whose speed drifts treats
them alike. The clock is CPU time of the process, which other programs disturb least; wall time is kept beside it.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from training_step import machine

from ternlm.benchmark.turns import interleave
from ternlm.device import keep_freed_memory

RESULTS = Path(__file__).parent / "results"

Times = dict[str, list[float]]
"""Seconds of each timed call, by the name of the arm."""


def take_turns(calls: Mapping[str, Callable[[], Any]], warmup: int, steps: int) -> tuple[Times, Times]:
    """CPU and wall seconds of `steps` calls of each arm, after `warmup` that are not counted."""
    timings = interleave(calls, warmup, steps)
    cpu = {name: timing.cpu_s for name, timing in timings.items()}
    return cpu, {name: timing.wall_s for name, timing in timings.items()}


def ratios(times: Times, arm: str, base: str) -> list[float]:
    """Times of one arm by those of another, turn by turn."""
    return [a / b for a, b in zip(times[arm], times[base], strict=True)]


def against_twin(cpu: Times, wall: Times) -> dict[str, Any]:
    """Medians of all arms, and the ratio of `ternary` to `twin` with its quartiles."""
    found = ratios(cpu, "ternary", "twin")
    return {
        "step_cpu_ms": {name: 1e3 * statistics.median(times) for name, times in cpu.items()},
        "step_wall_ms": {name: 1e3 * statistics.median(times) for name, times in wall.items()},
        "time_ratio": statistics.median(found),
        "time_ratio_quartiles": statistics.quantiles(found, n=4)[::2],
    }


def step_arguments(description: str, models: str) -> argparse.Namespace:
    """What such a benchmark is asked on the command line; `models` are those it measures by default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--models", default=models)
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--steps", type=int, default=12, help="timed steps per arm")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="print and write no file")
    return parser.parse_args()


def measure_cases(
    name: str,
    arguments: argparse.Namespace,
    measure: Callable[[str, bool], dict[str, Any]],
    line: Callable[[dict[str, Any]], str],
) -> None:
    """Measure every model and mode, print a line for each, and write NAME-DATE.json; other cases of the day stay."""
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    results = []
    for shape in arguments.models.split(","):
        for mode in arguments.modes.split(","):
            torch._dynamo.reset()  # or the graphs of all cases together reach its limit
            results.append({"model": shape, "mode": mode, **measure(shape, mode == "compiled")})
            print(line(results[-1]), flush=True)
    if arguments.dry:
        return
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}-{datetime.now(UTC):%Y-%m-%d}.json"
    new = {(result["model"], result["mode"]) for result in results}
    earlier = json.loads(file.read_text())["results"] if file.exists() else []
    results = [result for result in earlier if (result["model"], result["mode"]) not in new] + results
    file.write_text(json.dumps({"machine": machine(arguments.threads), "results": results}, indent=1) + "\n")
    print(f"written to {file}")
