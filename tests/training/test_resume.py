"""Stopped and resumed equals uninterrupted: weights, optimizer, rows and samples, bit for bit on the CPU.

The corpus is so small that an epoch ends in the middle of a batch every few steps.
"""

import csv
import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import TRAIN, tiny_corpus, tiny_settings
from ternlm import checkpoint
from ternlm.data.preparation import Prepared
from ternlm.errors import CheckpointError, EnvironmentFault, Interrupted, SettingsError, TokenizerError
from ternlm.run_directory import RunDirectory, read_jsonl
from ternlm.settings.resolve import Resolved
from ternlm.tokenizers import TokenizerSettings
from ternlm.training import launch
from ternlm.training.settings import RunSettings
from ternlm.training.trainer import Progress, Trainer

STEPS = 14


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), train=TRAIN[:8])


def settings(folder: Path, **sections: dict[str, Any]) -> RunSettings:
    base: dict[str, dict[str, Any]] = {
        "training": {
            "max_steps": STEPS,
            "batch_size": 5,
            "micro_batch_size": 3,
            "checkpoint_every_steps": 3,
            "keep_every": 1,
        },
        "schedule": {"name": "two_stage", "warmup_steps": 3},
        "tracking": {"every_steps": 1, "ternary_every_steps": 1, "tensorboard": False},
        "evaluation": {"every_steps": 4, "sample_every_steps": 5, "sample_tokens": 3, "prompts": ["The", "The"]},
    }
    merged = {name: base.get(name, {}) | sections.get(name, {}) for name in base | sections}
    return tiny_settings(folder, **merged)


def given(prepared: Prepared) -> Callable[..., Prepared]:
    return lambda settings, folder: prepared


def start(run: RunDirectory, prepared: Prepared, resume_from: Path | None = None, **sections: Any) -> Progress:
    values = settings(run.path.parent.parent, **sections).model_dump(mode="json")
    return launch.start(Resolved(values, {}), run, given(prepared), resume_from, quiet=True)


def resume(run: RunDirectory, prepared: Prepared, **overrides: Any) -> Progress:
    return launch.resume(run, overrides, given(prepared), quiet=True)


def run_in(tmp_path: Path, name: str) -> RunDirectory:
    (tmp_path / "runs").mkdir(exist_ok=True)
    return RunDirectory(tmp_path / "runs" / name)


def stop_at(patch: pytest.MonkeyPatch, step: int, how: str) -> None:
    """Let the process receive a signal, or die, after so many steps."""
    one_step = Trainer._one_step

    def stopping(self: Trainer) -> None:
        if self.progress.step == step:
            if how == "signal":
                self.interruption.received = 2
            else:
                raise KeyboardInterrupt
        one_step(self)

    patch.setattr(Trainer, "_one_step", stopping)


def interrupt(run: RunDirectory, prepared: Prepared, step: int, how: str, first: Callable[..., Any] = start) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step, how)
        with pytest.raises((Interrupted, KeyboardInterrupt)):
            first(run, prepared)


TIMES = ("wall_s", "time", "eta_s", "tokens_per_sec", "elapsed_seconds")


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in TIMES and not key.startswith("perf/")}


def records(run: RunDirectory) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in (run.scalars, run.ternary, run.evaluations, run.samples):
        found[file.name] = [without_times(row) for row in read_jsonl(file)]
        assert file.read_bytes().count(b"\n") == len(found[file.name])
    for file in (run.training_csv, run.evaluation_csv):
        with file.open() as stream:
            found[file.name] = [without_times(row) for row in csv.DictReader(stream)]
    return found


def state(run: RunDirectory, step: int = STEPS) -> dict[str, Any]:
    """Everything in a checkpoint that is not time."""
    _, _, model, optimizer, counters = checkpoint.open_checkpoint(run.checkpoints / f"step_{step:06d}")
    del counters["progress"]["elapsed_s"], counters["run_id"]
    tensors = {name: tensor.numpy().tobytes() for name, tensor in (model | optimizer).items()}
    return {**tensors, "state": counters}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, prepared: Prepared) -> RunDirectory:
    run = run_in(tmp_path_factory.mktemp("whole"), "whole")
    assert start(run, prepared).step == STEPS
    return run


