"""What a twin is: what arms may change, the trials that follow, and the file that keeps it."""

from pathlib import Path
from typing import Any

import pytest

from ternlm.errors import EnvironmentFault, SettingsError
from ternlm.recipes import load_recipe, recipe_names
from ternlm.run_directory import RunDirectory, runs_around, runs_in
from ternlm.training.sweep_record import End
from ternlm.twin import TwinDirectory, TwinRecord, TwinSettings, find_twin
from ternlm.twin.arms import (
    arm_settings,
    final_trials_of,
    identity,
    make_record,
    resolve_trial,
    twin_id,
    validated,
    with_trials,
)
from ternlm.twin.definition import NO_ROUNDING, RATE, final_trials, own_settings, read_text, require_own, sweep_trials

OPTIONS: dict[str, Any] = {"learning_rates": {"ternary": ["8e-3", "2e-3", "4e-3"]}, "seeds": [3, 1]}


def test_points_of_a_sweep_run_a_share_of_every_limit_and_of_the_warm_up() -> None:
    definition = TwinSettings.from_mapping({**OPTIONS, "sweep_share": 0.3, "own": {"ternary": {"a.b": 1}}})
    budget = {"training.max_steps": 1000, "training.max_epochs": 3}
    trials = sweep_trials(definition, budget, {"ternary": 50, "full": None})
    assert [(trial.id, trial.seed) for trial in trials] == [
        ("ternary-rate-0.002", 3),
        ("ternary-rate-0.004", 3),
        ("ternary-rate-0.008", 3),
    ]
    assert trials[1].settings == {
        "a.b": 1,
        RATE: 4e-3,
        "training.max_steps": 300,
        "training.max_epochs": pytest.approx(0.9),
        "schedule.warmup_steps": 15,
    }


def test_both_arms_of_a_seed_run_before_the_next_seed_and_an_arm_without_a_rate_does_not_run() -> None:
    definition = TwinSettings.from_mapping(OPTIONS)
    trials = final_trials(definition, {"ternary": 4e-3, "full": None})
    assert [(trial.id, trial.arm, trial.seed) for trial in trials] == [
        ("ternary-s3", "ternary", 3),
        ("full-s3", "full", 3),
        ("ternary-s1", "ternary", 1),
        ("full-s1", "full", 1),
    ]
    assert trials[0].settings == {RATE: 4e-3}
    assert trials[1].settings == NO_ROUNDING
    assert [trial.arm for trial in final_trials(definition, {"full": None})] == ["full", "full"]


def test_a_single_rate_is_the_rate_of_the_arm_and_no_sweep() -> None:
    definition = TwinSettings.from_mapping({"learning_rates": {"full": [5e-4]}})
    assert not definition.is_swept("full")
    assert own_settings(definition, "full") == {**NO_ROUNDING, RATE: 5e-4}
    assert sweep_trials(definition, {}, {"ternary": None, "full": None}) == []


def test_arms_may_change_how_they_are_trained_and_drawn_and_nothing_else() -> None:
    require_own("ternary", {"quantization.granularity": "row", "optimizer.name": "muon", "schedule.name": "cosine"})
    require_own("full", {"model.initializer_range": 0.1, "training.grad_clip": 0, "model.hidden_dropout": 0.2})
    for name in ("evaluation.max_tokens", "objective.name", "data.sequence_length", "training.deterministic"):
        with pytest.raises(SettingsError, match="both arms have the same"):
            require_own("ternary", {name: 1})


def test_a_text_is_named_or_goes_by_its_stem(tmp_path: Path) -> None:
    (tmp_path / "emma.txt").touch()
    assert read_text(f"novel={tmp_path / 'emma.txt'}") == ("novel", str((tmp_path / "emma.txt").resolve()))
    assert read_text("a/b/emma.txt") == ("emma", "a/b/emma.txt")
    assert read_text("w=wikitext-2") == ("w", "wikitext-2")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_twin_with_a_lower_rate_and_the_same_network(name: str) -> None:
    assert RATE in load_recipe(name).twin, "the full-precision arm starts from a rate of its own"
    record = make_record(name, {}, {}, {})
    ternary, full = arm_settings(record, "ternary"), arm_settings(record, "full")
    assert (full.quantization.weights, full.quantization.activations) == ("none", "none")
    assert full.optimizer.learning_rate <= ternary.optimizer.learning_rate
    assert (full.data, full.tokenizer, full.training) == (ternary.data, ternary.tokenizer, ternary.training)


