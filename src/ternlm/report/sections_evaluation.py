"""What was measured on text that the model was not trained on, and what it wrote."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from ternlm.report.blocks import Block, Chart, Kind, Paragraph, Section, Table, Text
from ternlm.report.charts import Series, lines
from ternlm.report.sections_training import EVALUATIONS
from ternlm.report.tail import mapping, number, string, whole
from ternlm.report.wording import NOTHING, count, decimal, percent, perplexity_name, setting, significant

Run = Mapping[str, Any]

SAMPLES = "samples/samples.jsonl"
_MOST_ROWS = 24


def evaluation_section(run: Run) -> Section:
    """Held-out loss, perplexity, bits per byte and accuracy of every evaluation, and how they were measured."""
    rows, tasks = run["evaluations"], [_task_table(run["tasks"])] if run["tasks"] else []
    if not rows:
        said = "The run was not evaluated on held-out text, so nothing is known of how it does on text it has not seen."
        return Section("Evaluation", (Paragraph(said, "warning"), *tasks))
    blocks: list[Block] = [Paragraph(_how(run, rows[-1]))]
    if len({_question(row) for row in rows}) > 1:
        blocks.append(Paragraph(
            "The evaluations were not all made on the same text in the same way; the numbers do not compare.", "warning"
        ))  # fmt: skip
    blocks.append(_table(rows))
    bits = [(row["step"], value) for row in rows if (value := number(row.get("val/bpb"))) is not None]
    if len(bits) > 1:
        alt = f"Bits per byte go from {decimal(bits[0][1])} at step {bits[0][0]} to {decimal(bits[-1][1])} at step "
        alt += f"{bits[-1][0]}; the lowest is {decimal(min(value for _, value in bits))}."
        draw = partial(lines, [Series("", bits, "dots")], "step", "bits per byte")
        blocks.append(Chart("Bits per byte on held-out text", alt, draw, EVALUATIONS))
    return Section("Evaluation", (*blocks, *tasks))


def samples_section(run: Run) -> Section | None:
    """Texts that the model wrote, from early to late; None if there are none."""
    rows = run["samples"]
    if not rows:
        return None
    prompt, mode = rows[-1]["prompt"], next((row["mode"] for row in rows if row["mode"] == "typical"), rows[-1]["mode"])
    blocks: list[Block] = [Paragraph("What the model made of the same beginning as training went on, unedited.")]
    for row in rows:
        if row["mode"] == mode and row["prompt"] == prompt:
            blocks.append(_text(row))
    last = [row for row in rows if row["step"] == rows[-1]["step"] and (row["mode"], row["prompt"]) != (mode, prompt)]
    if last:
        blocks.append(Paragraph(f"Other texts of step {rows[-1]['step']}:"))
        blocks += [_text(row) for row in last[:8]]
    return Section("What it writes", tuple(blocks))


def uniform_loss(run: Run) -> float | None:
    """Nats per target of a model that knows nothing: ln V."""
    size = whole(mapping(run["config"].get("model")).get("vocab_size"))
    return math.log(size) if size is not None and size > 1 else None


def _how(run: Run, row: Mapping[str, Any]) -> str:
    """How the last evaluation was made."""
    targets, text_bytes, protocol = (row.get(name) for name in ("n_targets", "n_bytes", "protocol"))
    parts = []
    if number(targets) is not None:
        over = f" over {count(text_bytes)} bytes" if number(text_bytes) is not None else ""
        parts.append(f"{count(targets)} targets{over} of the {string(row.get('split')) or 'held-out'} split")
    if isinstance(protocol, str):
        length = whole(row.get("sequence_length"))
        parts.append(f"protocol {protocol}" + ("" if length is None else f", windows of {count(length)}"))
    if isinstance(row.get("weights"), str) and isinstance(row.get("dtype"), str):
        parts.append(f"{row['weights']} weights, computed in {row['dtype']}")
    if isinstance(row.get("eval_id"), str):
        parts.append(f"text {row['eval_id']}")
    said = "; ".join(parts) or "How the text was scored is not in the rows"
    lowest = uniform_loss(run)
    known = "" if lowest is None else f" A model that knows nothing has a loss of {lowest:.4f} nats."
    return f"{said}.{known}"


def _table(rows: list[dict[str, Any]]) -> Table:
    shown = rows if len(rows) <= _MOST_ROWS else [*rows[:2], *rows[-_MOST_ROWS + 2 :]]
    best = min(rows, key=lambda row: float(row["val/loss"]))
    if best not in shown:
        shown = sorted([*shown, best], key=lambda row: int(row["step"]))
    cells = [
        (
            count(row["step"]),
            decimal(row["val/loss"]),
            decimal(row.get("val/perplexity"), 3),
            decimal(row.get("val/bpb")),
            percent(row.get("val/accuracy")),
            percent(row.get("val/top5_accuracy")),
            _signed(row.get("val/train_gap")),
        )
        for row in shown
    ]
    kinds: list[Kind] = ["good" if row is best and len(rows) > 1 else "plain" for row in shown]
    unit = perplexity_name(rows[-1])
    titles = ("step", "loss, nats", f"perplexity per {unit}", "bits per byte", "right", "right of 5", "above training")
    left_out = "" if len(shown) == len(rows) else f" {len(shown)} of {len(rows)} evaluations."
    caption = f"Held-out text. Right: the likeliest {unit} was the true one.{left_out}"
    return Table(titles, cells, caption, tuple(range(7)), EVALUATIONS, kinds)


def _task_table(tasks: list[dict[str, Any]]) -> Table:
    """A row for each metric of each task."""
    rows = [
        (row["task"], count(row["step"]), name, significant(value, 4) + _give_or_take(row["errors"].get(name)),
         count(row["n_samples"]), "" if row["limit"] is None else f"first {row['limit']}")
        for row in tasks
        for name, value in row["metrics"].items()
    ]  # fmt: skip
    titles = ("task", "step", "metric", "value", "samples", "of them")
    caption = "Tasks of lm-evaluation-harness; ± is the standard error where the harness gives one."
    return Table(titles, rows, caption, (1, 3, 4), ", ".join(dict.fromkeys(row["source"] for row in tasks)))


def _give_or_take(error: float | None) -> str:
    return "" if error is None else f" ± {error:.2g}"


def _question(row: Mapping[str, Any]) -> tuple[str, ...]:
    names = ("eval_id", "split", "protocol", "sequence_length", "weights", "mask_id")
    return tuple(setting(row.get(name)) for name in names)


def _signed(value: Any) -> str:
    found = number(value)
    return NOTHING if found is None else f"{found:+.3f}"


def _text(row: Mapping[str, Any]) -> Text:
    entropy = number(row["mean_entropy"])
    said = "" if entropy is None else f", mean entropy {entropy:.2f} nats"
    name = f"Step {row['step']}" + (f", {row['mode']}" if row["mode"] else "") + said
    whole_text = row["text"] if row["mode"] == "fill" else row["prompt"] + row["text"]
    return Text(whole_text, name, 0 if row["mode"] == "fill" else len(row["prompt"]))
