"""What an experiment file says, in its own form."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ternlm.errors import SettingsError
from ternlm.experiment import load_experiment
from ternlm.experiment.definition import is_own
from ternlm.experiment.stages import changed_settings
from ternlm.recipes import experiment_names, load_recipe
from ternlm.training.settings import RunSettings, resolve_settings

PLAIN = {
    "experiment_name": "first",
    "description": "a try",
    "extends": "bitnet-1m",
    "data": {"source": "texts", "max_samples": 7},
    "training": {"max_steps": 9},
    "evaluation": {"every_steps": 3, "splits": ["validation"], "protocol": "stream"},
    "generation": {"prompts": ["α", "猫"], "samples": 5, "temperature": 0.3},
    "output": {"directory": "elsewhere/first"},
}


def written(tmp_path: Path, values: dict[str, Any], name: str = "file.yaml") -> str:
    path = tmp_path / name
    text = json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["file.yaml", "file.json"])
def test_the_file_is_divided_between_the_run_and_what_follows_it(tmp_path: Path, name: str) -> None:
    experiment = load_experiment(written(tmp_path, PLAIN, name))
    assert (experiment.name, experiment.description) == ("first", "a try")
    assert experiment.directory == Path("elsewhere/first")
    assert (experiment.measurement.splits, experiment.measurement.protocol) == (("validation",), "stream")
    assert (experiment.generation.prompts, experiment.generation.samples) == (("α", "猫"), 5)
    assert experiment.generation.sampling == {"temperature": 0.3}
    settings = RunSettings.from_mapping(resolve_settings(experiment.layers).values)
    assert (settings.training.max_steps, settings.data.max_documents, settings.evaluation.every_steps) == (9, 7, 3)
    assert settings.model == RunSettings.from_mapping(load_recipe("bitnet-1m").values).model
    assert not experiment.notes


def test_a_file_without_a_name_is_called_like_the_file(tmp_path: Path) -> None:
    assert load_experiment(written(tmp_path, {"extends": "bitnet-1m"}, "my-try.yaml")).name == "my-try"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"experiment_name": "a/b"}, "'a/b' is not a plain name"),
        ({"evaluation": {"splits": ["dev"]}}, "evaluation.splits"),
        ({"evaluation": {"splits": []}}, "name one split or several"),
        ({"evaluation": {"protocol": "sliding"}}, "evaluation.protocol='sliding'"),
        ({"evaluation": 3}, "section 'evaluation' must hold settings"),
        ({"generation": ["α"]}, "section 'generation' must hold settings"),
        ({"generation": {"samples": -1}}, "generation.samples=-1"),
        ({"output": {"checkpoint": "x"}}, "section 'output' must say where"),
        ({"extends": "hgrn-9000"}, "unknown recipe 'hgrn-9000'"),
    ],
)
def test_bad_input_is_one_sentence_that_names_it(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        load_experiment(written(tmp_path, {**PLAIN, **change}))


def test_an_unknown_name_lists_the_shipped_experiments() -> None:
    with pytest.raises(SettingsError, match=r"unknown experiment 'stories-hgnr'\. Did you mean 'stories-hgrn'"):
        load_experiment("stories-hgnr")


def test_a_recipe_is_not_taken_for_an_experiment_nor_an_experiment_for_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="'bitnet-1m' is a recipe and no experiment"):
        load_experiment("bitnet-1m")
    with pytest.raises(SettingsError, match="is an experiment and no recipe"):
        load_recipe(written(tmp_path, PLAIN))


@pytest.mark.parametrize("name", experiment_names())
def test_every_shipped_experiment_has_valid_settings_and_a_description(name: str) -> None:
    experiment = load_experiment(name)
    settings = RunSettings.from_mapping(resolve_settings(experiment.layers).values)
    assert settings.total_steps(windows_per_epoch=1) >= 1
    assert experiment.description
    assert experiment.generation.prompts


def test_values_of_the_command_line_are_above_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, PLAIN)
    overrides = {"eval.splits": ["test"], "generation.temperature": 0.9, "output.directory": "here"}
    experiment = load_experiment(file, overrides=overrides)
    assert experiment.measurement.splits == ("test",)
    assert experiment.measurement.protocol == "stream"
    assert experiment.generation.sampling == {"temperature": 0.9}
    assert experiment.directory == Path("here")


def test_settings_of_the_experiment_are_told_from_those_of_its_run() -> None:
    own = ("evaluation.splits", "eval.baselines", "generation.top_k", "output.directory")
    of_the_run = ("evaluation.every_steps", "evaluation.batch_size", "training.max_steps", "prompts", "generation")
    assert all(map(is_own, own))
    assert not any(map(is_own, of_the_run))


def test_what_a_run_fills_in_itself_is_no_change() -> None:
    begun = {"model": {"vocab_size": 256, "hidden_size": 3}, "training": {"max_steps": 4}}
    assert (
        changed_settings(begun, {"model": {"vocab_size": None, "hidden_size": 3}, "training": {"max_steps": 4}}) == {}
    )
    assert changed_settings(begun, {"model": {"vocab_size": 300}}) == {"model.vocab_size": 300}
    assert changed_settings(begun, {"training": {"max_steps": 9}}) == {"training.max_steps": 9}
