"""What a training step costs: several models in turns, on one fixed batch each."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from ternlm.benchmark.energy import joules_per_call
from ternlm.benchmark.memory import tensor_peak_mb
from ternlm.benchmark.subject import Subject, Work
from ternlm.benchmark.turns import Clock, Timing, clock_for, interleave, ratios, spread
from ternlm.training.utilization import mfu, peak_flops

WARMUP, REPEATS = 3, 12


def compare_training(
    subjects: Sequence[Subject],
    work: Work | Sequence[Work],
    warmup: int = WARMUP,
    repeats: int = REPEATS,
    measures_memory: bool = True,
    check: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Time training steps of models that take turns.

    A step is forward, backward, clipping and a fused update of one micro-batch, so that a ternary step also pays for
    one rounding of all weights. Models are left trained by the steps that they made.

    Args:
        subjects: On one device, with different names.
        work: What a step reads, of all of them or of each.
        warmup: Steps of each that do not count, at least 1; compiling is apart from them.
        repeats: Steps of each that count, at least 2.
        measures_memory: Also find the largest sum of live tensors, in one more step of each.
        check: Called before each step; may raise to stop.
        say: Takes a sentence about what happens.

    Returns:
        `clock`, of the ratios; `base`, the first full-precision model, else the first; `warmup` and `repeats`; and
        `rows`, one per subject: `name`, `rows`, `sequence_length`, `tokens_per_step`, `dtype`, `is_quantized`,
        `compiled`, `compile_s` (None where nothing was to be compiled), `first_step_s`, `step_cpu_ms`, `step_wall_ms`,
        `ratio` to the base, `tokens_per_sec` by wall time, `flops_per_token`, `mfu`, `tensors_mb`,
        `joules_per_token`, `loss`. Spreads are `median`, `low` and `high`, the quartiles; the ratio is that of times
        per token, round by round.
    """
    works = [work] * len(subjects) if isinstance(work, Work) else list(work)
    started = [_begin(subject, each, check, say) for subject, each in zip(subjects, works, strict=True)]
    timings = interleave({subject.name: subject.training_step for subject in subjects}, max(warmup, 1), repeats, check)
    base, clock = base_of(subjects), clock_for(subjects[0].device)
    per_token = [each.rows * each.length for each in works]
    base_timing, base_tokens = timings[subjects[base].name], per_token[base]
    rows = []
    for subject, each, (compiled, compile_s) in zip(subjects, works, started, strict=True):
        check()
        timing, tokens = timings[subject.name], each.rows * each.length
        joules = joules_per_call(subject.training_step, subject.device, check)
        rows.append({
            "name": subject.name, "rows": each.rows, "sequence_length": each.length, "tokens_per_step": tokens,
            "dtype": str(subject.dtype).removeprefix("torch."), "is_quantized": subject.is_quantized,
            "compiled": compiled, "compile_s": compile_s, "first_step_s": timing.warmup_s[0],
            **_speed(subject, timing, tokens, each.length),
            "ratio": ratio_per_token(timing, base_timing, base_tokens / tokens, clock),
            "tensors_mb": _tensors_mb(subject) if measures_memory else None,
            "joules_per_token": None if joules is None else joules / tokens,
            "loss": subject.training_step(),
        })  # fmt: skip
    return {"clock": clock, "base": subjects[base].name, "warmup": warmup, "repeats": repeats, "rows": rows}


def base_of(subjects: Sequence[Subject]) -> int:
    """Place of the model that all are compared with: the first in full precision, else the first."""
    return next((place for place, subject in enumerate(subjects) if not subject.is_quantized), 0)


def ratio_per_token(timing: Timing, base: Timing, factor: float, clock: Clock) -> dict[str, float]:
    """Spread of the times of one model by those of the base, times the base's tokens by its own."""
    return spread(ratios(timing, base, clock), factor)


def _begin(
    subject: Subject, work: Work, check: Callable[[], None], say: Callable[[str], None]
) -> tuple[bool, float | None]:
    check()
    started = time.perf_counter()
    compiled = subject.begin_training(work, lambda sentence: say(f"{subject.name}: {sentence}"))
    return compiled, time.perf_counter() - started if work.compiled else None


def _speed(subject: Subject, timing: Timing, tokens: int, length: int) -> dict[str, Any]:
    wall = spread(timing.wall_s, 1e3)
    per_sec, flops = 1e3 * tokens / wall["median"], subject.flops_per_token(length)
    return {
        "step_cpu_ms": spread(timing.cpu_s, 1e3),
        "step_wall_ms": wall,
        "tokens_per_sec": per_sec,
        "flops_per_token": flops,
        "mfu": mfu(per_sec, flops, peak_flops(subject.device)),
    }


def _tensors_mb(subject: Subject) -> float:
    return tensor_peak_mb(subject.training_step, subject.held(), subject.device)
