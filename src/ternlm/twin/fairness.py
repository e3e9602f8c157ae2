"""What a reader of a gap must know before believing it: sentences computed from the comparison itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from ternlm.twin.definition import ARMS

CLAIMED_NATS = 0.02
"""Gaps below this say nothing without several seeds."""
_BIAS = {
    "full": "an untuned full-precision arm makes the gap look smaller than it is",
    "ternary": "an untuned ternary arm makes the gap look larger than it is",
}


def fairness(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Notes on a comparison, each `kind` (``plain``, ``good``, ``warning`` or ``bad``) and `text`."""
    notes = [*_tuning(found), *_unequal(found), *_schedules(found), *_sureness(found)]
    return [{"kind": kind, "text": text} for kind, text in notes]


def _tuning(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    notes = []
    for arm in ARMS:
        values, tuning = found["arms"][arm], found["arms"][arm]["tuning"]
        points = tuning["points"]
        if len(points) < 2:
            notes.append(("warning", f"The {values['name']} arm is untuned (one learning rate): {_BIAS[arm]}."))
            continue
        listed = ", ".join(_point(point) for point in points)
        head = f"{values['name'].capitalize()}: of the learning rates {listed},"
        if tuning["chosen"] is None:
            notes.append(("bad", f"{head} none came to its end."))
            continue
        tail = f"{tuning['chosen']:g} had the lowest validation loss at {found['sweep_share']:.0%} of the budget."
        notes.append(("plain", f"{head} {tail}"))
        if tuning["edge"] is not None:
            notes.append((
                "warning",
                f"The chosen learning rate of the {values['name']} arm is the {tuning['edge']} that was tried, so a "
                f"better one may lie beyond it: {_BIAS[arm].replace('untuned', 'undertuned')}.",
            ))  # fmt: skip
        elif len(points) < 3:
            notes.append(
                ("warning", f"Two learning rates are few for the {values['name']} arm; three bracket the best.")
            )
    return notes


def _point(point: Mapping[str, Any]) -> str:
    loss = point["state"].replace("_", " ") if point["loss"] is None else f"{point['loss']:.4f}"
    return f"{point['learning_rate']:g} ({loss})"


def _unequal(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Arms that did not come to their end, or did not see the same tokens."""
    notes, runs = [], {arm: found["arms"][arm]["runs"] for arm in ARMS}
    for arm in ARMS:
        values = found["arms"][arm]
        if not runs[arm]:
            notes.append(("bad", f"The {values['name']} arm was not trained: no learning rate came to its end."))
        for run in runs[arm]:
            if run["state"] != "finished":
                reason = f": {run['error']}" if run["error"] else "."
                state = run["state"].replace("_", " ")
                notes.append(("bad", f"Run {run['id']} of the {values['name']} arm did not finish ({state}){reason}"))
    pairs = list(zip(runs["ternary"], runs["full"], strict=False))
    is_known = True
    for name, words in (
        ("tokens", "numbers of tokens"), ("steps", "numbers of steps"), ("data_fingerprint", "data"), ("seed", "seeds")
    ):  # fmt: skip
        values = [(one[name], other[name]) for one, other in pairs if one["state"] == other["state"] == "finished"]
        if any(one != other for one, other in values):
            notes.append(("bad", f"The arms were trained on different {words}, which makes the gap unusable."))
        is_known = is_known and not any(None in pair for pair in values)
    if pairs and not notes and is_known:
        notes.append(("good", "Both arms read the same tokens in the same order, with the same batches and seeds."))
    return notes


def _schedules(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    own = [row["setting"] for row in found["differs"] if row["setting"].startswith("schedule.")]
    if not found["same"]:
        return []
    if not own:
        return [("plain", "Both arms follow the same schedule, scaled to their learning rates.")]
    return [("plain", f"Each arm has a schedule of its own: {', '.join(own)} differ.")]


def _sureness(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    count = len(found["seeds"]) or 1
    gaps = [text["gap_nats"] for text in found["texts"] if text["gap_nats"] is not None]
    notes = []
    if gaps and count < 3 and min(map(abs, gaps)) < CLAIMED_NATS:
        notes.append((
            "warning",
            f"A gap under {CLAIMED_NATS} nats says little with {_seeds(count)}: three show how far training moves it.",
        ))  # fmt: skip
    elif gaps and count == 1:
        notes.append(("plain", "One seed: others would move the gap, and intervals do not show that."))
    bare = [text["name"] for text in found["texts"] if text["gap_nats"] is not None and text["gap_nats_ci95"] is None]
    if bare and found["arms"]["ternary"]["is_causal"]:
        notes.append(("plain", f"{_listed(bare)}: too few documents for an interval."))
    return notes


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
