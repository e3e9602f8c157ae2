"""How fast the run was, and what it took of the machine."""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

from ternlm.report.blocks import Block, Chart, Section, Table
from ternlm.report.charts import Series, lines
from ternlm.report.sections_training import LOG
from ternlm.report.wording import count, decimal, duration, percent, short, size

Run = Mapping[str, Any]

SYSTEM = "metrics/system.jsonl"
_MIB = 2**20
_PICTURES = (
    ("system/process_cpu_percent", "Processor time of the run", "%, 100 is one core"),
    ("system/process_ram_mb", "Memory of the process", "MiB"),
    ("system/gpu0/util", "Use of the first GPU", "%"),
    ("system/gpu0/mem_used_mb", "Memory of the first GPU", "MiB"),
    ("system/gpu0/power_w", "Power of the first GPU", "W"),
    ("system/gpu0/temp_c", "Temperature of the first GPU", "°C"),
)


def machine_section(run: Run) -> Section | None:
    """Throughput and use of the machine; None if nothing of it is known."""
    rows = _rows(run)
    blocks: list[Block] = []
    if rows:
        blocks.append(Table(("what", "value"), rows, "Medians are over the logged steps.", (1,), f"{LOG}, {SYSTEM}"))
    speeds = run["curves"].get("perf/tokens_per_sec", [])
    if len(speeds) > 1:
        alt = f"Median {short(middle(speeds))} tokens per second, between {short(min(_values(speeds)))} and "
        alt += f"{short(max(_values(speeds)))}."
        blocks.append(_chart("Tokens per second", alt, speeds, "tokens per second", LOG))
    for name, title, unit in _PICTURES:
        points = run["system"].get(name, [])
        if len(points) > 1:
            alt = f"Median {decimal(middle(points), 0)} {unit}, at most {decimal(max(_values(points)), 0)}."
            blocks.append(_chart(title, alt, points, unit, SYSTEM))
    return Section("Speed and machine", tuple(blocks), is_folded=True) if blocks else None


def middle(points: Sequence[Sequence[float]]) -> float | None:
    """Median of a curve's values."""
    return median(_values(points)) if points else None


def _rows(run: Run) -> list[tuple[str, str]]:
    status, curves = run["status"], run["curves"]
    peak, share, data = (curves.get(f"perf/{name}", []) for name in ("peak_memory_mb", "mfu", "data_time_ms"))
    found = [
        ("training time", duration(status["elapsed_seconds"]), status["elapsed_seconds"]),
        ("tokens trained on", count(status["tokens_seen"]), status["tokens_seen"]),
        ("tokens per second, median", count(middle(curves.get("perf/tokens_per_sec", []))),
         middle(curves.get("perf/tokens_per_sec", []))),
        ("time per step, median", decimal(middle(curves.get("perf/step_time_ms", [])), 1, "ms"),
         middle(curves.get("perf/step_time_ms", []))),
        ("of it reading data, median", decimal(middle(data), 1, "ms"), middle(data)),
        ("model FLOPs utilization, median", percent(middle(share)), middle(share)),
        ("peak memory", size(max(_values(peak)) * _MIB) if peak else "", peak or None),
        ("disk used by the run", size(status["run_bytes"]), status["run_bytes"] or None),
    ]  # fmt: skip
    return [(name, value) for name, value, known in found if known is not None]


def _chart(title: str, alt: str, points: Sequence[Sequence[float]], unit: str, source: str) -> Chart:
    series = [Series("", [(point[0], point[1]) for point in points])]
    return Chart(title, alt, partial(lines, series, "step", unit), source)


def _values(points: Sequence[Sequence[float]]) -> list[float]:
    return [point[1] for point in points]