def test_the_run_crosses_epochs_in_the_middle_of_a_batch(whole: RunDirectory) -> None:
    epochs = [row["train/epoch"] for row in read_jsonl(whole.scalars)]
    assert epochs[-1] > 2
    assert any(int(a) < int(b) != b for a, b in pairwise(epochs))


@pytest.mark.parametrize("how", ["signal", "death"])
@pytest.mark.parametrize("step", [1, 4, 5, 7, 8, 11, 13])
def test_l01_a_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, prepared: Prepared, whole: RunDirectory, step: int, how: str
) -> None:
    run = run_in(tmp_path, "stopped")
    interrupt(run, prepared, step, how)
    saved = checkpoint.steps(run.checkpoints)
    assert (saved[-1] == step) if how == "signal" else (not saved or saved[-1] <= step)
    with run.scalars.open("ab") as file:
        file.write(b'{"step": 99')  # the torn line of a process that died
    assert resume(run, prepared).step == STEPS
    assert state(run) == state(whole)
    assert records(run) == records(whole)
    assert (run.checkpoints / "best").read_text() == (whole.checkpoints / "best").read_text()


def test_l01_a_run_with_muon_and_a_full_precision_start_resumes_in_either_part(
    tmp_path: Path, prepared: Prepared
) -> None:
    sections = {"optimizer": {"name": "muon"}, "quantization": {"full_precision_until": 0.5, "blend_steps": 2}}
    begin = partial(start, **sections)
    whole = run_in(tmp_path, "whole")
    begin(whole, prepared)
    assert [row["train/stage"] for row in read_jsonl(whole.scalars)] == [0] * 7 + [3] * 7
    for step in (5, 8):
        run = run_in(tmp_path, f"stopped-{step}")
        interrupt(run, prepared, step, "death", begin)
        resume(run, prepared)
        assert state(run) == state(whole)
        assert records(run) == records(whole)


def test_l01_resumes_may_follow_each_other(tmp_path: Path, prepared: Prepared, whole: RunDirectory) -> None:
    run = run_in(tmp_path, "chained")
    interrupt(run, prepared, 2, "signal")
    for step, how in ((3, "signal"), (8, "death"), (9, "death"), (12, "signal"), (13, "death")):
        interrupt(run, prepared, step, how, first=resume)
    resume(run, prepared)
    assert state(run) == state(whole)
    assert records(run) == records(whole)


def test_t11_a_resume_may_split_the_batch_differently(tmp_path: Path, prepared: Prepared, whole: RunDirectory) -> None:
    run = run_in(tmp_path, "stopped")
    interrupt(run, prepared, 5, "signal")
    resume(run, prepared, micro_batch_size=5)
    ours, theirs = (read_jsonl(r.scalars)[-1]["train/loss"] for r in (run, whole))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(
    tmp_path: Path, prepared: Prepared, whole: RunDirectory
) -> None:
    run = run_in(tmp_path, "stopped")
    interrupt(run, prepared, 10, "signal")
    (run.checkpoints / "step_000010" / "model.safetensors").write_bytes(b"\0" * 50)
    resume(run, prepared)
    assert state(run) == state(whole)
    assert records(run) == records(whole)


def test_nothing_loadable_is_refused_and_not_silently_started_again(tmp_path: Path, prepared: Prepared) -> None:
    run = run_in(tmp_path, "stopped")
    interrupt(run, prepared, 4, "signal")
    for step in checkpoint.steps(run.checkpoints):
        (run.checkpoints / f"step_{step:06d}" / "manifest.json").unlink()
    before = run.scalars.read_bytes()
    with pytest.raises(CheckpointError, match="damaged"):
        resume(run, prepared)
    assert run.scalars.read_bytes() == before


@pytest.mark.parametrize("weights", ["int8", "int6", "int4"])
def test_a_run_with_integer_weights_says_how_many_bits_they_have(
    tmp_path: Path, prepared: Prepared, weights: str
) -> None:
    run = run_in(tmp_path, "r")
    start(run, prepared, training={"max_steps": 1}, quantization={"weights": weights})
    assert f" {weights[-1]}-bit)" in run.log.read_text()


def test_a_complete_run_stays_as_it_is(tmp_path: Path, prepared: Prepared) -> None:
    run = run_in(tmp_path, "done")
    start(run, prepared, training={"max_steps": 3})
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path != run.log}
    assert resume(run, prepared).step == 3
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path != run.log} == before
    assert "complete at step 3" in run.log.read_text()


