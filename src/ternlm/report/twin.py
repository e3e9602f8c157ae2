"""A twin's result as text: a table and sentences for the terminal, sections for the page."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from rich.table import Table as Screen

from ternlm.report.blocks import Block, Chart, Kind, Number, Numbers, Paragraph, Section, Table
from ternlm.report.tail import mapping, number
from ternlm.tracking.console import short_count, short_duration

ARMS = ("ternary", "full")
NAMES = {"ternary": "ternary", "full": "full precision"}
SIZE_RULE = (
    "Packed: 2 bits per ternary weight, rows padded to 256 columns, scales in float32, everything else in bfloat16. "
    "The full-precision model is given in bfloat16 and in float32."
)
_UNKNOWN = "-"
_SOURCE = "comparison.json"


def twin_sections(found: Mapping[str, Any]) -> list[Section]:
    """The sections of a comparison as `comparison.json` holds it: what ternary weights cost, and what they save.

    Nothing is raised for a file that holds something else; the page says so.
    """
    title = "Ternary against full precision"
    try:
        return [
            Section(title, [*_headline(found), *_quality(found)]),
            Section("Loss of both arms", _curves(found)),
            Section("Size and speed", _costs(found)),
            Section("How the arms were made", _making(found)),
        ]
    except (LookupError, TypeError, ValueError, AttributeError):
        lost = f"{_SOURCE} is damaged. Make it anew with the same 'ternlm twin' command, which trains nothing again."
        return [Section(title, [Paragraph(lost, "bad")])]


def comparison_table(found: Mapping[str, Any], ascii_only: bool = False) -> Screen:
    """For the terminal: each text with what both arms reach and the gap."""
    table = Screen(box=None, pad_edge=False, header_style="dim")
    columns, rows, _ = quality_rows(found)
    for place, title in enumerate(columns):
        table.add_column(title, justify="left" if place == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell.replace("±", "+-") if ascii_only else cell for cell in row))
    return table


def cost_table(found: Mapping[str, Any]) -> Screen:
    """For the terminal: parameters, sizes, speed and training of both arms."""
    table = Screen(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for title in (NAMES["ternary"], NAMES["full"], "ratio"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in cost_rows(found):
        table.add_row(*row)
    return table


def headline(found: Mapping[str, Any]) -> list[str]:
    """The gap on each text, in a sentence each."""
    sentences = []
    for text in found["texts"]:
        gap, name = text["gap_nats"], "the validation split" if text["name"] == "validation" else text["name"]
        if gap is None:
            sentences.append(f"On {name} there is no gap: {_why_none(found)}.")
            continue
        sure = "" if text["gap_nats_ci95"] is None else " (95 %: {:+.4f} to {:+.4f})".format(*text["gap_nats_ci95"])
        bits = "" if text["gap_bpb"] is None else f", {text['gap_bpb']:+.4f} bits per byte"
        sentences.append(f"On {name} the gap is {gap:+.4f} nats per {text['unit']}{sure}{bits}.")
    return sentences


def quality_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]], list[int]]:
    """Titles, a row for each arm and text, and the places of numbers."""
    is_causal = found["arms"]["ternary"].get("is_causal") is not False
    bits = ["bits/byte"] if is_causal else []
    gap_bits = ["gap, bits/byte"] if is_causal else []
    columns = ["text", "weights", "loss", "perplexity", "untrained", *bits, "accuracy", "gap, nats", *gap_bits]
    rows = []
    for text in found["texts"]:
        gap = _with_ends(text["gap_nats"], text["gap_nats_ci95"])
        if text["spread_nats"] is not None:
            gap += f" ±{text['spread_nats']:.4f}"
        for arm in (*ARMS, "rounded"):
            result = text["rounded"] if arm == "rounded" else text["after"][arm]
            if result is None:
                continue
            before = None if arm == "rounded" else text["before"][arm]
            gap_bpb = _with_ends(text["gap_bpb"], text["gap_bpb_ci95"])
            gaps = [gap, *([gap_bpb] if is_causal else [])] if arm == "ternary" else [""] * (1 + is_causal)
            rows.append([
                text["name"], NAMES.get(arm, "full, rounded after"), _figure(result["loss"]),
                _perplexity(result), _UNKNOWN if before is None else _perplexity(before),
                *([_figure(result["bpb"])] if is_causal else []), _share(result["accuracy"]), *gaps,
            ])  # fmt: skip
    return columns, rows, list(range(2, len(columns)))


def cost_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """What the arms cost: a quantity, both arms, and the ternary arm's share of the other."""
    arms = found["arms"]
    counts = {arm: mapping(arms[arm]["parameters"]) for arm in ARMS}
    rows = [
        _row(f"parameters{label}", counts["ternary"].get(key), counts["full"].get(key), _thousands, None)
        for label, key in (("", "total"), (", in ternary layers", "ternary"), (", embedding and head", "embedding"))
    ]
    sizes = {arm: mapping(arms[arm]["bytes"]) for arm in ARMS}
    packed = sizes["ternary"].get("packed")
    rows.append(_row("size, packed against bfloat16", packed, sizes["full"].get("bf16"), _size))
    rows.append(_row("size, packed against float32", packed, sizes["full"].get("fp32"), _size))
    rows += _speed_rows(mapping(found.get("timing")))
    for label, key, shown in (
        ("training tokens", "tokens", lambda value: short_count(int(value))),
        ("epochs", "epochs", lambda value: f"{value:.2f}"),
        ("steps", "steps", lambda value: f"{int(value):,}"),
        ("training time", "seconds", short_duration),
    ):
        ternary, full = (number((arms[arm]["runs"] or [{}])[0].get(key)) for arm in ARMS)
        rows.append(_row(label, ternary, full, shown, None))
    return rows


