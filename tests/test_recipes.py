"""Recipes: every shipped one is complete and valid, files extend them, and a misspelled name is answered."""

import json
from pathlib import Path

import pytest
import yaml

from ternlm.errors import SettingsError
from ternlm.recipes import load_recipe, recipe_names, recipe_text
from ternlm.settings.resolve import Layer, resolve
from ternlm.training.launch import settings_from
from ternlm.training.plan import make_plan
from ternlm.training.settings import setting_names


def test_every_recipe_is_shipped_with_a_description_and_valid_settings() -> None:
    names = recipe_names()
    assert {"demo", "bitnet-1m", "bitnet-95m"} <= set(names)
    for name in names:
        recipe = load_recipe(name)
        assert recipe.description
        assert recipe.origin == f"recipe {name}"
        settings = settings_from(resolve([Layer(recipe.origin, recipe.values)], setting_names()))
        assert settings.model.family in ("bitnet", "qdyt", "hgrn", "hnet")


@pytest.mark.parametrize("name", recipe_names())
def test_i05_the_ternary_count_in_the_description_is_the_true_one(name: str) -> None:
    recipe = load_recipe(name)
    settings = settings_from(resolve([Layer("recipe", recipe.values)], setting_names()))
    size = settings.model.vocab_size or (256 if settings.tokenizer.name == "byte" else settings.tokenizer.vocab_size)
    settings = settings.model_copy(update={"model": settings.model.model_copy(update={"vocab_size": size})})
    ternary = make_plan(settings, windows_per_epoch=1000).ternary
    assert f"{ternary / 1e6:.1f}M ternary parameters" in recipe.description


def test_the_two_stage_recipe_has_the_rates_of_the_table() -> None:
    recipe = load_recipe("bitnet-95m")
    settings = settings_from(resolve([Layer("recipe", recipe.values)], setting_names()))
    schedule = make_plan(settings).schedule
    assert schedule.total_steps == 400_000
    assert schedule.learning_rate(0) == pytest.approx(4.0e-6, rel=1e-12)
    assert schedule.learning_rate(200_000) == pytest.approx(1e-3, rel=1e-12)
    assert schedule.learning_rate(399_999) == pytest.approx(1.5005e-5, rel=1e-4)
    assert (schedule.weight_decay(199_999), schedule.weight_decay(200_000)) == (0.1, 0.0)


def test_the_printed_recipe_is_the_file_and_loads_again(tmp_path: Path) -> None:
    text = recipe_text("demo")
    (tmp_path / "copy.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "copy.yaml")).values == load_recipe("demo").values


def test_a_misspelled_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match="Did you mean 'bitnet-95m'") as caught:
        load_recipe("bitnet-95")
    assert caught.value.exit_code == 2
    with pytest.raises(SettingsError, match="demo"):
        load_recipe("zzzzzzzz")


def test_a_file_extends_a_recipe_and_changes_only_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: demo\noptimizer:\n  lr: 1e-3\nseed: 7\n")
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    assert recipe.name == "mine"
    mine = settings_from(resolve([Layer("file", recipe.values)], setting_names()))
    demo = settings_from(resolve([Layer("recipe", load_recipe("demo").values)], setting_names()))
    assert (mine.optimizer.learning_rate, mine.training.seed) == (1e-3, 7)
    assert mine.model == demo.model
    assert mine.schedule == demo.schedule


def test_a_file_may_extend_one_with_dotted_names_and_may_not_extend_itself(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("training.max_steps: 5\ntraining: {seed: 1, batch_size: 3}\n")
    (tmp_path / "mine.yaml").write_text(f"extends: {tmp_path}/base.yaml\ntraining: {{seed: 2}}\nlr: 1e-3\n")
    values = load_recipe(str(tmp_path / "mine.yaml")).values
    training = settings_from(resolve([Layer("file", values)], setting_names())).training
    assert (training.max_steps, training.seed, training.batch_size) == (5, 2, 3)
    (tmp_path / "loop.yaml").write_text(f"extends: {tmp_path}/loop.yaml\n")
    with pytest.raises(SettingsError):
        load_recipe(str(tmp_path / "loop.yaml"))


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    values = {"training": {"max_steps": 3}, "schedule": {"name": "wsd"}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "a.json").write_text(json.dumps(values))
    assert load_recipe(str(tmp_path / "a.yaml")).values == load_recipe(str(tmp_path / "a.json")).values == values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "malformed"),
        (b"- 1\n- 2\n", "must hold sections"),
        (b"\xff\xfe\x00", "is malformed"),
        (b"!!python/object/apply:os.system ['true']", "malformed"),
        (b"", "must hold sections"),
    ],
)
def test_a_malformed_file_is_one_sentence_and_runs_nothing(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        load_recipe(str(tmp_path / "a.yaml"))


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="Check the path"):
        load_recipe(str(tmp_path / "missing.yaml"))
    (tmp_path / "a.yaml").write_text("extends: nowhere.yaml\n")
    with pytest.raises(SettingsError, match="nowhere"):
        load_recipe(str(tmp_path / "a.yaml"))