def test_a_run_may_be_made_longer_and_says_that_the_rates_move(tmp_path: Path, prepared: Prepared) -> None:
    run = run_in(tmp_path, "short")
    start(run, prepared, training={"max_steps": 4})
    assert resume(run, prepared, max_steps=6).step == 6
    assert [row["step"] for row in read_jsonl(run.scalars)] == [1, 2, 3, 4, 5, 6]
    assert "ends at step 6 instead of 4: learning rate" in run.log.read_text()


@pytest.mark.parametrize("name", ["lr", "seed", "batch_size", "model.hidden_size", "data.source", "schedule.name"])
def test_a_resume_refuses_what_would_make_it_another_run(tmp_path: Path, prepared: Prepared, name: str) -> None:
    run = run_in(tmp_path, "r")
    interrupt(run, prepared, 2, "signal")
    with pytest.raises(SettingsError):
        resume(run, prepared, **{name: 1})
    with pytest.raises(SettingsError, match="Did you mean"):
        resume(run, prepared, max_stepz=1)


def test_a_resume_refuses_other_data_and_other_tokenizers(tmp_path: Path, prepared: Prepared) -> None:
    run = run_in(tmp_path, "r")
    interrupt(run, prepared, 2, "signal")
    (tmp_path / "other").mkdir()
    other = tiny_corpus(tmp_path / "other", train=TRAIN[1:9])
    with pytest.raises(CheckpointError, match="not what") as caught:
        resume(run, other)
    assert caught.value.exit_code == 3
    trained = tiny_corpus(tmp_path / "other", tokenizer=TokenizerSettings(name="train", vocab_size=260))
    with pytest.raises(TokenizerError):
        resume(run, trained)


def test_two_processes_cannot_train_one_run(tmp_path: Path, prepared: Prepared) -> None:
    run = run_in(tmp_path, "r")
    interrupt(run, prepared, 2, "signal")
    with run.locked(), pytest.raises(EnvironmentFault, match="another process"):
        resume(run, prepared)


def test_a_new_run_may_go_on_from_anothers_checkpoint(tmp_path: Path, prepared: Prepared, whole: RunDirectory) -> None:
    run = run_in(tmp_path, "branch")
    progress = start(run, prepared, resume_from=whole.checkpoints / "step_000009")
    assert progress.step == STEPS
    assert state(run) == state(whole)
    assert [row["step"] for row in read_jsonl(run.scalars)] == [10, 11, 12, 13, 14]


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path, prepared: Prepared, whole: RunDirectory) -> None:
    run = run_in(tmp_path, "branch")
    values = settings(tmp_path).model_dump(mode="json")
    values["model"]["intermediate_size"] = 48
    with pytest.raises(CheckpointError, match="shape"):
        launch.start(Resolved(values, {}), run, given(prepared), whole.checkpoints / "step_000009", quiet=True)


def test_an_existing_run_is_not_started_again(tmp_path: Path, prepared: Prepared) -> None:
    run = run_in(tmp_path, "r")
    start(run, prepared, training={"max_steps": 1})
    before = run.scalars.read_bytes()
    with pytest.raises(SettingsError, match="ternlm resume"):
        start(run, prepared)
    assert run.scalars.read_bytes() == before


def test_settings_and_their_origins_are_saved_with_the_run(tmp_path: Path, prepared: Prepared) -> None:
    run = run_in(tmp_path, "r")
    values = settings(tmp_path, training={"max_steps": 1}).model_dump(mode="json")
    values["model"]["vocab_size"] = None
    launch.start(Resolved(values, {"training.max_steps": "command line"}), run, given(prepared), quiet=True)
    assert json.loads(run.config_origin.read_text()) == {"training.max_steps": "command line"}
    saved = launch.read_mapping(run.config)
    assert saved["model"]["vocab_size"] == 256, "resolved, not as written"
    values["model"]["vocab_size"] = 256
    assert saved == values
    assert checkpoint.load(run.checkpoints / "step_000001").config == saved


