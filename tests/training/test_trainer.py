"""The loop: what it logs is what it used, what it only looks at it does not change, and it ends by saving."""

import collections
import csv
import math
import os
import shutil
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import TRAIN, Fault, tiny_corpus, tiny_settings, tiny_trainer
from ternlm import checkpoint, tracking
from ternlm.data.preparation import Prepared
from ternlm.errors import CheckpointError, Diverged, Interrupted, MemoryExhausted, Preempted, StorageFault, TernlmError
from ternlm.run_directory import RunDirectory, read_jsonl
from ternlm.tracking import Tracker
from ternlm.training import trainer as module
from ternlm.training.trainer import Trainer

Make = Callable[..., Trainer]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), train=TRAIN[:12])


@pytest.fixture
def make(tmp_path: Path, prepared: Prepared) -> Make:
    """A trainer of 6 steps that logs every step and writes no TensorBoard events, with some settings changed."""

    def build(name: str = "run", resume_from: Path | None = None, **sections: dict[str, Any]) -> Trainer:
        base: dict[str, dict[str, Any]] = {
            "tracking": {"every_steps": 1, "tensorboard": False},
            "evaluation": {"every_steps": 1000},
        }
        for section, values in sections.items():
            base[section] = base.get(section, {}) | values
        return tiny_trainer(tmp_path / "runs" / name, prepared, tiny_settings(tmp_path, **base), resume_from)

    return build


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.tensors().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def rows(trainer: Trainer) -> list[dict[str, Any]]:
    return read_jsonl(trainer.run_directory.scalars)


def spy(trainer: Trainer, before: Callable[[int], None]) -> None:
    """Call `before(k)` right before update k, with everything set for it."""
    stepper = trainer.stepper

    def step(batch: Any, judge: Any, k: int) -> Any:
        before(k)
        return stepper(batch, judge, k)

    step.__dict__.update(micro_batch_size=stepper.micro_batch_size, scaler=stepper.scaler)
    trainer.stepper = step  # type: ignore[assignment]


