"""`ternlm sweep`: mistakes are found before the first trial, and a sweep that was stopped or broken goes on."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ternlm.cli.sweep_words import make_record, read_words, sweep_id, validated
from ternlm.errors import SettingsError
from ternlm.recipes import load_sweep, sweep_names, sweep_text
from ternlm.run_directory import read_jsonl

HANG_GUARD_S = 120
QUICK = ("tensorboard=false", "evaluation.every_steps=2", "evaluation.max_tokens=300")


def value_at_end(run: Path) -> float:
    return float(read_jsonl(run / "eval" / "eval_results.jsonl")[-1]["val/loss"])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["optimizer.learning_rat=[1,2]"], ["Did you mean 'optimizer.learning_rate'?"]),
        (["lr=[1e-3,-1]"], ["trial 'learning_rate=-1'", "above 0"]),
        (["hidden_size=[24,25]"], ["trial 'hidden_size=25'"]),
        (["sequence_length=[16,4096]"], ["trial 'sequence_length=4096'", "max_position_embeddings=24"]),
        (["lr=log(1e-4,1e-2)"], ["--samples"]),
        (["lr=log(1e-4)", "--samples", "2"], ["log takes two bounds"]),
        (["lr=uniform(2,1)", "--samples", "2"], ["low < high"]),
        (["lr=[1e-3]", "--seeds", "1,x"], ["seeds"]),
        (["lr=[1e-3]", "--metric", "loss"], ["metric"]),
        (["lr=[1e-3]", "--sweep-id", "../x"], ["not a plain name"]),
        (["steps_=3"], ["unknown setting"]),
        (["seed=3"], ["varies nothing"]),
        (["bitnet-1m", "lr=[1]"], ["two recipes"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_t12_a_wrong_sweep_is_one_sentence_and_nothing_is_created(
    ternlm, recipe: Path, tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    outcome = ternlm("sweep", recipe, *words)
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "no sweep given"),
        (["learning-rat"], 2, "Did you mean 'learning-rate'?"),
        (["learning-rate"], 2, "ternlm sweep learning-rate bitnet-1m"),
        (["--resume", "nothing"], 3, "no sweep 'nothing'"),
        (["--summary", "latest"], 3, "no sweep"),
        (["bitnet-1m", "--resume", "x"], 2, "take no settings"),
        (["--resume", "x", "--steps", "3"], 2, "take no settings"),
    ],
)
def test_what_is_missing_is_one_sentence(ternlm, words: list[str], code: int, message: str) -> None:
    outcome = ternlm("sweep", *words)
    assert outcome.code == code, outcome
    assert message in outcome.err


def test_a_mistake_in_one_trial_of_a_file_names_it(ternlm, recipe: Path, tmp_path: Path) -> None:
    text = f"recipe: {recipe}\ntrials:\n- name: fine\n- name: odd\n  settings: {{model: {{rope_thet: 1}}}}\n"
    (tmp_path / "sweep.yaml").write_text(text)
    outcome = ternlm("sweep", "sweep.yaml")
    assert outcome.code == 2
    assert "trial 'odd'" in outcome.err
    assert "Did you mean 'model.rope_theta'?" in outcome.err


def test_a_dry_run_shows_the_trials_and_the_sum_of_their_plans(ternlm, recipe: Path, tmp_path: Path) -> None:
    words = ("sweep", recipe, "lr=[1e-3,2e-3]", "training.batch_size=[2,6]", "--steps", 10, "--dry-run")
    listed = json.loads(ternlm(*words, "--json").out)
    plans = [
        json.loads(ternlm("plan", recipe, "--steps", 10, f"training.batch_size={b}", "--json").out) for b in (2, 6)
    ]
    assert len(listed["trials"]) == 4
    for key in ("tokens", "flops", "disk_bytes"):
        assert listed["total"][key] == 2 * sum(plan[key] for plan in plans)
    shown = ternlm(*words).out
    assert "learning_rate-0.001-batch_size-6" in shown
    assert "4 trials" in shown
    assert not (tmp_path / "runs").exists()


def test_the_command_line_goes_on_top_of_a_sweep_file(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TERNLM__tracking__report")  # the environment's settings are those of the sweep too
    (tmp_path / "mine.yaml").write_text(
        f"recipe: {recipe}\nsettings: {{training: {{max_steps: 9, batch_size: 3}}}}\n"
        "grid: {learning_rate: [1e-3, 2e-3], warmup_steps: [0, 1]}\nseeds: [0, 1]\n"
    )
    words = read_words(["mine.yaml", "lr=[5e-3]", "max_steps=4"], {"data.source": "x"}, {"seeds": ["7"]})
    assert words.name == "mine"
    record = make_record(words, print)
    assert record.shared == {"training.max_steps": 4, "training.batch_size": 3, "data.source": "x"}
    assert [(trial.seed, *trial.settings.values()) for trial in record.trials] == [(7, 5e-3, 0), (7, 5e-3, 1)]


def test_the_environment_is_part_of_the_sweep_and_its_name(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = read_words([str(recipe), "lr=[1e-3,2e-3]"], {}, {})
    plain = make_record(words, print)
    assert sweep_id(plain) == sweep_id(make_record(words, print))
    monkeypatch.setenv("TERNLM__training__batch_size", "3")
    record = make_record(words, print)
    assert record.shared["training.batch_size"] == 3
    assert sweep_id(record) != sweep_id(plain)
    assert validated(record)[record.trials[0].id].training.batch_size == 3


def test_an_arm_that_changes_nothing_is_left_out_with_all_its_seeds(recipe: Path) -> None:
    said: list[str] = []
    arms = [{"name": "base"}, {"name": "same", "settings": {"warmup_steps": "2"}}, {"name": "b", "settings": {"lr": 1}}]
    words = read_words([str(recipe), "max_steps=9"], {}, {"seeds": [4, 1]})
    record = make_record(words._replace(values={**words.values, "trials": arms}), said.append)
    assert [(trial.arm, trial.seed) for trial in record.trials] == [("base", 4), ("b", 4), ("base", 1), ("b", 1)]
    assert said == ["trial 'same' is the same as 'base' and is left out"]


def test_a_recipe_that_changed_under_a_sweep_is_noticed(recipe: Path) -> None:
    record = make_record(read_words([str(recipe), "lr=[1e-3,2e-3]"], {}, {}), print)
    assert len(validated(record)) == 2
    recipe.write_text(recipe.read_text().replace("batch_size: 4", "batch_size: 5"))
    with pytest.raises(SettingsError, match="no longer what the sweep began with"):
        validated(record)


def test_every_shipped_sweep_is_listed_printed_and_valid(ternlm, recipe: Path) -> None:
    listed = ternlm("recipes").out
    assert {"learning-rate", "qdyt-ablations"} <= set(sweep_names())
    for name in sweep_names():
        assert name in listed
        assert ternlm("recipes", name).out == sweep_text(name)
        loaded = load_sweep(name)
        assert loaded is not None and loaded.description
        given = [name] if loaded.values.get("recipe") else [name, str(recipe)]
        record = make_record(read_words(given, {}, {}), print)
        assert len(validated(record)) > 1


def test_trials_are_ordinary_runs_and_the_summary_has_their_numbers(ternlm, recipe: Path, tmp_path: Path) -> None:
    words = ("sweep", recipe, "lr=[1e-3,4e-3]", *QUICK, "--parallel", 2, "--sweep-id", "s")
    outcome = ternlm(*words)
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "runs" / "s"
    runs = [folder / name for name in ("learning_rate-0.001", "learning_rate-0.004")]
    told = json.loads((folder / "summary.json").read_text())
    assert [arm["mean"] for arm in told["arms"]] == [value_at_end(run) for run in runs]
    assert f"{value_at_end(runs[0]):.4f}" in outcome.out
    assert (folder / "summary.png").read_bytes().startswith(b"\x89PNG")
    origins = json.loads((runs[1] / "meta" / "config_origin.json").read_text())
    assert origins["optimizer.learning_rate"] == "command line"
    assert ternlm("status", "s/learning_rate-0.004", "--json").code == 0
    assert ternlm("inspect", "s/learning_rate-0.001").code == 0
    listed = ternlm("runs").out
    assert sorted(re.findall(r"^(s\S*) ", listed, re.MULTILINE)) == sorted(f"s/{run.name}" for run in runs)
    before = {run: (run / "status.json").read_bytes() for run in runs}
    again = ternlm(*words)
    assert again.code == 0
    assert {run: (run / "status.json").read_bytes() for run in runs} == before, "nothing is trained twice"
    assert json.loads(ternlm("sweep", "--summary", "s", "--json").out)["arms"] == told["arms"]
    assert ternlm("sweep", recipe, "lr=[1e-3]", "--sweep-id", "s").code == 2, "other trials"


@pytest.mark.slow
def test_a_diverging_trial_is_recorded_and_the_others_go_on(ternlm, recipe: Path, tmp_path: Path) -> None:
    outcome = ternlm(
        "sweep", recipe, "lr=[1e30,1e-3]", "grad_clip=0", *QUICK, "--steps", 40, "--sweep-id", "s", "--json"
    )
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)
    assert [(arm["state"], arm["rank"]) for arm in told["arms"]] == [("diverged", None), ("finished", 1)]
    record = json.loads((tmp_path / "runs" / "s" / "sweep.json").read_text())
    assert [trial["exit_code"] for trial in record["trials"]] == [4, 0]
    assert "Diverged" in record["trials"][0]["error"]


@pytest.mark.slow
def test_a_failed_trial_is_tried_again_only_on_request(ternlm, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "s"
    folder.mkdir(parents=True)
    obstacle = folder / "learning_rate-0.001"
    obstacle.touch()
    words = ("sweep", recipe, "lr=[1e-3,2e-3]", *QUICK, "--sweep-id", "s", "-q")
    outcome = ternlm(*words)
    assert outcome.code == 1
    assert "failed: learning_rate-0.001" in outcome.err
    assert "--retry-failed" in outcome.err
    assert "cannot be written" in (folder / "learning_rate-0.001.log").read_text()
    assert value_at_end(folder / "learning_rate-0.002") > 0
    obstacle.unlink()
    assert ternlm(*words).code == 1
    assert not obstacle.exists(), "it was not tried again"
    outcome = ternlm("sweep", "--resume", "s", "--retry-failed", "--json")
    assert outcome.code == 0, outcome.err
    assert [arm["state"] for arm in json.loads(outcome.out)["arms"]] == ["finished", "finished"]


def interrupt_after(rows: int, file: Path) -> threading.Thread:
    """Ctrl-C for this process as soon as a run has so many rows."""

    def wait() -> None:
        last = time.monotonic() + HANG_GUARD_S
        while time.monotonic() < last and (not file.exists() or file.read_bytes().count(b"\n") < rows):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_l01_a_sweep_that_was_interrupted_saves_and_goes_on_where_it_stopped(
    ternlm, recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "s"
    first, second, third = (folder / f"max_steps-{steps}" for steps in (3, 700, 4))
    interrupt_after(5, second / "metrics" / "scalars.jsonl")
    outcome = ternlm("sweep", recipe, "max_steps=[3,700,4]", *QUICK, "evaluation.every_steps=999", "--sweep-id", "s")
    assert outcome.code == 130, outcome
    assert (
        f"1 of 3 trials are done, what ran is saved. Continue with: ternlm sweep --resume {Path('runs/s')}"
        in outcome.err
    )
    stopped: dict[str, Any] = json.loads((second / "status.json").read_text())
    assert (stopped["state"], stopped["exit_code"]) == ("stopped", 130)
    assert 5 <= stopped["step"] < 700
    assert not third.exists()
    before = (first / "status.json").read_bytes()
    outcome = ternlm("sweep", "--resume", "s", "-q")
    assert outcome.code == 0, outcome.err
    assert (first / "status.json").read_bytes() == before, "what was finished is not touched"
    assert [row["step"] for row in read_jsonl(second / "metrics" / "scalars.jsonl")] == list(range(1, 701))
    assert len(json.loads((second / "meta" / "provenance.json").read_text())["sittings"]) == 2
    told = json.loads((folder / "summary.json").read_text())
    assert [arm["mean"] for arm in told["arms"]] == [value_at_end(run) for run in (first, second, third)]
