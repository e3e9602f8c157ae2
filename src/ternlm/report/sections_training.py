"""How the training went: loss, learning rate and gradients over the steps, with stages and anomalies."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ternlm.report.blocks import Block, Chart, Kind, Paragraph, Section, Table
from ternlm.report.charts import Mark, Series, lines
from ternlm.report.wording import count, decimal, listed, significant

Run = Mapping[str, Any]

LOG, EVALUATIONS, EVENTS = "metrics/scalars.jsonl", "eval/eval_results.jsonl", "metrics/events.jsonl"
_MOST_MARKS, _MOST_EVENTS = 40, 60
_SMOOTHED = 60
"""Points of a curve from which on a smoothed line is drawn over it."""


def training_section(run: Run) -> Section:
    """Curves of the training; says so where nothing was logged."""
    curves, found = run["curves"], marks(run)
    blocks: list[Block] = []
    losses = curves.get("train/loss", [])
    if not losses:
        blocks.append(Paragraph("No training step is in the log.", "warning"))
    if losses or run["evaluations"]:
        blocks.append(_loss_chart(run, found))
    if rates := curves.get("train/learning_rate"):
        top = max(rates, key=lambda point: point[1])
        alt = f"The learning rate is highest at step {top[0]}, {significant(top[1])}, and {significant(rates[-1][1])} "
        alt += f"at step {rates[-1][0]}.{_stages_in_words(run)}"
        blocks.append(_chart("Learning rate", alt, [Series("", _pairs(rates))], "learning rate", found))
    if norms := curves.get("train/grad_norm"):
        alt = f"The norm of the gradient before clipping is {significant(norms[0][1])} at step {norms[0][0]}, at most "
        alt += f"{significant(max(value for _, value in norms))}, and {significant(norms[-1][1])} at the end."
        is_wide = min(value for _, value in norms) > 0
        blocks.append(_chart("Norm of the gradient", alt, smoothed(norms), "norm before clipping", found, is_wide))
    for name in sorted(name for name in curves if name.startswith("hnet/")):
        points = curves[name]
        stage = name.split("/")[1].removeprefix("stage")
        alt = f"Chunks of stage {stage} hold {decimal(points[0][1], 2)} bytes at step {points[0][0]} and "
        alt += f"{decimal(points[-1][1], 2)} at step {points[-1][0]}."
        blocks.append(_chart(f"Bytes per chunk, stage {stage}", alt, [Series("", _pairs(points))], "bytes", ()))
    return Section("Training", tuple(blocks))


def events_section(run: Run) -> Section | None:
    """Warnings and errors, and what was decided; None if there were none."""
    events = run["events"]
    if not events:
        return None
    total = sum(run["event_counts"].values())
    counted = listed([f"{number} x {name}" for name, number in run["event_counts"].items()])
    rows = [(count(row["step"]), row["event"], row["message"], row["action"]) for row in events[-_MOST_EVENTS:]]
    kinds: list[Kind] = ["bad" if row["severity"] == "error" else "warning" for row in events[-_MOST_EVENTS:]]
    shown = "" if len(rows) == total else f" The table shows {len(rows)} of them, the last ones."
    titles = ("step", "event", "what happened", "decision")
    table = Table(titles, rows, "Warnings and errors, oldest first.", (0,), EVENTS, kinds)
    return Section("Anomalies", (Paragraph(f"{total} in all: {counted}.{shown}"), table), is_folded=len(rows) > 12)


def marks(run: Run) -> list[Mark]:
    """Stages that begin after the first logged step, and anomalies, thinned where they are many."""
    stages = [Mark(one["step"], one["name"] or f"stage {one['stage']}") for one in run["stages"][1:]]
    events = [row for row in run["events"] if row["step"] is not None]
    every = -(-len(events) // _MOST_MARKS) or 1
    return stages + [Mark(row["step"], row["event"], "anomaly") for row in events[::every]]


def smoothed(points: Sequence[Sequence[float]], name: str = "", color: int = 0) -> list[Series]:
    """A curve; of one with many points the raw values behind their moving average."""
    raw = _pairs(points)
    if len(raw) < _SMOOTHED:
        return [Series(name, raw, color=color)]
    weight, mean, total = 2 / (len(raw) / 15 + 1), 0.0, 0.0
    averages = []
    for step, value in raw:
        mean, total = (1 - weight) * mean + weight * value, (1 - weight) * total + weight
        averages.append((step, mean / total))
    return [Series("", raw, "thin", color), Series(name, averages, color=color)]


def held_out(run: Run) -> list[tuple[float, float]]:
    """Step and loss of every evaluation."""
    return [(row["step"], row["val/loss"]) for row in run["evaluations"]]


def _loss_chart(run: Run, found: Sequence[Mark]) -> Chart:
    losses, scored = run["curves"].get("train/loss", []), held_out(run)
    sentences = []
    if losses:
        sentences.append(
            f"Training loss is {decimal(losses[0][1], 3)} nats at step {losses[0][0]} and {decimal(losses[-1][1], 3)} "
            f"at step {losses[-1][0]}."
        )
    if scored:
        values = ", ".join(f"{decimal(value)} at step {step}" for step, value in _few(scored))
        sentences.append(f"Loss on held-out text: {values}.")
    if run["event_counts"]:
        sentences.append(f"{sum(run['event_counts'].values())} anomalies are marked.")
    series = [*smoothed(losses, "training")] if losses else []
    if scored:
        series.append(Series("held out", scored, "dots", 1))
    sources = [source for source, there in ((LOG, losses), (EVALUATIONS, scored), (EVENTS, run["events"])) if there]
    draw = partial(lines, series, "step", "nats per target", tuple(found))
    return Chart("Loss", " ".join(sentences) + _stages_in_words(run), draw, ", ".join(sources), wide=True)


def _chart(
    title: str, alt: str, series: Sequence[Series], y_label: str, found: Sequence[Mark], log_y: bool = False
) -> Chart:
    return Chart(title, alt, partial(lines, tuple(series), "step", y_label, tuple(found), log_y), LOG)


def _stages_in_words(run: Run) -> str:
    begun = [f"{one['name'] or 'stage ' + str(one['stage'])} at step {one['step']}" for one in run["stages"][1:]]
    return f" New stages begin: {listed(begun)}." if begun else ""


def _few(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The first, the lowest and the last, each once, in order."""
    chosen = {0, min(range(len(points)), key=lambda place: points[place][1]), len(points) - 1}
    return [points[place] for place in sorted(chosen)]


def _pairs(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    return [(point[0], point[1]) for point in points]
