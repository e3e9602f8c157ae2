"""The result of a twin: what each arm cost and reached, the gap on every text, and what makes it fair or not.

    gap = loss of the ternary arm - loss of the full-precision arm        nats per target, or bits per byte

Everything is read from the runs, and from the scores that were kept of them.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from ternlm.errors import EnvironmentFault
from ternlm.evaluation.bootstrap import interval, resampled_bpb, resampled_ratio
from ternlm.files import from_json, read_regular
from ternlm.report.history import Curve, Follower, extend, thinned
from ternlm.report.sweep import TrialResult, read_trial
from ternlm.report.tail import document, mapping, number, tail_rows
from ternlm.training.sweep import Trial
from ternlm.twin.arms import definition_of
from ternlm.twin.definition import ADJECTIVES, ARMS, RATE, VALIDATION, ArmName, own_settings
from ternlm.twin.definition import of_sweep as arm_of_sweep
from ternlm.twin.fairness import fairness
from ternlm.twin.record import TwinDirectory, TwinRecord

SCHEMA = 1
_LARGEST = 64 * 2**20
_CURVE_POINTS = 300
_NOT_COMPARED = ("tracking",)

Scores = Mapping[str, Mapping[str, Any]]


def compare(
    folder: TwinDirectory, record: TwinRecord, scores: Scores, timing: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The comparison as JSON values.

    Args:
        folder: The twin's folder.
        record: What it is.
        scores: By trial that finished: `after` and, of the first seed, `before` by text, `rounded` where it was asked
            for, and `facts` of the model.
        timing: What `time_arms` found, or None.

    Returns:
        `arms` by name, `texts` with the gap on each, `same` and `differs` of the settings, `timing`, and `notes`.
    """
    definition = definition_of(record)
    arms = {arm: _arm(folder, record, arm, scores) for arm in ARMS}
    names = [VALIDATION, *(text.name for text in definition.texts)]
    sources = {text.name: text.source for text in definition.texts}
    found = {
        "schema": SCHEMA,
        "id": folder.id,
        "name": record.name,
        "recipe": record.recipe,
        "description": record.description,
        "seeds": list(definition.seeds),
        "sweep_share": definition.sweep_share,
        "arms": arms,
        "texts": [{"source": sources.get(name), **_text(record, scores, name)} for name in names],
        **_settings_compared(folder, record),
        "timing": timing,
    }
    return found | {"notes": fairness(found)}


def read_before(folder: TwinDirectory) -> dict[str, Any]:
    """The comparison that an earlier sitting wrote; empty if there is none."""
    try:
        found = from_json(read_regular(folder.comparison, _LARGEST))
    except (OSError, ValueError):
        return {}
    return mapping(found)


def read_comparison(folder: TwinDirectory) -> dict[str, Any]:
    """The comparison of a twin.

    Raises:
        EnvironmentFault: There is none yet, or it is damaged.
    """
    found = read_before(folder)
    if not found:
        raise EnvironmentFault(f"'{folder.path}' holds no result yet. Go on with: {folder.resume_command}")
    return found


def _arm(folder: TwinDirectory, record: TwinRecord, arm: ArmName, scores: Scores) -> dict[str, Any]:
    trials = [trial for trial in record.trials if trial.arm == arm]
    config = next((found for trial in trials if (found := document(folder.run(trial).config))), {})
    facts: Mapping[str, Any] = next((scores[t.id]["facts"] for t in trials if "facts" in scores.get(t.id, {})), {})
    schedule, optimizer = mapping(config.get("schedule")), mapping(config.get("optimizer"))
    return {
        "name": ADJECTIVES[arm],
        "settings": {**own_settings(definition_of(record), arm), **_rate(record, arm)},
        "learning_rate": optimizer.get("learning_rate"),
        "optimizer": optimizer,
        "schedule": schedule,
        "tuning": _tuning(folder, record, arm),
        "runs": [_run(folder, record, trial) for trial in trials],
        "parameters": facts.get("parameters"),
        "bytes": facts.get("bytes"),
        "family": facts.get("family"),
        "is_causal": facts.get("is_causal"),
        "curves": _curves(folder, trials[0]) if trials else {},
    }


