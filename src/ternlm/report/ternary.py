"""Codes, flips and scales of every ternary matrix over a run, from `metrics/ternary.jsonl`."""

from typing import Any

from ternlm.report.spread import evenly, spread_rows
from ternlm.report.tail import number
from ternlm.run_directory import RunDirectory

KEYS = ("frac_neg", "frac_zero", "frac_pos", "flip_rate", "scale", "activation_scale", "activation_clipped",
        "near_threshold")  # fmt: skip
"""What is kept of all matrices together."""

HEAT_KEYS = ("frac_zero", "flip_rate", "scale")
"""What is kept of every matrix."""

_MOST_TIMES, _MOST_CELLS = 60, 12_000


def ternary_record(run: RunDirectory) -> dict[str, Any]:
    """`steps`, `matrices`, `values` ({key: a row per matrix, a value per step}) and `all` ({key: a value per step}).

    Steps are thinned, and of a model with very many matrices every second, third, ... is kept, so that the record of a
    long run stays small; `matrix_count` says how many there are.
    """
    found = spread_rows(run.ternary)
    names: dict[str, None] = {}
    for row in (found[:1] + found[-1:]) if found else []:
        for name in row:
            parts = name.split("/")
            if len(parts) >= 3 and parts[0] == "ternary" and parts[-1] == "scale" and parts[1:-1] != ["all"]:
                names["/".join(parts[1:-1])] = None
    rows = evenly(found, _MOST_TIMES)
    stride = max(1, -(-len(names) * len(rows) // _MOST_CELLS))
    kept = list(names)[::stride]
    return {
        "steps": [row["step"] for row in rows],
        "matrices": list(names) if stride == 1 else kept,
        "matrix_count": len(names),
        "values": {key: [[_short(row.get(f"ternary/{name}/{key}")) for row in rows] for name in kept]
                   for key in HEAT_KEYS},
        "all": {key: [_short(row.get(f"ternary/all/{key}")) for row in rows] for key in KEYS},
    }  # fmt: skip


def _short(value: Any) -> float | None:
    """Six digits are more than a picture shows."""
    found = number(value)
    return None if found is None else float(f"{found:.6g}")
