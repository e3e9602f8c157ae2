"""What the ternary weights do over the run: codes, flips and scales, of all matrices together and one by one."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ternlm.report.blocks import Block, Chart, Paragraph, Section
from ternlm.report.charts import Series, heat_map, lines
from ternlm.report.tail import mapping
from ternlm.report.wording import percent, significant

Run = Mapping[str, Any]

SOURCE = "metrics/ternary.jsonl"
_USUAL_ZEROS = (0.15, 0.55)
_MAPS = (
    ("frac_zero", "Share of zero codes, by matrix", "share of codes 0"),
    ("flip_rate", "Codes changed since the measurement before, by matrix", "share changed"),
    ("scale", "Scale, by matrix", "scale g"),
)


def ternary_section(run: Run) -> Section | None:
    """Curves and heat maps of the codes; None for a run that rounds nothing."""
    found = run["ternary"]
    steps = found["steps"]
    if not steps or not found["matrices"]:
        said = _absent(run)
        return None if said is None else Section("Ternary weights", (Paragraph(said, "warning"),))
    whole_run = found["all"]
    blocks: list[Block] = [Paragraph(text) for text in _sentences(found)]
    zeros = _last(whole_run["frac_zero"])
    if zeros is not None and not _USUAL_ZEROS[0] <= zeros <= _USUAL_ZEROS[1]:
        usual = " to ".join(percent(share, 0) for share in _USUAL_ZEROS)
        blocks.append(Paragraph(f"{percent(zeros)} of the codes are zero; usual are {usual}.", "warning"))
    names = (("frac_neg", "-1"), ("frac_zero", "0"), ("frac_pos", "+1"))
    shares = [Series(name, _points(steps, whole_run[key]), "dots") for key, name in names]
    if any(series.points for series in shares):
        alt = "Shares of the codes at the last measurement: " + ", ".join(
            f"{name} {percent(_last(whole_run[key]))}" for key, name in names
        )
        blocks.append(Chart("Codes of all matrices", f"{alt}.", partial(lines, shares, "step", "share"), SOURCE))
    flips = _points(steps, whole_run["flip_rate"])
    if flips:
        alt = f"{percent(flips[0][1], 2)} of the codes had changed at step {flips[0][0]}"
        if len(flips) > 1:
            alt += f", {percent(flips[-1][1], 2)} at step {flips[-1][0]}"
        alt += f"{', each time' if len(flips) > 1 else ''} since the measurement before."
        draw = partial(lines, [Series("", flips, "dots")], "step", "share changed")
        blocks.append(Chart("Codes that change", alt, draw, SOURCE))
    blocks += [chart for key, title, label in _MAPS if (chart := _map(found, key, title, label)) is not None]
    return Section("Ternary weights", tuple(blocks))


def last_zero_share(run: Run) -> float | None:
    """Share of codes that are 0 at the last measurement."""
    return _last(run["ternary"]["all"]["frac_zero"])


def _absent(run: Run) -> str | None:
    """What is to be said of a ternary run without statistics."""
    if mapping(run["config"].get("quantization")).get("weights") == "none" or not run["curves"]:
        return None
    return "The run has no statistics of its codes (tracking.ternary_every_steps)."


def _sentences(found: Mapping[str, Any]) -> list[str]:
    steps, count = found["steps"], found["matrix_count"]
    shown = len(found["matrices"])
    said = f"{count} {'matrix was' if count == 1 else 'matrices were'} measured "
    once = f"once, at step {steps[0]}."
    said += once if len(steps) == 1 else f"from step {steps[0]} to {steps[-1]}; {len(steps)} measurements are shown."
    if shown < count:
        said += f" The maps show {shown} of them."
    scales = [value for row in found["values"]["scale"] if (value := _last(row)) is not None]
    if scales:
        said += f" Scales lie between {significant(min(scales))} and {significant(max(scales))} at the end."
    return [said]


def _map(found: Mapping[str, Any], key: str, title: str, label: str) -> Chart | None:
    values = found["values"][key]
    last = [(value, name) for row, name in zip(values, found["matrices"], strict=True)
            if (value := _last(row)) is not None]  # fmt: skip
    if not last:
        return None
    (low, least), (high, most) = min(last), max(last)
    alt = f"At the last measurement lowest in {least}, {significant(low)}, and highest in {most}, {significant(high)}."
    draw = partial(heat_map, found["matrices"], found["steps"], values, "step", label)
    return Chart(title, alt, draw, SOURCE, wide=True)


def _points(steps: Sequence[int], values: Sequence[float | None]) -> list[tuple[float, float]]:
    return [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]


def _last(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)