@pytest.mark.parametrize("train", [["abc"], ["ab", "c"]])
def test_a_corpus_shorter_than_one_sequence_is_refused_before_anything_is_created(
    tmp_path: Path, train: list[str]
) -> None:
    small = tiny_corpus(tmp_path, train=train)
    run = run_in(tmp_path, "r")
    with pytest.raises(Exception, match="one window") as caught:
        start(run, small)
    assert caught.value.exit_code == 3  # type: ignore[attr-defined]
    assert not run.path.exists()


def test_a_missing_validation_split_is_refused_before_anything_is_created(tmp_path: Path, prepared: Prepared) -> None:
    class NoValidation:
        def __getattr__(self, name: str) -> Any:
            return getattr(prepared.corpus, name)

        def split(self, name: str) -> Any:
            from ternlm.errors import DataError

            if name == "validation":
                raise DataError("the validation split holds no documents.")
            return prepared.corpus.split(name)

    run = run_in(tmp_path, "r")
    values = settings(tmp_path).model_dump(mode="json")
    fake: Any = NoValidation()
    with pytest.raises(EnvironmentFault, match="validation"):
        launch.start(Resolved(values, {}), run, given(Prepared(fake, prepared.tokenizer)), quiet=True)
    assert not run.path.exists()


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_before_anything_is_created(
    tmp_path: Path, prepared: Prepared
) -> None:
    run = run_in(tmp_path, "r")
    values = settings(tmp_path).model_dump(mode="json")
    values["model"]["vocab_size"] = 200
    with pytest.raises(TokenizerError, match=r"256 ids.*200"):
        launch.start(Resolved(values, {}), run, given(prepared), quiet=True)
    assert not run.path.exists()


def test_the_whole_process_state_does_not_matter(tmp_path: Path, prepared: Prepared, whole: RunDirectory) -> None:
    run = run_in(tmp_path, "noise")
    torch.manual_seed(123)
    torch.rand(17)
    start(run, prepared)
    assert state(run) == state(whole)


@pytest.mark.parametrize("step", [4, STEPS])
def test_l13_an_evaluation_cut_off_by_a_signal_is_made_on_resume(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    alone, stopped = run_in(tmp_path, "alone"), run_in(tmp_path, "stopped")
    start(alone, prepared)
    evaluate = Trainer.evaluate

    def cut_off(self: Trainer) -> Any:
        if self.progress.step == step:
            self.interruption.received = 2
        return evaluate(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", cut_off)
        with pytest.raises(Interrupted):
            start(stopped, prepared)
    resume(stopped, prepared)
    losses = [[(row["step"], row["val/loss"]) for row in read_jsonl(run.evaluations)] for run in (alone, stopped)]
    assert losses[0] == losses[1]


def test_a_group_size_that_does_not_fit_is_refused_before_anything_is_created(
    tmp_path: Path, prepared: Prepared
) -> None:
    run = run_in(tmp_path, "grouped")
    with pytest.raises(SettingsError, match="group_size=7"):
        start(run, prepared, quantization={"granularity": "group", "group_size": 7})
    assert not run.path.exists()


def test_a_branch_killed_before_its_first_checkpoint_resumes_from_where_it_branched(
    tmp_path: Path, prepared: Prepared, whole: RunDirectory
) -> None:
    branch = run_in(tmp_path, "branch")
    source = whole.checkpoints / "step_000006"
    interrupt(branch, prepared, 6, "death", lambda run, data: start(run, data, resume_from=source))
    assert checkpoint.steps(branch.checkpoints) == [6]
    resume(branch, prepared)
    finals = [checkpoint.open_checkpoint(run.checkpoints / f"step_{STEPS:06d}").model for run in (whole, branch)]
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


def test_a_stream_that_is_refused_leaves_no_folder(tmp_path: Path, prepared: Prepared) -> None:
    def refuse(settings: RunSettings, folder: Path) -> Prepared:
        folder.mkdir(parents=True)
        (folder / "block-000000.bin").write_bytes(b"1")
        raise CheckpointError("no such column")

    values = settings(tmp_path).model_dump(mode="json")
    for kept in (False, True):
        run = run_in(tmp_path, "r")
        if kept:
            run.path.mkdir(parents=True)
        with pytest.raises(CheckpointError, match="no such column"):
            launch.start(Resolved(values, {}), run, refuse, quiet=True)
        assert run.path.exists() is kept