def tuning_rows(found: Mapping[str, Any]) -> tuple[list[list[str]], list[Kind]]:
    """The points of both sweeps with their losses, and how each row is set off."""
    rows: list[list[str]] = []
    kinds: list[Kind] = []
    for arm in ARMS:
        tuning = found["arms"][arm]["tuning"]
        for point in tuning["points"]:
            is_chosen = point["learning_rate"] == tuning["chosen"]
            loss = point["state"].replace("_", " ") if point["loss"] is None else f"{point['loss']:.4f}"
            rows.append([NAMES[arm], f"{point['learning_rate']:g}", loss, "chosen" if is_chosen else ""])
            kinds.append("good" if is_chosen else "plain")
    return rows, kinds


def _headline(found: Mapping[str, Any]) -> list[Block]:
    numbers = []
    for text in found["texts"]:
        if text["gap_nats"] is not None:
            ends = text["gap_nats_ci95"]
            sure = "no interval: few documents" if ends is None else f"95 %: {ends[0]:+.3f} to {ends[1]:+.3f}"
            numbers.append(Number(f"gap on {text['name']}", f"{text['gap_nats']:+.3f} nats", sure, _SOURCE))
    sizes = {arm: mapping(found["arms"][arm]["bytes"]) for arm in ARMS}
    if sizes["ternary"].get("packed") and sizes["full"].get("bf16"):
        ratio = sizes["full"]["bf16"] / sizes["ternary"]["packed"]
        detail = f"{_size(sizes['ternary']['packed'])} packed, {_size(sizes['full']['bf16'])} in bfloat16"
        numbers.append(Number("smaller by", f"{ratio:.1f}x", detail, _SOURCE))
    blocks: list[Block] = [Numbers(numbers[-3:] if len(numbers) > 3 else numbers)] if numbers else []
    blocks.append(Paragraph(" ".join(headline(found))))
    blocks.append(
        Paragraph(
            "A gap is the loss of the ternary model less that of its twin, the same network in full precision: above 0 "
            "the ternary model is worse, below 0 it is better."
        )
    )
    return blocks


def _quality(found: Mapping[str, Any]) -> list[Block]:
    columns, rows, numeric = quality_rows(found)
    blocks: list[Block] = []
    if rows:
        caption = (
            "Loss in nats per target, with the weights after the last update; untrained, with those before the first."
        )
        blocks.append(Table(columns, rows, caption, numeric, "scores/"))
    gaps = [text for text in found["texts"] if text["gap_nats"] is not None]
    if gaps:
        alt = " ".join(headline(found))
        blocks.append(Chart("Gap by text, with its interval", alt, lambda: _draw_gaps(gaps), _SOURCE))
    return blocks


def _curves(found: Mapping[str, Any]) -> list[Block]:
    curves = {arm: mapping(found["arms"][arm]["curves"]) for arm in ARMS}
    if not any(curve for each in curves.values() for curve in each.values()):
        return [Paragraph("Neither arm has logged a loss.", "warning")]
    ends = [
        f"{NAMES[arm]} ends at {curves[arm]['val/loss'][-1][1]:.4f}" for arm in ARMS if curves[arm].get("val/loss")
    ]  # fmt: skip
    alt = f"Validation loss over optimizer steps: {', '.join(ends) or 'not evaluated yet'}."
    return [
        Chart(
            "Loss: held out (dots) and while training (thin)",
            alt,
            lambda: _draw_curves(curves),
            "ternary/, full/: metrics and eval",
            True,
        )
    ]


