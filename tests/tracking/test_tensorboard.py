"""TensorBoard: its own reader finds every number, the texts, and after a resume no step twice."""

import math
import threading
from pathlib import Path
from typing import Any

import pytest

from ternlm.run_directory import RunDirectory
from ternlm.tracking import TrackingSettings, build_trackers
from ternlm.tracking.background import BackgroundTracker
from ternlm.tracking.tensorboard import TensorBoardTracker

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.create()
    return run


def read(run: RunDirectory) -> Any:
    events = accumulator.EventAccumulator(str(run.tensorboard))
    events.Reload()
    return events


def text_of(events: Any, tag: str) -> str:
    return str(events.Tensors(tag)[-1].tensor_proto.string_val[0].decode())


def test_every_number_with_a_slash_is_there_at_its_step_and_time(run: RunDirectory) -> None:
    tracker = TensorBoardTracker(run)
    tracker.log("train", {"step": 3, "time": 1e9, "train/loss": 1.25, "train/bpb": None, "train/grad_norm": math.nan})
    tracker.log("eval", {"step": 3, "val/loss": 1.5, "protocol": "window"})
    tracker.log("ternary", {"step": 3, "ternary/layers.0.self_attn.q_proj/frac_zero": 0.25})
    tracker.log("system", {"step": 4, "system/gpu0/util": 50})
    tracker.close()
    events = read(run)
    values = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert math.isnan(values.pop("train/grad_norm")[0][1])
    assert values == {
        "train/loss": [(3, 1.25)],
        "val/loss": [(3, 1.5)],
        "ternary/layers.0.self_attn.q_proj/frac_zero": [(3, 0.25)],
        "system/gpu0/util": [(4, 50)],
    }
    assert events.Scalars("train/loss")[0].wall_time == 1e9


def test_samples_and_events_are_text_that_is_never_read_as_markup(run: RunDirectory) -> None:
    tracker = TensorBoardTracker(run)
    hostile = "# Once\n```\n<script>x</script>\r\n**bold**"
    tracker.log("sample", {"step": 5, "mode": "greedy", "prompt": "A [b]", "generated_text": hostile})
    tracker.log("sample", {"step": 5, "prompt": "", "generated_text": "\ud83d"})
    tracker.log("event", {"step": 5, "event": "loss_spike", "severity": "warning", "message": "Up.", "action": "kept"})
    tracker.close()
    events = read(run)
    assert set(events.Tags()["tensors"]) == {"sample/greedy/A_b_", "sample/text/", "event/loss_spike"}
    text = text_of(events, "sample/greedy/A_b_")
    assert text == (
        "**Prompt**\n\n    A [b]\n\n**Continuation**\n\n    # Once\n    ```\n    <script>x</script>\n    **bold**\n"
    )
    assert text_of(events, "event/loss_spike") == "    warning: Up.\n"
    assert events.SummaryMetadata("event/loss_spike").plugin_data.plugin_name == "text"


def test_a_resumed_run_hides_the_steps_it_trains_again(run: RunDirectory) -> None:
    for first_step, losses in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (1, {2: 20.0})):
        (tracker,) = [
            tracker
            for tracker in build_trackers(run, TrackingSettings(wandb="disabled"), first_step, print)
            if isinstance(tracker, BackgroundTracker)
        ]
        for step, loss in losses.items():
            tracker.log("train", {"step": step, "train/loss": loss})
        tracker.close(60)
        assert tracker.describe() == "tensorboard"
    assert [(event.step, event.value) for event in read(run).Scalars("train/loss")] == [(1, 1.0), (2, 20.0)]
    assert not run.wandb.exists()


def test_r16_a_board_that_reads_hard_while_rows_are_written_sees_each_step_once_and_in_order(
    run: RunDirectory,
) -> None:
    tracker, done = TensorBoardTracker(run), threading.Event()
    tracker.log("train", {"step": 0, "train/loss": 0.0})
    tracker.flush()

    def write() -> None:
        for step in range(1, 1500):
            tracker.log("train", {"step": step, "train/loss": float(step)})
            if step % 7 == 0:
                tracker.flush()
        tracker.close()
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    board = accumulator.EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0})
    reads, seen = 0, 0
    while reads < 1000 or not done.is_set():
        board.Reload()
        steps = [event.step for event in board.Scalars("train/loss")] if board.Tags()["scalars"] else []
        assert steps == list(range(len(steps)))
        assert len(steps) >= seen
        reads, seen = reads + 1, len(steps)
    writer.join()
    board.Reload()
    assert len(board.Scalars("train/loss")) == 1500
