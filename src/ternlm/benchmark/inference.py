"""What reading a prompt and writing token by token cost: several models in turns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ternlm.benchmark.energy import joules_per_call
from ternlm.benchmark.memory import bytes_of, tensor_peak_mb
from ternlm.benchmark.subject import Subject
from ternlm.benchmark.training import base_of
from ternlm.benchmark.turns import Clock, Timing, clock_for, interleave, ratios, spread, timed

WARMUP, REPEATS = 1, 5
PERCENTILES = (50, 90, 99)


def compare_inference(
    subjects: Sequence[Subject],
    prompt_length: int,
    new_tokens: int,
    rows: int = 1,
    warmup: int = WARMUP,
    repeats: int = REPEATS,
    measures_memory: bool = True,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Time prefill and decoding of models that take turns, the most probable token each time.

    A turn is one text: the prompt in one pass, then token by token through the model's memory. Blocks run as written.
    Models are used up: full-precision weights are cast once to the type in which they are multiplied, as anybody would
    who puts them to use.

    Args:
        subjects: On one device, with different names. An encoder only reads.
        prompt_length: Tokens of the prompt.
        new_tokens: Tokens written after it.
        rows: Texts side by side.
        warmup: Turns of each that do not count, at least 1.
        repeats: Turns of each that count, at least 2.
        measures_memory: Also find the largest sum of live tensors, in one more turn of each.
        check: Called before each turn; may raise to stop.

    Returns:
        `clock`, `base`, `warmup`, `repeats`, `prompt_length`, `new_tokens`, `rows_per_turn` as in `compare_training`,
        and `rows`: `name`, `dtype`, `is_quantized`, `first_turn_s`, and `prefill` and `decode` (None of an encoder),
        each with `tokens_per_sec` by wall time over all rows, `ratio` to the base, `wall_ms` of a pass as `median`,
        `low`, `high`, and of a decoded token as `p50`, `p90`, `p99` over all of them; `weights_mb` held, `tensors_mb`
        at most, `disk_mb` (`Subject.disk_bytes`), `joules_per_token` of a whole turn.
    """
    sessions = [_Session(subject, prompt_length, new_tokens, rows) for subject in subjects]
    turns = interleave({session.subject.name: session.turn for session in sessions}, max(warmup, 1), repeats, check)
    laps = [session.laps[-repeats:] for session in sessions]
    place, clock = base_of(subjects), clock_for(subjects[0].device)
    found = []
    for session, own in zip(sessions, laps, strict=True):
        check()
        subject = session.subject
        joules = joules_per_call(session.turn, subject.device, check)
        found.append({
            "name": subject.name, "dtype": str(subject.dtype).removeprefix("torch."),
            "is_quantized": subject.is_quantized, "first_turn_s": turns[subject.name].warmup_s[0],
            "prefill": _prefill(own, laps[place], rows * prompt_length, clock),
            "decode": _decode(own, laps[place], rows, clock) if subject.decodes and new_tokens else None,
            "weights_mb": bytes_of(subject.held()) / 2**20, "disk_mb": subject.disk_bytes() / 2**20,
            "tensors_mb": tensor_peak_mb(session.turn, subject.held(), subject.device) if measures_memory else None,
            "joules_per_token": None if joules is None else joules / (rows * (prompt_length + new_tokens)),
        })  # fmt: skip
    return {
        "clock": clock, "base": subjects[place].name, "warmup": warmup, "repeats": repeats,
        "prompt_length": prompt_length, "new_tokens": new_tokens, "rows_per_turn": rows, "rows": found,
    }  # fmt: skip


@dataclass
class _Lap:
    """CPU and wall seconds of the parts of one turn."""

    read: tuple[float, float]
    decoded: list[tuple[float, float]]


class _Session:
    """One model, its prompt, and the laps of all turns that it has made."""

    def __init__(self, subject: Subject, prompt_length: int, new_tokens: int, rows: int) -> None:
        self.subject, self.laps = subject, list[_Lap]()
        subject.begin_inference()
        self._prompt = subject.ids(rows, prompt_length).to(subject.device)
        self._new_tokens = new_tokens if subject.decodes else 0
        self._next = torch.zeros(rows, dtype=torch.int64)

    def turn(self) -> None:
        """Read the prompt and write."""
        lap = _Lap(timed(self._read), [])
        self.laps.append(lap)
        for _ in range(self._new_tokens):
            lap.decoded.append(timed(self._write))

    def _read(self) -> None:
        self._choose(self.subject.prefill(self._prompt))

    def _write(self) -> None:
        self._choose(self.subject.decode(self._next))

    def _choose(self, logits: Tensor) -> None:
        self._next = logits[:, : self.subject.vocab_size].argmax(dim=-1)


def _prefill(laps: list[_Lap], base: list[_Lap], tokens: int, clock: Clock) -> dict[str, Any]:
    own = Timing([lap.read[0] for lap in laps], [lap.read[1] for lap in laps])
    other = Timing([lap.read[0] for lap in base], [lap.read[1] for lap in base])
    wall = spread(own.wall_s, 1e3)
    return {
        "tokens_per_sec": 1e3 * tokens / wall["median"],
        "wall_ms": wall,
        "cpu_ms": spread(own.cpu_s, 1e3),
        "ratio": spread(ratios(own, other, clock)),
    }


def _decode(laps: list[_Lap], base: list[_Lap], rows: int, clock: Clock) -> dict[str, Any]:
    """Percentiles are over all tokens of all turns; the ratio is that of whole turns, None if the base writes none."""
    walls, cpus = ([seconds[place] for lap in laps for seconds in lap.decoded] for place in (1, 0))
    latency = {f"p{each}": 1e3 * float(np.percentile(walls, each)) for each in PERCENTILES}
    writes = all(lap.decoded for lap in base)
    return {
        "tokens_per_sec": rows * len(walls) / sum(walls),
        "wall_ms": latency,
        "cpu_ms": {f"p{each}": 1e3 * float(np.percentile(cpus, each)) for each in PERCENTILES},
        "ratio": spread(ratios(_whole(laps), _whole(base), clock)) if writes else None,
    }


def _whole(laps: list[_Lap]) -> Timing:
    """Of all decoded tokens of each turn together."""
    return Timing(*([sum(seconds[place] for seconds in lap.decoded) for lap in laps] for place in (0, 1)))
