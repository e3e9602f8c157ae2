"""status.json: its schema, how often it is written, and that no disk can stop training through it."""

import json
import math
import os
import socket
from collections import deque
from pathlib import Path
from typing import Any

import psutil
import pytest

from builders import Fault
from ternlm.run_directory import RunDirectory
from ternlm.training.status import FINAL, RUNNING, StatusFile, loss_trend

KEYS = """schema run_id state reason step max_steps tokens_seen progress stage stage_name loss loss_trend learning_rate
weight_decay grad_norm tokens_per_sec step_time_ms eta_seconds elapsed_seconds started_at updated_at pid
process_started host device val best samples last_checkpoint anomalies ternary tracker exit_code error next_command
version"""


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "r").mkdir()
    return RunDirectory(tmp_path / "r")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def file(run: RunDirectory, clock: Clock, said: list[str]) -> StatusFile:
    return StatusFile(run, said.append, monotonic=clock, now=lambda: 1_800_000_000.25)


def content(run: RunDirectory) -> dict[str, Any]:
    return json.loads(run.status.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_file_has_exactly_the_keys_of_schema_1(run: RunDirectory, file: StatusFile) -> None:
    file.update("training", step=30, max_steps=120, loss=2.5)
    written = content(run)
    assert sorted(written) == sorted(KEYS.split())
    assert (written["schema"], written["run_id"], written["state"]) == (1, "r", "training")
    assert (written["step"], written["progress"], written["loss"]) == (30, 0.25, 2.5)
    assert written["started_at"] == written["updated_at"] == "2027-01-15T08:00:00.250Z"
    assert (written["pid"], written["host"]) == (os.getpid(), socket.gethostname())
    assert written["process_started"] == psutil.Process().create_time()
    assert written["exit_code"] is written["val"] is written["best"] is written["ternary"] is None
    assert not {*RUNNING} & {*FINAL}


def test_a_field_outside_the_schema_is_a_mistake_of_the_caller(file: StatusFile) -> None:
    with pytest.raises(AssertionError, match="lss"):
        file.update(lss=1.0)


def test_nothing_is_written_before_there_is_something_to_say(run: RunDirectory, file: StatusFile) -> None:
    assert not run.status.exists()


def test_writes_are_a_second_apart_unless_the_state_changes(run: RunDirectory, file: StatusFile, clock: Clock) -> None:
    file.update("training", step=1)
    for step in range(2, 50):
        clock.s += 0.02
        file.update("training", step=step)
    assert content(run)["step"] == 1
    file.update("evaluating")
    assert (content(run)["state"], content(run)["step"]) == ("evaluating", 49)
    clock.s += 1.0
    file.update(step=50)
    assert content(run)["step"] == 50


def test_a_heartbeat_writes_what_waits_and_else_only_now_and_then(
    run: RunDirectory, file: StatusFile, clock: Clock
) -> None:
    file.update("training", step=1)
    file.update(step=2)
    clock.s += 0.9
    file.heartbeat()
    assert content(run)["step"] == 1
    clock.s += 0.2
    file.heartbeat()
    assert content(run)["step"] == 2
    run.status.unlink()
    clock.s += 4.9
    file.heartbeat()
    assert not run.status.exists()
    clock.s += 0.2
    file.heartbeat()
    assert content(run)["step"] == 2


def test_a_reader_that_has_the_file_open_keeps_the_old_one_whole(run: RunDirectory, file: StatusFile) -> None:
    file.update("training", step=1)
    with run.status.open("rb") as before:
        file.update("saving", step=2)
        assert json.loads(before.read())["step"] == 1
        file.final("finished", 0)
        before.seek(0)
        assert json.loads(before.read())["step"] == 1
    assert content(run)["state"] == "finished"


def test_the_last_word_is_complete_durable_and_not_overwritten(
    run: RunDirectory, file: StatusFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), real(descriptor)))
    file.update("training", step=7, eta_seconds=3.0)
    file.update(step=8)
    assert synced == [], "a training step does not wait for the disk"
    file.final("diverged", 4, reason="loss is nan", error="x" * 9000, next_command="ternlm resume r")
    assert len(synced) == 2  # content and folder
    file.update("training", step=9)
    file.heartbeat()
    written = content(run)
    assert (written["state"], written["step"], written["exit_code"]) == ("diverged", 8, 4)
    assert (written["reason"], written["next_command"]) == ("loss is nan", "ternlm resume r")
    assert (len(written["error"]), written["eta_seconds"]) == (2000, None)


def test_numbers_json_cannot_hold_become_null_and_any_text_is_kept(run: RunDirectory, file: StatusFile) -> None:
    file.update("training", loss=math.nan, grad_norm=math.inf, val={"loss": -math.inf, "bpb": None, "step": 3})
    written = content(run)
    assert (written["loss"], written["grad_norm"], written["val"]) == (
        None,
        None,
        {"loss": None, "bpb": None, "step": 3},
    )
    assert written["best"] is None
    file.update("saving", samples=[{"mode": "stress", "prompt": "é🙂", "text": "lone \udc80 surrogate"}])
    assert content(run)["samples"] == [{"mode": "stress", "prompt": "é🙂", "text": "lone \udc80 surrogate"}]


