"""What follows from a sweep's definition, and what becomes of its trials: pure, in order, and never run twice."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ternlm.errors import EnvironmentFault, SettingsError
from ternlm.run_directory import SWEEP, RunDirectory, find_run, runs_around
from ternlm.settings.resolve import parse_overrides
from ternlm.training.settings import setting_names
from ternlm.training.sweep import SEED, Draw, SweepSettings, Trial, base_arm, expand
from ternlm.training.sweep_record import End, SweepDirectory, SweepRecord, find_sweep, fingerprint
from ternlm.training.sweep_trials import TrialRunner, assignments, end_of, pending

CURRENT = {"optimizer.learning_rate": 2e-3, "training.batch_size": 12, "model.hidden_act": "silu"}


def trials_of(**values: Any) -> list[Trial]:
    return expand(SweepSettings.from_mapping(values), setting_names(), CURRENT.__getitem__)


def record_of(*trials: Trial, **ends: End) -> SweepRecord:
    marks = {trial.id: fingerprint(trial.settings) for trial in trials}
    return SweepRecord(
        "s", "here", "", "bitnet-1m", {"training.max_steps": 3}, "val/loss", {}, list(trials), marks, ends
    )


def test_a_grid_is_the_product_with_the_last_key_fastest_and_seeds_slowest() -> None:
    trials = trials_of(grid={"lr": ["1e-3", 2e-3], "training.batch_size": [4, 8]}, seeds=[5, 1])
    points = [(t.seed, t.settings["optimizer.learning_rate"], t.settings["training.batch_size"]) for t in trials]
    assert points == [(seed, rate, size) for seed in (5, 1) for rate in (1e-3, 2e-3) for size in (4, 8)]
    assert trials[0].arm == "learning_rate=0.001, batch_size=4"
    assert trials[0].id == "learning_rate-0.001-batch_size-4-s5"
    assert trials[0].overrides()[SEED] == 5
    assert len({trial.id for trial in trials}) == 8


def test_arms_grid_and_draws_multiply() -> None:
    trials = trials_of(
        trials=[{"name": "base"}, {"name": "twin", "settings": {"quantization": {"weights": "none"}}}],
        grid={"lr": [1e-3, 2e-3, 3e-3]},
        random={"warmup_steps": {"low": 1, "high": 9, "whole": True}},
        samples=2,
    )
    assert len(trials) == 2 * 3 * 2
    assert trials[-1].arm == "twin, learning_rate=0.003, draw 2"
    assert trials[-1].settings["quantization.weights"] == "none"
    warmups = [trial.settings["schedule.warmup_steps"] for trial in trials]
    assert warmups == warmups[:2] * 6, "the draws are the same for every arm"


def test_a_grid_may_consist_of_lists() -> None:
    trials = trials_of(grid={"sample_modes": [["greedy", "stress"], ["typical"]]})
    assert [trial.settings["evaluation.sample_modes"] for trial in trials] == [["greedy", "stress"], ["typical"]]
    assert trials[0].id == "sample_modes-greedy-stress"


def test_draws_are_decided_by_the_seed_and_lie_in_their_range() -> None:
    given = {
        "random": {
            "lr": {"low": "1e-4", "high": "1e-2", "log": True},
            "weight_decay": {"low": 0, "high": 0.2},
            "warmup_steps": {"low": 2, "high": 6, "whole": True},
            "schedule.name": {"choices": ["cosine", "wsd"]},
        },
        "samples": 400,
    }
    trials = trials_of(**given, draw_seed=3)
    assert trials == trials_of(**given, draw_seed=3)
    assert trials != trials_of(**given, draw_seed=4)
    rates = [trial.settings["optimizer.learning_rate"] for trial in trials]
    assert all(1e-4 <= rate <= 1e-2 and rate == float(f"{rate:.4g}") for rate in rates)
    below = sum(rate < 1e-3 for rate in rates) / len(rates)
    assert abs(below - 0.5) < 4 * math.sqrt(0.25 / len(rates)), "half of them lie below the middle of the logarithm"
    decays = [trial.settings["optimizer.weight_decay"] for trial in trials]
    assert abs(sum(decays) / len(decays) - 0.1) < 4 * 0.2 / math.sqrt(12 * len(decays))
    assert {trial.settings["schedule.warmup_steps"] for trial in trials} == {2, 3, 4, 5, 6}
    assert {trial.settings["schedule.name"] for trial in trials} == {"cosine", "wsd"}


def test_more_samples_and_more_keys_change_no_earlier_draw() -> None:
    rate = {"lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    few = trials_of(random=rate, samples=3)
    more = trials_of(random={"schedule.name": {"choices": ["cosine", "wsd"]}, **rate}, samples=7)
    key = "optimizer.learning_rate"
    assert [trial.settings[key] for trial in few] == [trial.settings[key] for trial in more[:3]]


def test_t20_a_factor_multiplies_what_the_recipe_has() -> None:
    trials = trials_of(grid={"lr": ["x1", "x1/4", "x2.5"], "training.batch_size": ["x1/4"]})
    assert [trial.settings["optimizer.learning_rate"] for trial in trials] == [2e-3, 5e-4, 5e-3]
    assert trials[0].settings["training.batch_size"] == 3
    assert isinstance(trials[0].settings["training.batch_size"], int)
    (word,) = trials_of(trials=[{"name": "a", "settings": {"model.hidden_act": "x2"}}])
    assert word.settings["model.hidden_act"] == "x2", "what is no number is not multiplied"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trials": [{"name": "a", "settings": {"optimizer.learning_rat": 1}}]}, "'a'.*Did you mean.*learning_rate'"),
        ({"trials": [{"name": "a", "setings": {}}]}, "trials.0.setings.*Did you mean 'trials.0.settings'"),
        ({"trials": [{"name": "a"}, {"name": "a"}]}, "two trials are called 'a'"),
        ({"trials": [{"name": "a", "settings": {"lr": 1}}], "grid": {"learning_rate": [1, 2]}}, "'a'.*also in grid"),
        ({"grid": {"optimizer.learning_rat": [1]}}, "Did you mean"),
        ({"grid": {"lr": []}}, "'lr' has no values"),
        ({"grid": {"lr": 1}}, "grid.lr"),
        ({"grid": {"lr": [1], "learning_rate": [1]}}, "twice"),
        ({"grid": {"lr": [1, 1.0]}}, "holds the trial 'learning_rate=1' twice"),
        ({"grid": {"lr": [1]}, "random": {"lr": {"low": 1, "high": 2}}, "samples": 1}, "both in grid and in random"),
        ({"random": {"lr": {"low": 1, "high": 2}}}, "samples"),
        ({"grid": {"lr": [1]}, "samples": 3}, "belong together"),
        ({"random": {"lr": {"low": 2, "high": 1}}, "samples": 1}, "low < high"),
        ({"random": {"lr": {"low": 0, "high": 1, "log": True}}, "samples": 1}, "no logarithm"),
        ({"random": {"lr": {"low": 0.2, "high": 0.8, "whole": True}}, "samples": 1}, "no whole number lies between"),
        ({"random": {"lr": {"low": 0, "high": 1, "choices": [1]}}, "samples": 1}, "not both"),
        ({"seeds": [0, 0]}, "each given once"),
        ({"seeds": [1], "grid": {"seed": [1, 2]}}, "training.seed"),
        ({"metric": "val/los", "seeds": [1]}, "metric"),
        ({"gird": {"lr": [1]}}, "Did you mean 'grid'"),
        ({}, "varies nothing"),
    ],
)
def test_a_wrong_definition_is_one_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        trials_of(**values)


def test_folder_names_are_plain_and_differ_also_without_case() -> None:
    names = ["No QDrop", "no qdrop", "no/qdrop", "...", "é", "x" * 60]
    trials = trials_of(trials=[{"name": name} for name in names])
    ids = [trial.id for trial in trials]
    assert ids == ["No-QDrop", "no-qdrop-2", "no-qdrop-3", "trial", "trial-2", "x" * 60]


def test_the_base_is_the_arm_of_that_name_or_the_first() -> None:
    assert base_arm(["a", "base", "b"]) == "base"
    assert base_arm(["a", "b"]) == "a"


def test_a_draw_without_a_distribution_is_refused() -> None:
    with pytest.raises(SettingsError, match="low and high"):
        Draw.from_mapping({"low": 1})


def test_the_record_survives_the_file(tmp_path: Path) -> None:
    sweep = SweepDirectory(tmp_path / "s")
    record = record_of(*trials_of(grid={"lr": [1e-3, 2e-3]}, seeds=[1, 2]))
    record.ends[record.trials[0].id] = End(4, "Diverged: so it is")
    with sweep.locked():
        sweep.write(record)
        with pytest.raises(EnvironmentFault, match="another process"), sweep.locked():
            pass
    assert sweep.read() == record
    sweep.file.write_text("{}")
    with pytest.raises(EnvironmentFault, match="damaged"):
        sweep.read()
    with pytest.raises(EnvironmentFault, match="there is no sweep"):
        SweepDirectory(tmp_path / "nothing").read()


def test_sweeps_and_the_runs_inside_are_found_by_name(tmp_path: Path) -> None:
    for name in ("lr-1", "lr-2"):
        (tmp_path / name / "base" / "meta").mkdir(parents=True)
        (tmp_path / name / SWEEP).write_text("{}")
    assert find_sweep("lr-2", tmp_path).path == tmp_path / "lr-2"
    assert find_sweep(str(tmp_path / "lr-1"), tmp_path / "elsewhere").id == "lr-1"
    with pytest.raises(EnvironmentFault, match="several"):
        find_sweep("lr", tmp_path)
    with pytest.raises(EnvironmentFault, match="lr-1, lr-2"):
        find_sweep("nothing", tmp_path)
    assert find_run("lr-1/base", tmp_path).path == tmp_path / "lr-1" / "base"
    assert find_run("lr-2/b", tmp_path).path == tmp_path / "lr-2" / "base"
    assert find_run("latest", tmp_path).path.name == "base"


def test_a_trial_looks_for_a_teacher_among_the_runs_beside_its_sweep(tmp_path: Path) -> None:
    (tmp_path / "lr" / "base").mkdir(parents=True)
    assert runs_around(RunDirectory(tmp_path / "lr" / "base")) == tmp_path / "lr"
    (tmp_path / "lr" / SWEEP).write_text("{}")
    assert runs_around(RunDirectory(tmp_path / "lr" / "base")) == tmp_path
    assert runs_around(RunDirectory(tmp_path / "lr")) == tmp_path


@pytest.mark.parametrize("value", [1e-5, "none", None, True, [1, "a"], "quo\"te ' and: é", "1e-3", {"a": 1}, ""])
def test_t13_words_on_the_command_line_mean_what_they_meant(value: Any) -> None:
    (word,) = assignments({"a.b": value})
    read = parse_overrides([word])["a.b"]
    assert read == value or float(read) == value


STATES = [
    ("finished", 0, "done"), ("stopped", 0, "done"), ("stopped", 130, "go on"), ("preempted", 75, "go on"),
    ("training", None, "go on"), ("diverged", 4, "done"), ("failed", 1, "retry"), ("out_of_memory", 5, "retry"),
]  # fmt: skip


@pytest.mark.parametrize(("state", "code", "expected"), STATES)
def test_what_a_run_left_decides_whether_it_runs_again(
    tmp_path: Path, state: str, code: int | None, expected: str
) -> None:
    sweep, trial = SweepDirectory(tmp_path), Trial("a", "a", None, {})
    run, record = sweep.run(trial), record_of(trial)
    run.path.mkdir()
    run.status.write_text(json.dumps({"state": state, "exit_code": code, "error": None}))
    assert bool(pending(sweep, record, retry_failed=False)) == (expected == "go on")
    assert bool(pending(sweep, record, retry_failed=True)) == (expected != "done")


def test_a_trial_that_never_became_a_run_is_known_from_the_record(tmp_path: Path) -> None:
    sweep, trials = SweepDirectory(tmp_path), [Trial(name, name, None, {}) for name in "abc"]
    record = record_of(*trials, a=End(3, "DataError: gone"), b=End(-9, None))
    assert pending(sweep, record, retry_failed=False) == trials[1:], "a failed; b was killed; c was never begun"
    assert pending(sweep, record, retry_failed=True) == trials
    assert end_of(sweep, record, trials[0]) == End(3, "DataError: gone")


def test_a_trial_is_begun_by_train_and_continued_by_resume(tmp_path: Path) -> None:
    sweep, trial = SweepDirectory(tmp_path), Trial("a-s1", "a", 1, {"optimizer.learning_rate": 1e-3})
    runner = TrialRunner(sweep, record_of(trial))
    words = runner.command(trial)[3:]
    assert words[:2] == ["train", "bitnet-1m"]
    assert {"training.max_steps=3", "optimizer.learning_rate=0.001", "training.seed=1"} <= set(words)
    assert words[-5:] == ["--run-id", "a-s1", "--runs-dir", str(tmp_path), "--quiet"]
    sweep.run(trial).create()
    sweep.run(trial).config.write_text("{}")
    assert runner.command(trial)[3:] == ["resume", str(tmp_path / "a-s1"), "--quiet"]
