"""Reading a run that is being written, half gone, made by another version, or by a process that is no more."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from fake_run import TIME, fake_run, write_rows
from ternlm.report.history import History
from ternlm.report.screen import Screen
from ternlm.report.status import Disk, is_run, read_disk, read_status
from ternlm.run_directory import RunDirectory

HERE = {"host": socket.gethostname(), "pid": os.getpid(), "process_started": psutil.Process().create_time()}
NO_DISK = Disk(0, 0, None)
HANG_GUARD_S = 120.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_healthy_run_is_read_in_full(path: Path) -> None:
    status = read_status(fake_run(path, **HERE), now=TIME + 3)
    assert (status.state, status.alive, status.is_running, status.reason) == ("training", True, True, None)
    assert (status.step, status.max_steps, status.progress, status.age_seconds) == (3120, 5000, 0.624, 3.0)
    assert status.val is not None and status.best is not None
    assert (status.val["step"], status.val["bpb"], status.val["accuracy"]) == (3000, 1.1, 0.58)
    assert (status.peak_memory_mb, status.system["system/ram_percent"]) == (1812.0, 41.0)
    assert [sample["mode"] for sample in status.samples] == ["greedy", "typical", "stress"]
    assert [event["event"] for event in status.events] == ["loss_spike"]
    assert status.run_bytes > status.checkpoint_bytes == 12 * 1000
    assert status.free_bytes is not None and status.free_bytes > 0
    json.dumps(status.as_dict(), allow_nan=False)


def test_l08_checkpoints_and_anomalies_come_in_the_order_of_their_steps(path: Path) -> None:
    run = RunDirectory(path)
    steps = [9000, 10000, 500, 999999, 1000000, 70, 8, 100000, 250, 10500, 1, 99]
    for step in steps:
        (run.checkpoints / f"step_{step:06d}").mkdir(parents=True)
        (run.anomalies / f"step_{step}_loss_spike").mkdir(parents=True)
    for name in ("best", ".tmp-step_002000000", "step_x", "step_12"):
        (run.checkpoints / name).mkdir()
    (run.anomalies / "notes.txt").touch()
    status = read_status(run)
    assert status.checkpoints == sorted(steps)
    assert status.last_checkpoint == 1_000_000
    assert status.anomalies["count"] == 12
    assert [row["step"] for row in status.anomalies["newest"]] == [10000, 10500, 100000, 999999, 1000000]
    assert status.anomalies["last"] == {"event": "loss_spike", "step": 1_000_000}


def test_l08_a_line_cut_anywhere_is_not_there_yet(path: Path) -> None:
    run = fake_run(path, step=30)
    run.status.unlink()
    *before, last = run.scalars.read_bytes().splitlines(keepends=True)
    for length in (*range(0, len(last), 7), len(last) - 1):
        run.scalars.write_bytes(b"".join(before) + last[:length])
        assert read_status(run, NO_DISK).step == 29
    run.scalars.write_bytes(b"".join(before) + last)
    assert read_status(run, NO_DISK).step == 30


def test_lines_that_are_no_rows_are_passed_over(path: Path) -> None:
    run = fake_run(path, step=20)
    run.status.unlink()
    with run.scalars.open("ab") as stream:
        stream.write(b'\xff\xfe\n[1]\n"x"\nnull\n\n{"step": tru\n' + b"[" * 100_000 + b"\n")
        stream.write(b'{"step": NaN}\n{"step": "7"}\n{"step": true}\n{"no": 1}\n{"step": 1' + b"0" * 400 + b"}\n")
    assert read_status(run, NO_DISK).step is None, "the tail holds one enormous line"
    with run.scalars.open("ab") as stream:
        stream.write(b'{"step": 21, "train/loss": Infinity, "time": 1e300}\n')
    status = read_status(run, NO_DISK)
    assert (status.step, status.loss) == (21, None)


def test_only_the_end_of_a_large_file_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake_run(path, step=40, **HERE)
    with run.scalars.open("r+b") as stream:
        stream.truncate(0)
        stream.seek(1 << 34)  # 16 GiB of nothing
        stream.write(b'\n{"step": 41, "time": 9e9, "train/loss": 1.5}\n')
    status = read_status(run, NO_DISK)
    assert (status.step, status.loss) == (41, 1.5)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": 1', "\x00" * 50, '"training"', "[" * 99999])
def test_a_status_file_that_says_nothing_leaves_what_the_metrics_know(path: Path, content: str) -> None:
    run = fake_run(path)
    run.status.write_text(content)
    status = read_status(run, now=TIME + 5)
    assert (status.state, status.reason, status.is_running) == ("unknown", "status.json cannot be read", True)
    assert (status.step, status.max_steps, status.val and status.val["step"]) == (3120, 5000, 3000)
    assert status.best == {"loss": pytest.approx(1.25, abs=0.05), "step": 1750}
    assert [sample["text"][:7] for sample in status.samples] == ["the fox", "a bird ", "\x1b[31mzq"]
    assert not read_status(run, now=TIME + 500).is_running


@pytest.mark.parametrize(
    "garbage",
    [
        None,
        "x",
        -1,
        1e308,
        True,
        [],
        {},
        [[]],
        {"loss": "x", "step": []},
        10**400,
        "2027-13-45",
        "0001-01-01",
        "9999-12-31T23:59:59-20:00",
    ],
    ids=repr,
)
def test_fields_of_any_type_are_read_as_unknown(path: Path, garbage: Any) -> None:
    run = fake_run(path, step=300)
    keys = json.loads(run.status.read_text())
    run.status.write_text(json.dumps(dict.fromkeys(keys, garbage)))
    assert read_status(run).step == 300 or garbage is not None
    run.config.unlink()
    status = read_status(run)
    json.dumps(status.as_dict(), allow_nan=False)
    history = History(run)
    history.poll()
    assert Screen(80).draw(status, history.curves)
    assert len(status.as_dict()) == len(read_status(RunDirectory(path / "none")).as_dict())


def test_a_run_of_an_older_version_lacks_keys_and_shows_the_rest(path: Path) -> None:
    run = fake_run(path)
    run.status.write_text('{"state": "finished", "step": 5000, "updated_at": "2027-01-15T08:30:00Z"}')
    status = read_status(run)
    assert (status.state, status.step, status.max_steps, status.progress) == ("finished", 5000, 5000, 1.0)
    assert (status.loss_trend, status.pid, status.alive, status.version) == (None, None, None, None)
    assert status.next_command == f"ternlm generate {path} --prompt '...'"
    run.status.unlink()
    (run.checkpoints / "final").write_text("step_003000")
    assert read_status(run).state == "finished", "there is a final checkpoint, and there never was a status file"


def test_missing_parts_are_none_and_a_missing_folder_is_said(path: Path) -> None:
    assert read_status(RunDirectory(path)).state == "missing"
    path.mkdir()
    assert not is_run(path)
    (path / "metrics").mkdir()
    assert is_run(path)
    status = read_status(RunDirectory(path))
    assert (status.state, status.step, status.val, status.samples, status.checkpoints) == (
        "damaged",
        None,
        None,
        [],
        [],
    )
    assert status.next_command is None


@pytest.mark.parametrize(
    ("fields", "state", "alive"),
    [
        ({}, "training", True),
        ({"process_started": HERE["process_started"] - 3600}, "lost", False),  # the number was given again
        ({"process_started": None}, "training", True),
        ({"pid": 2**22 + 1}, "lost", False),
        ({"pid": -5}, "lost", False),
        ({"pid": 2**70}, "lost", False),
        ({"pid": 2**22 + 1, "state": "finished"}, "finished", False),
        ({"host": "elsewhere"}, "training", None),
    ],
)
def test_a_running_state_needs_a_running_process(path: Path, fields: dict[str, Any], state: str, alive: bool) -> None:
    status = read_status(fake_run(path, step=30, **(HERE | fields)), now=TIME + 60)
    assert (status.state, status.alive) == (state, alive)
    if state == "lost":
        assert status.reason is not None and "it was training" in status.reason
        assert status.next_command == f"ternlm resume {path}"
        assert not status.is_running
        assert status.eta_seconds is None


def test_a_process_that_ended_is_gone_also_while_its_parent_has_not_noticed(path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = psutil.Process(child.pid)
    run = fake_run(path, step=30, host=HERE["host"], pid=child.pid, process_started=process.create_time())
    assert read_status(run, now=TIME).state == "training"
    child.kill()
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert read_status(run, now=TIME).state == "lost"
    child.communicate()
    assert read_status(run, now=TIME).state == "lost"


def test_the_last_word_of_a_process_that_ends_while_it_is_looked_at_counts(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fake_run(path, step=30, **(HERE | {"pid": 2**22 + 1}))

    def ended(pid: int) -> Any:
        run.status.write_text(json.dumps(json.loads(run.status.read_text()) | {"state": "finished", "exit_code": 0}))
        raise psutil.NoSuchProcess(pid)

    monkeypatch.setattr(psutil, "Process", ended)
    assert read_status(run).state == "finished"


@pytest.mark.parametrize(
    ("state", "silent_s", "step_time_ms", "expected"),
    [
        ("training", 100, 200.0, "training"),
        ("training", 130, 200.0, "lost"),
        ("training", 500, 60_000.0, "training"),  # steps of a minute
        ("evaluating", 1700, 200.0, "evaluating"),
        ("compiling", 1900, 200.0, "lost"),
    ],
)
def test_on_another_machine_silence_decides(
    path: Path, state: str, silent_s: float, step_time_ms: float, expected: str
) -> None:
    run = fake_run(path, step=30, state=state, step_time_ms=step_time_ms)
    assert read_status(run, now=TIME + silent_s).state == expected


def test_the_newer_of_status_file_and_rows_is_shown(path: Path) -> None:
    run = fake_run(path, step=30, **HERE)
    row = {"step": 31, "time": TIME + 0.5, "train/loss": 0.5, "perf/tokens_per_sec": 7.0}
    write_rows(run.scalars, [row])
    status = read_status(run)
    assert (status.step, status.loss, status.tokens_per_sec) == (31, 0.5, 7.0)
    assert status.learning_rate is not None, "what the row lacks comes from the status file"
    write_rows(run.scalars, [row | {"time": TIME - 0.5}])  # rolled back since then
    assert read_status(run).step == 30
    write_rows(run.evaluations, [{"step": 32, "time": TIME + 1, "val/loss": 0.25}])
    status = read_status(run)
    assert status.val == {"loss": 0.25, "bpb": None, "step": 32, "accuracy": None}
    assert status.best == {"loss": 0.25, "step": 32}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_files_of_another_user_are_not_there(path: Path) -> None:
    run = fake_run(path, step=30)
    run.scalars.chmod(0)
    (run.path / "eval").chmod(0)
    try:
        assert read_status(run).step == 30
    finally:
        run.scalars.chmod(0o644)
        (run.path / "eval").chmod(0o755)


def test_refused_files_are_not_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake_run(path, step=30)
    real = os.open

    def refused(path: Any, *args: Any, **options: Any) -> Any:
        if Path(path) != run.status:
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **options)

    with monkeypatch.context() as patch:
        for name in ("open", "listdir", "scandir"):
            patch.setattr(os, name, refused)
        status = read_status(run)
    assert (status.step, status.checkpoints, status.run_bytes) == (30, [], 0)


def test_reading_changes_nothing(path: Path) -> None:
    run = fake_run(path, step=300)
    files = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(path.rglob("*"))}
    for _ in range(3):
        read_status(run)
        read_disk(run)
        History(run).poll()
    assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(path.rglob("*"))} == files


def test_a_pipe_or_a_folder_in_place_of_a_file_does_not_block(path: Path) -> None:
    run = fake_run(path, step=30)
    for file in (run.scalars, run.status):
        file.unlink()
    os.mkfifo(run.scalars)
    run.status.mkdir()
    history = History(run)
    history.poll()
    assert history.curves["train/loss"] == []
    assert read_status(run).step is None


@pytest.fixture
def restless(path: Path) -> Iterator[RunDirectory]:
    """A run that another process writes and disturbs at full speed."""
    run = RunDirectory(path)
    child = subprocess.Popen([sys.executable, Path(__file__).with_name("restless_writer.py"), path])
    last = time.monotonic() + HANG_GUARD_S
    try:
        while not run.status.exists():
            assert child.poll() is None
            assert time.monotonic() < last
            time.sleep(0.01)
        yield run
        assert child.poll() is None, "the writer came to grief by itself"
    finally:
        child.kill()
        child.wait()


def test_r16_thousands_of_looks_at_a_run_at_full_speed_fail_never_and_never_go_back(restless: RunDirectory) -> None:
    reads, steps, history = 5000, [], History(restless)
    for turn in range(reads):
        status = read_status(restless, NO_DISK)
        assert status.state in ("training", "unknown")
        if status.step is not None:
            steps.append(status.step)
        if turn % 10 == 0:
            history.poll()
            curve = history.curves["train/loss"]
            assert all(before[0] < after[0] for before, after in pairwise(curve))
            read_disk(restless)
    assert len(steps) > 0.9 * reads
    assert steps == sorted(steps)
    assert steps[-1] > steps[0] + 100, "the writer was writing"


def test_r16_a_naive_reader_fails_on_the_same_run(restless: RunDirectory) -> None:
    failures = 0
    for _ in range(10_000):
        try:
            json.loads(restless.scalars.read_bytes().splitlines()[-1])["step"]
            json.loads(restless.status.read_bytes())["step"]
        except (OSError, ValueError, IndexError, TypeError):
            failures += 1
    assert failures > 0
