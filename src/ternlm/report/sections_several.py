"""Several runs side by side: their results, their curves in one picture, and the settings in which they differ."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ternlm.report.blocks import Block, Chart, Paragraph, Section, Table
from ternlm.report.charts import Series, lines
from ternlm.report.sections_machine import middle
from ternlm.report.sections_summary import best_evaluation
from ternlm.report.sections_training import EVALUATIONS, LOG, held_out, smoothed
from ternlm.report.tail import number
from ternlm.report.wording import NOTHING, count, decimal, listed, setting, short, significant, size

Run = Mapping[str, Any]

MOST_CURVES = 8


def several_sections(record: Mapping[str, Any]) -> list[Section]:
    """Summary, curves and differences of several runs."""
    runs: Sequence[Run] = record["runs"]
    if not runs:
        return [Section("Summary", (Paragraph("There are no runs.", "bad"),))]
    return [
        Section("Side by side", (*_sentences(runs), _results(runs))),
        Section("Curves", tuple(_curves(runs[:MOST_CURVES]))),
        _differences(record),
        _alignment(runs),
    ]


def _sentences(runs: Sequence[Run]) -> list[Paragraph]:
    found = []
    pending = [f"{run['name']} ({run['status']['state']})" for run in runs if run["status"]["state"] != "finished"]
    if pending:
        verb, whose = ("is", "its") if len(pending) == 1 else ("are", "their")
        found.append(Paragraph(f"Not finished {verb} {listed(pending)}; {whose} numbers are not final.", "warning"))
    scored = [(number(row.get("val/bpb")), run) for run in runs if (row := best_evaluation(run)) is not None]
    bits = [(value, run) for value, run in scored if value is not None]
    texts = {setting(row.get("eval_id")) for run in runs for row in run["evaluations"][-1:]}
    if len(texts) > 1:
        found.append(Paragraph(
            "The runs were scored on different texts or with different tokenizers, so loss and perplexity do not "
            "compare; bits per byte do as far as the texts are alike. 'ternlm compare' scores models on one text.",
            "warning",
        ))  # fmt: skip
    elif len(bits) > 1 and len(bits) == len(runs):
        low, high = (choose(bits, key=lambda pair: pair[0]) for choose in (min, max))
        found.append(Paragraph(
            f"{low[1]['name']} has the fewest bits per byte on held-out text: {decimal(low[0])}, against "
            f"{decimal(high[0])} of {high[1]['name']}. Whether a small difference is more than chance is what "
            "'ternlm compare' tells, with an interval."
        ))  # fmt: skip
    missing = [run["name"] for run in runs if not run["evaluations"]]
    if missing:
        found.append(Paragraph(f"Never evaluated: {listed(missing)}.", "warning"))
    return found


def _results(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        row, status = best_evaluation(run) or {}, run["status"]
        packed = run["parameters"]["packed_bytes"]
        rows.append((
            run["name"], status["state"], f"{count(status['step'])} / {count(status['max_steps'])}",
            short(status["tokens_seen"]), decimal(row.get("val/loss")), decimal(row.get("val/bpb")),
            count(row.get("step")), short(run["parameters"]["total"]), NOTHING if packed is None else size(packed),
            short(middle(run["curves"].get("perf/tokens_per_sec", []))), count(sum(run["event_counts"].values())),
        ))  # fmt: skip
    titles = ("run", "state", "steps", "tokens", "best loss", "bits per byte", "at step", "parameters", "packed",
              "tokens/s", "anomalies")  # fmt: skip
    caption = "The best evaluation of each run; tokens per second is the median of training."
    return Table(titles, rows, caption, tuple(range(2, 11)), f"status.json, {EVALUATIONS}, {LOG}")


def _curves(runs: Sequence[Run]) -> list[Block]:
    blocks: list[Block] = []
    scored = [Series(run["name"], held_out(run), "dots", place) for place, run in enumerate(runs)]
    scored = [series for series in scored if series.points]
    if scored:
        ends = ", ".join(f"{one.name} {decimal(one.points[-1][1])}" for one in scored)
        draw = partial(lines, scored, "step", "nats per target")
        blocks.append(Chart("Loss on held-out text", f"At the last evaluation: {ends}.", draw, EVALUATIONS, wide=True))
    for name, title, label in (("train/loss", "Training loss", "nats per target"),
                               ("train/learning_rate", "Learning rate", "learning rate")):  # fmt: skip
        given = [(place, run) for place, run in enumerate(runs) if run["curves"].get(name)]
        if given:
            drawn = [series for place, run in given for series in smoothed(run["curves"][name], run["name"], place)]
            if name == "train/learning_rate":
                drawn = [Series(run["name"], [tuple(point) for point in run["curves"][name]], color=place)
                         for place, run in given]  # fmt: skip
            ends = ", ".join(f"{run['name']} {significant(run['curves'][name][-1][1], 4)}" for _, run in given)
            draw = partial(lines, drawn, "step", label)
            blocks.append(Chart(title, f"At the last logged step: {ends}.", draw, LOG))
    return blocks or [Paragraph("Nothing was logged by any of the runs.", "warning")]


def _differences(record: Mapping[str, Any]) -> Section:
    found = record["differences"]
    if not found:
        return Section("Settings that differ", (Paragraph("The runs have the same settings."),))
    rows = [(one["setting"], *(setting(value) for value in one["values"])) for one in found]
    titles = ("setting", *(run["name"] for run in record["runs"]))
    return Section("Settings that differ", (Table(titles, rows, "All other settings are the same.", (),
                                                  "meta/config.json"),))  # fmt: skip


def _alignment(runs: Sequence[Run]) -> Section:
    """The verdicts of all runs, part by part; what each run does stands with the run."""
    verdicts = [{row["part"]: row["verdict"] for row in run["alignment"]["rows"]} for run in runs]
    parts = list(dict.fromkeys(part for found in verdicts for part in found))
    rows = [(part, *(found.get(part, "unknown") for found in verdicts)) for part in parts]
    titles = ("part", *(run["name"] for run in runs))
    caption = "Whether each part is as BitNet b1.58 defines it."
    return Section("Against the paper", (Table(titles, rows, caption, (), "eval/alignment.json"),))
