"""The plain-language summary of a run: three numbers that matter, and sentences that follow from what is on disk."""

from collections.abc import Mapping
from typing import Any

from ternlm.report.blocks import Block, Kind, Number, Numbers, Paragraph, Section, Text
from ternlm.report.sections_evaluation import uniform_loss
from ternlm.report.sections_machine import middle
from ternlm.report.sections_origin import verdicts_in_words
from ternlm.report.sections_ternary import last_zero_share
from ternlm.report.sections_training import EVALUATIONS, LOG
from ternlm.report.tail import mapping, number, string
from ternlm.report.wording import count, decimal, duration, listed, percent, perplexity_name, short, size

Run = Mapping[str, Any]
Sentence = tuple[str, Kind]

_OVERFITTING, _RISE = 0.1, 0.02
"""Nats of held-out loss above training loss, and above its own minimum, from which on it is said."""

_STATES: dict[str, Sentence] = {
    "finished": ("The run is finished.", "good"),
    "stopped": ("The run was stopped before its end and can be continued.", "warning"),
    "preempted": ("The machine was taken from the run before its end; it can be continued.", "warning"),
    "diverged": ("The training diverged: the loss rose and did not come back, so the run was ended.", "bad"),
    "out_of_memory": ("The run ended because memory ran out.", "bad"),
    "failed": ("The run ended with an error.", "bad"),
    "lost": ("The process of the run is gone: it was killed, or the machine went down.", "bad"),
    "unknown": ("The run has no status file that can be read; what follows is from its other files.", "warning"),
    "damaged": ("The folder lacks the settings of the run; what follows is from what is left of it.", "bad"),
    "missing": ("The folder of the run does not exist.", "bad"),
}


def summary_section(run: Run) -> Section:
    """Three numbers, then what they mean."""
    blocks: list[Block] = []
    if numbers := main_numbers(run):
        blocks.append(Numbers(numbers[:3]))
    sentences = [*_state(run), *_what(run), *_quality(run), *_cost(run), *_trouble(run)]
    blocks += [Paragraph(text, kind) for text, kind in sentences]
    if run["status"]["next_command"]:
        blocks.append(Text(run["status"]["next_command"], "What to type next"))
    return Section("Summary", tuple(blocks))


def main_numbers(run: Run) -> list[Number]:
    """The numbers that matter, the most important first; only those that are known."""
    found = [_quality_number(run), _size_number(run), _speed_number(run), _progress_number(run)]
    return [one for one in found if one is not None]


def best_evaluation(run: Run) -> Mapping[str, Any] | None:
    """The evaluation with the lowest loss."""
    best: Mapping[str, Any] | None = min(run["evaluations"], key=lambda row: float(row["val/loss"]), default=None)
    return best


def _quality_number(run: Run) -> Number | None:
    rows = run["evaluations"]
    if rows:
        row = rows[-1]
        unit, bits = perplexity_name(row), number(row.get("val/bpb"))
        known = number(row.get("val/perplexity"))
        perplexity = (
            f"step {row['step']}" if known is None else f"perplexity {known:.2f} per {unit}, step {row['step']}"
        )
        if bits is not None:
            return Number("on held-out text", decimal(bits, 3, "bits per byte"), perplexity, EVALUATIONS)
        return Number(f"loss per {unit}, held-out text", decimal(row["val/loss"], 3, "nats"), perplexity, EVALUATIONS)
    if losses := run["curves"].get("train/loss"):
        step, loss = losses[-1]
        return Number("training loss", decimal(loss, 3, "nats"), f"step {step}; not evaluated on held-out text", LOG)
    return None


def _size_number(run: Run) -> Number | None:
    counts = run["parameters"]
    if counts["total"] is None:
        return None
    source, half = counts["source"], 2 * counts["total"]
    packed = counts["packed_bytes"]
    if packed is None or not counts["ternary"]:
        return Number("parameters", short(counts["total"]), f"{size(half)} in bfloat16", source)
    share = percent(counts["ternary"] / counts["total"])
    detail = f"{size(half)} in bfloat16; {share} of {short(counts['total'])} parameters are ternary"
    return Number("packed size", size(packed), detail, source)


def _speed_number(run: Run) -> Number | None:
    speed = middle(run["curves"].get("perf/tokens_per_sec", []))
    if speed is None:
        return None
    spent = run["status"]["elapsed_seconds"]
    detail = "median of training" if spent is None else f"median of training, {duration(spent)} in all"
    return Number("speed", f"{short(speed)} tokens/s", detail, LOG)


def _progress_number(run: Run) -> Number | None:
    step, total = run["status"]["step"], run["status"]["max_steps"]
    if step is None:
        return None
    return Number("steps", count(step), f"of {count(total)}" if total else "", "status.json")