def _costs(found: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = [
        Table(["", NAMES["ternary"], NAMES["full"], "ratio"], cost_rows(found), SIZE_RULE, (1, 2, 3), _SOURCE)
    ]
    timing = mapping(found.get("timing"))
    if timing:
        training = timing["training"]
        clock = "CPU time of the process" if training["clock"] == "cpu" else "wall time"
        row = training["rows"][0]
        blocks.append(
            Paragraph(
                f"Speed: both models in turns on this machine, {training['repeats']} repetitions; medians, and ratios "
                f"turn by turn from {clock}. A training step reads {row['rows']} x {row['sequence_length']} tokens "
                f"in {row['dtype']}; CPU threads: {timing['threads']}."
            )
        )
    else:
        blocks.append(Paragraph("The two models were not timed against each other."))
    return blocks


def _making(found: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = [Paragraph(note["text"], note["kind"]) for note in found["notes"]]
    rows, kinds = tuning_rows(found)
    if rows:
        caption = "Learning rates that were tried, with validation loss at the end of a schedule of their own."
        blocks.append(Table(["weights", "learning rate", "validation loss", ""], rows, caption, (1, 2), _SOURCE, kinds))
    if found["differs"]:
        differs = [[row["setting"], _value(row["ternary"]), _value(row["full"])] for row in found["differs"]]
        caption = f"Every setting in which the arms differ; {len(found['same'])} others are equal."
        source = "ternary/meta/config.json, full/meta/config.json"
        blocks.append(Table(["setting", NAMES["ternary"], NAMES["full"]], differs, caption, (), source))
    return blocks


def _draw_gaps(texts: list[Mapping[str, Any]]) -> Any:
    from ternlm.report.charts import intervals

    names, gaps = [text["name"] for text in texts], [text["gap_nats"] for text in texts]
    ends = [tuple(text["gap_nats_ci95"]) if text["gap_nats_ci95"] else None for text in texts]
    return intervals(names, gaps, ends, "gap, nats per target", zero_line=True)


def _draw_curves(curves: Mapping[str, Mapping[str, Any]]) -> Any:
    from ternlm.report.charts import Series, lines

    series = []
    for color, arm in enumerate(ARMS):
        series.append(Series("", curves[arm].get("train/loss", ()), "thin", color))
        series.append(Series(NAMES[arm], curves[arm].get("val/loss", ()), "dots", color))
    return lines(series, "optimizer step", "loss, nats per target")


def _speed_rows(timing: Mapping[str, Any]) -> list[list[str]]:
    """Medians of both arms; the ratio is that of times for a step, and of tokens per second otherwise."""
    if not timing:
        return []
    ternary, full = _by_arm(timing, "training")
    ratio = ternary["ratio"]["median"] / full["ratio"]["median"]
    rows = [
        _row("training step, ms", _median(ternary["step_wall_ms"]), _median(full["step_wall_ms"]), _tenth, ratio),
        _row("training, tokens/s", *_speeds(ternary, full), _thousands, 1 / ratio),
        _row("training, peak memory of tensors", ternary["tensors_mb"], full["tensors_mb"], _megabytes),
    ]
    ternary, full = _by_arm(timing, "inference")
    for part in ("prefill", "decode"):
        one, other = ternary[part], full[part]
        if one is not None and other is not None:
            ratio = other["ratio"]["median"] / one["ratio"]["median"]
            rows.append(_row(f"{part}, tokens/s", *_speeds(one, other), _thousands, ratio))
    return rows


def _by_arm(timing: Mapping[str, Any], part: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    rows = {row["name"]: row for row in timing[part]["rows"]}
    return rows[timing["by_arm"]["ternary"]], rows[timing["by_arm"]["full"]]


def _speeds(ternary: Mapping[str, Any], full: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return _median(ternary["tokens_per_sec"]), _median(full["tokens_per_sec"])


def _median(value: Any) -> float | None:
    return number(value["median"] if isinstance(value, Mapping) else value)


def _row(
    label: str,
    ternary: float | None,
    full: float | None,
    shown: Callable[[float], str],
    ratio: float | Literal["own"] | None = "own",
) -> list[str]:
    """A quantity of both arms; the ratio is theirs unless another is given, or none."""
    cells = [_UNKNOWN if value is None else shown(value) for value in (ternary, full)]
    if ratio == "own":
        ratio = None if ternary is None or not full else ternary / full
    return [label, *cells, "" if ratio is None else f"{ratio:.2f}"]


def _why_none(found: Mapping[str, Any]) -> str:
    lacking = [
        NAMES[arm]
        for arm in ARMS
        if not any(run["state"] == "finished" for run in found["arms"][arm]["runs"])
    ]  # fmt: skip
    return f"the {' and the '.join(lacking)} arm did not finish" if lacking else "the arms were scored on other targets"


def _with_ends(value: float | None, ends: Any) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value:+.4f}" + ("" if ends is None else f" [{ends[0]:+.4f}, {ends[1]:+.4f}]")


def _figure(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.4f}"


def _perplexity(result: Mapping[str, Any]) -> str:
    value = number(result.get("perplexity"))
    return _UNKNOWN if value is None else f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def _share(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.2%}"


def _thousands(value: float) -> str:
    return f"{value:,.0f}"


def _tenth(value: float) -> str:
    return f"{value:,.1f}"


def _megabytes(value: float) -> str:
    """Of MiB, which is what is measured; sizes of files are in 10^6 bytes."""
    return f"{value:,.0f} MiB"


def _size(value: float) -> str:
    return f"{value / 1e6:,.2f} MB"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
