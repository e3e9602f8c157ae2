"""Trackers: rows reach their files at once, and no failure of any of them reaches the loop."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ternlm.run_directory import RunDirectory, read_jsonl
from ternlm.tracking import TRACKERS, Tracker, Trackers, TrackingSettings, build_trackers
from ternlm.tracking.console import ConsoleTracker, short_count, short_duration, training_numbers
from ternlm.tracking.csv import CsvTracker
from ternlm.tracking.jsonl import JsonlTracker

TRAIN_ROW: dict[str, Any] = {
    "step": 3, "tokens_seen": 90, "wall_s": 1.5, "train/loss": 1.25, "train/learning_rate": 1e-3,
    "train/grad_norm": 0.5, "train/bpb": None, "train/perplexity": 3.49, "perf/tokens_per_sec": 12345.0, "eta_s": 65.0,
}  # fmt: skip
EVAL_ROW: dict[str, Any] = {
    "step": 3, "wall_s": 1.5, "val/loss": 1.5, "val/bpb": 2.1, "val/perplexity": 4.5, "val/accuracy": 0.25,
    "val/top5_accuracy": 0.5,
}  # fmt: skip
SAMPLE_ROW: dict[str, Any] = {"step": 3, "prompt": "[bold]One", "generated_text": " day\n[/bold]", "generated_ids": [1]}

EVENT_ROW: dict[str, Any] = {
    "step": 3, "event": "loss_spike", "severity": "warning", "message": "The loss went [up].", "action": "kept",
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.create()
    return run


class Recording(Tracker):
    """Remembers its rows; fails when told to."""

    def __init__(self, fail_at: int = 10**9, fail_on_close: bool = False) -> None:
        self.rows: list[Any] = []
        self.closed, self.fail_at, self.fail_on_close = 0, fail_at, fail_on_close

    def log(self, kind: str, row: Any) -> None:
        if len(self.rows) == self.fail_at:
            raise ConnectionError("gone")
        self.rows.append((kind, dict(row)))

    def close(self) -> None:
        self.closed += 1
        if self.fail_on_close:
            raise ConnectionError("gone")


def test_l10_a_tracker_that_raises_is_switched_off_once_and_the_others_go_on() -> None:
    said: list[str] = []
    first, second, third = Recording(), Recording(fail_at=1), Recording()
    together = Trackers([first, second, third], said.append)
    for step in range(4):
        together.log("train", {"step": step})
    together.close()
    assert [len(tracker.rows) for tracker in (first, second, third)] == [4, 1, 4]
    assert (first.closed, second.closed, third.closed) == (1, 0, 1)
    assert said == ["Recording is switched off: gone. Training goes on."]
    assert together.describe() == "Recording off: gone"


def test_l10_a_failure_while_closing_is_kept_away_too() -> None:
    said: list[str] = []
    first, second = Recording(fail_on_close=True), Recording()
    Trackers([first, second], said.append).close()
    assert second.closed == 1
    assert len(said) == 1


def test_a_keyboard_interrupt_is_not_a_failure_of_a_tracker() -> None:
    class Interrupting(Tracker):
        def log(self, kind: str, row: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trackers([Interrupting()], print).log("train", {})


def test_l10_trackers_that_cannot_start_are_left_out_with_one_sentence(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> Tracker:
        raise ImportError("no module")

    monkeypatch.setitem(TRACKERS, "csv", refuse)
    said: list[str] = []
    built = build_trackers(run, TrackingSettings(tensorboard=False, wandb="disabled"), 0, said.append)
    assert len(built) == 1
    assert said == ["tracker 'csv' is off: no module. Training goes on."]


@pytest.mark.parametrize("csv_on", [True, False])
def test_t12_settings_choose_the_trackers(run: RunDirectory, csv_on: bool) -> None:
    settings = TrackingSettings(csv=csv_on, tensorboard=False, wandb="disabled")
    together = Trackers(build_trackers(run, settings, 0, print), print)
    together.log("train", TRAIN_ROW)
    together.close()
    assert read_jsonl(run.scalars) == [TRAIN_ROW]
    assert run.training_csv.exists() == csv_on
    assert not run.tensorboard.exists()
    assert together.describe() is None


def test_l07_each_kind_of_row_has_its_own_file_and_is_there_at_once(run: RunDirectory) -> None:
    tracker = JsonlTracker(run)
    for kind, row, file in (
        ("train", TRAIN_ROW, run.scalars),
        ("eval", EVAL_ROW, run.evaluations),
        ("sample", SAMPLE_ROW, run.samples),
        ("ternary", {"step": 3, "ternary/all/frac_zero": 0.5}, run.ternary),
        ("system", {"step": 3, "system/cpu_percent": 50.0}, run.system),
        ("event", EVENT_ROW, run.events),
    ):
        tracker.log(kind, row)  # type: ignore[arg-type]
        assert read_jsonl(file) == [row]


def test_the_table_has_a_header_once_also_after_a_resume(run: RunDirectory) -> None:
    CsvTracker(run).log("train", TRAIN_ROW)
    resumed = CsvTracker(run)
    resumed.log("train", TRAIN_ROW | {"step": 4, "train/bpb": 1.75})
    resumed.log("eval", EVAL_ROW)
    resumed.log("sample", SAMPLE_ROW)
    with run.training_csv.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["bpb"], row["lr"]) for row in rows] == [("3", "", "0.001"), ("4", "1.75", "0.001")]
    with run.evaluation_csv.open() as file:
        assert next(csv.DictReader(file))["top5_accuracy"] == "0.5"


def test_an_empty_table_of_a_killed_process_still_gets_its_header(run: RunDirectory) -> None:
    run.training_csv.write_text("")
    CsvTracker(run).log("train", TRAIN_ROW)
    assert run.training_csv.read_text().startswith("step,elapsed_seconds,loss,lr,")


def console(tmp_path: Path, **options: Any) -> tuple[ConsoleTracker, io.StringIO, Path]:
    stream, log = io.StringIO(), tmp_path / "train.log"
    return ConsoleTracker(100, 0, log, Console(file=stream, width=200, highlight=False), **options), stream, log


def test_lines_go_to_the_screen_and_to_the_log(tmp_path: Path) -> None:
    tracker, stream, log = console(tmp_path)
    tracker.log("train", TRAIN_ROW)
    tracker.log("eval", EVAL_ROW)
    tracker.log("sample", SAMPLE_ROW)
    tracker.say("half [red]way[/red]")
    tracker.close()
    shown = stream.getvalue()
    assert "step 3/100  loss 1.2500  12.3k tok/s  ETA 1m05s" in shown
    assert "val loss 1.5000  bpb 2.1000  accuracy 25.0%" in shown
    assert "[bold]One day [/bold]" in shown, "text of a model is never read as markup"
    assert "half [red]way[/red]" in shown
    kept = log.read_text()
    assert all(part in kept for part in ("loss 1.2500", "val loss 1.5000", "half [red]way[/red]"))


def test_quiet_shows_nothing_and_still_keeps_the_log(tmp_path: Path) -> None:
    tracker, stream, log = console(tmp_path, quiet=True)
    tracker.log("train", TRAIN_ROW)
    tracker.say("something")
    assert stream.getvalue() == ""
    assert len(log.read_text().splitlines()) == 2


def test_events_are_shown_by_their_weight_and_the_measured_kinds_are_not(tmp_path: Path) -> None:
    tracker, stream, log = console(tmp_path)
    tracker.log("event", EVENT_ROW)
    tracker.log("event", EVENT_ROW | {"severity": "info", "message": "Saved.", "action": None})
    tracker.log("ternary", {"step": 3, "ternary/all/frac_zero": 0.5})
    tracker.log("system", {"step": 3, "system/cpu_percent": 50.0})
    assert stream.getvalue() == "step 3  warning: The loss went [up].\n"
    assert [line.partition("  ")[2] for line in log.read_text().splitlines()] == [
        "warning: The loss went [up].",
        "info: Saved.",
    ]


def test_l10_a_log_that_cannot_be_written_is_tried_again_with_the_next_line(tmp_path: Path) -> None:
    (tmp_path / "train.log").mkdir()
    tracker, stream, log = console(tmp_path)
    tracker.log("train", TRAIN_ROW)
    tracker.say("going on")
    assert "going on" in stream.getvalue()
    log.rmdir()
    tracker.say("back")
    assert log.read_text().endswith(" back\n")


@pytest.mark.parametrize("error", [BrokenPipeError(), SystemExit(1)])
def test_l10_a_reader_that_went_away_silences_the_console_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    tracker, stream, log = console(tmp_path)

    def closed(*args: Any, **options: Any) -> None:
        raise error

    tracker._console.print = closed  # type: ignore[method-assign]
    tracker.log("train", TRAIN_ROW)
    tracker.say("going on")
    tracker.close()
    assert stream.getvalue() == ""
    assert len(log.read_text().splitlines()) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e300])
def test_extreme_numbers_are_shown_and_not_fatal(value: float) -> None:
    assert "loss" in training_numbers(TRAIN_ROW | {"train/loss": value, "train/bpb": value})


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (999, "999"), (12_345, "12.3k"), (4.5e6, "4.5M"), (2e9, "2.0B")])
def test_short_counts(value: float, text: str) -> None:
    assert short_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (273_600, "3d04h"), (-3, "0s")],
)
def test_short_durations(seconds: float, text: str) -> None:
    assert short_duration(seconds) == text
