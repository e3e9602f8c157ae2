"""Local rows: strict, whole, and back as soon as a full disk has room again."""

import csv
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ternlm.run_directory import RunDirectory, append_jsonl, append_line, read_jsonl
from ternlm.tracking import Tracker, TrackingSettings, build_trackers


class FillingDisk:
    """`os.write` on a disk that can be filled: it then takes nothing, or half of what it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, takes_half: bool) -> None:
        self.is_full, real = False, os.write

        def write(descriptor: int, content: bytes) -> int:
            if not self.is_full:
                return real(descriptor, content)
            if takes_half:
                return real(descriptor, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "write", write)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.create()
    return run


def local_trackers(run: RunDirectory, said: list[str]) -> list[Tracker]:
    return build_trackers(run, TrackingSettings(tensorboard=False, wandb="disabled"), 0, said.append)


def log_train(trackers: list[Tracker], step: int) -> None:
    for tracker in trackers:
        tracker.log("train", {"step": step, "wall_s": 1.5, "train/loss": 1.25, "train/perplexity": 123.456})


@pytest.mark.parametrize("takes_half", [False, True])
def test_l10_rows_come_again_when_a_full_disk_has_room(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, takes_half: bool
) -> None:
    said: list[str] = []
    trackers = local_trackers(run, said)
    disk = FillingDisk(monkeypatch, takes_half)
    for step in range(8):
        disk.is_full = step in (2, 3, 6)
        log_train(trackers, step)
    assert [json.loads(line)["step"] for line in run.scalars.read_text().splitlines()] == [0, 1, 4, 5, 7]
    with run.training_csv.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["perplexity"]) for row in rows] == [(str(step), "123.456") for step in (0, 1, 4, 5, 7)]
    for name in ("metrics/*.jsonl", "logs/*.csv"):
        about = [sentence for sentence in said if sentence.startswith(name)]
        assert [sentence.removeprefix(name) for sentence in about[1::2]] == [
            " can be written again; 2 rows were lost.",
            " can be written again; 1 row was lost.",
        ]
        assert all("No space left" in sentence and "Training goes on" in sentence for sentence in about[0::2])
        assert len(about) == 4


def test_l10_rows_lost_until_the_end_are_told_at_the_end(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    jsonl, *_ = local_trackers(run, said)
    FillingDisk(monkeypatch, takes_half=False).is_full = True
    log_train([jsonl], 1)
    assert jsonl.describe() == "metrics/*.jsonl failing, 1 row was lost"
    jsonl.close()
    assert said[-1] == "metrics/*.jsonl could not be written to the end; 1 row was lost."


def test_a_row_no_file_can_hold_costs_only_itself(run: RunDirectory) -> None:
    said: list[str] = []
    jsonl, *_ = local_trackers(run, said)
    for step, value in enumerate((1.0, object(), 2.0)):
        jsonl.log("train", {"step": step, "train/loss": value})
    assert [row["step"] for row in read_jsonl(run.scalars)] == [0, 2]
    assert len(said) == 2


def test_l08_a_line_torn_by_a_kill_does_not_spoil_the_next(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2, "te')
    append_jsonl(file, {"step": 3})
    append_jsonl(file, {"step": 4})
    assert [row["step"] for row in read_jsonl(file)] == [1, 3, 4]


def test_one_row_is_one_write_also_behind_a_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    real = os.write

    def write(descriptor: int, content: bytes) -> int:
        writes.append(bytes(content))
        return real(descriptor, content)

    monkeypatch.setattr(os, "write", write)
    append_line(tmp_path / "rows", "a")
    (tmp_path / "rows").write_bytes(b"a\nb")
    append_line(tmp_path / "rows", "c")
    assert writes == [b"a\n", b"\nc\n"]


def test_numbers_that_are_not_finite_become_null_wherever_they_are(tmp_path: Path) -> None:
    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    file, nan, infinity = tmp_path / "rows.jsonl", float("nan"), float("inf")
    append_jsonl(file, {"step": 1, "a": nan, "b": {"c": [1.5, -infinity]}, "d": (infinity,), "e": "NaN", "f": True})
    row = json.loads(file.read_text(), parse_constant=refuse)
    assert row == {"step": 1, "a": None, "b": {"c": [1.5, None]}, "d": [None], "e": "NaN", "f": True}


def test_half_a_surrogate_pair_in_generated_text_is_written_as_an_escape(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    append_jsonl(file, {"text": "é\ud83d"})
    assert json.loads(file.read_text(encoding="utf-8")) == {"text": "é\ud83d"}
    assert "é" in file.read_text(encoding="utf-8")


def test_the_columns_of_the_training_table_are_those_scripts_expect(run: RunDirectory) -> None:
    log_train(local_trackers(run, []), 7)
    header, row = run.training_csv.read_text().splitlines()
    assert header == "step,elapsed_seconds,loss,lr,grad_norm,bpb,perplexity"
    assert row == "7,1.5,1.25,,,,123.456"
