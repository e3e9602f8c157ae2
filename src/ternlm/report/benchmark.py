"""A benchmark as tables for the terminal, sentences, and sections of a page; the ratio comes first."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table as TerminalTable
from rich.text import Text as RichText

from ternlm.report import charts
from ternlm.report.blocks import Block, Chart, Number, Numbers, Paragraph, Section, Table, Text
from ternlm.tracking.console import short_count

Row = Mapping[str, Any]

WIDTH = 118
"""Columns that the tables need, for names of moderate length."""
_FILE = "benchmark.json"
_TRAINING = ("model", "time", "tokens/s", "step ms, CPU", "step ms, wall", "tensors", "process", "MFU", "mJ/token",
             "epoch")  # fmt: skip
_INFERENCE = ("model", "decode", "tokens/s", "p50", "p90", "p99 ms", "prefill", "tokens/s", "weights", "process",
              "file")  # fmt: skip


def benchmark_tables(record: Row) -> list[TerminalTable]:
    """For the terminal: one table of training and one of inference, as far as they were measured."""
    tables = []
    for _, title, columns, rows in _parts(record):
        table = TerminalTable(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
        for place, column in enumerate(columns):
            table.add_column(column, justify="right" if place else "left", no_wrap=bool(place), overflow="fold")
        for row in rows:
            table.add_row(*map(RichText, row))
        tables.append(table)
    return tables


def sentences(record: Row) -> list[str]:
    """How it was measured, on what, and what was not."""
    machine = record["machine"]
    lines = []
    for part in ("training", "inference"):
        if record[part] is not None:
            lines.append(_method(record, part))
    lines.append(_machine(machine))
    if record["training"] is not None:
        lines += [f"compiling took {row['compile_s']:.0f} s, apart from the steps: {row['name']}"
                  for row in record["training"]["rows"] if row["compiled"]]  # fmt: skip
    lines += [f"{model['name']}: {note}" for model in record["models"] for note in model["notes"]]
    lines += [_apart(record, part) for part in ("training", "inference") if _apart(record, part)]
    return lines + list(record["skipped"])


def subtitle(record: Row) -> str:
    """One line for the head of a page."""
    machine = record["machine"]
    return f"{machine['device_name'] or machine['cpu']}, {machine['measured_at'][:10]}"


def benchmark_sections(record: Row) -> list[Section]:
    """What a page shows: the main ratios, training, inference, models, and how it was measured."""
    sections = [Section("In short", [*_numbers(record), *(Paragraph(line) for line in sentences(record)[:1])])]
    for part, title, columns, rows in _parts(record):
        charts_of = [*_charts(record, part)]
        table = Table(columns, rows, title, numeric=range(1, len(columns)), source=_FILE)
        sections.append(Section(part.capitalize(), [table, *charts_of]))
    sections.append(Section("Models", [_models(record)]))
    notes = [Paragraph(line, _kind(record, line)) for line in sentences(record)]
    command = record.get("command")
    how: list[Block] = [*notes, *([Text(command, "Measured with")] if command else [])]
    return [*sections, Section("How it was measured", how)]


def _kind(record: Row, line: str) -> Any:
    return "warning" if line in record["skipped"] else "plain"


def _parts(record: Row) -> Iterator[tuple[str, str, Sequence[str], list[list[str]]]]:
    training, inference = record["training"], record["inference"]
    if training is not None:
        title = f"Training, time per token over that of {record['base']}; above 1 is slower"
        yield "training", title, *_filled(_TRAINING, [*map(_training, training["rows"])])
    if inference is not None:
        title = f"Inference, time over that of {record['base']}; above 1 is slower"
        yield "inference", title, *_filled(_INFERENCE, [*map(_inference, inference["rows"])])


def _filled(columns: Sequence[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Without columns in which nothing stands."""
    kept = [place for place in range(len(columns)) if any(row[place] != "-" for row in rows)]
    return [columns[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _training(row: Row) -> list[str]:
    joules = row["joules_per_token"]
    return [
        row["name"],
        _ratio(row["ratio"]),
        short_count(row["tokens_per_sec"]),
        f"{row['step_cpu_ms']['median']:,.0f}",
        f"{row['step_wall_ms']['median']:,.0f}",
        _size(row["tensors_mb"]),
        _size(row["process_mb"]),
        "-" if row["mfu"] is None else f"{row['mfu']:.0%}",
        "-" if joules is None else f"{1e3 * joules:.3g}",
        "-" if row["epoch_s"] is None else _duration(row["epoch_s"]),
    ]


def _inference(row: Row) -> list[str]:
    decode, prefill = row["decode"], row["prefill"]
    written = ["-"] * 5
    if decode is not None:
        latency = [f"{decode['wall_ms'][name]:.1f}" for name in ("p50", "p90", "p99")]
        written = [_ratio(decode["ratio"]), short_count(decode["tokens_per_sec"]), *latency]
    sizes = [_size(row[name]) for name in ("weights_mb", "process_mb", "disk_mb")]
    return [row["name"], *written, _ratio(prefill["ratio"]), short_count(prefill["tokens_per_sec"]), *sizes]


def _ratio(ratio: Row | None) -> str:
    if ratio is None:
        return "-"
    middle = f"{ratio['median']:.2f}x"
    if ratio["low"] is None:
        return f"{middle} *"
    is_base = ratio["low"] == ratio["high"] == 1
    return middle if is_base else f"{middle} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def _method(record: Row, part: str) -> str:
    result, options = record[part], record["options"]
    clock = "CPU time of the process" if result["clock"] == "cpu" else "wall time"
    turns = f"{result['repeats']} rounds in random order after {result['warmup']} of warm-up"
    if part == "training":
        work = options["work"]
        reads = "real text" if options["reads_text"] else "random ids"
        what = (
            f"one step is forward, backward, clipping and AdamW on {work['rows']} x {work['length']} tokens ({reads})"
        )
    else:
        what = f"one turn is {result['prompt_length']} tokens read and {result['new_tokens']} written, eagerly"
    return (
        f"{part}: {what}; {turns}; ratios round by round by {clock}, with quartiles, tokens/s and latency by wall time"
    )


def _machine(machine: Row) -> str:
    name = machine["device_name"] or machine["cpu"]
    peak = machine["peak"]
    most = f", {peak['flops'] / 1e12:.2f} TFLOP/s at most ({peak['source']})" if peak else ""
    used = f"{machine['threads']} {'thread' if machine['threads'] == 1 else 'threads'}"
    return (
        f"machine: {name}, {machine['cores']} cores, {used} used, {machine['ram_gb']} GB, "
        f"load {machine['load_average']}{most}; torch {machine['packages']['torch']}, ternlm {machine['ternlm']}"
    )


def _apart(record: Row, part: str) -> str:
    names = [row["name"] for row in (record[part] or {"rows": ()})["rows"] if not row["interleaved"]]
    if not names:
        return ""
    return f"* {part}: memory did not suffice to measure {', '.join(names)} in turns with the base; ratio of medians"


def _numbers(record: Row) -> list[Numbers]:
    """Of the first quantized model, against the base."""
    found = []
    quantized = [model["name"] for model in record["models"] if model["is_quantized"]]
    for part, quantity, label in (("training", None, "training time"), ("inference", "decode", "time per new token")):
        rows = {row["name"]: row for row in (record[part] or {"rows": ()})["rows"]}
        name = next((name for name in quantized if name in rows), None)
        row = rows[name] if name is not None else None
        row = row[quantity] if row is not None and quantity else row
        if row is not None and row["ratio"] is not None and name != record["base"]:
            detail = f"{name} over {record['base']}; above 1 is slower"
            found.append(Number(label, f"{row['ratio']['median']:.2f}x", detail, _FILE))
        if name is not None and part == "inference":
            found.append(Number("file", _size(rows[name]["disk_mb"]), f"{name}, 2 bits per ternary weight", _FILE))
    return [Numbers(found)] if found else []


def _charts(record: Row, part: str) -> Iterator[Chart]:
    rows = record[part]["rows"]
    cells = [row if part == "training" else row["decode"] for row in rows]
    found = [(row["name"], cell) for row, cell in zip(rows, cells, strict=True) if cell is not None]
    compared = [(name, cell["ratio"]) for name, cell in found if cell["ratio"] is not None]
    what = "time per token" if part == "training" else "time per new token"
    if compared:
        names, ratios = zip(*compared, strict=True)
        values = [ratio["median"] for ratio in ratios]
        ends = [None if ratio["low"] is None else (ratio["low"], ratio["high"]) for ratio in ratios]
        label = f"{what} / that of {record['base']}"
        said = ", ".join(f"{name} {value:.2f}" for name, value in zip(names, values, strict=True))
        yield Chart(
            f"{part.capitalize()}: {what}", f"{label}: {said}.",
            lambda: charts.intervals(names, values, ends, label), _FILE,
        )  # fmt: skip
    if found:
        speeds = {name: cell["tokens_per_sec"] for name, cell in found}
        said = ", ".join(f"{name} {short_count(speed)}" for name, speed in speeds.items())
        yield Chart(
            f"{part.capitalize()}: tokens per second", f"Tokens per second: {said}.",
            lambda: charts.bars([*speeds], [*speeds.values()], "tokens per second"), _FILE,
        )  # fmt: skip


def _models(record: Row) -> Table:
    rows = []
    for model in record["models"]:
        counts = model["parameters"]
        weights = "trained" if model["is_trained"] else "random"
        peer = f"{model['peer']} {model['peer_version'] or ''}".strip() if model["peer"] else "-"
        numbers = [f"{counts[name]:,}" for name in ("total", "ternary", "embedding")]
        rows.append([model["name"], model["family"], *numbers, weights, peer])
    columns = ("model", "family", "parameters", "ternary", "embeddings", "weights", "layers of")
    return Table(columns, rows, "What was measured.", numeric=(2, 3, 4), source=_FILE)


def _size(mib: float | None) -> str:
    if mib is None:
        return "-"
    return f"{mib / 1024:.2f} GiB" if mib >= 1024 else f"{mib:.1f} MiB" if mib < 100 else f"{mib:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
