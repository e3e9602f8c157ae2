"""An analysis as text: one table of extremes for the terminal, or every row, and rows for spreadsheets."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

Row = Mapping[str, Any]


class _Quantity(NamedTuple):
    """One line of the summary: a column of one kind of rows."""

    rows: str
    key: str
    label: str
    form: str = ".4g"


_QUANTITIES = (
    _Quantity("matrices", "negative", "weights at -1", ".1%"),
    _Quantity("matrices", "zero", "weights at 0", ".1%"),
    _Quantity("matrices", "positive", "weights at +1", ".1%"),
    _Quantity("matrices", "scale_median", "scale"),
    _Quantity("matrices", "threshold_median", "threshold / scale"),
    _Quantity("matrices", "relative_error", "squared error", ".1%"),
    _Quantity("sites", "utilization", "codes in use", ".1%"),
    _Quantity("sites", "entropy", "entropy of codes", ".1%"),
    _Quantity("sites", "clip_rate", "clipped", ".2%"),
    _Quantity("norms", "clip_rate", "clipped by norm", ".2%"),
    _Quantity("norms", "saturation", "saturated in norm", ".2%"),
    _Quantity("norms", "alpha_eff", "alpha of norm"),
    _Quantity("stream", "std", "std of stream"),
    _Quantity("skips", "value", "skip scale"),
    _Quantity("changes", "change", "loss, one unrounded", "+.4f"),
    _Quantity("parts", "forward_ms", "forward, ms", ".2f"),
    _Quantity("parts", "backward_ms", "backward, ms", ".2f"),
)

_COLUMNS = {
    "matrices": {"name": "", "rows": "rows", "columns": "columns", "weights": "weights", "negative": "-1", "zero": "0",
                 "positive": "+1", "dead_rows": "dead rows", "scale_median": "scale", "scale_q05": "5%",
                 "scale_q95": "95%", "threshold_median": "delta/s", "relative_error": "error"},
    "sites": {"name": "", "bits": "bits", "codes_used": "codes", "utilization": "in use", "entropy": "entropy",
              "clip_rate": "clipped", "at_limit": "at limit", "step": "step", "std": "std", "absmax": "largest"},
    "norms": {"name": "", "clip_rate": "clipped", "saturation": "saturated", "alpha_eff": "alpha", "clip": "a",
              "stream_std": "std of input"},
    "stream": {"name": "", "std": "std", "absmax": "largest"},
    "skips": {"name": "", "value": "scale"},
    "sensitivity": {"name": "", "loss": "loss", "change": "change", "error": "standard error"},
    "time": {"name": "", "forward_ms": "forward, ms", "backward_ms": "backward, ms"},
}  # fmt: skip
_SHARES = {"negative", "zero", "positive", "relative_error", "utilization", "entropy", "clip_rate", "at_limit",
           "saturation"}  # fmt: skip
_NUMBER_WIDTH = 8
FULL_WIDTH = 140
"""Columns that the tables of `full_tables` need, for the longest names."""


def summary_table(analysis: Row) -> Table:
    """The lowest, median and highest value of each quantity, and where: a height that does not grow with the model."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name, justify in (
        ("lowest", "right"),
        ("at", "left"),
        ("median", "right"),
        ("highest", "right"),
        ("at", "left"),
    ):
        least = None if name == "at" else _NUMBER_WIDTH  # in a narrow terminal places are cut, numbers are not
        style = "dim" if name == "at" else ""
        table.add_column(name, justify=justify, no_wrap=True, style=style, min_width=least)  # type: ignore[arg-type]
    kinds = _kinds(analysis)
    ternary = [row for row in kinds["matrices"] if row["negative"] is not None]
    kinds["matrices"] = ternary or kinds["matrices"]  # scales of integer rows are another thing
    for quantity in _QUANTITIES:
        rows = sorted(
            (row for row in kinds[quantity.rows] if row.get(quantity.key) is not None),
            key=lambda row: row[quantity.key],
        )
        if not rows:
            continue
        low, middle, high = (
            format(row[quantity.key], quantity.form) for row in (rows[0], rows[len(rows) // 2], rows[-1])
        )
        if low == high:
            table.add_row(quantity.label, "", "", middle, "", "")
        else:
            table.add_row(quantity.label, low, _where(rows[0], rows), middle, high, _where(rows[-1], rows))
    return table


def full_tables(analysis: Row) -> Iterator[Table]:
    """Every row of every kind."""
    for kind, rows in csv_rows(analysis).items():
        if not rows:
            continue
        columns = {
            name: label for name, label in _COLUMNS[kind].items() if any(row.get(name) is not None for row in rows)
        }
        table = Table(box=None, pad_edge=False, title=kind, title_justify="left", title_style="bold")
        for name, label in columns.items():
            table.add_column(label, justify="left" if name in ("name", "weights") else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(_cell(name, row.get(name)) for name in columns))
        yield table


def csv_rows(analysis: Row) -> dict[str, list[dict[str, Any]]]:
    """Flat rows by kind, without histograms and counts of codes."""
    measured, timed = analysis["sensitivity"], analysis["time"]
    sensitivity = []
    if measured is not None and measured["full_precision"] is not None:
        sensitivity = [measured["full_precision"], measured["activations"], *measured["blocks"], *measured["layers"]]
    kinds = {name: analysis[name] for name in ("matrices", "sites", "norms", "stream", "skips")}
    kinds |= {"sensitivity": sensitivity, "time": timed["parts"] if timed else []}
    return {
        kind: [{name: value for name, value in row.items() if name not in ("histogram", "codes")} for row in rows]
        for kind, rows in kinds.items()
    }


def sentences(analysis: Row, full: bool) -> list[str]:
    """What the numbers say: the loss in full precision, then the alarms, of each kind the worst unless `full`."""
    lines = []
    measured = analysis["sensitivity"]
    if not any(row["weights"] != "none" for row in analysis["matrices"]):
        lines.append("Nothing is quantized: this model computes in full precision.")
    if measured is not None:
        line = f"loss {_number(measured['loss'], '.4f')} nats per target over {measured['targets']:,} targets"
        if measured["full_precision"] is not None:
            for row, what in ((measured["activations"], "activations"), (measured["full_precision"], "everything")):
                line += f"; {_number(row['change'], '+.4f')} with {what} in full precision"
        lines.append(line)
    alarms = analysis["alarms"]
    if not alarms:
        return [*lines, "no alarms"]
    for kind in dict.fromkeys(alarm["kind"] for alarm in alarms):
        of_kind = [alarm for alarm in alarms if alarm["kind"] == kind]
        worst = max(of_kind, key=lambda alarm: abs(alarm["value"] - alarm["limit"]))
        if full:
            lines += [f"ALARM {alarm['sentence']}" for alarm in of_kind]
        else:
            more = f" And {len(of_kind) - 1} more like it (--full)." if len(of_kind) > 1 else ""
            lines.append(f"ALARM {worst['sentence']}{more}")
    return lines


def _kinds(analysis: Row) -> dict[str, Sequence[Row]]:
    kinds: dict[str, Sequence[Row]] = {
        name: analysis[name] for name in ("matrices", "sites", "norms", "stream", "skips")
    }
    kinds["changes"] = analysis["sensitivity"]["layers"] if analysis["sensitivity"] else []
    kinds["parts"] = analysis["time"]["parts"] if analysis["time"] else []
    return kinds


def _where(row: Row, rows: Sequence[Row]) -> str:
    """Block and last name, or the whole path within the block where others there end alike."""
    if row["block"] is None or "part" not in row:
        return str(row["name"])
    last = str(row["part"]).rpartition(".")[2]
    alike = {other["part"] for other in rows if str(other["part"]).rpartition(".")[2] == last}
    return f"{row['block']}.{last if len(alike) == 1 else row['part']}"


def _number(value: float | None, form: str) -> str:
    return "that is not finite," if value is None else format(value, form)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2%}" if name in _SHARES else f"{value:+.4f}" if name == "change" else f"{value:.4g}"
