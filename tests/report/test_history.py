"""Curves of a growing file: only new bytes are read, large files are sampled, memory is bounded."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fake_run import training_row, write_rows
from ternlm.report import history
from ternlm.report.history import MOST_POINTS, Follower, History, extend
from ternlm.run_directory import RunDirectory, append_jsonl


def row(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {"step": step, "train/loss": loss, "filler": "x" * 200}


def steps(rows: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in rows]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "scalars.jsonl"


def test_each_look_gives_the_rows_written_since_the_last(file: Path) -> None:
    follower = Follower(file)
    assert follower.poll() == []
    write_rows(file, [row(1), row(2)])
    assert steps(follower.poll()) == [1, 2]
    assert follower.poll() == []
    append_jsonl(file, row(3))
    assert steps(follower.poll()) == [3]


def test_a_half_written_line_is_read_once_when_it_is_whole(file: Path) -> None:
    line = json.dumps(row(2)) + "\n"
    write_rows(file, [row(1)])
    follower = Follower(file)
    with file.open("a") as stream:
        stream.write(line[:50])
        stream.flush()
        assert steps(follower.poll()) == [1]
        assert follower.poll() == []
        stream.write(line[50:])
    assert steps(follower.poll()) == [2]


@pytest.mark.parametrize("way", ["replaced", "truncated"])
def test_a_file_that_begins_anew_is_read_from_its_start(file: Path, way: str) -> None:
    write_rows(file, [row(step) for step in range(1, 40)])
    follower = Follower(file)
    follower.poll()
    if way == "replaced":  # as a resumed run does; longer than before, so its size does not give it away
        write_rows(file.with_name("other"), [row(step) for step in range(1, 50)])
        file.with_name("other").replace(file)
        expected = list(range(1, 50))
    else:
        write_rows(file, [row(7)])
        expected = [7]
    assert steps(follower.poll()) == expected


def test_only_what_was_appended_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(file, [row(step) for step in range(1, 2000)])
    follower = Follower(file)
    follower.poll()
    read: list[int] = []
    real = history.rows_in
    monkeypatch.setattr(history, "rows_in", lambda content: (read.append(len(content)), real(content))[1])
    append_jsonl(file, row(2000))
    follower.poll()
    assert sum(read) == len(json.dumps(row(2000))) + 1


def test_a_large_file_is_sampled_evenly_and_its_end_is_whole(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 30_000
    write_rows(file, [row(step) for step in range(1, count + 1)])
    read: list[int] = []
    real = history.rows_in
    monkeypatch.setattr(history, "rows_in", lambda content: (read.append(len(content)), real(content))[1])
    follower = Follower(file)
    found = steps(follower.poll())
    assert sum(read) < file.stat().st_size / 10
    assert found[-200:] == list(range(count - 199, count + 1))
    gaps = [after - before for before, after in pairwise(found)]
    assert max(gaps) < 2.2 * count / 1024
    append_jsonl(file, row(count + 1))
    assert steps(follower.poll()) == [count + 1]


def test_a_long_curve_keeps_its_shape_in_bounded_memory() -> None:
    curve: history.Curve = []
    for start in range(0, 100_000, 500):
        extend(curve, [row(step, loss=step / 1000) for step in range(start, start + 500)], "train/loss")
        assert len(curve) <= MOST_POINTS
    assert len(curve) > MOST_POINTS / 3
    assert all(value == pytest.approx(step / 1000) for step, value in curve)
    gaps = [after[0] - before[0] for before, after in pairwise(curve)]
    assert max(gaps) < 200, "the beginning is as fine as the end"


def test_steps_that_come_again_replace_what_followed_them() -> None:
    curve: history.Curve = []
    extend(curve, [row(step) for step in (10, 20, 30, 40)], "train/loss")
    extend(curve, [row(25, 9.0), row(35, 8.0)], "train/loss")
    assert curve == [(10, 1.0), (20, 1.0), (25, 9.0), (35, 8.0)]


def test_values_that_are_no_numbers_leave_no_point() -> None:
    curve: history.Curve = []
    rows = [row(1), row(2, float("nan")), {"step": 3}, {"train/loss": 1.0}, {"step": "4", "train/loss": 1.0}]
    rows += [row(6, 1e308), row(7, -1e308)]
    extend(curve, [*rows, {"step": 1e300, "train/loss": 1.0}, {"step": 5, "train/loss": "x"}], "train/loss")
    assert curve == [(1, 1.0)]


def test_the_history_of_a_run_has_its_training_and_evaluation_curves(tmp_path: Path) -> None:
    run, noise = RunDirectory(tmp_path), random.Random(1)
    seen = History(run)
    seen.poll()
    assert set(map(len, seen.curves.values())) == {0}
    write_rows(run.scalars, [training_row(step, 100, noise) for step in range(1, 11)])
    write_rows(run.evaluations, [{"step": 5, "val/loss": 2.5}, {"step": 10, "val/loss": 2.25}])
    seen.poll()
    assert seen.curves["val/loss"] == [(5, 2.5), (10, 2.25)]
    assert {name: len(curve) for name, curve in seen.curves.items() if name != "val/loss"} == dict.fromkeys(
        ("train/loss", "train/grad_norm", "train/learning_rate", "perf/tokens_per_sec"), 10
    )
    write_rows(run.scalars.with_name("cut"), [training_row(step, 100, noise) for step in range(1, 4)])
    run.scalars.with_name("cut").replace(run.scalars)  # resumed from step 3
    seen.poll()
    assert [step for step, _ in seen.curves["train/loss"]] == [1, 2, 3]
