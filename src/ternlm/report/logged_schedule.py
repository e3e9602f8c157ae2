"""Learning rates and weight decay as they were logged, against the published schedule and against the run's settings.

The published schedule of BitNet b1.58: a warm-up, then two straight lines over the whole run with a drop between them
at half of it, and weight decay 0.1 that is 0 from there on.

Source:
    Ma et al., "The Era of 1-bit LLMs: Training Tips, Code and FAQ", which adds the details to arXiv 2402.17764.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ternlm.errors import SettingsError
from ternlm.report.spread import Row
from ternlm.report.tail import mapping, number, whole
from ternlm.training.schedule import Schedule, ScheduleSettings

_LOG = "metrics/scalars.jsonl"
_FEWEST = 3
"""Logged rates that tell a line from a curve."""
_STRAIGHT, _DROP, _EQUAL = 2e-3, 0.02, 1e-6
_BETAS, _DECAY = [0.9, 0.95], 0.1

Values = list[tuple[int, float]]
Judged = tuple[str, str]
"""What the run does, and a verdict."""


def schedule_rows(config: Mapping[str, Any], rows: Sequence[Row], total: int | None) -> list[dict[str, str]]:
    """Rows of {part, definition, run, verdict, source}; ``unknown`` where the log says too little.

    Args:
        config: Settings of the run.
        rows: Of its log.
        total: Steps of the whole run.
    """
    rates, decays = (_updates(rows, f"train/{name}") for name in ("learning_rate", "weight_decay"))
    judged = [
        ("learning rate", "warm-up, then two straight falling lines with a drop at half of the run", _LOG,
         _rate_shape(rates, total)),
        ("learning rate against the settings", "every logged rate is the one that the settings ask for", _LOG,
         _against_settings(rates, config, total)),
        ("weight decay", "0.1 in the first half of the run, 0 in the second", _LOG, _decay(decays, total)),
        ("optimizer", "AdamW with betas 0.9 and 0.95", "meta/config.json", _optimizer(config)),
    ]  # fmt: skip
    return [
        {"part": part, "definition": definition, "run": run, "verdict": verdict, "source": source}
        for part, definition, source, (run, verdict) in judged
    ]


def _updates(rows: Sequence[Row], column: str) -> Values:
    """Index k of an update and the value it used; the row of step s is that of update s - 1."""
    found = [(row["step"] - 1, number(row.get(column))) for row in rows if row["step"] > 0]
    return [(k, value) for k, value in found if value is not None]


def _rate_shape(rates: Values, total: int | None) -> Judged:
    if not rates:
        return "no learning rate is logged", "unknown"
    top = max(rate for _, rate in rates)
    peak = next(place for place, (_, rate) in enumerate(rates) if rate == top)
    words = f"{top:.3g} at step {rates[peak][0] + 1}, {rates[-1][1]:.3g} at step {rates[-1][0] + 1}"
    if not total or rates[-1][0] < total // 2 or top <= 0:
        return f"{words}; half of the run is not reached", "unknown"
    if rates[peak][0] >= total // 2:
        return f"{words}; highest in the second half", "differs"
    half = total // 2
    if not _is_warmup(rates[:peak], top):
        return f"{words}; no straight warm-up", "differs"
    first = [pair for pair in rates[peak + 1 :] if pair[0] < half]  # a warm-up ends one update before the line begins
    second = [pair for pair in rates[peak + 1 :] if pair[0] >= half]
    if min(len(first), len(second)) < _FEWEST:
        return f"{words}; too few rates are logged to tell its shape", "unknown"
    if not all(_is_straight(part, top) for part in (first, second)):
        return f"{words}; not straight in each half", "differs"
    drop = 1 - second[0][1] / expected if (expected := _at(first, second[0][0])) > 0 else 0.0
    falls = all(part[-1][1] < part[0][1] for part in (first, second))
    dropped = f"a drop of {100 * drop:.0f} % at half" if drop > _DROP else "no drop at half"
    return f"{words}; straight in each half, {dropped}", "same" if falls and drop > _DROP else "differs"


def _against_settings(rates: Values, config: Mapping[str, Any], total: int | None) -> Judged:
    peak, decay = (number(mapping(config.get("optimizer")).get(name)) for name in ("learning_rate", "weight_decay"))
    try:
        settings = ScheduleSettings.from_mapping(mapping(config.get("schedule")), "schedule")
    except SettingsError:
        return "the settings of the schedule cannot be read", "unknown"
    if not rates or not total or peak is None or decay is None or "schedule" not in config:
        return "no learning rate is logged" if not rates else "the settings of the schedule are not there", "unknown"
    schedule = Schedule(settings, peak, decay, total)
    offs = []
    for k, rate in rates:
        wanted = schedule.learning_rate(min(k, total - 1)) * _stage_factor(config, k, total)
        offs.append((abs(rate - wanted) / max(abs(wanted), 1e-12), k + 1))
    if all(off <= _EQUAL for off, _ in offs):
        return f"equal in all {len(rates)} logged steps (schedule {settings.name})", "same"
    worst, at = max(offs)
    return f"off by up to {100 * worst:.2g} %, at step {at} (schedule {settings.name})", "differs"


def _stage_factor(config: Mapping[str, Any], k: int, total: int) -> float:
    """What progressive quantization multiplies the rate of update k by: from 1 to `lr_factor` once all is ternary."""
    section = mapping(config.get("quantization"))
    share, factor = (number(section.get(name)) for name in ("partial_until", "lr_factor"))
    if section.get("progressive") is not True or section.get("weights") != "ternary" or None in (share, factor):
        return 1.0
    assert share is not None
    assert factor is not None
    since = k - math.floor(share * total)
    ramp = whole(section.get("lr_ramp_steps")) or 0
    if since < 0:
        return 1.0
    return 1 - (1 - factor) * (min(since / ramp, 1.0) if ramp > 0 else 1.0)


def _decay(decays: Values, total: int | None) -> Judged:
    if not decays:
        return "no weight decay is logged", "unknown"
    changes = [(next(steps)[0] + 1, value) for value, steps in groupby(decays, key=lambda pair: pair[1])]
    words = ", ".join(f"{value:g} from step {step}" for step, value in changes[:4])
    words += ", ..." if len(changes) > 4 else ""
    half = math.inf if not total else total // 2
    wrong = [value for k, value in decays if value != (_DECAY if k < half else 0.0)]
    if wrong and (total or any(value not in (_DECAY, 0.0) for value in wrong)):
        return words, "differs"
    if not total or decays[-1][0] < half:
        return f"{words}; half of the run is not reached", "unknown"
    return words, "same"


def _optimizer(config: Mapping[str, Any]) -> Judged:
    section = mapping(config.get("optimizer"))
    name, betas = section.get("name"), section.get("betas")
    if not isinstance(name, str) or not isinstance(betas, list):
        return "the settings do not say", "unknown"
    words = f"{name} with betas {' and '.join(str(beta) for beta in betas)}"
    return words, "same" if name == "adamw" and betas == _BETAS else "differs"


def _at(line: Values, k: int) -> float:
    """The line through the first and the last point, at k."""
    (x0, y0), (x1, y1) = line[0], line[-1]
    return y0 + (y1 - y0) * (k - x0) / (x1 - x0)


def _is_warmup(points: Values, top: float) -> bool:
    """Whether rates grow as the number of the update does."""
    return all(abs(rate - points[0][1] * (k + 1) / (points[0][0] + 1)) <= _STRAIGHT * top for k, rate in points)


def _is_straight(points: Values, peak: float) -> bool:
    return max(abs(rate - _at(points, k)) for k, rate in points) <= _STRAIGHT * peak
