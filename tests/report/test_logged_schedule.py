"""What the log says of learning rate and weight decay: the published schedule is known, any other is told apart."""

import math
from typing import Any, get_args

import pytest

from ternlm.models.stages import QuantizationSettings, Stages
from ternlm.report.logged_schedule import schedule_rows
from ternlm.training.schedule import Schedule, ScheduleName, ScheduleSettings

TOTAL = 400
RATE, DECAY, SETTINGS, OPTIMIZER = (
    "learning rate", "weight decay", "learning rate against the settings", "optimizer"
)  # fmt: skip
ADAMW = {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.1, "betas": [0.9, 0.95]}


def config(name: str = "two_stage", **sections: Any) -> dict[str, Any]:
    return {"schedule": {"name": name, "warmup_steps": 20}, "optimizer": ADAMW, **sections}


def log(settings: dict[str, Any], every: int = 10, last: int = TOTAL) -> list[dict[str, Any]]:
    """Rows as training writes them: that of step s holds what update s - 1 used."""
    quantization = QuantizationSettings.from_mapping(settings.get("quantization", {}), "quantization")
    stages = Stages(quantization, 4, TOTAL)
    schedule = Schedule(ScheduleSettings.from_mapping(settings["schedule"], "schedule"), 3e-3, 0.1, TOTAL, stages)
    return [
        {"step": step, "train/learning_rate": schedule.learning_rate(step - 1),
         "train/weight_decay": schedule.weight_decay(step - 1)}
        for step in (1, *range(every, last + 1, every))
    ]  # fmt: skip


def judged(settings: dict[str, Any], rows: list[dict[str, Any]], total: int | None = TOTAL) -> dict[str, Any]:
    found = schedule_rows(settings, rows, total)
    assert all({*row} == {"part", "definition", "run", "verdict", "source"} for row in found)
    return {row["part"]: (row["verdict"], row["run"]) for row in found}


@pytest.mark.parametrize("every", [1, 7, 25])
def test_the_published_schedule_is_the_same_in_every_part(every: int) -> None:
    found = judged(config(), log(config(), every))
    assert {verdict for verdict, _ in found.values()} == {"same"}
    assert "straight in each half, a drop of" in found[RATE][1]
    assert found[SETTINGS][1].endswith("logged steps (schedule two_stage)")


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_every_other_schedule_is_told_apart_and_still_is_what_its_settings_ask_for(name: str) -> None:
    found = judged(config(name), log(config(name)))
    assert found[RATE][0] == ("same" if name == "two_stage" else "differs")
    assert found[DECAY][0] == ("same" if name.startswith("two_stage") else "differs")
    assert found[SETTINGS][0] == "same"


def test_progressive_quantization_is_part_of_what_the_settings_ask_for() -> None:
    values = {"progressive": True, "lr_ramp_steps": 30}
    resolved = QuantizationSettings.from_mapping(values, "quantization").model_dump(mode="json")
    settings = config("cosine", quantization=resolved)
    assert judged(settings, log(settings))[SETTINGS][0] == "same"
    assert judged(settings, log(config("cosine")))[SETTINGS][0] == "differs"


@pytest.mark.parametrize(
    ("column", "change", "part"),
    [
        ("train/learning_rate", lambda k, rate: rate * 1.001 if k == 200 else rate, SETTINGS),
        ("train/learning_rate", lambda k, rate: 3e-3, RATE),
        ("train/learning_rate", lambda k, rate: rate * (1.3 if k > 100 else 1.0), RATE),
        ("train/learning_rate", lambda k, rate: 3e-3 * (400 - k) / 400 if k > 20 else rate, RATE),
        ("train/learning_rate", lambda k, rate: 1e-3 * k / 400, RATE),
        ("train/weight_decay", lambda k, decay: 0.1, DECAY),
        ("train/weight_decay", lambda k, decay: 0.05 if decay else 0.0, DECAY),
        ("train/weight_decay", lambda k, decay: 0.1 if k < 260 else 0.0, DECAY),
        ("train/weight_decay", lambda k, decay: 0.1 if k < 150 else 0.0, DECAY),
    ],
)  # fmt: skip
def test_e10_a_log_that_was_tampered_with_differs(column: str, change: Any, part: str) -> None:
    rows = [{**row, column: change(row["step"], row[column])} for row in log(config())]
    found = judged(config(), rows)
    assert found[part][0] == "differs", found[part]


def test_a_run_that_has_not_come_to_its_half_is_unknown_and_not_the_same() -> None:
    found = judged(config(), log(config(), last=190))
    assert (found[RATE][0], found[DECAY][0], found[SETTINGS][0]) == ("unknown", "unknown", "same")
    assert "half of the run is not reached" in found[RATE][1]
    assert judged(config(), log(config(), every=150))[RATE][0] == "unknown", "two rates are no line"
    assert judged(config(), log(config()), None)[RATE][0] == "unknown"


def test_a_decay_that_is_wrong_already_need_not_wait_for_the_half() -> None:
    rows = [{**row, "train/weight_decay": 0.3} for row in log(config(), last=90)]
    assert judged(config(), rows)[DECAY][0] == "differs"
    assert judged(config(), rows, None)[DECAY][0] == "differs"


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 0, "train/learning_rate": 1.0}],
        [{"step": 3, "train/learning_rate": None, "train/weight_decay": "x"}],
        [{"step": 3, "train/learning_rate": math.nan}],
    ],
)
def test_an_empty_log_is_unknown(rows: list[dict[str, Any]]) -> None:
    found = judged(config(), rows)
    assert [found[part][0] for part in (RATE, DECAY, SETTINGS)] == ["unknown"] * 3


@pytest.mark.parametrize("rate", [0.0, -1.0, 1e-300, 1e90])
def test_rates_of_any_size_are_judged(rate: float) -> None:
    rows = [{"step": step, "train/learning_rate": rate} for step in range(1, TOTAL + 1, 9)]
    assert judged(config(), rows)[RATE][0] in ("unknown", "differs")
    assert judged(config(), rows, 1)[SETTINGS][0] == "differs"


@pytest.mark.parametrize("spoiled", [{}, {"name": "x"}, {"name": []}, {"warmup_steps": -3}, "x", None])
def test_settings_that_cannot_be_read_are_unknown(spoiled: Any) -> None:
    found = judged({"schedule": spoiled, "optimizer": {"learning_rate": "x"}}, log(config()))
    assert found[SETTINGS][0] == found[OPTIMIZER][0] == "unknown"
    assert found[RATE][0] == "same", "what was logged is known without them"


def test_the_optimizer_is_the_published_one_or_not() -> None:
    for section, verdict in ((ADAMW, "same"), ({**ADAMW, "betas": [0.9, 0.999]}, "differs"),
                             ({**ADAMW, "name": "muon"}, "differs"), ({}, "unknown")):  # fmt: skip
        assert judged(config(optimizer=section), [])[OPTIMIZER][0] == verdict