def _state(run: Run) -> list[Sentence]:
    status = run["status"]
    if run["is_running"]:
        left = "" if status["eta_seconds"] is None else f"; about {duration(status['eta_seconds'])} are left"
        done = "" if status["progress"] is None else f", {percent(status['progress'], 0)} are done"
        return [(f"The run is still going ({status['state']}){done}{left}. Everything below is as of now.", "warning")]
    text, kind = _STATES.get(status["state"], (f"The run is in the state '{status['state']}'.", "warning"))
    reason = next((said for name in ("error", "reason") if (said := string(status[name]))), None)
    if reason is not None and status["state"] != "finished":
        text += f" Reason: {reason.rstrip('.')}."
    step, total = status["step"], status["max_steps"]
    if step is not None and total and step < total:
        text += f" It made {count(step)} of {count(total)} steps."
    return [(text, kind)]


def _epochs(passes: float) -> str:
    shown = f"{passes:.3g}"
    return f"{shown} epoch{'s' * (shown != '1')}"


def _what(run: Run) -> list[Sentence]:
    family, source = _of(run, "model.family"), string(run["data"].get("source")) or _of(run, "data.source")
    counts, status = run["parameters"], run["status"]
    if family is None:
        return []
    said = f"A {family} model"
    if counts["total"] is not None:
        said += f" with {count(counts['total'])} parameters"
        if counts["ternary"]:
            said += f", {count(counts['ternary'])} of them ternary"
    if _of(run, "quantization.weights") == "none":
        said += ", in full precision"
    epochs = run["curves"].get("train/epoch", [])
    trained = [f"{count(status['step'])} steps" if status["step"] else "",
               f"{short(status['tokens_seen'])} tokens" if status["tokens_seen"] else "",
               _epochs(epochs[-1][1]) if epochs else ""]  # fmt: skip
    known = [part for part in trained if part]
    said += f", trained for {listed(known)}" if known else ", not trained yet"
    return [(f"{said}{f' on {source}' if source is not None and known else ''}.", "plain")]


def _quality(run: Run) -> list[Sentence]:
    rows, losses = run["evaluations"], run["curves"].get("train/loss", [])
    if not rows and not losses:
        return [("Nothing was logged: there is no result.", "bad")]
    if not rows:
        return [("The run was never evaluated on held-out text. The loss on its training text "
                 f"({decimal(losses[-1][1], 3)} nats) does not say how it does on other text.", "warning")]  # fmt: skip
    first, last, unit = rows[0], rows[-1], perplexity_name(rows[-1])
    found: list[Sentence] = []
    if len(rows) == 1:
        found.append((f"There was one evaluation, at step {last['step']}: {decimal(last['val/loss'])} nats per {unit}. "
                      "One evaluation says where the run stood, not where it was going.", "warning"))  # fmt: skip
    else:
        verb = "fell" if last["val/loss"] < first["val/loss"] else "rose"
        kind: Kind = "plain" if verb == "fell" else "bad"
        found.append((f"On held-out text the loss {verb} from {decimal(first['val/loss'])} nats per {unit} at step "
                      f"{first['step']} to {decimal(last['val/loss'])} at step {last['step']}.", kind))  # fmt: skip
    return [*found, *_comparisons(run)]


def _comparisons(run: Run) -> list[Sentence]:
    """The last evaluation against the best one, the training loss, and knowing nothing."""
    last, best, found = run["evaluations"][-1], best_evaluation(run), list[Sentence]()
    assert best is not None
    rise = last["val/loss"] - best["val/loss"]
    if rise > _RISE:
        found.append((f"It was lowest at step {best['step']} ({decimal(best['val/loss'])}) and has risen by "
                      f"{decimal(rise, 3)} since.", "warning"))  # fmt: skip
    gap = number(last.get("val/train_gap"))
    if gap is not None and gap > _OVERFITTING:
        found.append((f"That is {decimal(gap, 3)} nats above the training loss: the model knows its training text "
                      "better than other text.", "warning"))  # fmt: skip
    uniform = uniform_loss(run)
    if uniform is not None and last["val/loss"] >= uniform:
        found.append((f"A model that knows nothing has {decimal(uniform)}: this one has learned nothing.", "bad"))
    return found


def _cost(run: Run) -> list[Sentence]:
    zeros = last_zero_share(run)
    found: list[Sentence] = []
    if zeros is not None:
        found.append((f"{percent(zeros)} of the ternary weights are 0, the others -1 or +1.", "plain"))
    if run["alignment"]["step"] is not None:
        found.append((verdicts_in_words(run), "plain"))
    return found


def _trouble(run: Run) -> list[Sentence]:
    counts = run["event_counts"]
    if not counts:
        return []
    total = sum(counts.values())
    skipped = sum(1 for row in run["events"] if row["action"] == "skip")
    said = f"There {'was' if total == 1 else 'were'} {total} {'anomaly' if total == 1 else 'anomalies'}: "
    said += listed([f"{number_} x {name}" for name, number_ in counts.items()])
    if skipped and len(run["events"]) == total:
        said += f"; {skipped} updates were skipped" if skipped > 1 else "; one update was skipped"
    return [(f"{said}.", "warning")]


def _of(run: Run, name: str) -> str | None:
    """A setting that is a text."""
    section, _, key = name.partition(".")
    return string(mapping(run["config"].get(section)).get(key))
