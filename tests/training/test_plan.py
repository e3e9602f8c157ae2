"""A plan counts what training will really do, without building a model in memory."""

from pathlib import Path
from typing import Any

import pytest

from builders import tiny_settings
from encoders import wordpiece
from ternlm.cli.plan import plan_of
from ternlm.data.preparation import prepare_data
from ternlm.errors import SettingsError
from ternlm.models import build_model
from ternlm.training.plan import draw_schedule, make_plan


def test_i05_counts_equal_those_of_the_model(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    plan = make_plan(settings)
    model = build_model(settings.model, settings.quantization)
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert plan.ternary == sum(layer.weight.numel() for layer in model.bit_linears().values())
    assert plan.steps == 6
    assert plan.tokens == 6 * 4 * 16
    assert plan.tokens_per_parameter == pytest.approx(plan.tokens / plan.parameters)


def test_planning_the_largest_recipe_allocates_no_weights(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, model={"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008})
    assert make_plan(settings).parameters > 5e9


@pytest.mark.parametrize(
    ("sections", "changed"),
    [
        ({"training": {"max_steps": 12}}, {"steps", "tokens", "flops", "tokens_per_parameter"}),
        ({"training": {"batch_size": 8}}, {"tokens", "flops", "tokens_per_parameter", "activation_bytes_estimate"}),
        ({"training": {"micro_batch_size": 1}}, {"activation_bytes_estimate"}),
        ({"training": {"gradient_checkpointing": True}}, {"activation_bytes_estimate"}),
        ({"training": {"keep_last": 9}}, {"disk_bytes"}),
        ({"training": {"keep_every": 1}}, {"disk_bytes"}),
        ({"quantization": {"weights": "none"}}, {"state_bytes", "activation_bytes_estimate", "packed_bytes"}),
    ],
)
def test_t12_a_setting_moves_the_numbers_it_should(tmp_path: Path, sections: dict[str, Any], changed: set[str]) -> None:
    before, after = (
        make_plan(tiny_settings(tmp_path)).as_dict(),
        make_plan(tiny_settings(tmp_path, **sections)).as_dict(),
    )
    moved = {name for name in before if before[name] != after[name]} - {"rates"}
    assert moved == changed


def test_the_rates_shown_are_those_of_the_schedule_at_its_edges(tmp_path: Path) -> None:
    plan = make_plan(tiny_settings(tmp_path, training={"max_steps": 40}, schedule={"name": "two_stage"}))
    shown = {row["step"]: row for row in plan.as_dict()["rates"]}
    assert {0, 20, 39} <= shown.keys()
    for k, row in shown.items():
        assert row["learning_rate"] == plan.schedule.learning_rate(k)
        assert row["weight_decay"] == plan.schedule.weight_decay(k)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_plan_of_the_shortest_runs(tmp_path: Path, steps: int) -> None:
    rates = make_plan(tiny_settings(tmp_path, training={"max_steps": steps})).as_dict()["rates"]
    assert all(0 <= row["step"] < steps for row in rates)


def test_an_epoch_of_an_encoder_is_planned_as_long_as_it_is_trained(tmp_path: Path) -> None:
    wordpiece(tmp_path / "tokenizer")
    settings = tiny_settings(
        tmp_path,
        model={"family": "qdyt", "vocab_size": None},
        objective={"name": "mlm"},
        tokenizer={"name": str(tmp_path / "tokenizer")},
        training={"max_steps": None, "max_epochs": 30},
    )
    prepared = prepare_data(settings.data, settings.tokenizer)
    loader = prepared.corpus.loader(4, settings.windows(prepared.tokenizer), 0)
    assert plan_of(settings).steps == settings.total_steps(loader.windows_per_epoch)


def test_epochs_need_the_size_of_the_data(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, training={"max_steps": None, "max_epochs": 2})
    assert make_plan(settings, windows_per_epoch=10).steps == 5
    with pytest.raises(SettingsError, match="prepared data"):
        make_plan(settings)


def test_the_picture_of_the_schedule_is_drawn(tmp_path: Path) -> None:
    plan = make_plan(tiny_settings(tmp_path, schedule={"name": "two_stage"}))
    draw_schedule(plan, tmp_path / "a.svg", "rates")
    assert "<svg" in (tmp_path / "a.svg").read_text()
