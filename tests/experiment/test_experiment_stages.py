"""An experiment from its file to its summary, stopped and killed on the way."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ternlm import checkpoint
from ternlm.cli.train import prepare_run
from ternlm.errors import DataError, EnvironmentFault, Interrupted, SettingsError
from ternlm.experiment import STAGES, ExperimentDirectory, load_experiment
from ternlm.experiment.stages import Hooks, run_experiment
from ternlm.models import MODELS
from ternlm.training.settings import resolve_settings

SIZES: dict[str, dict[str, Any]] = {
    "bitnet": {"extends": "bitnet-1m", "model": {
        "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 40, "max_position_embeddings": 48,
    }},
    "hgrn": {"extends": "hgrn-nano", "model": {"hidden_size": 24, "num_hidden_layers": 2}},
    "hnet": {"extends": "hnet-nano", "model": {"d_model": [24, 32], "num_blocks": [[1, 0, 1], [1]]}},
}  # fmt: skip
"""Shipped recipes of each family that reads bytes, made tiny."""

FAMILIES = [family for family in SIZES if family in MODELS]
PROMPTS = ["Η γάτα ", "猫坐在", "🐈🙂 ", "Mixed μείγμα 混合 🎉"]
RUN = {"batch_size": 4, "precision": "fp32", "device": "cpu", "threads": 1, "checkpoint_every_steps": 2, "max_steps": 6}


def many_scripts(folder: Path, documents: int = 120) -> Path:
    """Text files in Greek, Chinese, English and pictures."""
    folder.mkdir(parents=True)
    for n in range(documents):
        text = (
            f"Η γάτα {n % 7} κάθεται στο χαλί.\n猫坐在垫子上，第{n}次。\nThe cat 🐈 sat {'🙂' * (n % 3)} on mat {n}.\n"
        )
        (folder / f"{n:03}.txt").write_text(text, encoding="utf-8")
    return folder


def definition(tmp_path: Path, family: str = "bitnet", **changes: Any) -> Path:
    """An experiment file over `many_scripts`."""
    texts = tmp_path / "texts"
    base = {
        **SIZES[family],
        "experiment_name": "tiny",
        "data": {
            "source": str(texts if texts.exists() else many_scripts(texts)), "sequence_length": 32,
            "max_tokens": None, "validation_fraction": 0.1, "test_fraction": 0.1,
        },
        "training": RUN,
        "tracking": {"every_steps": 1, "tensorboard": False},
        "evaluation": {"every_steps": 3, "sample_every_steps": None, "max_tokens": 2000},
        "generation": {"prompts": PROMPTS, "samples": 5, "max_new_tokens": 12},
    }  # fmt: skip
    for section, fields in changes.items():
        base[section] = {**base.get(section, {}), **fields} if isinstance(fields, dict) else fields
    path = tmp_path / f"{family}.yaml"
    path.write_text(yaml.safe_dump(base, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(file: Path, folder: Path, began: Any = lambda stage, text: None) -> dict[str, Any]:
    experiment = load_experiment(str(file))
    hooks = Hooks(prepare_run, began, quiet=True)
    return run_experiment(experiment, resolve_settings(experiment.layers), ExperimentDirectory(folder), hooks)


def without_times(value: Any) -> Any:
    """A summary without what no two runs share."""
    moving = {"timestamp", "seconds", "wall_s", "tokens_per_sec", "bytes_per_sec", "elapsed_seconds", "origin"}
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in moving}
    return value


def weights(folder: Path) -> bytes:
    return (checkpoint.resolve(f"{folder}@final", folder.parent) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_greek_chinese_and_pictures_go_all_the_way(tmp_path: Path, family: str) -> None:
    summary = run(definition(tmp_path, family), tmp_path / "here")
    raw = [path.read_bytes() for path in sorted((tmp_path / "texts").iterdir())]
    splits = summary["data"]["splits"]
    assert sum(split["bytes"] for split in splits.values()) == sum(map(len, raw))
    assert {"Greek", "Han", "Latin", "symbols"} == set(summary["data"]["scripts"])
    test = summary["results"]["test"]
    assert test["n_bytes"] == splits["test"]["bytes"]
    assert test["n_targets"] == splits["test"]["bytes"] + splits["test"]["documents"]
    assert 0 < test["bpb"] < 12
    assert test["baselines"]["uniform"] == 8.0
    assert test["loss"] == pytest.approx(math.log(test["perplexity"]))
    written = (tmp_path / "here" / "results" / "generations.txt").read_text(encoding="utf-8")
    assert written.count("=== Sample ") == 5
    for prompt in PROMPTS:
        assert f"Prompt: {prompt}\n" in written
    assert summary["results"]["generation"]["samples"] == 5
    assert summary["results"]["model_type"] == family


def test_the_files_that_readers_look_for_are_there_and_agree(tmp_path: Path) -> None:
    summary = run(definition(tmp_path), folder := tmp_path / "here")
    assert json.loads((folder / "experiment_summary.json").read_text(encoding="utf-8")) == summary
    results = json.loads((folder / "results" / "evaluation_results.json").read_text(encoding="utf-8"))
    assert {name: value for name, value in results.items() if name != "made_from"} == summary["results"]
    for name, file in summary["files"].items():
        assert (folder / file).exists(), name
    assert {"training_log", "eval_log", "evaluation_results", "generations"} <= summary["files"].keys()
    header, *rows = (folder / summary["files"]["training_log"]).read_text().splitlines()
    assert header.startswith("step,elapsed_seconds,loss,lr")
    assert [row.partition(",")[0] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert (summary["state"], summary["training"]["step"], list(summary["seconds"])) == ("finished", 6, list(STAGES))
    assert (summary["experiment"], summary["config"]["model"]["hidden_size"]) == ("tiny", 24)


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(definition(tmp_path), folder := tmp_path / "here")

    def never(*given: Any, **named: Any) -> None:
        raise AssertionError("a stage that was done ran again")

    for name in ("training.launch.start", "training.launch.resume", "checkpoint.load"):
        monkeypatch.setattr(f"ternlm.{name}", never)
    said: dict[str, str] = {}
    again = run(definition(tmp_path), folder, lambda stage, text: said.update({stage: text}))
    assert [said[stage] for stage in STAGES[1:]] == ["done"] * 3
    assert without_times(again) == without_times(first)


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_before_any_stage_the_same_command_goes_on_to_the_same_result(tmp_path: Path, stage: str) -> None:
    file = definition(tmp_path)
    whole = run(file, tmp_path / "whole")

    def stop(begun: str, text: str) -> None:
        if begun == stage:
            raise Interrupted("stopped.")

    with pytest.raises(Interrupted, match="The same 'ternlm experiment' command goes on from here"):
        run(file, tmp_path / "here", stop)
    resumed = run(file, tmp_path / "here")
    assert weights(tmp_path / "here") == weights(tmp_path / "whole")
    assert without_times(resumed["results"]) == without_times(whole["results"])
    assert resumed["state"] == "finished"


@pytest.mark.parametrize(
    "torn", ["results/evaluation_results.json", "results/generations.txt", "experiment_summary.json"]
)
def test_a_result_that_was_lost_is_made_again(tmp_path: Path, torn: str) -> None:
    file, folder = definition(tmp_path), tmp_path / "here"
    whole = run(file, folder)
    if torn.endswith(".txt"):
        (folder / torn).unlink()
    else:
        (folder / torn).write_text('{"half": ')
    assert without_times(run(file, folder)["results"]) == without_times(whole["results"])
    assert (folder / torn).read_text(encoding="utf-8").count("=== Sample") == (5 if torn.endswith(".txt") else 0)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_while_training_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    file = definition(tmp_path, training={"max_steps": 12, "checkpoint_every_steps": 2})
    whole = run(file, tmp_path / "whole")
    command = [sys.executable, "-m", "ternlm", "experiment", str(file), "-q", f"output.directory={tmp_path / 'here'}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    saved = tmp_path / "here" / "checkpoints" / "step_000004"
    for _ in range(1200):
        if saved.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert saved.exists()
    resumed = run(file, tmp_path / "here")
    assert weights(tmp_path / "here") == weights(tmp_path / "whole")
    assert without_times(resumed["results"]) == without_times(whole["results"])


def test_another_measurement_is_made_and_training_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    first = run(definition(tmp_path), folder)
    before = weights(folder)
    both = {"splits": ["validation", "test"], "baselines": False}
    second = run(definition(tmp_path, evaluation=both, generation={"samples": 2}), folder)
    assert weights(folder) == before
    assert second["results"]["test"]["loss"] == first["results"]["test"]["loss"]
    assert "baselines" not in second["results"]["test"]
    assert second["results"]["validation"]["split"] == "validation"
    assert second["results"]["generation"]["samples"] == 2


def test_more_steps_train_on_and_measure_again(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    run(definition(tmp_path), folder)
    second = run(definition(tmp_path, training={"max_steps": 8}, evaluation={"checkpoint": "final"}), folder)
    assert (second["training"]["step"], second["results"]["step"]) == (8, 8)


def test_a_damaged_last_checkpoint_is_trained_again(tmp_path: Path) -> None:
    file, folder = definition(tmp_path, evaluation={"checkpoint": "final"}), tmp_path / "here"
    first, before = run(file, folder), weights(folder)
    os.truncate(folder / "checkpoints" / "step_000006" / "model.safetensors", 1000)
    again = run(file, folder)
    assert again["results"]["step"] == 6
    assert weights(folder) == before
    assert without_times(again["results"]) == without_times(first["results"])


def test_results_of_two_checkpoints_never_stand_side_by_side(tmp_path: Path) -> None:
    folder, final = tmp_path / "here", {"checkpoint": "final"}
    first = run(definition(tmp_path, evaluation=final), folder)

    def stop(begun: str, text: str) -> None:
        if begun == "generate":
            raise Interrupted("stopped.")

    with pytest.raises(Interrupted):
        run(definition(tmp_path, training={"max_steps": 8}, evaluation=final), folder, stop)
    between = json.loads((folder / "experiment_summary.json").read_text(encoding="utf-8"))["results"]
    assert between["step"] == 8
    assert "generation" not in between
    last = run(definition(tmp_path, training={"max_steps": 8}, evaluation=final), folder)
    assert last["results"]["sample_generations"] != first["results"]["sample_generations"]


def test_texts_that_are_asked_for_no_more_are_no_result(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    first = run(definition(tmp_path), folder)
    without = run(definition(tmp_path, generation={"samples": 0}), folder)
    assert not {"generation", "sample_generations"} & without["results"].keys()
    assert "generations" not in without["files"]
    assert without_times(run(definition(tmp_path), folder)["results"]) == without_times(first["results"])


def test_a_second_process_leaves_the_summary_of_the_first_alone(tmp_path: Path) -> None:
    file, folder = definition(tmp_path), tmp_path / "here"
    run(file, folder)
    before = (folder / "experiment_summary.json").read_bytes()
    with ExperimentDirectory(folder).run.locked(), pytest.raises(EnvironmentFault, match="by another process"):
        run(file, folder)
    assert (folder / "experiment_summary.json").read_bytes() == before


@pytest.mark.parametrize(
    ("file", "content"),
    [("results/evaluation_results.json", '{"made_from": 5}'), ("experiment_summary.json", '{"seconds": ["much"]}')],
)
def test_files_that_were_edited_into_nonsense_are_made_again(tmp_path: Path, file: str, content: str) -> None:
    folder = tmp_path / "here"
    first = run(definition(tmp_path), folder)
    (folder / file).write_text(content)
    assert without_times(run(definition(tmp_path), folder)["results"]) == without_times(first["results"])


def test_another_model_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run(definition(tmp_path), tmp_path / "here")
    sentence = r"begun with model\.hidden_size=24; now it is 32\. Choose another experiment_name"
    with pytest.raises(SettingsError, match=sentence):
        run(definition(tmp_path, model={"hidden_size": 32}), tmp_path / "here")
    named = definition(tmp_path, model={"hidden_size": 32}, output={"directory": "here"})
    with pytest.raises(SettingsError, match=r"Choose another output\.directory"):
        run(named, tmp_path / "here")


def test_bad_sampling_is_refused_before_anything_begins(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"generation\.top_p=1\.5"):
        run(definition(tmp_path, generation={"top_p": 1.5}), tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_a_split_that_the_data_do_not_have_is_named(tmp_path: Path) -> None:
    file = definition(tmp_path, data={"test_fraction": 0}, evaluation={"splits": ["test"]})
    with pytest.raises(DataError, match=r"the data have no test split, which it names\. They have: train, val"):
        run(file, tmp_path / "here")
    (tmp_path / "word.txt").write_text("a")
    file = definition(tmp_path, data={"source": str(tmp_path / "word.txt")})
    with pytest.raises(DataError, match=r"no validation split, to measure the model on\. They have: train\. Add text"):
        run(file, tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_a_protocol_that_the_model_cannot_follow_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="remembers no more than these"):
        run(definition(tmp_path, evaluation={"protocol": "stream"}), tmp_path / "here")
    assert not (tmp_path / "here").exists()


@pytest.mark.skipif("hgrn" not in MODELS, reason="the family 'hgrn' is not here")
def test_a_recurrent_model_is_measured_with_its_memory_carried_on(tmp_path: Path) -> None:
    summary = run(definition(tmp_path, "hgrn", evaluation={"protocol": "stream"}), tmp_path / "here")
    assert summary["results"]["test"]["protocol"] == "stream"
    assert summary["results"]["test"]["n_bytes"] == summary["data"]["splits"]["test"]["bytes"]


def test_of_a_hierarchical_model_the_results_show_where_it_cuts(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    summary = run(definition(tmp_path, "hnet"), folder)
    results = json.loads((folder / "results" / "evaluation_results.json").read_text())
    assert results["chunks"][0]["bytes_per_chunk"] > 0
    page = (folder / summary["files"]["chunk_page"]).read_text(encoding="utf-8")
    assert "tiny, step 6: the beginning of the test split" in page
    assert (folder / summary["files"]["chunk_picture"]).read_bytes().startswith(b"\x89PNG")
    (folder / summary["files"]["chunk_page"]).unlink()
    assert run(tmp_path / "hnet.yaml", folder)["files"] == summary["files"]


def test_a_model_without_chunks_gets_no_picture_of_them(tmp_path: Path) -> None:
    run(definition(tmp_path), tmp_path / "out")
    assert not list((tmp_path / "out" / "results").glob("chunks*"))
    assert "chunks" not in json.loads((tmp_path / "out" / "results" / "evaluation_results.json").read_text())


def test_without_a_test_split_the_validation_split_is_measured(tmp_path: Path) -> None:
    summary = run(definition(tmp_path, data={"test_fraction": 0}), tmp_path / "here")
    assert summary["results"]["validation"]["split"] == "validation"


def test_no_samples_write_no_text(tmp_path: Path) -> None:
    summary = run(definition(tmp_path, generation={"samples": 0}), tmp_path / "here")
    assert "generation" not in summary["results"]
    assert not (tmp_path / "here" / "results" / "generations.txt").exists()


def test_streamed_data_are_measured_on_what_was_held_back(tmp_path: Path) -> None:
    file = definition(tmp_path, data={"stream": True, "stream_validation_tokens": 1500, "stream_buffer": 10**6})
    summary = run(file, tmp_path / "here")
    assert summary["data"]["stream"] is True
    assert summary["results"]["validation"]["n_targets"] >= 1500
    assert summary["results"]["validation"]["baselines"]["3-gram"] is None


def test_invalid_bytes_are_in_the_summary(tmp_path: Path) -> None:
    many_scripts(tmp_path / "texts")
    (tmp_path / "texts" / "000.txt").write_bytes("Η γ".encode()[:-1] + b" broken")
    summary = run(definition(tmp_path, data={"encoding_errors": "skip"}), tmp_path / "here")
    assert summary["data"]["invalid_bytes"]["documents"] == 1
    assert summary["data"]["invalid_bytes"]["places"] == [f"{tmp_path / 'texts' / '000.txt'}, offset 3"]