@pytest.mark.parametrize("name", ["two_stage", "two_stage_continuous", "cosine"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_t01_t03_logged_rates_are_those_in_the_optimizer_at_every_update(
    make: Make, name: str, accumulation: int
) -> None:
    trainer = make(
        schedule={"name": name, "warmup_steps": 3, "min_lr_ratio": 0.125},
        training={"max_steps": 12, "gradient_accumulation_steps": accumulation},
    )
    used: list[dict[str, tuple[float, float]]] = []
    spy(
        trainer,
        lambda k: used.append({g["name"]: (g["lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups}),
    )
    trainer.run()
    assert len(used) == 12
    edge = 6 if name.startswith("two") else 8
    for k, row in enumerate(rows(trainer)):
        rate, decay = row["train/learning_rate"], row["train/weight_decay"]
        assert row["step"] == k + 1
        assert used[k] == {"matrices": (rate, decay), "embeddings": (rate, 0.0), "rest": (rate, 0.0)}
        assert rate == trainer.schedule.learning_rate(k)
        assert decay == (0.1 if k < edge else 0.0)
        assert row["train/stage"] == (2 if name.startswith("two") and k >= 6 else 1)
    peak = 2e-3
    assert [used[k]["rest"][0] for k in (0, 2)] == pytest.approx([peak / 3, peak])
    assert used[11]["rest"][0] == trainer.schedule.learning_rate(11) > peak / 8


def test_t09_the_logged_loss_is_recomputed_from_the_batch_and_the_weights_before_the_update(make: Make) -> None:
    trainer = make(training={"micro_batch_size": 3})
    expected: list[float] = []

    def recompute(k: int) -> None:
        batch = trainer.loader.batch(4 * k)
        with torch.no_grad():
            logits = trainer.model(batch.tokens).logits.double()
        scored = batch.targets != -100
        nats = -torch.log_softmax(logits, -1)[scored].gather(1, batch.targets[scored][:, None])
        expected.append(nats.mean().item())

    spy(trainer, recompute)
    trainer.run()
    assert [row["train/loss"] for row in rows(trainer)] == pytest.approx(expected, rel=1e-5)


def test_l03_tokens_seen_are_the_targets_that_were_scored(make: Make) -> None:
    trainer = make()
    trainer.run()
    counted = [trainer.loader.batch(4 * k).num_targets for k in range(6)]
    assert [row["tokens_seen"] for row in rows(trainer)] == [sum(counted[: k + 1]) for k in range(6)]
    assert sum(counted) < 6 * 4 * 16, "the begin marker is never a target"
    assert trainer.progress.samples == 24


TRAIN_ROW = {
    "step": int, "tokens_seen": int, "wall_s": float, "time": float, "train/loss": float, "train/perplexity": float,
    "train/bpb": float, "train/learning_rate": float, "train/weight_decay": float, "train/grad_norm": float,
    "train/epoch": float, "train/stage": int, "perf/tokens_per_sec": float, "perf/step_time_ms": float,
    "perf/data_time_ms": float, "perf/mfu": float, "perf/peak_memory_mb": float, "eta_s": float,
}  # fmt: skip


def test_l07_every_row_of_a_file_has_one_schema_with_units_in_the_names(make: Make) -> None:
    trainer = make(evaluation={"every_steps": 2, "sample_every_steps": 3})
    trainer.run()
    for row in rows(trainer):
        assert {name: type(value) for name, value in row.items()} == TRAIN_ROW
        assert row["train/perplexity"] == pytest.approx(math.exp(row["train/loss"]))
        assert not any("pct" in name or "percent" in name for name in row)
    run = trainer.run_directory
    evaluations = read_jsonl(run.evaluations)
    assert [row["step"] for row in evaluations] == [2, 4, 6]
    assert len({frozenset(row) for row in evaluations}) == 1
    for row in evaluations:
        assert row["split"] == "validation"
        assert row["perplexity_unit"] == "byte"
        assert row["val/perplexity"] == pytest.approx(math.exp(row["val/loss"]))
        assert row["n_bytes"] > 0
    samples = read_jsonl(run.samples)
    assert [row["step"] for row in samples] == [3, 3, 3, 6, 6, 6]
    assert [row["mode"] for row in samples] == ["greedy", "typical", "stress"] * 2
    assert all({"prompt", "generated_text", "generated_ids", "seed"} <= row.keys() for row in samples)


def test_the_time_of_an_evaluation_row_is_that_of_the_run(make: Make) -> None:
    trainer = make(evaluation={"every_steps": 2})
    trainer.progress.elapsed_s = 500.0
    trainer.run()
    assert [row["wall_s"] > 500 for row in read_jsonl(trainer.run_directory.evaluations)] == [True] * 3


def test_the_table_for_spreadsheets_says_the_same_as_the_rows(make: Make) -> None:
    trainer = make(evaluation={"every_steps": 3})
    trainer.run()
    with trainer.run_directory.training_csv.open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["step", "elapsed_seconds", "loss", "lr", "grad_norm", "bpb", "perplexity"]
    for line, row in zip(table, rows(trainer), strict=True):
        assert float(line["loss"]) == row["train/loss"]
        assert float(line["lr"]) == row["train/learning_rate"]
        assert float(line["elapsed_seconds"]) == row["wall_s"]


def test_g02_looking_at_the_model_does_not_change_it(make: Make) -> None:
    plain = make("plain", evaluation={"every_steps": 1000, "sample_every_steps": None})
    watched = make("watched", evaluation={"every_steps": 1, "sample_every_steps": 1, "prompts": ["a", "b"]})
    torch.manual_seed(5)
    plain.run()
    torch.manual_seed(6)
    watched.run()
    assert same(weights(plain), weights(watched))
    assert [row["train/loss"] for row in rows(plain)] == [row["train/loss"] for row in rows(watched)]
    assert watched.model.training


def test_d03_evaluation_reads_documents_that_training_never_does(make: Make) -> None:
    corpus = make().corpus
    train, held_out = corpus.split("train"), corpus.split("validation")
    assert not set(train.document_hashes.tolist()) & set(held_out.document_hashes.tolist())


def test_the_best_checkpoint_is_the_one_with_the_lowest_validation_loss(make: Make) -> None:
    trainer = make(
        training={"max_steps": 8, "checkpoint_every_steps": 1, "keep_every": 1}, evaluation={"every_steps": 2}
    )
    losses = iter([3.0, 1.0, 2.0, 1.5])
    evaluate = trainer.evaluate

    def scripted() -> Any:
        result = evaluate()
        trainer.progress.last_evaluation["loss"] = next(losses)
        return result

    trainer.evaluate = scripted  # type: ignore[method-assign]
    trainer.run()
    root = trainer.run_directory.checkpoints
    assert (root / "best").read_text() == "step_000004\n"
    assert (root / "last").read_text() == (root / "final").read_text() == "step_000008\n"
    assert trainer.progress.best_loss == 1.0


def test_t19_stage_checkpoints_stand_on_both_sides_of_the_boundary_and_survive_pruning(make: Make) -> None:
    trainer = make(
        schedule={"name": "two_stage", "warmup_steps": 2},
        training={"max_steps": 20, "checkpoint_every_steps": 3, "keep_last": 2},
    )
    trainer.run()
    root = trainer.run_directory.checkpoints
    assert checkpoint.steps(root) == [10, 11, 18, 20]
    pinned = {step: checkpoint.verify(root / f"step_{step:06d}")["pinned"] for step in checkpoint.steps(root)}
    assert pinned == {10: "stage boundary", 11: "stage boundary", 18: None, 20: "end"}


def test_a_time_limit_stops_saves_and_leaves_the_schedule_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.update(now=clock["now"] + 1e-6) or clock["now"])
    trainer = make(training={"max_time": "3s"})
    spy(trainer, lambda k: clock.update(now=clock["now"] + 1.0))
    progress = trainer.run()
    assert progress.step == 3
    root = trainer.run_directory.checkpoints
    assert checkpoint.newest_valid(root).name == "step_000003"
    assert not (root / "final").exists()
    assert "max_time" in trainer.run_directory.log.read_text()
    clock["now"] = 0.0
    resumed = make(resume_from=root / "step_000003", training={"max_time": "1h"})
    assert resumed.run().step == 6
    whole = make("whole")
    whole.run()
    assert same(weights(resumed), weights(whole))


def test_a_run_stopped_before_its_first_step_can_be_resumed(make: Make) -> None:
    trainer = make(training={"max_time": 1e-9})
    assert trainer.run().step == 0
    resumed = make(resume_from=trainer.run_directory.checkpoints / "step_000000")
    resumed.run()
    whole = make("whole")
    whole.run()
    assert same(weights(resumed), weights(whole))


class Broken(Tracker):
    """Fails at its n-th row."""

    def __init__(self, good_rows: int) -> None:
        self.left = good_rows

    def log(self, kind: str, row: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the network is gone")

    def close(self) -> None:
        raise RuntimeError("still gone")


@pytest.mark.parametrize("good_rows", [0, 2, 100])
def test_l10_a_tracker_that_fails_is_switched_off_and_training_goes_on(
    make: Make, monkeypatch: pytest.MonkeyPatch, good_rows: int
) -> None:
    whole = make("whole")
    whole.run()
    monkeypatch.setitem(tracking.TRACKERS, "broken", lambda recorded: Broken(good_rows))
    trainer = make()
    assert trainer.run().step == 6
    assert same(weights(trainer), weights(whole))
    assert len(rows(trainer)) == 6
    assert trainer.run_directory.log.read_text().count("Broken is switched off") == 1


def test_l10_a_tracker_that_cannot_start_is_left_out(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise OSError("no such service")

    monkeypatch.setitem(tracking.TRACKERS, "broken", refuse)
    trainer = make()
    assert trainer.run().step == 6
    assert "tracker 'broken' is off: no such service" in trainer.run_directory.log.read_text()


def test_l10_training_survives_the_loss_of_its_own_log_folders(make: Make) -> None:
    trainer = make()
    run = trainer.run_directory
    for file in (run.scalars, run.training_csv):
        for leftover in file.parent.iterdir():
            leftover.unlink()
        file.parent.rmdir()
        file.parent.write_text("a file in place of the folder")
    assert trainer.run().step == 6
    assert checkpoint.newest_valid(run.checkpoints).name == "step_000006"


def poison(trainer: Trainer, steps: set[int]) -> None:
    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan if trainer.progress.step in steps else gradient

    trainer.model.get_parameter("model.norm.weight").register_hook(hook)


def test_t18_a_bad_step_is_logged_skipped_and_training_goes_on(make: Make) -> None:
    trainer = make()
    poison(trainer, {2})
    seen: list[dict[str, torch.Tensor]] = []
    spy(trainer, lambda k: seen.append(weights(trainer)))
    assert trainer.run().step == 6
    assert [same(a, b) for a, b in pairwise(seen)] == [False, False, True, False, False]
    assert "update is skipped" in trainer.run_directory.log.read_text()
    assert rows(trainer)[2]["train/grad_norm"] is None, "JSON has no word for NaN"
    (event,) = read_jsonl(trainer.run_directory.events)
    assert (event["event"], event["action"], event["step"]) == ("nan_inf_grad", "skip", 2)
    (evidence,) = trainer.run_directory.anomalies.iterdir()
    assert evidence.name == "step_000002_nan_inf_grad"


def test_t18_three_bad_steps_in_a_row_end_the_run_with_the_last_good_checkpoint(make: Make) -> None:
    trainer = make(training={"checkpoint_every_steps": 2}, anomaly={"action": "stop"})
    poison(trainer, {3, 4, 5})
    with pytest.raises(Diverged) as caught:
        trainer.run()
    assert caught.value.exit_code == 4
    newest = checkpoint.newest_valid(trainer.run_directory.checkpoints)
    loaded = checkpoint.load(newest)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in loaded.model.tensors().values())
    assert not (trainer.run_directory.checkpoints / "final").exists()


def test_memory_running_out_in_the_middle_of_a_run_does_not_change_the_result(make: Make) -> None:
    whole = make("whole", training={"micro_batch_size": 1})
    whole.run()
    trainer = make()
    forward = trainer.model.forward

    def limited(tokens: torch.Tensor, *args: Any, **options: Any) -> Any:
        if tokens.shape[0] > 1 and trainer.model.training:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(tokens, *args, **options)

    trainer.model.forward = limited  # type: ignore[method-assign]
    trainer.run()
    assert trainer.stepper.micro_batch_size == 1
    assert same(weights(trainer), weights(whole))


def test_memory_that_suffices_for_nothing_ends_the_run_with_its_own_code(make: Make) -> None:
    trainer = make()

    def never(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.model.forward = never  # type: ignore[method-assign]
    with pytest.raises(MemoryExhausted) as caught:
        trainer.run()
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("number", "error", "code"), [(signal.SIGINT, Interrupted, 130), (signal.SIGTERM, Preempted, 75)]
)
def test_a_signal_finishes_the_step_saves_it_and_says_how_to_go_on(
    make: Make, number: int, error: type[TernlmError], code: int
) -> None:
    handler = signal.getsignal(number)
    trainer = make(tracking={"every_steps": 100})
    spy(trainer, lambda k: os.kill(os.getpid(), number) if k == 3 else None)
    with pytest.raises(error, match="ternlm resume") as caught:
        trainer.run()
    assert caught.value.exit_code == code
    assert trainer.status.step == 4, "the status knows the last step, logged or not"
    assert trainer.progress.step == 4, "the step that was running is finished"
    assert checkpoint.newest_valid(trainer.run_directory.checkpoints).name == "step_000004"
    assert signal.getsignal(number) is handler, "handlers are put back"
    whole, resumed = make("whole"), make(resume_from=trainer.run_directory.checkpoints / "step_000004")
    whole.run()
    resumed.run()
    assert same(weights(resumed), weights(whole))


def test_l13_a_signal_during_evaluation_leaves_a_valid_checkpoint(make: Make) -> None:
    trainer = make(evaluation={"every_steps": 4, "batch_size": 1})

    def interrupting(*args: Any, **options: Any) -> Any:
        if not trainer.model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*args, **options)

    forward = trainer.model.forward
    trainer.model.forward = interrupting  # type: ignore[method-assign]
    with pytest.raises(Preempted):
        trainer.run()
    assert trainer.progress.step == 4
    assert checkpoint.newest_valid(trainer.run_directory.checkpoints).name == "step_000004"
    assert trainer.model.training


def test_a_second_signal_ends_at_once(make: Make) -> None:
    trainer = make()

    def twice(k: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    spy(trainer, twice)
    with pytest.raises(SystemExit) as caught:
        trainer.run()
    assert caught.value.code == 130
    assert checkpoint.steps(trainer.run_directory.checkpoints) == []


@pytest.mark.parametrize("sticks", [False, True])
def test_l11_a_disk_error_at_any_operation_of_a_save_is_typed_and_keeps_a_good_checkpoint(
    make: Make, monkeypatch: pytest.MonkeyPatch, sticks: bool
) -> None:
    trainer = make(training={"checkpoint_every_steps": 2, "max_steps": 6})
    trainer.run()
    root = trainer.run_directory.checkpoints
    failures = 0
    for n in range(1, 300):
        trainer.saves._failed = 0
        trainer.progress.step += 1
        trainer.progress.last_evaluation = {"step": trainer.progress.step, "loss": -float(n), "bpb": 1.0}
        with monkeypatch.context() as patch:
            fault = Fault(patch.setattr, n, sticks)
            trainer.save()
            trainer.saves.wait()
        failures += trainer.saves._failed
        if not fault.met:
            break
        assert checkpoint.newest_valid(root).name >= "step_000006"
    else:
        pytest.fail("the save never ended")
    assert failures > 10
    checkpoint.load(checkpoint.newest_valid(root))


def test_l11_two_checkpoints_in_a_row_that_cannot_be_written_end_the_run(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(training={"checkpoint_every_steps": 2, "max_steps": 20})
    trainer.saves.writer.asynchronous = False
    free = collections.namedtuple("usage", "total used free")
    full = {"is_full": False}
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free(1, 1, 0) if full["is_full"] else usage(path))
    spy(trainer, lambda k: full.update(is_full=k >= 7 or k == 3))  # one failure alone is survived
    with pytest.raises(StorageFault, match="free disk space") as caught:
        trainer.run()
    assert caught.value.exit_code == 3
    assert trainer.progress.step == 10
    checkpoint.load(checkpoint.newest_valid(trainer.run_directory.checkpoints))
    assert [row["event"] for row in read_jsonl(trainer.run_directory.events)] == ["disk_low"] * 3


@pytest.mark.parametrize("state", [{}, {"progress": 3}, {"progress": {"nonsense": 1}, "loss_scale": {}}])
def test_a_checkpoint_without_a_position_is_refused(make: Make, tmp_path: Path, state: dict[str, Any]) -> None:
    trainer = make()
    trainer.run()
    made = trainer._contents()._replace(state=state)
    path = checkpoint.save(tmp_path / "foreign", 6, made)
    with pytest.raises(CheckpointError):
        make("other", resume_from=path)


def test_the_model_starts_from_the_seed_alone(make: Make) -> None:
    torch.manual_seed(1)
    first = weights(make("a", training={"seed": 3}))
    torch.manual_seed(2)
    assert same(weights(make("b", training={"seed": 3})), first)
    assert not same(weights(make("c", training={"seed": 4})), first)


def test_the_run_folder_holds_what_is_documented_and_nothing_else(make: Make) -> None:
    trainer = make(evaluation={"sample_every_steps": 6})
    trainer.run()
    run: RunDirectory = trainer.run_directory
    files = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    outside = {name for name in files if not name.startswith("checkpoints/")}
    assert outside == {
        "status.json",
        "metrics/scalars.jsonl",
        "metrics/ternary.jsonl",
        "metrics/system.jsonl",
        "eval/eval_results.jsonl",
        "samples/samples.jsonl",
        "logs/train.log",
        "logs/training_log.csv",
        "logs/eval_log.csv",
    }
    assert {"checkpoints/best", "checkpoints/last", "checkpoints/final"} <= files