def test_the_twins_settings_of_a_recipe_go_on_top_of_those_it_extends(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("twin: {optimizer.learning_rate: 0.5, model.initializer_range: 0.25}\n")
    (tmp_path / "b.yaml").write_text(f"extends: {tmp_path / 'a.yaml'}\ntwin: {{optimizer.learning_rate: 0.125}}\n")
    found = load_recipe(str(tmp_path / "b.yaml"))
    assert found.twin == {"optimizer.learning_rate": 0.125, "model.initializer_range": 0.25}
    assert "twin" not in found.values
    (tmp_path / "c.yaml").write_text("twin: 3\n")
    with pytest.raises(SettingsError, match="twin holds settings"):
        load_recipe(str(tmp_path / "c.yaml"))


def record() -> TwinRecord:
    own: dict[Any, dict[str, Any]] = {"full": {"grad_clip": 2}}
    made = make_record("bitnet-1m", {"max_steps": 100, "hidden_size": 64}, own, OPTIONS)
    return made._replace(ends={"ternary-rate-0.002": End(4, "Diverged: it did.")}, chosen={"ternary": 4e-3})


def test_a_record_is_read_as_it_was_written_and_is_the_same_twin(tmp_path: Path) -> None:
    folder = TwinDirectory(tmp_path / "runs" / "t")
    folder.path.mkdir(parents=True)
    written = record()
    folder.write(written)
    assert folder.read() == written
    assert identity(folder.read()) == identity(written)
    assert twin_id(written).startswith("bitnet-1m-twin-")
    assert find_twin("t", tmp_path / "runs").path == folder.path
    assert find_twin("latest", tmp_path / "runs").path == folder.path
    more = written.definition | {"texts": [["a", "b"]], "ptq": True}
    assert identity(written._replace(definition=more)) == identity(written), "what is measured may change"
    other = written.definition | {"sweep_share": 0.5}
    assert identity(written._replace(definition=other)) != identity(written)


def test_the_arms_are_runs_known_by_the_twins_name(tmp_path: Path) -> None:
    folder = TwinDirectory(tmp_path / "t")
    (folder.path / "full" / "meta").mkdir(parents=True)
    (folder.path / "scores").mkdir()
    folder.write(record())
    assert runs_in(folder.path) == [folder.path / "full"]
    assert runs_around(RunDirectory(folder.path / "full")) == tmp_path


@pytest.mark.parametrize("content", [b"", b"{}", b'{"trials": [{}]}', b"[1]"])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "twin.json").write_bytes(content)
    with pytest.raises(EnvironmentFault, match="damaged"):
        TwinDirectory(tmp_path).read()


def test_the_arms_that_are_compared_have_the_chosen_rate_and_keep_their_settings() -> None:
    begun = record()
    complete = with_trials(begun, final_trials_of(begun))
    assert [trial.id for trial in complete.trials[3:]] == ["ternary-s3", "full-s3", "ternary-s1", "full-s1"]
    assert with_trials(complete, final_trials_of(complete)) == complete
    settings = validated(complete, complete.trials)
    assert settings["ternary-s3"].optimizer.learning_rate == 4e-3
    assert settings["full-s1"].training.seed == 1
    assert settings["full-s1"].training.grad_clip == 2
    changed = complete._replace(shared={**complete.shared, "training.max_steps": 7})
    with pytest.raises(SettingsError, match="no longer what the twin began with"):
        validated(changed, complete.trials)
    assert resolve_trial(complete, complete.trials[-1]).values["training"]["max_steps"] == 100