def _rate(record: TwinRecord, arm: ArmName) -> dict[str, Any]:
    return {} if record.chosen.get(arm) is None else {RATE: record.chosen[arm]}


def _tuning(folder: TwinDirectory, record: TwinRecord, arm: ArmName) -> dict[str, Any]:
    """The points of an arm's sweep, the one that was chosen, and whether it lies at an edge."""
    trials = [trial for trial in record.trials if arm_of_sweep(trial) == arm]
    points = []
    for trial in trials:
        result = read_trial(folder, record, trial, "val/loss")
        points.append({"learning_rate": trial.settings[RATE], "loss": result.value, **_progress(result)})
    rates = [point["learning_rate"] for point in points]
    chosen = record.chosen.get(arm)
    edge = None
    if chosen is not None and rates:
        edge = "lowest" if chosen == min(rates) else "highest" if chosen == max(rates) else None
    return {"points": points, "chosen": chosen, "edge": edge, "is_tuned": len(points) > 1 and chosen is not None}


def _run(folder: TwinDirectory, record: TwinRecord, trial: Trial) -> dict[str, Any]:
    run, result = folder.run(trial), read_trial(folder, record, trial, "val/loss")
    last: dict[str, Any] = next((row for row in reversed(tail_rows(run.scalars)) if "train/epoch" in row), {})
    return {
        **_progress(result),
        "seed": mapping(mapping(document(run.config)).get("training")).get("seed"),
        "epochs": number(last.get("train/epoch")),
        "data_fingerprint": mapping(document(run.data_fingerprint)).get("fingerprint"),
    }


def _progress(result: TrialResult) -> dict[str, Any]:
    fields = ("id", "state", "error", "tokens", "seconds")
    return {name: getattr(result, name) for name in fields} | {"steps": result.step}


def _curves(folder: TwinDirectory, trial: Trial) -> dict[str, Curve]:
    """Loss over steps of an arm's first run, thinned."""
    run, found = folder.run(trial), {}
    for name, file in (("train/loss", run.scalars), ("val/loss", run.evaluations)):
        curve: Curve = []
        extend(curve, Follower(file).poll(), name)
        found[name] = thinned(curve, _CURVE_POINTS) if len(curve) > _CURVE_POINTS else curve
    return found


def _text(record: TwinRecord, scores: Scores, name: str) -> dict[str, Any]:
    """Both arms on a text, and the gap: seed by seed, and of the seeds' means."""
    seeds: list[dict[str, Any]] = []
    pairs = []
    for seed in dict.fromkeys(trial.seed for trial in record.trials if arm_of_sweep(trial) is None):
        pair = {trial.arm: trial for trial in record.trials if trial.seed == seed and trial.arm in ARMS}
        kept = {arm: found for arm in ARMS if (found := _score(scores, pair.get(arm), "after", name)) is not None}
        row: dict[str, Any] = {"seed": seed, **{arm: kept[arm]["result"] if arm in kept else None for arm in ARMS}}
        row["rounded"] = mapping(_score(scores, pair.get("full"), "rounded", name)).get("result")
        if len(kept) == len(ARMS):
            pairs.append((kept["ternary"], kept["full"]))
        seeds.append(row | _gap([pairs[-1]] if len(kept) == len(ARMS) else []))
    first: Mapping[str, Any] = next((each for row in seeds for arm in ARMS if (each := row[arm])), {})
    gaps = [row["gap_nats"] for row in seeds if row["gap_nats"] is not None]
    return {
        "name": name,
        "unit": first.get("perplexity_unit"),
        "protocol": first.get("protocol"),
        "documents": first.get("documents"),
        "bytes": first.get("n_bytes"),
        "targets": first.get("n_targets"),
        "before": {arm: _before(record, scores, arm, name) for arm in ARMS},
        "after": {arm: _mean([row[arm] for row in seeds]) for arm in ARMS},
        "rounded": _mean([row["rounded"] for row in seeds]),
        **_gap(pairs),
        "spread_nats": stdev(gaps) if len(gaps) > 1 else None,
        "seeds": seeds,
    }


