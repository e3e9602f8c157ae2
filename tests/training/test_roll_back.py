"""Going back: bad data lead to an earlier checkpoint and past them, and being killed on the way changes nothing."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import TRAIN, let_data_be_bad, tiny_corpus, tiny_settings
from ternlm import checkpoint
from ternlm.data.preparation import Prepared
from ternlm.errors import CheckpointError, Diverged
from ternlm.run_directory import RunDirectory, read_jsonl
from ternlm.settings.resolve import Resolved
from ternlm.training import launch, roll_back
from ternlm.training.progress import Progress
from ternlm.training.trainer import Trainer

BATCH, STEPS = 4, 24
BAD = range(11 * BATCH, 14 * BATCH)
"""Samples of three batches in a row whose gradient is not finite, whenever they are trained on."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), train=TRAIN[:20])


@pytest.fixture
def bad_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let gradients of the bad samples be NaN."""
    let_data_be_bad(monkeypatch, BAD)


def start(path: Path, prepared: Prepared, **anomaly: Any) -> RunDirectory:
    settings = tiny_settings(
        path.parent,
        training={"max_steps": STEPS, "batch_size": BATCH, "checkpoint_every_steps": 4, "keep_last": 2},
        tracking={"every_steps": 1, "ternary_every_steps": 4, "tensorboard": False},
        evaluation={"every_steps": 1000},
        anomaly={"roll_back_steps": 4, "skip_batches": 8, **anomaly},
    )
    run = RunDirectory(path)
    launch.start(Resolved(settings.model_dump(mode="json"), {}), run, given(prepared), quiet=True)
    return run


def given(prepared: Prepared) -> Callable[..., Prepared]:
    return lambda settings, folder: prepared


def state(run: RunDirectory) -> dict[str, Any]:
    opened = checkpoint.open_newest(run.checkpoints)
    del opened.state["progress"]["elapsed_s"], opened.state["run_id"], opened.state["detector"]["dumps"]
    tensors = {name: tensor.numpy().tobytes() for name, tensor in (opened.model | opened.optimizer).items()}
    return {**tensors, "state": opened.state}


@pytest.mark.usefixtures("bad_data")
def test_r19_three_bad_batches_lead_back_and_past_the_data(tmp_path: Path, prepared: Prepared) -> None:
    run = start(tmp_path / "run", prepared)
    events = [(row["event"], row["action"]) for row in read_jsonl(run.events)]
    assert events == [("nan_inf_grad", "skip"), ("nan_inf_grad", "skip"), ("nan_inf_grad", "roll_back"),
                      ("roll_back", "roll_back")]  # fmt: skip
    opened = checkpoint.open_newest(run.checkpoints)
    (entry,) = opened.state["progress"]["roll_backs"]
    assert entry == {"from_step": 14, "to_step": 8, "samples_from": 8 * BATCH, "samples_to": 16 * BATCH}
    assert opened.state["step"] == STEPS
    assert opened.manifest["rollbacks"] == 1
    assert opened.state["progress"]["samples"] == (16 + STEPS - 8) * BATCH
    assert [row["step"] for row in read_jsonl(run.scalars)] == [*range(1, STEPS + 1)], "the abandoned steps are cut off"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in opened.model.values())
    assert not (run.checkpoints / "rollback.json").exists()
    assert (run.anomalies / "step_000011_nan_inf_grad" / "layers.json").exists()


@pytest.mark.usefixtures("bad_data")
@pytest.mark.parametrize("call", ["begin", "abandon", "cut_after", "_restore", "after"])
def test_r19_a_roll_back_that_is_killed_ends_bit_for_bit_as_one_that_is_not(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    expected = state(start(tmp_path / "whole" / "run", prepared))
    places: dict[str, tuple[Any, str]] = {
        "begin": (roll_back, "begin"),  # nothing of it has happened yet
        "abandon": (checkpoint, "abandon"),  # the intent is written
        "cut_after": (RunDirectory, "cut_after"),  # later checkpoints are hidden
        "_restore": (Trainer, "_restore"),
        "after": (Trainer, "_log_step"),  # steps of the new future have been made, none is saved
    }
    owner, name = places[call]
    real, path = getattr(owner, name), tmp_path / "killed" / "run"
    rolling = {"back": False}
    begin = Trainer._roll_back

    def rolls(self: Trainer) -> None:
        rolling["back"] = True
        begin(self)

    def killed(*args: Any, **options: Any) -> Any:
        if rolling["back"] and (call != "after" or args[0].progress.step == 10):
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_roll_back", rolls)
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            start(path, prepared)
    run = RunDirectory(path)
    launch.resume(run, {}, given(prepared), quiet=True)
    assert state(run) == expected
    assert [row["step"] for row in read_jsonl(run.scalars)] == [*range(1, STEPS + 1)]


@pytest.mark.usefixtures("bad_data")
def test_r19_the_allowance_ends_and_the_run_with_it(tmp_path: Path, prepared: Prepared) -> None:
    with pytest.raises(Diverged, match="max_roll_backs=2") as caught:
        start(tmp_path / "run", prepared, skip_batches=0, roll_back_steps=100, max_roll_backs=2, non_finite_in_a_row=1)
    assert caught.value.exit_code == 4
    run = RunDirectory(tmp_path / "run")
    assert [row["event"] for row in read_jsonl(run.events)].count("roll_back") == 2
    checkpoint.load(checkpoint.newest_valid(run.checkpoints))


@pytest.mark.usefixtures("bad_data")
def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path: Path, prepared: Prepared) -> None:
    with pytest.raises(Diverged, match="no checkpoint to go back to"):
        settings = tiny_settings(tmp_path, training={"max_steps": 20, "batch_size": BATCH})
        values = Resolved(settings.model_dump(mode="json"), {})
        launch.start(values, RunDirectory(tmp_path / "run"), given(prepared), quiet=True)


def test_r18_weights_that_are_not_finite_are_never_saved_and_left_at_once(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, poisoned = Trainer.save, []

    def poisoning(self: Trainer) -> None:
        if self.progress.step == 12 and not poisoned:
            poisoned.append(True)
            with torch.no_grad():
                self.model.get_parameter("model.norm.weight")[3] = math.nan
        save(self)

    monkeypatch.setattr(Trainer, "save", poisoning)
    run = start(tmp_path / "run", prepared)
    assert [row["event"] for row in read_jsonl(run.events)] == ["nan_inf_state", "roll_back"]
    opened = checkpoint.open_newest(run.checkpoints)
    assert opened.state["step"] == STEPS
    assert all(bool(torch.isfinite(tensor).all()) for tensor in opened.model.values())


def test_an_intent_that_cannot_be_read_is_not_guessed(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"to": "4", "roll_backs": []}', "[" * 100_000):
        (tmp_path / "rollback.json").write_text(content)
        with pytest.raises(CheckpointError, match="damaged"):
            roll_back.unfinished(tmp_path)
    (tmp_path / "rollback.json").unlink()
    assert roll_back.unfinished(tmp_path) is None
    assert not roll_back.complete(tmp_path, Progress())
