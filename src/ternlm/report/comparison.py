"""A comparison of models as text: a table for the terminal, rows for spreadsheets, and sentences."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ternlm.tracking.console import short_count

Row = Mapping[str, Any]

_BASELINES = {
    "uniform": "every token equally likely",
    "unigram": "frequencies of tokens alone",
    "3-gram": "two bytes of context (Kneser-Ney)",
    "4-gram": "three bytes of context (Kneser-Ney)",
    "5-gram": "four bytes of context (Kneser-Ney)",
    "gzip": "compressed, gzip -9",
    "xz": "compressed, xz -9e",
}
WIDTH = 100
"""Columns that the table needs, for names of moderate length."""
_CSV = ("rank", "name", "family", "weights", "parameters", "ternary_parameters", "step", "tokens_seen", "bpb",
        "bpb_low", "bpb_high", "difference", "difference_low", "difference_high", "bpb_all", "loss", "perplexity",
        "perplexity_unit", "accuracy", "n_targets", "n_bytes", "bytes_per_sec", "state_bytes", "protocol",
        "sequence_length", "dtype", "checkpoint")  # fmt: skip


def baseline_name(name: str) -> str:
    """What a baseline is, in words."""
    return _BASELINES[name]


def baseline_rows(record: Row) -> list[tuple[str, float]]:
    """The baselines that are known, the fewest bits per byte first."""
    found = record.get("baselines") or {}
    return sorted(((name, found[name]) for name in _BASELINES if found.get(name) is not None), key=lambda row: row[1])


def as_table(record: Row, ascii_only: bool = False) -> Table:
    """For the terminal: the best model first, baselines where they would stand."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("#", "model", "family", "weights", "parameters", "bits/byte", "vs best", "bytes/s", "memory"):
        is_text = title in ("model", "family", "weights")
        table.add_column(title, justify="left" if is_text else "right", no_wrap=title != "model", overflow="fold")
    rows = [(row["bpb"], _cells(row), "bold" if row["rank"] == 1 else "") for row in record["models"]]
    rows += [
        (bits, ["", name, "baseline", "", "", f"{bits:.4f}", "", "", ""], "dim") for name, bits in baseline_rows(record)
    ]
    for _, cells, style in sorted(rows, key=lambda row: (row[0] is None, row[0] or 0.0)):
        table.add_row(*(Text(cell.replace("±", "+-") if ascii_only else cell, style=style) for cell in cells))
    return table


def sentences(record: Row) -> list[str]:
    """What was scored, what the marks mean, and what makes numbers unlike."""
    models = record["models"]
    how = "windows without memory" if record["protocol"] == "block" else "memory carried through each document"
    if record["protocol"].startswith("sliding"):
        how = "windows that overlap"
    lines = [f"{record['bytes']:,} bytes in {record['documents']:,} documents; protocol {record['protocol']}: {how}"]
    if any(row["bpb_ci95"] for row in models):
        lines.append("± 95 %: documents drawn again 1,000 times, the same for all models; = not told from the best")
    elif len(models) > 1:
        lines.append("no intervals: too few documents to draw from")
    lengths = sorted({row["sequence_length"] for row in models})
    if len(lengths) > 1:
        shown = ", ".join(f"{length:,}" for length in lengths)
        lines.append(f"windows differ ({shown} tokens), as in training; --sequence-length gives all the same")
    counted = (record.get("baselines") or {}).get("ngram_training_bytes")
    if counted is not None:
        lines.append(f"n-grams counted on {counted:,} bytes of the text that '{record['baselines_of']}' was trained on")
    if any(row["bpb"] is None for row in models):
        lines.append("-: an unknown token hides text, so bits per byte cannot be told")
    return lines


def as_csv(record: Row) -> str:
    """One line per model, then one per baseline."""
    text = io.StringIO()
    table = csv.DictWriter(text, _CSV, lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    for row in record["models"]:
        table.writerow({**row, **_ends("bpb", row["bpb_ci95"]), **_ends("difference", row["difference_ci95"])})
    for name, bits in baseline_rows(record):
        table.writerow({"name": name, "family": "baseline", "bpb": bits, "n_bytes": record["bytes"]})
    return text.getvalue()


def short_size(count: int) -> str:
    """``512 B``, ``24.0 KiB``, ``1.5 MiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _cells(row: Row) -> list[str]:
    rank = "-" if row["rank"] is None else f"{row['rank']}{'=' if row['ties_best'] else ''}"
    fixed = [rank, row["name"], row["family"], row["weights"], short_count(row["parameters"])]
    return [
        *fixed,
        "-" if row["bpb"] is None else f"{row['bpb']:.4f}{_spread(row['bpb_ci95'])}",
        f"{row['difference']:+.4f}{_spread(row['difference_ci95'])}" if row["rank"] not in (None, 1) else "",
        "-" if row["bytes_per_sec"] is None else short_count(row["bytes_per_sec"]),
        short_size(row["state_bytes"]),
    ]


def _spread(ends: Sequence[float] | None) -> str:
    """Half of an interval."""
    return "" if ends is None else f" ±{(ends[1] - ends[0]) / 2:.4f}"


def _ends(name: str, ends: Sequence[float] | None) -> dict[str, float | None]:
    low, high = ends if ends is not None else (None, None)
    return {f"{name}_low": low, f"{name}_high": high}