def _score(scores: Scores, trial: Trial | None, weights: str, name: str) -> Mapping[str, Any] | None:
    if trial is None:
        return None
    found: Mapping[str, Any] | None = scores.get(trial.id, {}).get(weights, {}).get(name)
    return found


def _before(record: TwinRecord, scores: Scores, arm: ArmName, name: str) -> dict[str, Any] | None:
    """What the arm scored with the weights as they were drawn, of its first seed."""
    trials = [trial for trial in record.trials if trial.arm == arm]
    kept = next((each for trial in trials if (each := _score(scores, trial, "before", name)) is not None), None)
    return None if kept is None else _mean([kept["result"]])


def _mean(results: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Means over seeds of what an arm scored; the perplexity is that of the mean loss."""
    known = [result for result in results if result]
    if not known:
        return None
    means = {}
    for name in ("loss", "bpb", "accuracy", "ppl_word"):
        values = [value for result in known if (value := number(result.get(name))) is not None]
        means[name] = fmean(values) if len(values) == len(known) else None
    loss = means["loss"]
    return means | {"perplexity": None if loss is None else float(np.exp(min(loss, 700.0)))}


def _gap(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    """The gap of the mean over pairs of scores, with intervals over documents.

    There is none where the arms, or the seeds, did not score the same targets, nor in bits per byte where a text has
    unknown tokens.
    """
    nothing = dict.fromkeys(("gap_nats", "gap_nats_ci95", "gap_bpb", "gap_bpb_ci95"))
    if not pairs or not all(_is_same_text(pairs[0][0], side) for pair in pairs for side in pair):
        return nothing
    results = [(ternary["result"], full["result"]) for ternary, full in pairs]
    found: dict[str, Any] = nothing | {"gap_nats": fmean(one["loss"] - other["loss"] for one, other in results)}
    if all(one["bpb"] is not None and other["bpb"] is not None for one, other in results):
        found["gap_bpb"] = fmean(one["bpb"] - other["bpb"] for one, other in results)
    if any(side["by_document"] is None for pair in pairs for side in pair):
        return found
    found["gap_nats_ci95"] = _apart(resampled_ratio(_nats(pairs, "nats"), _counts(pairs, "targets")))
    if found["gap_bpb"] is not None:
        found["gap_bpb_ci95"] = _apart(resampled_bpb(_nats(pairs, "text_nats"), _counts(pairs, "bytes")))
    return found


def _is_same_text(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    same = ("eval_id", "n_targets", "protocol", "sequence_length", "mask_id")
    return all(one["result"].get(name) == other["result"].get(name) for name in same)


def _nats(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], name: str) -> np.ndarray:
    """Of both arms on each document, means over seeds, (2, documents)."""
    return np.array([[pair[place]["by_document"][name] for pair in pairs] for place in (0, 1)], dtype=float).mean(
        axis=1
    )


def _counts(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], name: str) -> np.ndarray:
    return np.array(pairs[0][0]["by_document"][name], dtype=float)


def _apart(drawn: np.ndarray | None) -> tuple[float, float] | None:
    return None if drawn is None else interval(drawn[0] - drawn[1])


def _settings_compared(folder: TwinDirectory, record: TwinRecord) -> dict[str, Any]:
    """What the settings of both arms' first runs have in common, and every one in which they differ."""
    configs: list[dict[str, Any]] = []
    for arm in ARMS:
        trials = [trial for trial in record.trials if trial.arm == arm]
        configs.append(_flat(next((found for t in trials if (found := document(folder.run(t).config))), {})))
    ternary, full = configs
    if not ternary or not full:
        return {"same": {}, "differs": []}
    names = sorted(name for name in {*ternary, *full} if name.partition(".")[0] not in _NOT_COMPARED)
    differs = [
        {"setting": name, "ternary": ternary.get(name), "full": full.get(name)}
        for name in names
        if ternary.get(name) != full.get(name)
    ]
    other = {row["setting"] for row in differs}
    return {"same": {name: ternary[name] for name in names if name not in other}, "differs": differs}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{field}": value
        for section, fields in config.items()
        if isinstance(fields, Mapping)
        for field, value in fields.items()
    }