def test_the_best_evaluation_is_remembered_over_sittings_and_forgotten_by_a_roll_back(
    run: RunDirectory, clock: Clock
) -> None:
    run.evaluations.parent.mkdir(parents=True)
    rows = [{"step": 10, "val/loss": 3.0}, {"step": 20, "val/loss": 2.0}, {"step": 30, "val/loss": 1.0}, {"step": "x"}]
    run.evaluations.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 40, "val')
    file = StatusFile(run, pytest.fail, monotonic=clock)
    file.update("training", step=20)  # resumed there, the row of step 30 is cut
    assert content(run)["best"] == {"loss": 2.0, "step": 20}
    file.update("evaluating", step=25, val={"loss": 1.5, "bpb": None, "step": 25})
    assert content(run)["best"] == {"loss": 1.5, "step": 25}
    file.update("training", step=22)
    assert content(run)["best"] == {"loss": 2.0, "step": 20}
    file.update("saving", best={"loss": 9.0, "step": 1})
    assert content(run)["best"] == {"loss": 9.0, "step": 1}


def test_the_trend_is_the_slope_per_1000_steps_and_shrugs_off_spikes() -> None:
    line = deque((step, 5.0 - 0.002 * step) for step in range(10, 1290, 10))
    assert loss_trend(line) == pytest.approx(-2.0)
    spiked = deque((step, loss + (30.0 if step in (400, 410, 1250) else 0.0)) for step, loss in line)
    assert loss_trend(spiked) == pytest.approx(-2.0, abs=0.05)
    assert loss_trend(deque([*line][:8])) == pytest.approx(-2.0)
    assert loss_trend(deque([*line][:7])) is None
    assert loss_trend(deque((3, float(loss)) for loss in range(20))) is None, "one step has no slope"


def test_the_trend_follows_the_logged_losses_in_a_bounded_window(
    run: RunDirectory, file: StatusFile, clock: Clock
) -> None:
    for step in range(1, 2001):
        file.update("training", step=step, loss=10.0 if step < 1000 else 0.001 * step)
    file.update("saving")
    assert content(run)["loss_trend"] == pytest.approx(1.0)
    file.update("waiting", step=1875)  # rolled back: what followed did not happen, and three rows are too few
    assert content(run)["loss_trend"] is None
    for step in range(1876, 1876 + 128):
        file.update("training", step=step, loss=1.9)
    file.update("saving")
    assert content(run)["loss_trend"] == pytest.approx(0.0)


def test_a_resumed_run_has_the_trend_it_had_when_it_stopped(run: RunDirectory, clock: Clock) -> None:
    run.scalars.parent.mkdir(parents=True)
    rows = [{"step": step, "train/loss": None if step == 35 else 3.0 - step * step / 1e4} for step in range(5, 205, 5)]
    run.scalars.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = StatusFile(RunDirectory(run.path / "other"), pytest.fail, monotonic=clock)
    (run.path / "other").mkdir()
    for row in rows[:30]:
        whole.update("training", step=row["step"], loss=row["train/loss"])
    resumed = StatusFile(run, pytest.fail, monotonic=clock)
    resumed.update(step=150)
    assert resumed.step == whole.step == 150
    assert resumed.loss_trend == whole.loss_trend is not None
    assert resumed.reason is None


@pytest.mark.parametrize("sticks", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("word", ["update", "final"])
def test_l11_no_refused_operation_stops_training_or_leaves_a_mess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, sticks: bool
) -> None:
    for n in range(1, 30):
        run = RunDirectory(tmp_path / f"{n}")
        run.path.mkdir()
        said: list[str] = []
        file = StatusFile(run, said.append, monotonic=Clock())
        file.update("training", step=1)
        with monkeypatch.context() as patch:
            fault = Fault(patch.setattr, n, sticks)
            file.update("evaluating", step=2) if word == "update" else file.final("failed", 1)
            file.update("training", step=3)
            file.update("saving", step=4)
        if not fault.met:
            assert n > 3
            break
        assert len(said) == 1, f"operation {n}: {said}"
        assert "Training goes on" in said[0]
        assert content(run)["step"] in (1, 2, 3, 4), "the file is old or new, never torn"
        leftovers = [path.name for path in run.path.iterdir() if path != run.status]
        assert leftovers == []
    else:
        pytest.fail("the fault was always met")


def test_a_crash_between_writing_and_renaming_leaves_one_file_that_is_used_again(
    run: RunDirectory, clock: Clock, said: list[str]
) -> None:
    (run.path / ".status.json.new").write_bytes(b"half of a sta" * 10_000)
    StatusFile(run, said.append, monotonic=clock).update("training", step=5)
    assert (said, content(run)["step"]) == ([], 5)
    assert [path.name for path in run.path.iterdir()] == ["status.json"]


def test_the_temporary_name_is_not_followed_out_of_the_folder(
    run: RunDirectory, clock: Clock, said: list[str], tmp_path: Path
) -> None:
    (tmp_path / "precious").write_text("kept")
    (run.path / ".status.json.new").symlink_to(tmp_path / "precious")
    file = StatusFile(run, said.append, monotonic=clock)
    file.update("training", step=1)
    file.update("saving", step=2)
    assert (tmp_path / "precious").read_text() == "kept"
    assert content(run)["step"] == 2, "the link was removed and the next write succeeded"
    assert len(said) == 1


def test_a_folder_that_is_gone_costs_one_warning(run: RunDirectory, file: StatusFile, said: list[str]) -> None:
    run.path.rmdir()
    file.update("training", step=1)
    file.update("saving", step=2)
    file.final("finished", 0)
    assert len(said) == 1
    assert "cannot be written: No such file or directory" in said[0]
