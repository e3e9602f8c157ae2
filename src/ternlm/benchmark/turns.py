"""Calls that take turns, so that a machine whose speed drifts treats all of them alike.

Each round makes every call once, in an order that is drawn anew, so that no call always runs behind the same one. CPU
time of the process, all threads together, is what other programs disturb least; on an accelerator only wall time says
anything.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Clock = Literal["cpu", "wall"]


@dataclass
class Timing:
    """Seconds of one call, repeated.

    Attributes:
        cpu_s, wall_s: Of each call that counts, round by round.
        warmup_s: Wall time of each call before those; the first one also compiles, where something is compiled.
    """

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    warmup_s: list[float] = field(default_factory=list)

    def seconds(self, clock: Clock) -> list[float]:
        """Of each call that counts, by one clock."""
        return self.cpu_s if clock == "cpu" else self.wall_s


def clock_for(device: torch.device) -> Clock:
    """The clock that ratios are taken from: ``cpu`` on the CPU, ``wall`` elsewhere."""
    return "cpu" if device.type == "cpu" else "wall"


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    warmup: int,
    repeats: int,
    check: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time several calls in turns.

    Args:
        calls: What is timed, by name.
        warmup: Calls of each that do not count, all of one before those of the next.
        repeats: Rounds, at least 2.
        check: Called before each call; may raise to stop.
        seed: Decides the order within the rounds.

    Returns:
        The seconds of each, by name, in the order of `calls`.
    """
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: quartiles need at least 2")
    timings = {name: Timing() for name in calls}
    for name, call in calls.items():
        for _ in range(warmup):
            check()
            timings[name].warmup_s.append(timed(call)[1])
    order, generator = list(calls), random.Random(seed)
    for _ in range(repeats):
        generator.shuffle(order)
        for name in order:
            check()
            cpu, wall = timed(calls[name])
            timings[name].cpu_s.append(cpu)
            timings[name].wall_s.append(wall)
    return timings


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """CPU and wall seconds of one call, until the device is done with it."""
    synchronize()
    started, cpu_started = time.perf_counter(), time.process_time()
    call()
    synchronize()
    return time.process_time() - cpu_started, time.perf_counter() - started


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def spread(values: list[float], scale: float = 1.0) -> dict[str, float]:
    """Median and quartiles of at least two values, times a factor."""
    low, middle, high = (scale * value for value in statistics.quantiles(values, n=4, method="inclusive"))
    return {"median": middle, "low": low, "high": high}


def ratios(timing: Timing, base: Timing, clock: Clock) -> list[float]:
    """Seconds of one call by those of another, round by round."""
    return [a / b for a, b in zip(timing.seconds(clock), base.seconds(clock), strict=True)]
