"""The gap and what is said of it, from scores and runs made by hand; and the page that shows it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ternlm.evaluation.bootstrap import interval, resampled_bpb, resampled_ratio
from ternlm.report.blocks import Chart, Numbers, Paragraph, Table
from ternlm.report.twin import cost_rows, headline, quality_rows, twin_sections
from ternlm.training.sweep import Trial
from ternlm.training.sweep_record import End
from ternlm.twin import TwinDirectory, TwinRecord
from ternlm.twin.comparing import compare
from ternlm.twin.definition import NO_ROUNDING, RATE

DOCUMENTS = 17


def score(mean: float, seed: int, **changes: Any) -> dict[str, Any]:
    """What an arm scored on a text of seventeen documents of unlike lengths, about `mean` nats per target."""
    lengths = np.random.default_rng(0).integers(3, 40, DOCUMENTS)
    text_nats = lengths * (mean + np.random.default_rng(seed).normal(0, 0.2, DOCUMENTS))
    nats = text_nats + 0.5  # the end of a document is a target as well
    targets = lengths + 1
    result = {
        "loss": float(nats.sum() / targets.sum()),
        "bpb": float(text_nats.sum() / (math.log(2) * 4 * lengths.sum())),
        "accuracy": 0.25,
        "perplexity_unit": "token",
        "protocol": "block",
        "sequence_length": 16,
        "documents": DOCUMENTS,
        "n_bytes": int(4 * lengths.sum()),
        "n_targets": int(targets.sum()),
        "eval_id": "x",
    }
    by_document = {
        "text_id": "t",
        "text_nats": text_nats.tolist(),
        "bytes": (4 * lengths).tolist(),
        "nats": nats.tolist(),
        "targets": targets.tolist(),
    }
    return {"result": result | changes, "by_document": by_document}


def write_run(folder: TwinDirectory, trial: Trial, loss: float, state: str = "finished", tokens: int = 640) -> None:
    """The files of a run that a comparison reads."""
    run = folder.run(trial)
    for file in (run.config, run.evaluations, run.scalars):
        file.parent.mkdir(parents=True, exist_ok=True)
    schedule = {"name": "cosine" if "schedule.name" in trial.settings else "linear"}
    is_full = "quantization.weights" in trial.settings
    config = {
        "optimizer": {"learning_rate": trial.settings.get(RATE, 1e-3)},
        "quantization": {"weights": "none" if is_full else "ternary"},
        "schedule": schedule,
        "training": {"seed": trial.seed or 0},
        "tracking": {"notes": trial.id},
    }
    run.config.write_text(json.dumps(config))
    run.data_fingerprint.write_text(json.dumps({"fingerprint": "d"}))
    code = {"finished": 0, "diverged": 4}.get(state, 1)
    status = {"schema": 1, "state": state, "exit_code": code, "step": 10, "tokens_seen": tokens, "elapsed_seconds": 5.0}
    run.status.write_text(json.dumps(status | {"error": None if code == 0 else "it ended"}))
    run.evaluations.write_text(json.dumps({"step": 10, "val/loss": loss}) + "\n")
    run.scalars.write_text(
        "".join(json.dumps({"step": s, "train/loss": 9 - s / 5, "train/epoch": s / 4}) + "\n" for s in range(1, 11))
    )


@pytest.fixture
def folder(tmp_path: Path) -> TwinDirectory:
    """Where the runs are."""
    return TwinDirectory(tmp_path / "t")


def make(
    folder: TwinDirectory, points: dict[str, dict[float, float]], states: dict[str, str], **definition: Any
) -> TwinRecord:
    """A record with points of a sweep and both arms, whose runs are on disk."""
    trials, ends = [], {}
    for arm, losses in points.items():
        own = NO_ROUNDING if arm == "full" else {}
        for rate, loss in losses.items():
            trial = Trial(f"{arm}-rate-{rate:g}", f"{arm}, {rate:g}", None, {**own, RATE: rate})
            trials.append(trial)
            write_run(folder, trial, loss)
    chosen: dict[str, float | None] = {arm: min(losses, key=losses.__getitem__) for arm, losses in points.items()}
    for seed in definition.get("seeds", [None]):
        for arm, state in states.items():
            own = NO_ROUNDING if arm == "full" else {}
            rate = {RATE: chosen[arm]} if arm in chosen else {}
            trial = Trial(arm if seed is None else f"{arm}-s{seed}", arm, seed, {**own, **rate})
            trials.append(trial)
            write_run(folder, trial, 4.0, state)
            ends[trial.id] = End({"finished": 0, "diverged": 4}.get(state, 1), None)
    marks = {trial.id: "" for trial in trials}
    return TwinRecord("r", "r", "a recipe", {}, definition, chosen, trials, marks, ends)


FINISHED = {"ternary": "finished", "full": "finished"}
FACTS = {
    "family": "bitnet",
    "is_causal": True,
    "parameters": {"total": 1000, "ternary": 800, "embedding": 150, "other": 50},
    "bytes": {"packed": 620, "bf16": 2000, "fp32": 4000},
}


def scores(ternary: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    return {
        "ternary": {"after": {"validation": ternary}, "before": {"validation": score(7.0, 3)}, "facts": FACTS},
        "full": {"after": {"validation": full}, "before": {"validation": score(7.1, 4)}, "facts": FACTS},
    }


def kinds(found: dict[str, Any]) -> list[str]:
    return [note["kind"] for note in found["notes"]]


def test_the_gap_is_the_difference_of_losses_with_the_paired_interval_over_documents(folder: TwinDirectory) -> None:
    one, other = score(4.1, 1), score(3.9, 2)
    text = compare(folder, make(folder, {}, FINISHED), scores(one, other), None)["texts"][0]
    assert text["gap_nats"] == pytest.approx(one["result"]["loss"] - other["result"]["loss"])
    assert text["gap_bpb"] == pytest.approx(one["result"]["bpb"] - other["result"]["bpb"])
    nats, targets = (np.array([each["by_document"][name] for each in (one, other)]) for name in ("nats", "targets"))
    low, high = text["gap_nats_ci95"]
    assert low < text["gap_nats"] < high
    draws = np.random.default_rng(0)
    gaps = []
    for _ in range(1000):
        drawn = draws.integers(0, DOCUMENTS, DOCUMENTS)
        gaps.append((nats[0, drawn].sum() - nats[1, drawn].sum()) / targets[0, drawn].sum())
    assert (low, high) == pytest.approx(tuple(np.quantile(gaps, (0.025, 0.975))))
    assert text["before"]["ternary"]["loss"] == pytest.approx(score(7.0, 3)["result"]["loss"])


def test_bits_per_byte_are_resampled_as_ever_and_nats_on_the_same_draws() -> None:
    nats, counts = np.array([[3.0] * 12, list(range(1, 13))]), np.arange(2, 14)
    ratio, bits = resampled_ratio(nats, counts), resampled_bpb(nats, counts)
    assert ratio is not None and bits is not None
    assert np.allclose(ratio, bits * math.log(2))
    assert interval(ratio[1])[0] < nats[1].sum() / counts.sum() < interval(ratio[1])[1]
    assert resampled_ratio(nats[:, :9], counts[:9]) is None


def test_over_seeds_the_gap_is_a_mean_with_its_spread(folder: TwinDirectory) -> None:
    record = make(folder, {}, FINISHED, seeds=[4, 7])
    found = {
        f"{arm}-s{seed}": {"after": {"validation": score(mean, seed + place)}}
        for place, (arm, mean) in enumerate((("ternary", 4.2), ("full", 4.0)))
        for seed in (4, 7)
    }
    text = compare(folder, record, found, None)["texts"][0]
    gaps = [row["gap_nats"] for row in text["seeds"]]
    assert text["gap_nats"] == pytest.approx(sum(gaps) / 2)
    assert text["spread_nats"] == pytest.approx(abs(gaps[0] - gaps[1]) / math.sqrt(2))
    losses = [row["full"]["loss"] for row in text["seeds"]]
    assert text["after"]["full"]["perplexity"] == pytest.approx(math.exp(sum(losses) / 2))


@pytest.mark.parametrize("changes", [{"eval_id": "y"}, {"n_targets": 3}, {"protocol": "stream"}, {"mask_id": "m"}])
def test_there_is_no_gap_between_scores_on_other_targets(folder: TwinDirectory, changes: dict[str, Any]) -> None:
    found = compare(folder, make(folder, {}, FINISHED), scores(score(4.1, 1), score(3.9, 2, **changes)), None)
    assert found["texts"][0]["gap_nats"] is None
    assert "there is no gap" in headline(found)[0]


def test_there_is_no_gap_over_seeds_that_were_scored_on_other_targets(folder: TwinDirectory) -> None:
    record, found = make(folder, {}, FINISHED, seeds=[4, 7]), {}
    for seed, changes in ((4, {}), (7, {"eval_id": "y"})):
        for arm in FINISHED:
            found[f"{arm}-s{seed}"] = {"after": {"validation": score(4.0, seed, **changes)}}
    kept = found["full-s7"]["after"]["validation"]["by_document"]
    for values in (kept, found["ternary-s7"]["after"]["validation"]["by_document"]):
        values.update({name: values[name][:-1] for name in ("text_nats", "bytes", "nats", "targets")})
    text = compare(folder, record, found, None)["texts"][0]
    assert text["gap_nats"] is None
    assert [row["gap_nats"] is None for row in text["seeds"]] == [False, False]


def test_an_encoder_has_a_gap_in_nats_and_neither_bits_nor_an_interval(folder: TwinDirectory) -> None:
    one, other = ({**score(mean, 1, bpb=None, mask_id="m"), "by_document": None} for mean in (3.0, 2.5))
    text = compare(folder, make(folder, {}, FINISHED), scores(one, other), None)["texts"][0]
    assert text["gap_nats"] == pytest.approx(0.5, rel=0.1)
    assert (text["gap_bpb"], text["gap_nats_ci95"]) == (None, None)


def test_e12_an_arm_with_one_rate_is_called_untuned(folder: TwinDirectory) -> None:
    record = make(folder, {"ternary": {1e-3: 5.0, 2e-3: 4.0, 4e-3: 4.5}}, FINISHED)
    found = compare(folder, record, scores(score(4.1, 1), score(3.9, 2)), None)
    untuned = [note["text"] for note in found["notes"] if "untuned" in note["text"]]
    assert untuned == [
        "The full-precision arm is untuned (one learning rate): an untuned full-precision arm makes the gap look "
        "smaller than it is."
    ]
    assert found["arms"]["ternary"]["tuning"]["chosen"] == 2e-3
    assert found["arms"]["ternary"]["tuning"]["edge"] is None
    assert not any("beyond it" in note["text"] for note in found["notes"])


@pytest.mark.parametrize(("losses", "edge"), [((3.0, 4.0, 5.0), "lowest"), ((5.0, 4.0, 3.0), "highest")])
def test_a_best_rate_at_an_edge_is_said(folder: TwinDirectory, losses: tuple[float, ...], edge: str) -> None:
    record = make(folder, {"full": dict(zip((1e-3, 2e-3, 4e-3), losses, strict=True))}, FINISHED)
    found = compare(folder, record, scores(score(4.1, 1), score(3.9, 2)), None)
    assert found["arms"]["full"]["tuning"]["edge"] == edge
    assert any(f"is the {edge} that was tried" in note["text"] for note in found["notes"])


def test_arms_on_unequal_tokens_are_called_unusable(folder: TwinDirectory) -> None:
    record = make(folder, {}, FINISHED)
    assert "good" in kinds(compare(folder, record, scores(score(4.1, 1), score(3.9, 2)), None))
    write_run(folder, record.trials[1], 4.0, tokens=641)
    notes = compare(folder, record, scores(score(4.1, 1), score(3.9, 2)), None)["notes"]
    assert {
        "kind": "bad",
        "text": "The arms were trained on different numbers of tokens, which makes the gap unusable.",
    } in notes
    assert "good" not in [note["kind"] for note in notes]


def test_e10_arms_are_not_said_to_have_read_the_same_where_that_is_not_known(folder: TwinDirectory) -> None:
    record = make(folder, {}, FINISHED)
    for trial in record.trials:
        folder.run(trial).data_fingerprint.unlink()
    assert "good" not in kinds(compare(folder, record, scores(score(4.1, 1), score(3.9, 2)), None))


def test_what_differs_between_the_arms_is_read_from_their_settings(folder: TwinDirectory) -> None:
    record = make(folder, {"full": {1e-3: 3.0, 2e-3: 2.0}}, FINISHED)
    found = compare(folder, record, {}, None)
    assert found["differs"] == [
        {"setting": "optimizer.learning_rate", "ternary": 1e-3, "full": 2e-3},
        {"setting": "quantization.weights", "ternary": "ternary", "full": "none"},
    ]
    assert found["same"] == {"schedule.name": "linear", "training.seed": 0}


@pytest.mark.parametrize("state", ["diverged", "failed"])
def test_an_arm_that_did_not_finish_is_said_and_the_page_is_made(folder: TwinDirectory, state: str) -> None:
    record = make(folder, {}, {"ternary": state, "full": "finished"})
    only = {"full": scores(score(4.1, 1), score(3.9, 2))["full"]}
    found = json.loads(json.dumps(compare(folder, record, only, None)))
    assert found["texts"][0]["gap_nats"] is None
    assert headline(found) == ["On the validation split there is no gap: the ternary arm did not finish."]
    assert any(state in note["text"] and note["kind"] == "bad" for note in found["notes"])
    assert twin_sections(found)


def test_a_twin_without_anything_has_a_page_too(folder: TwinDirectory) -> None:
    record = TwinRecord("r", "r", "", {}, {}, {}, [], {}, {})
    found = json.loads(json.dumps(compare(folder, record, {}, None)))
    assert [section.title for section in twin_sections(found)]
    assert headline(found) == [
        "On the validation split there is no gap: the ternary and the full precision arm did not finish."
    ]


@pytest.mark.parametrize(
    "found", [{}, {"texts": [], "arms": {}}, {"texts": None, "arms": 3}, {"texts": [{"name": "a"}]}]
)
def test_a_damaged_comparison_is_said_on_the_page(found: dict[str, Any]) -> None:
    (section,) = twin_sections(found)
    assert "comparison.json is damaged" in section.blocks[0].text  # type: ignore[union-attr]


def test_e10_the_page_shows_the_numbers_of_the_comparison_and_draws(folder: TwinDirectory) -> None:
    record = make(folder, {"ternary": {1e-3: 5.0, 2e-3: 4.0, 4e-3: 4.5}}, FINISHED)
    values = scores(score(4.1, 1), score(3.9, 2))
    values["full"]["rounded"] = {"validation": score(6.0, 5)}
    found = json.loads(json.dumps(compare(folder, record, values, timing(ratio=1.25))))
    blocks = [block for section in twin_sections(found) for block in section.blocks]
    gap = found["texts"][0]["gap_nats"]
    shown = [number.value for block in blocks if isinstance(block, Numbers) for number in block.numbers]
    assert f"{gap:+.3f} nats" in shown
    assert "3.2x" in shown, "2000 bytes in bfloat16 against 620 packed"
    for block in blocks:
        if isinstance(block, Table):
            assert all(len(row) == len(block.columns) for row in block.rows)
            assert not block.kinds or len(block.kinds) == len(block.rows)
        elif isinstance(block, Chart):
            assert block.alt and block.draw() is not None
        elif isinstance(block, Paragraph):
            assert block.text
    columns, rows, _ = quality_rows(found)
    assert [row[1] for row in rows] == ["ternary", "full precision", "full, rounded after"]
    assert all(len(row) == len(columns) for row in rows)
    costs = {row[0]: row[1:] for row in cost_rows(found)}
    assert costs["training step, ms"] == ["50.0", "40.0", "1.25"]
    assert costs["training, tokens/s"][-1] == "0.80"
    assert costs["decode, tokens/s"][-1] == "2.00"
    assert costs["epochs"][:2] == ["2.50", "2.50"]


def timing(ratio: float) -> dict[str, Any]:
    """As `time_arms` tells it."""

    def spread(value: float) -> dict[str, float]:
        return {"median": value, "low": value - 1, "high": value + 1}

    step = {"rows": 4, "sequence_length": 16, "dtype": "float32", "tensors_mb": 7.0}
    read = {"tokens_per_sec": 100.0, "ratio": spread(0.5)}
    base = {"tokens_per_sec": 50.0, "ratio": spread(1.0)}
    training = [
        {**step, "name": "a", "step_wall_ms": spread(50.0), "tokens_per_sec": spread(1280.0), "ratio": spread(ratio)},
        {**step, "name": "b", "step_wall_ms": spread(40.0), "tokens_per_sec": spread(1600.0), "ratio": spread(1.0)},
    ]
    inference = [{"name": "a", "prefill": read, "decode": read}, {"name": "b", "prefill": base, "decode": base}]
    return {
        "training": {"clock": "cpu", "repeats": 8, "rows": training},
        "inference": {"rows": inference},
        "by_arm": {"ternary": "a", "full": "b"},
        "threads": 2,
    }
